"""What a run folder tells of a training: its settings, its steps, its machine, and what it left.

Everything is read from the run's files. What is not recorded there is None or absent, and stays so.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.journal import read_journal
from eval.answers import Result, find_results
from model.files import read_json

CONFIG, METRICS, SESSIONS = "config.toml", "metrics.jsonl", "sessions.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run; `config` and `rows` are empty for a model that was only asked, not trained here."""

    folder: Path
    name: str
    config: dict[str, Any]
    rows: list[Row]  # of metrics.jsonl, one a step
    sessions: list[Row]  # of sessions.jsonl: what the training ran on, each time it was started
    results: dict[str, Result]  # by the name of their folder in eval/

    @property
    def num_ranks(self) -> int | None:
        """How many processes trained last; None where that is not recorded."""
        ranks = self.rows[-1].get("peak_memory_bytes") if self.rows else None
        return len(ranks) if isinstance(ranks, list) else None

    def find(self, name: str) -> Any:
        """Return what the latest session recorded under a name, None where none did."""
        return latest(self.sessions, name)


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Open run folders, named after their last part, or in full where two would be called the same.

    Raises: FileNotFoundError or ValueError for a folder that is no run, or a damaged file.
    """
    short = [folder.resolve().name for folder in folders]
    if twice := {str(one) for one in folders if list(folders).count(one) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} is given twice")
    return [
        open_run(folder, name if short.count(name) == 1 else str(folder))
        for folder, name in zip(folders, short, strict=True)
    ]


def open_run(folder: Path, name: str) -> Run:
    results = find_results(folder)
    has_config, has_metrics = (folder / CONFIG).is_file(), (folder / METRICS).is_file()
    if has_config != has_metrics:
        there, missing = (CONFIG, METRICS) if has_config else (METRICS, CONFIG)
        raise FileNotFoundError(f"{folder} has {there} but no {missing}: train/main.py writes both, is it a whole run?")
    if not has_config and not results:
        raise FileNotFoundError(f"{folder} is no run: it has neither {CONFIG}, {METRICS} nor eval/*/scores.json")
    config = _read_config(folder / CONFIG) if has_config else {}
    rows = read_metrics(folder / METRICS) if has_metrics else []
    return Run(folder, name, config, rows, list(read_journal(folder / SESSIONS)), results)


def read_metrics(file: Path) -> list[Row]:
    """Return the steps' rows; a last line cut short by a kill is left out.

    Raises: ValueError naming the line that is broken, or for no step at all.
    """
    rows = list(read_journal(file))
    for number, row in enumerate(rows, start=1):
        if not all(isinstance(row.get(key), int | float) for key in ("step", "loss")):
            raise ValueError(f"{file}, line {number}: expected numbers as its step and loss")
    if not rows:
        raise ValueError(f"{file} holds no step: the run was stopped before its first")
    return rows


def select(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that recorded `name`, (S,), and the values, (ranks, S); NaN where a rank has none.

    A plain number counts as one rank's; both are empty where nothing is recorded.
    """
    recorded = {row["step"]: np.atleast_1d(np.array(row.get(name), dtype=float)) for row in rows}  # None becomes NaN
    recorded = {step: values for step, values in recorded.items() if not np.isnan(values).all()}
    table = np.full((max(map(len, recorded.values()), default=0), len(recorded)), np.nan)
    for place, values in enumerate(recorded.values()):
        table[: len(values), place] = values
    return np.array(list(recorded)), table


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


def find_base(run: Run) -> str | None:
    """Return what a training started from, as its settings, its sessions or its adapter name it; else None."""
    if named := run.config.get("model") or run.find("start"):
        return str(named)
    adapter = run.folder / "final/adapter_config.json"
    return read_json(adapter).get("base_model_name_or_path") if adapter.is_file() else None


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    for key, value in config.items():
        if not re.fullmatch(r"[a-z0-9_]+", key) or not isinstance(value, str | int | float):
            raise ValueError(f"{file}: {key!r} = {value!r} is no setting of a training stage")
    return config
