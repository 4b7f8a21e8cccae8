"""Look at every row and every picture before a training run does: `python -m data.check FILE.json --images DIR`.

A damaged picture or a row that is no conversation would stop a run when it is read, hours in. Here each row is rendered
and each picture decoded as training does it, once, on all cores. Into a folder (`FILE.check/` or --out):

    pictures.jsonl     what was found in each picture; a second run decodes only those that are new or have changed
    bad.jsonl          pictures and rows that cannot be used; training leaves them out where `bad_list` names this file
    data_report.json   counts by source: damage, duplicates, odd files, lengths; the same bytes for the same files
    token_lengths.png  histograms of the lengths

The exit code is 0 when all is sound, 1 when something is bad or cannot be read.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import PIL
from PIL import Image
from tqdm import tqdm

from data.check_report import PicturesFound, RowFacts, RowsFound, draw_lengths, find_usable, make_report, print_report
from data.conversation import TEMPLATES, parse_turns, render_conversation
from data.image import FORMATS, open_image
from data.pictures import PictureFolder
from data.processes import run_chunks
from data.rows import stream_rows
from data.similar import hash_picture
from data.tokenizer import Tokenizer

ROWS_PER_CHUNK = 128
PICTURES_PER_CHUNK = 16
MAX_PROBLEM = 200  # characters; some messages quote what was read
MISSING = "missing"
STAMP = ("size", "mtime_ns", "pillow")  # what tells that a picture is still the one that was looked at, and by whom
DIED = "the process that read it was killed: it needs too much memory, or crashes its decoder"
NO_PICTURE = {"mode": "", "odd_format": "", "is_turned": False, "warning": "", "sha256": "0", "dhash": "0"}
ORIENTATION = 0x0112  # EXIF: how the camera was held; 1 is upright


@dataclass(frozen=True)
class TextOptions:
    """How rows become tokens, as in a stage's configuration."""

    tokenizer: Path
    template: str
    tokens_per_image: int  # P
    max_tokens: int


def read_rows(file: Path, options: TextOptions, num_workers: int) -> RowsFound:
    """Render every row.

    Raises: FileNotFoundError, or ValueError for what is no JSON or no tokenizer.
    """
    Tokenizer(options.tokenizer)
    found = RowsFound()
    measure = functools.partial(measure_row, options)
    with tqdm(desc="rows", unit="row", mininterval=0.5) as bar:
        for rows, facts in run_chunks(measure, stream_rows(file), ROWS_PER_CHUNK, num_workers):
            for row, of_row in zip(rows, facts, strict=True):
                found.add(of_row or RowFacts(name_source(row), flaw=DIED))
            bar.update(len(rows))
    return found


def measure_row(options: TextOptions, row: Any) -> RowFacts:
    """Render one row as `ConversationDataset` does, and count."""
    source = name_source(row)
    tokenizer = _open_tokenizer(options.tokenizer)
    try:
        turns = parse_turns(row)
        (row.get("image") or "").encode("utf-8")
        template = row.get("template", options.template)
        whole = kept = render_conversation(turns, tokenizer, options.tokens_per_image, template)
        if len(whole) > options.max_tokens:
            kept = render_conversation(
                turns, tokenizer, options.tokens_per_image, template, max_tokens=options.max_tokens
            )
    except ValueError as error:
        return RowFacts(source, flaw=shorten(str(error)))
    has_empty_answer = any(turn.role == "gpt" and not turn.text.strip() for turn in turns)
    return RowFacts(source, row.get("image"), None, len(whole), len(kept), kept.num_supervised, has_empty_answer)


def name_source(row: Any) -> str:
    """Return the row's `source`, else its picture's first folder ("images" where that is none, or a number), or "text".

    LLaVA's first stage keeps its pictures in 660 numbered folders.
    """
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("source"), str) and row["source"]:
        return shorten(row["source"])
    if not isinstance(row.get("image"), str):
        return "text"
    first, *others = PurePosixPath(row["image"]).parts or ("",)
    return shorten(first) if others and not first.isdecimal() else "images"


