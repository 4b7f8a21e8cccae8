"""Prepare a data set: `python -m data.prepare coco --root coco --out coco.json`, then `python -m data.check`.

What must lie below --root stands in `data/prepare/<source>.py`. Beside the output, `FILE.report.json` says what was
read, mended and dropped. Both are the same bytes for the same inputs, options and seed.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from data.prepare import coco, easy_vqa, flickr30k, llava, mix, tiny_zh, visual_genome, vqav2
from data.prepare.leaks import SPLITS, Leaks, LookAlikes
from data.prepare.options import Options
from data.prepare.report import Report
from data.rows import RowWriter

SOURCES = {
    "coco": coco,
    "flickr30k": flickr30k,
    "visual_genome": visual_genome,
    "vqav2": vqav2,
    "llava": llava,
}


def main() -> None:
    arguments = _parse_arguments()
    try:
        if arguments.source in ("easy_vqa", "tiny_zh"):
            beside = arguments.out.parent / "easy_vqa"
            is_first = arguments.source == "easy_vqa"
            counts = easy_vqa.prepare(arguments.out) if is_first else tiny_zh.prepare(beside, arguments.out)
            for name, count in counts.items():
                print(f"{count:6d} rows  {arguments.out / name}")
            return
        if arguments.out.suffix not in {".json", ".jsonl"}:
            raise ValueError(f"--out {arguments.out}: expected a file that ends in .json or .jsonl")
        report = Report(arguments.source)
        report.options = _describe_options(arguments)
        if arguments.source == "mix":
            parts = [mix.Part.parse(text) for text in arguments.parts]
            rows = mix.read(parts, arguments.seed, report)
        else:
            rows = _read(arguments, report)
        with RowWriter(arguments.out) as writer:
            for row in tqdm(rows, arguments.source, unit=" rows", leave=False):
                writer.write(row)
            report.rows = writer.num_rows
        report.write(arguments.out.with_suffix(".report.json"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    report.print()
    print(f"  {arguments.out}, {arguments.out.with_suffix('.report.json').name}")


def _read(arguments: argparse.Namespace, report: Report) -> Iterator[dict]:
    """Yield the rows of a source without leaks, and no more of them than asked for."""
    folder = arguments.root if arguments.root.is_dir() else arguments.root.parent
    leaks = Leaks(
        [folder, *([arguments.coco] if arguments.coco else [])],
        ("val2017",) if arguments.source == "vqav2" else SPLITS,  # train2014 has nothing of val2014
        arguments.exclude,
        arguments.allow_leaks,
    )
    options = Options(arguments.seed, arguments.language)
    rows = SOURCES[arguments.source].read(arguments.root, options, leaks, report)
    if arguments.exclude_pictures:
        likes = LookAlikes(arguments.exclude_pictures, arguments.workers, report)
        images = llava.find_image_folder(folder) if arguments.source == "llava" else folder
        rows = likes.leave_out(rows, arguments.images or images, report)
    if arguments.max is not None:
        rows = sample_rows(rows, arguments.max, arguments.seed, arguments.out.parent, report)
    yield from rows
    leaks.write_notes(report)


def sample_rows(rows: Iterable[dict], num_rows: int, seed: int, folder: Path, report: Report) -> Iterator[dict]:
    """Yield a seeded sample of the rows in their order; all of them wait in a file in `folder`, not in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder) as waiting:
        total = 0
        for row in rows:
            waiting.write(json.dumps(row) + "\n")
            total += 1
        chosen = set(random.Random(f"{seed}:max").sample(range(total), min(num_rows, total)))
        report.drop("row: beyond --max", total - len(chosen))
        waiting.seek(0)
        yield from (json.loads(line) for number, line in enumerate(waiting) if number in chosen)


def _describe_options(arguments: argparse.Namespace) -> dict[str, object]:
    """Return what the result depends on, files and folders by name: they may lie elsewhere, the result is the same."""

    def describe(value: Any) -> object:
        if isinstance(value, list):
            return [describe(item) for item in value]
        return value.resolve().name if isinstance(value, Path) else value

    elsewhere = {"source", "out", "workers", "parts"}
    return {name: describe(value) for name, value in vars(arguments).items() if name not in elsewhere}


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Write LLaVA conversation files.")
    sources = parser.add_subparsers(dest="source", required=True)
    for name, text in (
        ("easy_vqa", "the easy-VQA set, from its installed Python package"),
        ("tiny_zh", "a small Chinese set, from `easy_vqa` beside it and drawings of installed packages"),
    ):
        sources.add_parser(name, help=text).add_argument("--out", type=Path, required=True, help="folder to write")
    for name, module in SOURCES.items():
        _add_options(_add_parser(sources, name, module))
    mixture = _add_parser(sources, "mix", mix)
    mixture.add_argument("parts", nargs="+", metavar="FILE:SHARE[:FOLDER]", help="share 0.5 is half of the rows")
    mixture.add_argument("--out", type=Path, required=True, metavar="FILE", help=".json or .jsonl")
    mixture.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _add_parser(sources: Any, name: str, module: ModuleType) -> argparse.ArgumentParser:
    text = str(module.__doc__)
    layout = argparse.RawDescriptionHelpFormatter
    return sources.add_parser(name, help=text.partition("\n")[0], description=text, formatter_class=layout)


def _add_options(source: argparse.ArgumentParser) -> None:
    add = source.add_argument
    add("--root", type=Path, required=True, metavar="DIR", help="where the owner's files lie")
    add("--out", type=Path, required=True, metavar="FILE", help=".json or .jsonl")
    add("--max", type=_count, metavar="N", help="a sample of so many rows, in their order")
    add("--seed", type=int, default=0, help="of the sample, and of what a source chooses (default 0)")
    add("--language", choices=("en", "zh"), default="en", help="of the prompts")
    add("--exclude", type=Path, action="append", default=[], metavar="FILE",
        help="pictures to leave out: a name or COCO id a line, or a conversation file; may be repeated")  # fmt: skip
    add("--exclude-pictures", type=Path, action="append", default=[], metavar="DIR",
        help="leave out what looks like a picture below DIR (MME's, VQA-v2's val2014); may be repeated")  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="where the rows' pictures are, for the former (default: the root)")
    add("--coco", type=Path, metavar="DIR", help="where COCO's annotations lie, if not at the root")
    add("--allow-leaks", action="store_true", help="keep COCO's val2014 and val2017, which benchmarks ask about")
    add("--workers", type=_count, default=len(os.sched_getaffinity(0)), metavar="N", help="processes; all cores else")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


if __name__ == "__main__":
    main()
