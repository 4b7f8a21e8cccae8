"""The chain from pages to a published data set: `python -m data.zh.build CONFIG.toml`.

The file names the work folder, and has a table of settings for each step: those that the step's own command takes as
options (`python -m data.zh.collect --help`), spelled with underscores. `data/zh/encyclopedia.toml` is one.

    work = "runs/zh"
    [collect]
    source = "folder"
    folder = "my/pictures"
    [generate]
    model = "NAME"

Everything is checked before the first step begins. Killed anywhere, the same command goes on; a step whose work is
done costs nothing.
"""

import argparse
import hashlib
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data.zh import clean, collect, generate, publish
from data.zh.options import make_settings
from data.zh.record import DIALOGUES, RECORDS, REPLIES


class Step(NamedTuple):
    """A step of the chain."""

    settings: type[Any]
    run: Callable[[Any, Path], dict[str, Any]]
    result: str  # the file by which one sees whether it did anything


STEPS = {
    "collect": Step(collect.CollectSettings, collect.run, RECORDS),
    "generate": Step(generate.GenerateSettings, generate.run, REPLIES),
    "clean": Step(clean.CleanSettings, clean.run, DIALOGUES),
    "publish": Step(publish.PublishSettings, publish.run, publish.REPORT),
}


def load_config(file: Path) -> tuple[Path, dict[str, Any]]:
    """Return the work folder and each step's settings.

    Raises: FileNotFoundError, or ValueError naming the file and the key for what is unknown, missing or impossible.
    """
    if not file.is_file():
        raise FileNotFoundError(f"configuration {file} is missing")
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    unknown = sorted(tables.keys() - {"work", *STEPS})
    if unknown:
        raise ValueError(f"{file}: unknown key '{unknown[0]}', known are work, [{'], ['.join(STEPS)}]")
    work = tables.pop("work", "")
    if not isinstance(work, str) or not work:
        raise ValueError(f'{file}: work = {work!r}, expected the folder to work in: work = "runs/zh"')
    settings = {}
    for name, step in STEPS.items():
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{file}: {name} = {table!r}, expected a table [{name}]")
        settings[name] = make_settings(step.settings, table, f"{file}, [{name}]")
    return Path(work), settings


def build(work: Path, settings: dict[str, Any], last: str) -> None:
    """Run the steps up to `last`. Raises: ValueError with the name of the step that failed."""
    for number, (name, step) in enumerate(STEPS.items(), start=1):
        print(f"[{number}/{len(STEPS)}] {name}", flush=True)
        before, began = _digest(work / step.result), time.monotonic()
        try:
            report = step.run(settings[name], work)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: {error}") from error
        is_same = before is not None and before == _digest(work / step.result)
        print(f"[{number}/{len(STEPS)}] {name}: {time.monotonic() - began:.1f} s{', nothing new' if is_same else ''}")
        if name == last:
            return
        if name == "generate" and (settings[name].dry_run or settings[name].pilot):
            print("a pilot or a dry run ends here: take it out of [generate] to go on")
            return
        if report.get("left"):
            print(f"{name}: {report['left']} are still to be done; what is there goes on, and the rest when run again")


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.zh.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument("--step", choices=STEPS, default="publish", help="stop after this one (default publish)")
    arguments = parser.parse_args()
    try:
        work, settings = load_config(arguments.config)
        build(work, settings, arguments.step)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on where this one stopped")


if __name__ == "__main__":
    main()