def read_pictures(images: list[str], folder: PictureFolder, record_file: Path, num_workers: int) -> PicturesFound:
    """Decode the pictures that `record_file` does not know as they are now, and note them there.

    Raises: OSError for a folder that cannot be read.
    """
    found = find_pictures(images, folder)
    stamps = {file: _stamp(folder, file) for number, file in enumerate(found.files.names) if not found.is_known[number]}
    for record in _load_records(record_file):
        stamp = stamps.get(record["image"])
        if stamp is not None and all(record[key] == value for key, value in zip(STAMP, stamp, strict=True)):
            found.add(found.files[record["image"]], record)
    todo = [file for number, file in enumerate(found.files.names) if not found.is_known[number]]
    inspect = functools.partial(inspect_picture, folder.folder)
    _end_last_line(record_file)
    with (
        record_file.open("a", encoding="utf-8") as opened,
        tqdm(desc="pictures", total=len(stamps), unit="picture", mininterval=0.5) as bar,
    ):
        bar.update(len(stamps) - len(todo))
        for files, facts in run_chunks(inspect, todo, PICTURES_PER_CHUNK, num_workers):
            for file, of_picture in zip(files, facts, strict=True):
                about = {"image": file, **dict(zip(STAMP, stamps[file], strict=True))}
                record = about | (of_picture or NO_PICTURE | {"problem": DIED})
                found.add(found.files[file], record)
                if record["sha256"] != NO_PICTURE["sha256"]:  # disk or memory may have failed: it is tried again
                    opened.write(json.dumps(record) + "\n")
            opened.flush()
            bar.update(len(files))
    return found


def find_pictures(images: list[str], folder: PictureFolder) -> PicturesFound:
    """Look the rows' pictures up in the folder."""
    stored: list[str | None] = []
    problems = {}
    for image in tqdm(images, desc="looking up pictures", unit="picture", mininterval=0.5):
        try:
            stored.append(folder.find(image))
            if stored[-1] is None:
                problems[image] = MISSING
        except ValueError as error:
            stored.append(None)
            problems[image] = shorten(str(error))
    found = PicturesFound(images, stored)
    for image, problem in problems.items():
        found.add_problem(found.files[image], problem, is_missing=problem == MISSING)
    return found


def inspect_picture(folder: Path, file: str) -> dict[str, Any]:
    """Decode one picture as training does; return its line of `pictures.jsonl`, whatever it is."""
    try:
        content = _open_folder(folder).read(file)
    except (OSError, ValueError, MemoryError) as error:
        return NO_PICTURE | {"problem": shorten(f"{type(error).__name__}: {error}")}
    facts = NO_PICTURE | {"problem": "", "sha256": hashlib.sha256(content).hexdigest()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            facts |= _describe_picture(content, PurePosixPath(file).suffix.lower())
            open_image(io.BytesIO(content))
            facts["dhash"] = f"{hash_picture(content):016x}"
        except ValueError as error:
            facts["problem"] = _explain(str(error), content)
    if caught:
        facts["warning"] = shorten(str(caught[0].message))
    return facts


def _describe_picture(content: bytes, ending: str) -> dict[str, Any]:
    """Return what the header says, or nothing if it cannot be read."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            kind = "JPEG" if image.format == "MPO" else image.format  # several pictures in one JPEG, as of phones
            expected = Image.registered_extensions().get(ending)
            named = f"named {ending}" if expected else "without its ending"
            # To look for EXIF behind the pixels of a PNG, Pillow would decode it.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            return {
                "width": image.width,
                "height": image.height,
                "mode": image.mode,
                "odd_format": "" if kind == expected else f"{kind} {named}",
                "is_turned": exif.get(ORIENTATION, 1) in range(2, 9),
            }
    except Exception:  # open_image says what it is
        return {}


def _explain(problem: str, content: bytes) -> str:
    if not content:
        return "empty file"
    if content.lstrip()[:1] == b"<":
        return "a page of HTML or XML, not a picture"
    return shorten(problem.removeprefix("cannot read the picture: ")) or "its decoder gave no reason (out of memory?)"


def _stamp(folder: PictureFolder, file: str) -> tuple[int, int, str]:
    """Return the values of STAMP."""
    if folder.shards is not None:
        return folder.measure(file), 0, PIL.__version__
    status = (folder.folder / file).stat()
    return status.st_size, status.st_mtime_ns, PIL.__version__


def _end_last_line(file: Path) -> None:
    """Keep a line that a kill cut short apart from what will be written behind it."""
    with file.open("ab+") as opened:
        if opened.tell():
            opened.seek(-1, os.SEEK_END)
            if opened.read() != b"\n":
                opened.write(b"\n")


def _load_records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of `pictures.jsonl` that are whole."""
    if file.exists():
        with file.open("rb") as opened:
            for line in opened:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and record.keys() >= {"image", "problem", *STAMP}:
                    yield record


def write_bad_list(file: Path, rows: RowsFound, pictures: PicturesFound) -> int:
    """Write what training is to leave out, one a line; return how many lines."""
    images = zip(rows.images.names, pictures.of_image.tolist(), strict=True)
    bad = itertools.chain(
        ({"image": image, "reason": pictures.problems[of]} for image, of in images if of in pictures.problems),
        ({"row": number, "reason": flaw} for number, flaw in rows.flaws.items()),
    )
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in bad]
    _write_text(file, "".join(lines))
    return len(lines)


