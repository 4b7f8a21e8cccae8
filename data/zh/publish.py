"""The clean dialogues become a data set: conversation files, pictures, statistics, a card.

    python -m data.zh.publish --work DIR

    DIR/published/
        train.json validation.json test.json    LLaVA's rows, with source, license, lang, kind and topic besides
        images/                                 the pictures that they name
        ATTRIBUTION.jsonl                       page, author and licence of each picture
        statistics.json *.png DATASET_CARD.md

Pictures of one page, and pages with one picture, are in one split. A group's split is drawn by its name, so that it
stays where it is when others come. English rows are mixed in later: `python -m data.prepare mix`.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.conversation import parse_turns
from data.prepare.prompts import make_conversation
from data.rows import RowWriter
from data.tokenizer import Tokenizer
from data.zh import card, describe
from data.zh.collect import attribute
from data.zh.describe import SHORT_KINDS, SPLITS, Entry
from data.zh.options import run_command, setting
from data.zh.record import ATTRIBUTION, DIALOGUES, RECORDS, Record, Reply, read_records, read_replies

PUBLISHED = "published"
REPORT = "publish.report.json"
SHORT_SUFFIX = "\n请用一个词或短语回答问题。"  # of the first question, where all answers are that short
MAX_SHORT = 12  # characters
SENTENCE_MARKS = "，。；！？,;!?"
TINY_TOKENIZER = Path(__file__).parents[1] / "tiny/tokenizer.model"


@dataclass(frozen=True)
class PublishSettings:
    """What is published, and under which name."""

    name: str = setting("plain-llava-zh", "of the data set, on its card")
    license: str = setting("", "of the dialogues, as the Hub spells it; cc-by-sa-4.0 of Wikipedia's texts, else other")
    validation_share: float = setting(0.05, "of the groups of pictures; 0 makes no such split")
    test_share: float = setting(0.05, "of the groups of pictures; 0 makes no such split")
    seed: int = setting(0, "of the splits")
    tokenizer: str = setting("", "tokenizer.model or .json to count tokens with; else the tiny model's")

    def __post_init__(self) -> None:
        if min(self.validation_share, self.test_share) < 0 or self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share = {self.validation_share} and test_share = {self.test_share}, expected shares "
                "from 0 that leave something for training"
            )
        if not self.name.strip():
            raise ValueError("name is empty, expected that of the data set")


def run(settings: PublishSettings, work: Path) -> dict[str, Any]:
    """Write `published` and the report, all of it new or nothing.

    Raises: FileNotFoundError or ValueError for what is missing or broken in the work folder, or too little to split.
    """
    tokenizer = Tokenizer(Path(settings.tokenizer) if settings.tokenizer else TINY_TOKENIZER)
    origin = {"settings": dataclasses.asdict(settings), "inputs": _digest_inputs(work, tokenizer.file)}
    published = work / PUBLISHED
    report = _load_report(work)
    if report.items() >= origin.items() and all((published / name).is_file() for name in report["files"]):
        print(f"publish: nothing to do, {published} is of these dialogues (delete it to make it anew)")
        return report
    entries = _make_entries(settings, work)
    temporary = work / f"{PUBLISHED}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    num_brief = _write_rows(entries, temporary)
    records = {entry.record.sha256: entry.record for entry in entries}
    _write_pictures(records.values(), work, temporary)
    statistics = describe.describe(entries, tokenizer) | {"asked_for_short_answers": num_brief}
    _write_json(temporary / "statistics.json", statistics)
    describe.draw(entries, tokenizer, temporary)
    (temporary / "DATASET_CARD.md").write_text(card.write(settings, work, entries, statistics), encoding="utf-8")
    files = sorted(file.name for file in temporary.iterdir() if file.is_file())
    _replace_folder(temporary, published)
    report = origin | {"splits": statistics["splits"], "files": files}
    _write_json(work / REPORT, report)
    _print(report, published)
    return report


def _digest_inputs(work: Path, tokenizer: Path) -> dict[str, str]:
    """Return the hash of every file that what is published depends on."""
    steps = [f"{step}.report.json" for step in ("collect", "generate", "clean")]
    files = [work / name for name in (RECORDS, DIALOGUES, *steps)] + card.find_marks(work) + [tokenizer]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def _load_report(work: Path) -> dict[str, Any]:
    try:
        return {"files": [], **json.loads((work / REPORT).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):  # not there, or not whole
        return {"files": []}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _make_entries(settings: PublishSettings, work: Path) -> list[Entry]:
    """Return all dialogues with their records and splits, whatever order they were written in."""
    records, replies = read_records(work), read_replies(work, DIALOGUES)
    if not replies:
        raise ValueError(f"{work / DIALOGUES} holds no dialogue to publish")
    by_name = {record.sha256: record for record in records}
    for reply in replies:
        if reply.sha256 not in by_name:
            raise ValueError(f"{work / DIALOGUES} names the picture {reply.sha256}, which no record has")
    used = {reply.sha256 for reply in replies}
    bound = sorted({by_name[name].source for name in used} - {"folder"})
    if bound and settings.license not in ("", card.SHARE_ALIKE):
        raise ValueError(
            f"license = {settings.license!r}, but texts of {', '.join(bound)} ask for {card.SHARE_ALIKE!r}"
        )
    groups = group_pictures(records)
    splits = assign_splits({groups[name] for name in used}, settings)
    replies.sort(key=lambda reply: reply.key)
    return [Entry(splits[groups[reply.sha256]], reply, by_name[reply.sha256]) for reply in replies]


def group_pictures(records: Iterable[Record]) -> dict[str, str]:
    """Return for each picture the name of its group: the first of all pictures that pages tie together.

    Pages are told by their titles, those of an encyclopedia by their addresses, too.
    """
    leaders: dict[object, object] = {}

    def find(one: object) -> object:
        while leaders.setdefault(one, one) != one:
            leaders[one] = leaders[leaders[one]]
            one = leaders[one]
        return one

    pictures = []
    for record in records:
        pictures.append(record.sha256)
        pages = [("title", record.title), ("address", record.page_url if record.source != "folder" else "")]
        for page in pages:
            if page[1]:
                leaders[find(page)] = find(record.sha256)
    first: dict[object, str] = {}
    for picture in sorted(pictures):
        first.setdefault(find(picture), picture)
    return {picture: first[find(picture)] for picture in pictures}


def assign_splits(groups: Iterable[str], settings: PublishSettings) -> dict[str, str]:
    """Return each group's split, drawn by its name; none of the splits that are wanted is empty.

    Raises: ValueError for fewer groups than splits.
    """
    drawn = sorted((_draw(group, settings.seed), group) for group in groups)
    shares = [
        (name, share) for name, share in (("test", settings.test_share), ("validation", settings.validation_share))
    ]
    wanted = [(name, share) for name, share in shares if share]
    if len(drawn) <= len(wanted):
        raise ValueError(
            f"{len(drawn)} groups of pictures (of one page each) are too few for {len(wanted) + 1} splits: collect "
            "more pages, or set validation_share or test_share to 0"
        )
    splits: dict[str, str] = {}
    start, limit = 0, 0.0
    for place, (name, share) in enumerate(wanted):
        limit += share
        end = sum(draw < limit for draw, _ in drawn)
        end = min(max(end, start + 1), len(drawn) - len(wanted) + place)
        splits |= {group: name for _, group in drawn[start:end]}
        start = end
    return splits | {group: "train" for _, group in drawn[start:]}


def _draw(group: str, seed: int) -> float:
    """Return a number from 0 to 1 that only the group's name and the seed decide."""
    return int(hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()[:13], 16) / 16**13


