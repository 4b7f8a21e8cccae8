"""The runs of a report: trainings with the answers that their models gave."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.journal import read_journal
from data.runs import CONFIG, METRICS, SESSIONS, Run, read_config, read_metrics
from eval.answers import Result, find_results
from model.files import read_json


@dataclass(frozen=True)
class AnsweredRun(Run):
    results: dict[str, Result]  # by the name of their folder in eval/


def open_runs(folders: Sequence[Path]) -> list[AnsweredRun]:
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


def open_run(folder: Path, name: str) -> AnsweredRun:
    results = find_results(folder)
    has_config, has_metrics = (folder / CONFIG).is_file(), (folder / METRICS).is_file()
    if has_config != has_metrics:
        there, missing = (CONFIG, METRICS) if has_config else (METRICS, CONFIG)
        raise FileNotFoundError(f"{folder} has {there} but no {missing}: train/main.py writes both, is it a whole run?")
    if not has_config and not results:
        raise FileNotFoundError(f"{folder} is no run: it has neither {CONFIG}, {METRICS} nor eval/*/scores.json")
    config = read_config(folder / CONFIG) if has_config else {}
    rows = read_metrics(folder / METRICS) if has_metrics else []
    if has_metrics and not rows:
        raise ValueError(f"{folder / METRICS} holds no step: the run was stopped before its first")
    return AnsweredRun(folder, name, config, rows, list(read_journal(folder / SESSIONS)), results)


def find_base(run: Run) -> str | None:
    """Return what a training started from, as its settings, its sessions or its adapter name it; else None."""
    if named := run.config.get("model") or run.find("start"):
        return str(named)
    adapter = run.folder / "final/adapter_config.json"
    return read_json(adapter).get("base_model_name_or_path") if adapter.is_file() else None