_open_tokenizer = functools.cache(Tokenizer)
_open_folder = functools.cache(PictureFolder)


def shorten(text: str) -> str:
    """Return a message in one line, without what differs between two runs."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return re.sub(r" at 0x[0-9a-f]+", "", line)[:MAX_PROBLEM]


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.check", description="Check rows and pictures before training."
    )
    parser.add_argument("file", type=Path, help="conversation file, JSON or JSONL")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of pictures or tar shards; else the file's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results; else FILE.check")
    tiny = Path(__file__).parent / "tiny/tokenizer.model"
    parser.add_argument("--tokenizer", type=Path, default=tiny, help="the model's own; else the tiny model's")
    parser.add_argument("--template", choices=TEMPLATES, default="vicuna_v1", help="of rows that name none")
    parser.add_argument("--tokens-per-image", type=int, default=576)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; all cores else")
    arguments = parser.parse_args()
    try:
        is_sound = check(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on where this one stopped")
    sys.exit(0 if is_sound else 1)


def check(arguments: argparse.Namespace) -> bool:
    """Check, report, and tell whether all is sound.

    Raises: FileNotFoundError or ValueError for what cannot be opened, or a number that makes no sense.
    """
    for name in ("max_tokens", "batch_size", "micro_batch_tokens", "ranks", "workers"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected at least 1")
    file, out = arguments.file, arguments.out or arguments.file.with_suffix(".check")
    options = TextOptions(arguments.tokenizer, arguments.template, arguments.tokens_per_image, arguments.max_tokens)
    folder = PictureFolder(arguments.images or file.parent)
    rows = read_rows(file, options, arguments.workers)
    out.mkdir(parents=True, exist_ok=True)
    pictures = read_pictures(rows.images.names, folder, out / "pictures.jsonl", arguments.workers)
    num_bad = write_bad_list(out / "bad.jsonl", rows, pictures)
    settings = {
        "tokenizer": str(options.tokenizer),
        "template": options.template,
        "tokens_per_image": options.tokens_per_image,
        "max_tokens": options.max_tokens,
    }
    counts = make_report(rows, pictures, arguments.batch_size, arguments.micro_batch_tokens, arguments.ranks)
    report = {"file": str(file), "images": str(folder.folder), **settings, **counts}
    _write_text(out / "data_report.json", json.dumps(report, indent=1) + "\n")
    draw_lengths(rows, find_usable(rows, pictures), options.max_tokens, out / "token_lengths.png")
    print(", ".join(f"{name}: {value}" for name, value in settings.items()))
    print_report(report)
    print(f"wrote {out}/data_report.json, token_lengths.png, pictures.jsonl, bad.jsonl")
    if num_bad:
        print(f'{num_bad} bad: set bad_list = "{out / "bad.jsonl"}" in the stage\'s configuration, or mend the files')
    else:
        print("all rows and pictures are sound")
    return num_bad == 0


if __name__ == "__main__":
    main()
