"""What the steps of the Chinese data set hand each other, and the journals that they write it into.

A step reads the files of the step before it in one work folder, and appends to its own:

    images/            pictures by their content's hash
    records.jsonl      a `Record` a line: a picture and the text beside it (collect)
    replies.jsonl      a `Reply` a line: what a model wrote about a record (generate)
    dialogues.jsonl    the replies that are good enough (clean)

These are journals (`data/journal.py`): killing a step anywhere loses at most what it was about to write.
"""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data.journal import read_journal

Row = TypeVar("Row", "Record", "Reply")

RECORDS = "records.jsonl"
ATTRIBUTION = "ATTRIBUTION.jsonl"
REPLIES = "replies.jsonl"
DIALOGUES = "dialogues.jsonl"


@dataclass(frozen=True)
class Record:
    """A picture of an encyclopedia and what is written beside it."""

    image: str  # below the work folder: images/3f/3fa9...e1.jpg
    sha256: str  # of the picture's file; names the record
    title: str  # of the page
    section: str  # heading above the text; "" is the page's introduction
    text: str  # plain, in simplified characters
    topic: str  # what it was found under: a category, a search, a folder
    page_url: str
    revision: int  # of the page; 0 where the source has none
    author: str  # of the picture
    license: str  # of the picture, its short name: CC BY-SA 4.0
    license_url: str
    image_url: str  # where the picture is described, by those who license it
    source: str  # wikipedia, wit or folder


@dataclass(frozen=True)
class Reply:
    """A dialogue about a record's picture, as a model wrote it."""

    sha256: str  # of the record's picture
    kind: str  # of dialogue: data/zh/prompts.toml has them
    prompt_version: str
    model: str  # as it was asked for
    turns: tuple[tuple[str, str], ...]  # question and answer; none where the kind does not fit the picture
    model_snapshot: str = ""  # as the endpoint named itself
    input_tokens: int = 0  # as billed, of all requests that this reply took
    output_tokens: int = 0
    cost: float = 0.0  # in the currency of the given prices

    @property
    def key(self) -> str:
        """What is never paid for twice."""
        return f"{self.sha256}:{self.kind}:{self.prompt_version}:{self.model}"


def read_records(work: Path) -> list[Record]:
    """Return the records of a work folder. Raises: FileNotFoundError or ValueError naming the file and the line."""
    return _read(work / RECORDS, Record, "collect")


def read_replies(work: Path, name: str = REPLIES) -> list[Reply]:
    """Return what `generate` (REPLIES) or `clean` (DIALOGUES) left in a work folder. Raises: as `read_records`."""
    return _read(work / name, Reply, "generate" if name == REPLIES else "clean")


def _read(file: Path, kind: type[Row], step: str) -> list[Row]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: `python -m data.zh.{step}` writes it")
    rows = []
    for number, row in enumerate(read_journal(file), start=1):
        try:
            rows.append(parse_row(row, kind))
        except ValueError as error:
            raise ValueError(f"{file}, row {number}: {error}") from error
    return rows


def parse_row(row: dict[str, Any], kind: type[Row]) -> Row:
    """Return a journal's row as what it stands for. Raises: ValueError for keys or types that are not its."""
    wanted = typing.get_type_hints(kind)
    if row.keys() != wanted.keys():
        raise ValueError(f"it has the keys {', '.join(row)}, expected {', '.join(wanted)}")
    values = dict(row)
    if "turns" in values:
        turns = values["turns"]
        if not isinstance(turns, list) or not all(
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns
        ):
            raise ValueError(f"turns = {turns!r}, expected pairs of question and answer")
        values["turns"] = tuple((question, answer) for question, answer in turns)
    for name, hint in wanted.items():
        if hint is float and type(values[name]) is int:
            values[name] = float(values[name])
        if hint in (str, int, float) and type(values[name]) is not hint:
            raise ValueError(f"{name} = {values[name]!r} is a {type(values[name]).__name__}, expected {hint.__name__}")
    return kind(**values)


def as_row(value: Record | Reply) -> dict[str, Any]:
    """Return what a journal takes."""
    return dataclasses.asdict(value)
