"""What the dashboard knows of a folder of runs: read again when a file changed, drawn once for all who look.

Names come from browsers: only those count that were found here. What is read lies inside the folder of runs.
"""

import base64
import functools
import io
import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data.charts import CHARTS, Style, draw_panels, draw_together
from data.fonts import find_chinese_font
from data.journal import read_journal
from data.run_words import RUN_WORDS
from data.runs import (
    CONFIG,
    LAST_STEPS,
    METRICS,
    SCORES,
    SESSIONS,
    Row,
    Run,
    latest,
    median,
    read_config,
    read_metrics,
    read_scores,
    select,
)

MAX_RUNS = 200  # the newest are shown
MAX_TOGETHER = 6  # runs whose curves are shown at once
MAX_BYTES = {CONFIG: 2**20, SESSIONS: 2**24, METRICS: 2**31}
MAX_SCORES_BYTES = 2**24
NUM_LISTED_ROWS, NUM_DRAWN_ROWS = 2_000, 6_000  # of metrics.jsonl, for the table and for a chart
LOOK_EVERY_S = 2.0
REDRAW_EVERY_S = 4.0
TRAINING_S = 75.0  # a training has written something within this time
MAX_DRAWN = 64  # sets of pictures of about 150 KB
WIDTH_INCHES, TOGETHER_INCHES = 4.8, 8.0
Stamp = tuple[int, int]  # when a file was last written, in ns, and its bytes
# What is wrong in files of any content: they are JSON and TOML, but perhaps not what a training or an evaluation wrote.
BROKEN = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, OSError)


@dataclass(frozen=True)
class Summary:
    """A run as the table shows it; None is not recorded."""

    name: str
    folder: Path
    stamps: Mapping[str, Stamp]  # of its files, by their names
    train: str | None = None
    lora_rank: int | None = None
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None  # mean of the last steps
    held_out_loss: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None  # mean
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """Return "training", "finished", "stopped", or "asked" for a model that was not trained here."""
        if METRICS not in self.stamps:
            return "asked"
        written = self.stamps[METRICS][0]
        is_final = "final" in self.stamps and self.stamps["final"][0] >= written
        if not is_final and time.time() - written / 1e9 < TRAINING_S:
            return "training"
        return "finished" if "final" in self.stamps else "stopped"


@dataclass(frozen=True)
class Look:
    """All besides its runs that decides how a chart looks."""

    language: str
    window: int | None
    is_log: bool

    def make_style(self, width_inches: float) -> Style:
        return Style(RUN_WORDS[self.language], width_inches, self.window, self.is_log)


@dataclass(frozen=True)
class Drawn:
    """Pictures of one run by their kind, or "together" of several, as data URIs."""

    names: tuple[str, ...]
    stamps: tuple[Stamp | None, ...]
    number: int  # another one has other pictures
    drawn_at: float
    pictures: Mapping[str, str]
    problem: str = ""


