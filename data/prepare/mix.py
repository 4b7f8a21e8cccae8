"""Several conversation files become one, in seeded shares and a seeded order.

A part is `FILE:SHARE`, or `FILE:SHARE:FOLDER`: share 0.5 is half of the file's rows, drawn at random, 2.5 all of them
twice and half of them once more. The pictures of all parts have to lie below one folder, training's; FOLDER is put in
front of the paths of a part whose own folder lies in it. Ids that were there before get the file's name in front.
"""

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from data.prepare.report import Report
from data.rows import RowFile


@dataclass(frozen=True)
class Part:
    """A file, how many of its rows for each one it has, and what is put in front of its pictures' paths."""

    file: Path
    share: float
    folder: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises: ValueError for anything else than FILE:SHARE or FILE:SHARE:FOLDER."""
        file, _, rest = text.partition(":")
        share, _, folder = rest.partition(":")
        try:
            part = cls(Path(file), float(share), folder.strip("/"))
        except ValueError:
            part = cls(Path(file), 0)
        if not 0 < part.share <= 100:
            raise ValueError(f"part {text!r}: expected FILE:SHARE, or FILE:SHARE:FOLDER, with a share up to 100")
        return part


def read(parts: Sequence[Part], seed: int, report: Report) -> Iterator[dict]:
    """Yield the rows of the mixture; its table is in the report.

    Raises: FileNotFoundError or ValueError for a file that is missing or broken, or a row that is no conversation.
    """
    files = [RowFile(report.add_input(part.file)) for part in parts]
    drawn = [_draw(len(files[number]), part, f"{seed}:{number}") for number, part in enumerate(parts)]
    _describe(parts, files, drawn, report)
    owners = np.repeat(np.arange(len(parts), dtype=np.uint16), [len(numbers) for numbers in drawn])
    rows = np.concatenate(drawn)
    order = array("q", range(len(rows)))
    random.Random(seed).shuffle(order)
    seen: set[str] = set()
    for place in order:
        part, file, number = parts[owners[place]], files[owners[place]], int(rows[place])
        if number in file.flaws:
            raise ValueError(f"{file.file}, row {number}: {file.flaws[number]}")
        row = file[number]
        if part.folder and row.get("image") is not None:
            row["image"] = f"{part.folder}/{row['image']}"
        if "id" in row:
            row["id"] = _make_unique(row["id"], part.file.stem, seen, report)
        yield row


def _draw(num_rows: int, part: Part, seed: str) -> np.ndarray:
    """Return the numbers of the rows to take: whole passes, and a sample for the rest."""
    whole, rest = divmod(round(part.share * num_rows), num_rows)
    if not whole and not rest:
        raise ValueError(f"{part.file}:{part.share} is not one row of {num_rows}: take a larger share")
    sample = sorted(random.Random(seed).sample(range(num_rows), rest))
    return np.concatenate([np.arange(num_rows)] * whole + [np.array(sample, dtype=np.int64)])


def _describe(parts: Sequence[Part], files: Sequence[RowFile], drawn: Sequence[np.ndarray], report: Report) -> None:
    total = sum(len(numbers) for numbers in drawn)
    for part, file, numbers in zip(parts, files, drawn, strict=True):
        report.read += len(file)
        has_picture = np.array([image is not None for image in file.images])
        report.parts.append(
            {
                "file": part.file.name,
                "share": part.share,
                "folder": part.folder,
                "rows": len(numbers),
                "share of the mixture": round(len(numbers) / total, 4),
                "rows with pictures": int(has_picture[numbers].sum()),
            }
        )


def _make_unique(name: object, prefix: str, seen: set[str], report: Report) -> object:
    """Return the id, in front of it the file's name and a count where it was there before."""
    count, unique = 1, name
    while str(unique) in seen:
        unique = f"{prefix}-{name}" if count == 1 else f"{prefix}-{name}-{count}"
        count += 1
    report.mend("id: not the first of its kind, renamed", unique is not name)
    seen.add(str(unique))
    return unique