def _write_rows(entries: Sequence[Entry], folder: Path) -> int:
    """Write a conversation file for each split, and return how many rows ask for short answers."""
    seen: Counter[str] = Counter()
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for split, reply, record in entries:
        row = make_row(reply, record)
        seen[row["id"]] += 1
        if seen[row["id"]] > 1:  # another model's, or another prompt's
            row["id"] += f"-{seen[row['id']]}"
        rows[split].append(row)
    for split, of_split in rows.items():
        if of_split:
            with RowWriter(folder / f"{split}.json") as writer:
                for row in of_split:
                    writer.write(row)
    return sum(SHORT_SUFFIX in row["conversations"][0]["value"] for of_split in rows.values() for row in of_split)


def make_row(reply: Reply, record: Record) -> dict[str, Any]:
    """Return a dialogue as LLaVA's files have it. Raises: ValueError for one that is no conversation."""
    turns = list(reply.turns)
    if turns and reply.kind in SHORT_KINDS and all(is_brief(answer) for _, answer in turns):
        turns[0] = (turns[0][0] + SHORT_SUFFIX, turns[0][1])
    row = {
        "id": f"{reply.sha256[:16]}-{reply.kind}",
        "image": record.image,
        "conversations": make_conversation(turns) if turns else [],
        "source": record.source,
        "license": record.license,
        "lang": "zh",
        "kind": reply.kind,
        "topic": record.topic,
    }
    try:
        parse_turns(row)
    except ValueError as error:
        raise ValueError(f"{DIALOGUES}, the dialogue {reply.key}: {error}") from error
    return row


def is_brief(answer: str) -> bool:
    """Tell whether an answer is what one gets who asks for a word or a phrase."""
    return len(answer) <= MAX_SHORT and not any(mark in answer for mark in SENTENCE_MARKS)


def _write_pictures(records: Iterable[Record], work: Path, folder: Path) -> None:
    """Link the pictures, copy them where links cannot be, and write whose they are."""
    lines = []
    for record in sorted(records, key=lambda one: one.image):
        target = folder / record.image
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (work / record.image).is_file():
            raise FileNotFoundError(f"picture {work / record.image} is missing: `python -m data.zh.collect` gets it")
        try:
            os.link(work / record.image, target)
        except OSError:
            shutil.copyfile(work / record.image, target)
        lines.append(json.dumps(attribute(record), ensure_ascii=False) + "\n")
    (folder / ATTRIBUTION).write_text("".join(lines), encoding="utf-8")


def _replace_folder(new: Path, old: Path) -> None:
    """Give the new folder the old one's name; a folder cannot be renamed over another."""
    retired = old.with_name(old.name + ".old")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        old.rename(retired)
    new.rename(old)
    shutil.rmtree(retired, ignore_errors=True)


def _print(report: dict[str, Any], published: Path) -> None:
    print(f"publish\n  {'split':12}{'dialogues':>10}{'questions':>10}{'pictures':>10}{'pages':>8}")
    for split, counts in report["splits"].items():
        print(f"  {split:12}" + "".join(f"{counts[name]:>{width}}" for name, width in describe.COLUMNS.items()))
    print(f"  {published}: {', '.join(report['files'])}, images")


def main() -> None:
    run_command("publish", str(__doc__), PublishSettings, run)


if __name__ == "__main__":
    main()
