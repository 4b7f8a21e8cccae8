"""Pictures of one's own with texts: a folder with the pictures and `index.jsonl`, one line a picture:

    {"image": "china.jpg", "title": "...", "section": "", "text": "...", "topic": "...", "page_url": "...",
     "author": "...", "license": "CC BY 4.0", "license_url": "...", "image_url": "..."}

`image`, `title`, `text` and `license` must be there. Whether a licence is good enough its owner knows.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.prepare.report import Report
from data.zh.record import Record
from data.zh.store import Found

INDEX = "index.jsonl"
NEEDED = ("image", "title", "text", "license")
OPTIONAL = ("section", "topic", "page_url", "author", "license_url", "image_url")


def find(folder: Path, report: Report) -> Iterator[Found]:
    """Yield the pictures of the index.

    Raises: FileNotFoundError, or ValueError naming the line for one that says something else.
    """
    index = report.add_input(folder / INDEX)
    for number, line in enumerate(index.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        report.read += 1
        try:
            row = parse_line(line)
        except ValueError as error:
            raise ValueError(f"{index}, line {number}: {error}") from error
        file = folder / row["image"]
        if not file.is_file():
            report.drop("picture: missing")
            continue
        about = file.stat()
        record = Record(sha256="", revision=0, source="folder", **row | {"image": ""})
        yield Found(record, f"{file.resolve()}, {about.st_size} bytes of {about.st_mtime_ns}", file.read_bytes)


def parse_line(line: str) -> dict[str, str]:
    """Return a line's texts, "" where it has none. Raises: ValueError."""
    row: Any = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    for key, value in row.items():
        if key not in NEEDED + OPTIONAL:
            close = difflib.get_close_matches(key, NEEDED + OPTIONAL, n=1)
            raise ValueError(f"unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        if not isinstance(value, str):
            raise ValueError(f"{key} = {value!r}, expected a text")
    missing = [key for key in NEEDED if not row.get(key, "").strip() and key != "text"]
    if missing or "text" not in row:
        raise ValueError(f"{', '.join(missing or ['text'])} is missing")
    if Path(row["image"]).is_absolute() or ".." in Path(row["image"]).parts:
        raise ValueError(f"image = {row['image']!r} is not below the folder")
    return {key: row.get(key, "") for key in NEEDED + OPTIONAL}
