"""What a run records: `metrics.jsonl`, one line a step, and the pictures drawn from it."""

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.runs import METRICS, Row, read_metrics, select, smooth

if TYPE_CHECKING:  # importing it takes half a second that only the rank that draws should spend
    from matplotlib.axes import Axes

GIB = 2**30
WINDOW = 25  # steps that a line is smoothed over


class MetricsFile:
    """Lines of JSON, flushed one by one; resuming drops the lines of steps that will be done again."""

    def __init__(self, file: Path, first_step: int) -> None:
        if file.exists():
            kept = [row for row in read_metrics(file) if row["step"] <= first_step]
            shorter = file.with_suffix(".partial")
            shorter.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            shorter.replace(file)
        self.file = file.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def memory_bytes(device: torch.device) -> dict[str, int | None]:
    """Return the most memory held so far: allocated and reserved on the GPU, or resident of this process."""
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_memory_bytes": peak, "reserved_memory_bytes": reserved}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_memory_bytes": peak, "reserved_memory_bytes": None}


def draw_curves(folder: Path, title: str) -> None:
    """Draw `loss.png`, `throughput.png` and `memory.png` from a run's `metrics.jsonl`."""
    rows = read_metrics(folder / METRICS)
    if rows:  # a run stopped before its first step has nothing to show
        draw_loss(rows, folder / "loss.png", title)
        draw_throughput(rows, folder / "throughput.png", title)
        draw_memory(rows, folder / "memory.png", title)


def draw_loss(rows: Sequence[Row], picture: Path, title: str) -> None:
    """Draw training loss (every step and smoothed) and held-out loss and exact match over the steps."""
    from matplotlib.figure import Figure  # without pyplot no window is looked for and no figure stays behind

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    steps, losses = select(rows, "loss")
    axis.plot(steps, losses[0], color="tab:blue", alpha=0.25, linewidth=0.8, label="training loss, every step")
    axis.plot(steps, smooth(losses[0], WINDOW), color="tab:blue", label="training loss, smoothed")
    axis.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)", title=title, yscale="log")
    axis.grid(alpha=0.3)
    steps, losses = select(rows, "held_out_loss")
    if steps.size:
        axis.plot(steps, losses[0], "o-", color="tab:orange", markersize=4, label="held-out loss")
        right = axis.twinx()
        _, matches = select(rows, "exact_match")
        right.plot(steps, matches[0], "s--", color="tab:green", markersize=4, label="held-out exact match")
        right.set(ylabel="exact match", ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(picture, dpi=120)


def draw_throughput(rows: Sequence[Row], picture: Path, title: str) -> None:
    """Draw tokens per second and MFU, and below what share of each step was spent waiting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    speed, waits = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, tokens = select(rows, "tokens_per_s")
    plot_smoothed(speed, steps, tokens, "tab:blue", f"real tokens/s (median {np.median(tokens):,.0f})")
    speed.set(ylabel="real tokens/s, all ranks", title=title, ylim=(0, None))
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.grid(alpha=0.3)
    steps, mfu = select(rows, "mfu")
    if steps.size:
        right = speed.twinx()
        plot_smoothed(right, steps, 100 * mfu, "tab:green", f"MFU (median {100 * np.median(mfu):.1f} %)")
        right.set(ylabel="MFU (%)", ylim=(0, 100))  # all that the cards could do: its line stays clear of the other
    for name, color, what in (("data_wait_s", "tab:orange", "data"), ("rank_wait_s", "tab:purple", "other ranks")):
        recorded = [row for row in rows if row.get(name) is not None]
        (steps, waited), (_, step_s) = select(recorded, name), select(recorded, "step_s")
        plot_smoothed(waits, steps, 100 * waited / step_s, color, f"waiting for {what}")
    waits.set(xlabel="optimizer step", ylabel="share of the step (%)", ylim=(0, None))
    waits.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(picture, dpi=120)


def draw_memory(rows: Sequence[Row], picture: Path, title: str) -> None:
    """Draw every rank's peak memory, and below how busy the GPUs were and their power where that was recorded."""
    import matplotlib
    from matplotlib.figure import Figure

    is_gpu = bool(select(rows, "reserved_memory_bytes")[0].size)
    figure = Figure(figsize=(8, 8 if is_gpu else 5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1]) if is_gpu else [figure.subplots()]
    for name, style, what in (
        ("peak_memory_bytes", "-", "allocated" if is_gpu else "resident"),
        ("reserved_memory_bytes", "--", "reserved"),
        ("gpu_memory_used_bytes", ":", "on the card"),
    ):
        steps, ranks = select(rows, name)
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(ranks)))
        for rank, (values, color) in enumerate(zip(ranks, colors, strict=True)):
            is_named = style == "-" and rank % -(-len(ranks) // 8) == 0  # 8 names are enough to see the order
            axes[0].plot(steps, values / GIB, style, color=color, label=f"rank {rank}" if is_named else None)
        if steps.size:
            axes[0].plot([], [], style, color="gray", label=f"{what}: at most {np.nanmax(ranks) / GIB:.2f} GiB")
    axes[0].set(ylabel="highest so far, each rank (GiB)", title=title)
    busy = (("gpu_utilization", "tab:blue", "utilisation (%)"), ("gpu_power_w", "tab:red", "power (W)"))
    for axis, (name, color, what) in zip(axes[1:], busy, strict=False):  # a CPU has no such axes
        plot_smoothed(axis, *select(rows, name), color, f"mean {what}")
        axis.set(ylabel=f"GPU {what}")
    axes[-1].set(xlabel="optimizer step")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4 if is_gpu else 2)
    figure.savefig(picture, dpi=120)


def plot_smoothed(axis: "Axes", steps: np.ndarray, ranks: np.ndarray, color: str, label: str) -> None:
    """Draw every rank's values faintly, and their mean over the ranks smoothed, where there are any."""
    for values in ranks:
        axis.plot(steps, values, color=color, alpha=0.25 / len(ranks) ** 0.5, linewidth=0.8)
    if len(ranks):
        axis.plot(steps, smooth(np.nanmean(ranks, axis=0), WINDOW), color=color, label=label)
