"""What a run folder tells of a training: its settings, its steps, what it ran on, and its scores.

Everything is read from the run's files. What is not recorded there is None or absent, and stays so.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.journal import parse_line, read_journal

CONFIG, METRICS, SESSIONS = "config.toml", "metrics.jsonl", "sessions.jsonl"
SCORES = "eval/*/scores.json"
LAST_STEPS = 25  # what the last loss is the mean of
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run; `config` and `rows` are empty for a model that was only asked, not trained here."""

    folder: Path
    name: str
    config: dict[str, Any]
    rows: list[Row]  # of metrics.jsonl, one a step
    sessions: list[Row]  # of sessions.jsonl: what the training ran on, each time it was started

    @property
    def num_ranks(self) -> int | None:
        """How many processes trained last; None where that is not recorded."""
        ranks = self.rows[-1].get("peak_memory_bytes") if self.rows else None
        return len(ranks) if isinstance(ranks, list) else None

    def find(self, name: str) -> Any:
        """Return what the latest session recorded under a name, None where none did."""
        return latest(self.sessions, name)


def read_config(file: Path) -> dict[str, Any]:
    """Return a run's settings. Raises: ValueError for what no training stage wrote."""
    try:
        config = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    for key, value in config.items():
        if not re.fullmatch(r"[a-z0-9_]+", key) or not isinstance(value, str | int | float):
            raise ValueError(f"{file}: {key!r} = {value!r} is no setting of a training stage")
    return config


def read_metrics(file: Path, at_most: int | None = None, num_last: int = 1) -> list[Row]:
    """Return the steps' rows; a last line cut short by a kill is left out, and all are where there is no file.

    Args:
        at_most: of a longer file only every second, third, ... row is read, so that these are no more; those that
            measured held-out data are read besides.
        num_last: and so are the last ones.

    Raises: ValueError naming the line that is broken.
    """
    rows = []
    for number, row in _read_some(file, at_most, num_last) if at_most else enumerate(read_journal(file), start=1):
        if not all(isinstance(row.get(key), int | float) for key in ("step", "loss")):
            raise ValueError(f"{file}, line {number}: expected numbers as its step and loss")
        rows.append(row)
    return rows


def _read_some(file: Path, at_most: int, num_last: int) -> Iterator[tuple[int, Row]]:
    """Yield lines with their numbers, without keeping or parsing the others."""
    with file.open("rb") as opened:
        num_lines = sum(piece.count(b"\n") for piece in iter(lambda: opened.read(2**20), b""))
        opened.seek(0)
        stride = math.ceil(num_lines / at_most)
        for number, line in enumerate(islice(opened, num_lines), start=1):
            is_last = number > num_lines - num_last
            if number % stride and not is_last and b'"held_out_loss"' not in line:
                continue
            yield number, parse_line(line, file, number)


def read_scores(run: Path) -> dict[str, dict[str, Any]]:
    """Return the content of a run's scores.json files by their folders' names. Raises: ValueError naming the file."""
    found = {}
    for file in sorted(run.glob(SCORES)):
        try:
            scores = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(scores, dict):
            raise ValueError(f"{file} holds a {type(scores).__name__}, expected an object")
        found[file.parent.name] = scores
    return found


def select(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that recorded `name`, (S,), and the values, (ranks, S); NaN where a rank has none.

    Ranks may become more or fewer when a run goes on elsewhere; a plain number counts as one rank's. Both are empty
    where nothing is recorded.
    """
    recorded = {row["step"]: row[name] for row in rows if _has_number(row.get(name))}
    if not recorded:
        return np.empty(0), np.empty((0, 0))
    if not any(isinstance(value, list) for value in recorded.values()):  # the usual case, many times as fast
        return np.array(list(recorded)), np.array([list(recorded.values())], dtype=float)
    ranks = [value if isinstance(value, list) else [value] for value in recorded.values()]
    table = np.full((max(map(len, ranks)), len(ranks)), np.nan)
    for place, values in enumerate(ranks):
        table[: len(values), place] = values  # None becomes NaN
    return np.array(list(recorded)), table


def _has_number(value: Any) -> bool:
    ranks = value if isinstance(value, list) else [value]
    return any(isinstance(one, int | float) and not math.isnan(one) for one in ranks)


def total(rows: Sequence[Row], name: str) -> float | None:
    """Return the sum over the steps, None where a step lacks it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) if rows and len(values) == len(rows) else None


def median(rows: Sequence[Row], name: str) -> float | None:
    _, values = select(rows, name)
    return float(np.median(values)) if values.size else None


def highest(rows: Sequence[Row], name: str) -> float | None:
    _, values = select(rows, name)
    return float(np.nanmax(values)) if values.size else None


def latest(rows: Sequence[Row], name: str) -> Any:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def smooth(values: np.ndarray, window: int | None = None) -> np.ndarray:
    """Return the mean of the last `window` values at each place, of as many as there are at the start.

    Args:
        window: 25, or 2 % of a long run, where it is not given.
    """
    window = min(len(values), window or max(25, len(values) // 50))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