class Shelf:
    """A folder of runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summaries: dict[str, Summary] = {}
        self.num_hidden = 0  # runs that are not listed
        self.listed_at = -math.inf
        self.drawn: OrderedDict[tuple[tuple[str, ...], Look], Drawn] = OrderedDict()
        self.numbers = itertools.count(1)
        self.listing, self.drawing = threading.Lock(), threading.Lock()

    @functools.cached_property
    def has_chinese_font(self) -> bool:
        return find_chinese_font() is not None

    def list_runs(self) -> dict[str, Summary]:
        """Return the runs by their names, the last started first; files are looked at every `LOOK_EVERY_S` at most."""
        with self.listing:
            if time.monotonic() - self.listed_at >= LOOK_EVERY_S:
                found = sorted(self._find(), key=lambda pair: _find_start(pair[1]), reverse=True)
                listed = found[:MAX_RUNS]
                self.summaries = {folder.name: self._summarize(folder, stamps) for folder, stamps in listed}
                self.num_hidden = len(found) - len(listed)
                self.listed_at = time.monotonic()
            return self.summaries

    def draw(self, runs: Sequence[Summary], look: Look, is_patient: bool) -> Drawn | None:
        """Return the pictures of one run, or the one of several together.

        Args:
            is_patient: wait while others are drawn; else return what was drawn last, None if nothing was.
        """
        key = (tuple(run.name for run in runs), look)
        stamps = tuple(run.stamps.get(METRICS) for run in runs)
        if self._is_fresh(found := self.drawn.get(key), stamps):
            return found
        if not self.drawing.acquire(blocking=is_patient):
            return found
        try:
            if self._is_fresh(found := self.drawn.get(key), stamps):  # by another, meanwhile
                return found
            pictures, problem = self._draw(runs, look)
            drawn = Drawn(key[0], stamps, next(self.numbers), time.monotonic(), pictures, problem)
            self.drawn[key] = drawn
            self.drawn.move_to_end(key)
            while len(self.drawn) > MAX_DRAWN:
                self.drawn.popitem(last=False)
            return drawn
        finally:
            self.drawing.release()

    def _is_fresh(self, drawn: Drawn | None, stamps: tuple[Stamp | None, ...]) -> bool:
        if drawn is None:
            return False
        return drawn.stamps == stamps or time.monotonic() - drawn.drawn_at < REDRAW_EVERY_S

    def _draw(self, runs: Sequence[Summary], look: Look) -> tuple[dict[str, str], str]:
        try:
            read = [Run(run.folder, run.name, {}, self._read_rows(run, NUM_DRAWN_ROWS, num_last=1), []) for run in runs]
            if len(runs) > 1:
                drawn = {"together": draw_together(read, look.make_style(TOGETHER_INCHES))}
            else:
                drawn = {kind: draw_panels(kind, read, look.make_style(WIDTH_INCHES)) for kind in CHARTS}
        except BROKEN as error:
            return {}, self._explain(error)
        return {kind: to_uri(picture) for kind, picture in drawn.items() if picture}, ""

    def _find(self) -> Iterator[tuple[Path, dict[str, Stamp]]]:
        """Yield the run folders, with the stamps of their files."""
        if not self.folder.is_dir():
            return
        for folder in self.folder.iterdir():
            if not folder.name.startswith(".") and self._is_inside(folder) and folder.is_dir():
                files = [folder / name for name in (CONFIG, METRICS, SESSIONS)] + sorted(folder.glob(SCORES))
                stamps = {str(file.relative_to(folder)): _stamp(file) for file in files if file.is_file()}
                if METRICS in stamps and (folder / "final").is_dir():
                    stamps["final"] = _stamp(folder / "final")
                if stamps:
                    yield folder, stamps

    def _summarize(self, folder: Path, stamps: dict[str, Stamp]) -> Summary:
        """Read a run's files, unless they are as they were; what cannot be read is told."""
        known = self.summaries.get(folder.name)
        if known is not None and known.stamps == stamps:
            return known
        facts: dict[str, Any] = {}
        problems = []
        for read in (self._read_config, self._read_sessions, self._read_steps, self._read_scores):
            try:
                facts |= read(Summary(folder.name, folder, stamps))
            except BROKEN as error:
                problems.append(self._explain(error))
        return Summary(folder.name, folder, stamps, **facts, problems=tuple(problems))

    def _read_config(self, run: Summary) -> dict[str, Any]:
        if CONFIG not in run.stamps:
            return {}
        config = read_config(self._check(run.folder / CONFIG, MAX_BYTES[CONFIG]))
        rank = config.get("lora_rank") if config.get("train") == "lora" else None
        return {"train": config.get("train"), "lora_rank": rank}

    def _read_sessions(self, run: Summary) -> dict[str, Any]:
        if SESSIONS not in run.stamps:
            return {}
        sessions = list(read_journal(self._check(run.folder / SESSIONS, MAX_BYTES[SESSIONS])))
        num_steps = latest(sessions, "num_steps")
        return {"num_steps": num_steps if isinstance(num_steps, int) else None}

    def _read_steps(self, run: Summary) -> dict[str, Any]:
        rows = self._read_rows(run, NUM_LISTED_ROWS, LAST_STEPS)
        if not rows:
            return {}
        _, step_s = select(rows, "step_s")
        _, losses = select(rows, "loss")
        _, held_out = select(rows, "held_out_loss")
        return {
            "step": int(rows[-1]["step"]),
            "loss": float(losses[0, -LAST_STEPS:].mean()) if losses.size else None,
            "held_out_loss": float(held_out[0, -1]) if held_out.size else None,
            "tokens_per_s": median(rows, "tokens_per_s"),
            "step_s": float(step_s[0].mean()) if step_s.size else None,
        }

    def _read_rows(self, run: Summary, at_most: int, num_last: int) -> list[Row]:
        if METRICS not in run.stamps:
            return []
        return read_metrics(self._check(run.folder / METRICS, MAX_BYTES[METRICS]), at_most, num_last)

    def _read_scores(self, run: Summary) -> dict[str, Any]:
        for file in run.folder.glob(SCORES):
            self._check(file, MAX_SCORES_BYTES)
        scores = read_scores(run.folder)
        for task, found in scores.items():
            check_scores(task, found)
        return {"scores": scores}

    def _check(self, file: Path, max_bytes: int) -> Path:
        """Return a file that may be read. Raises: ValueError saying why not."""
        if not self._is_inside(file):
            raise ValueError(f"{file} is a link to somewhere else: it is not followed")
        if (num_bytes := file.stat().st_size) > max_bytes:
            raise ValueError(f"{file} has {num_bytes:,} bytes, at most {max_bytes:,} are read")
        return file

    def _is_inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.folder.resolve())

    def _explain(self, error: Exception) -> str:
        """Return what is wrong, without where on this machine the runs lie."""
        return str(error).replace(f"{self.folder}/", "") or type(error).__name__


def check_scores(task: str, scores: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no task's scores; only the headline may be missing."""
    parts = scores.get("parts", {})
    bars = scores.get("bars") or {}
    try:
        figures = [*bars.values(), *(part for of_kind in parts.values() for part in of_kind.values())]
        is_good = all(map(_is_scored, figures)) and (scores.get("score") is None or _is_scored(scores))
    except AttributeError:
        is_good = False
    if not is_good:
        raise ValueError(f"eval/{task}/scores.json: these are not scores as eval/main.py writes them")


def _is_scored(figures: Mapping[str, Any]) -> bool:
    interval = figures.get("interval")
    numbers = [figures.get("n"), figures.get("score"), figures.get("best", 1.0), *(interval or [])]
    return all(isinstance(one, int | float) for one in numbers) and len(numbers) in (3, 5)


def to_uri(picture: bytes) -> str:
    """Return a PNG as a data URI, in 256 colours: nobody sees the difference, and it has half the bytes."""
    written = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(written, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"


def _find_start(stamps: Mapping[str, Stamp]) -> int:
    """Return when a training was started, in ns, or a model last scored: its place stays while it goes on."""
    return stamps[CONFIG][0] if CONFIG in stamps else max(written for written, _ in stamps.values())


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return found.st_mtime_ns, found.st_size
