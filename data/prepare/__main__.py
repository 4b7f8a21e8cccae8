"""Prepare a data set: `python -m data.prepare easy_vqa --out runs/easy_vqa`."""

import argparse
import sys
from pathlib import Path

from data.prepare import easy_vqa


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Write LLaVA conversation files.")
    sources = parser.add_subparsers(dest="source", required=True)
    source = sources.add_parser("easy_vqa", help="the easy-VQA set, from its installed Python package")
    source.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        counts = easy_vqa.prepare(arguments.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, count in counts.items():
        print(f"{count:6d} rows  {arguments.out / name}")


if __name__ == "__main__":
    main()
