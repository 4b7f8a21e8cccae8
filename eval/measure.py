"""What the suites of `eval/speed.py` share: new processes, clocks, memory, medians, goals and the machine's name."""

import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from model.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_EVERY_S = 0.002
BANDWIDTH_BYTES = 2**30  # far more than any cache holds
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}

Result = TypeVar("Result")
Figures = Mapping[str, float]  # one contestant's in one round; names end in their unit


def run_in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a module's function where nothing but PyTorch's import has happened yet.

    Raises: what the function raises; BrokenProcessPool when its process is killed, for want of memory for instance.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # half of the time that a new process would take to start
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()


def take_turns(contestants: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """Measure one contestant after the other, `repeats` times around, each time in a new process."""
    results: dict[str, list[Result]] = {name: [] for name in contestants}
    for round_number in range(1, repeats + 1):
        for name, measure in contestants.items():
            print(f"round {round_number} of {repeats}: {name}", file=sys.stderr, flush=True)
            results[name].append(run_in_new_process(measure))
    return results


def summarize(rounds: Mapping[str, Sequence[Figures]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return every contestant's median and [lowest, highest] of every figure."""
    series = {
        name: {figure: [row[figure] for row in figures] for figure in figures[0]} for name, figures in rounds.items()
    }
    return {
        "median": {name: {key: statistics.median(row) for key, row in rows.items()} for name, rows in series.items()},
        "spread": {name: {key: [min(row), max(row)] for key, row in rows.items()} for name, rows in series.items()},
    }


def make_goal(what: str, value: float, at_most: float | None = None, at_least: float | None = None) -> dict[str, Any]:
    """Set a figure beside what it should be."""
    if at_most is not None:
        return {"goal": what, "value": value, "at_most": at_most, "reached": value <= at_most}
    assert at_least is not None
    return {"goal": what, "value": value, "at_least": at_least, "reached": value >= at_least}


def print_goals(goals: Sequence[Mapping[str, Any]]) -> None:
    rows = [["goal", "is", "should be", ""]]
    for goal in goals:
        wanted = f"<= {goal['at_most']:g}" if "at_most" in goal else f">= {goal['at_least']:g}"
        rows.append([goal["goal"], f"{goal['value']:.3f}", wanted, "reached" if goal["reached"] else "MISSED"])
    print_table(rows)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


def format_median(result: Mapping[str, Any], name: str, figure: str, scale: float = 1, digits: int = 1) -> str:
    """Return "median (lowest to highest)" of a summarised figure times `scale`."""
    median, (low, high) = (result[kind][name][figure] for kind in ("median", "spread"))
    return f"{median * scale:.{digits}f} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"


def wait_for(device: str) -> None:
    """Return when the device has done all it was told to, so that a clock can be read."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class MemoryWatch:
    """Look every few milliseconds, in a thread, how far this process's memory has risen since the block began."""

    def __enter__(self) -> Self:
        self.before = self.highest = self._look()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._note()
        private, files = (high - low for high, low in zip(self.highest, self.before, strict=True))
        self.private_peak_bytes = private
        self.file_pages_bytes = files  # of mapped files: what was looked at, which other processes share

    def _watch(self) -> None:
        while not self.stopped.wait(SAMPLE_EVERY_S):
            self._note()

    def _note(self) -> None:
        self.highest = [max(pair) for pair in zip(self.highest, self._look(), strict=True)]

    def _look(self) -> list[int]:
        status = _read_status()
        return [status["RssAnon"], status["RssFile"]]


def _read_status() -> dict[str, int]:
    """Return Linux's account of this process's memory, in bytes."""
    lines = [line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def current_memory_bytes(device: str) -> int:
    """Return what is held now; on a GPU, count the peak from here on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _read_status()["VmRSS"]


def peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_read_bandwidth(device: str) -> float:
    """Return the bytes per second at which all threads together read memory: the best of ten sums over 1 GiB."""
    tensor = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    return BANDWIDTH_BYTES / _best_time(tensor.sum, device)


def measure_product_rate(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product: the best of ten."""
    size = PRODUCT_SIZE[torch.device(device).type]
    matrix = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _best_time(lambda: matrix @ matrix, device)


def _best_time(run: Callable[[], object], device: str) -> float:
    seconds = []
    for _ in range(10):
        wait_for(device)
        started = time.perf_counter()
        run()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def describe_environment(device: str) -> dict[str, Any]:
    """Return hardware, versions and commit; to be called before measuring, for the load is others' then."""
    import transformers

    load = round(os.getloadavg()[0], 1)  # of the last minute: figures of a busy machine say little
    return describe_machine(device) | {"load_average": load, "transformers": transformers.__version__}
