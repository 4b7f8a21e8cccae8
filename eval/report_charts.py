"""The report's charts: of each kind one picture, with a panel for every run that recorded it.

Colours are Okabe's and Ito's, which people tell apart whatever their colour vision, and which print well.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.fonts import find_chinese_font
from eval.page import PICTURES
from eval.report_runs import Run, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLORS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#000000")
GIB = 2**30
NUM_COLUMNS = 2
NUM_NAMED_RANKS = 8
Words = Mapping[str, str]


def draw_charts(runs: Sequence[Run], folder: Path, words: Words) -> dict[str, str]:
    """Draw every kind that some run recorded into `folder`/pictures; return the Markdown that shows each.

    Raises: ValueError where words or names are Chinese and no font for them is installed.
    """
    import matplotlib

    style: Any = {"font.size": 9, "text.parse_math": False, "axes.spines.top": False}
    style |= {"axes.spines.right": False, "axes.unicode_minus": False, "font.family": [choose_font(runs, words)]}
    shown = {}
    with matplotlib.rc_context(style):
        for kind, (recorded, draw) in CHARTS.items():
            panels = [run for run in runs if select(run.rows, recorded)[0].size]
            if panels:
                name = f"{kind}.png"
                _draw_panels(panels, draw, folder / PICTURES / name, words)
                shown[kind] = f"![{words[f'{kind} chart']}]({PICTURES}/{name})"
    return shown


def choose_font(runs: Sequence[Run], words: Words) -> str:
    """Return a font that has every character of the charts. Raises: ValueError saying what to install."""
    if "".join([*words.values(), *(run.name for run in runs)]).isascii():
        return "DejaVu Sans"  # comes with Matplotlib
    font = find_chinese_font()
    if font is None:
        raise ValueError("no font with Chinese characters is installed for the charts: apt install fonts-noto-cjk")
    return font


def _draw_panels(runs: Sequence[Run], draw: Callable[["Axes", Run, Words], None], picture: Path, words: Words) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_rows = math.ceil(len(runs) / NUM_COLUMNS)
    figure = Figure(figsize=(8, 0.5 + 2.5 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, min(len(runs), NUM_COLUMNS), squeeze=False)
    labels: dict[str, Any] = {}
    for axis, run in zip(grid.flat, runs, strict=False):
        draw(axis, run, words)
        told = axis.get_title("left")
        axis.set_title(f"{run.name}: {told}" if told else run.name, fontsize=9, loc="left")
        axis.set_xlabel(words["step"])
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(alpha=0.25, linewidth=0.6)
        labels |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    for axis in grid.flat[len(runs) :]:
        axis.set_axis_off()
    if labels:
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150, facecolor="white", metadata={"Software": None})


def draw_loss(axis: "Axes", run: Run, words: Words) -> None:
    """Draw training loss, every step and smoothed, and held-out loss."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    steps, losses = select(run.rows, "loss")
    axis.plot(steps, losses[0], color=BLUE, alpha=0.25, linewidth=0.6, label=words["every step"])
    axis.plot(steps, smooth(losses[0]), color=BLUE, linewidth=1.4, label=words["smoothed"])
    held_out_steps, held_out = select(run.rows, "held_out_loss")
    if held_out.size:
        axis.plot(held_out_steps, held_out[0], "o-", color=ORANGE, markersize=3, linewidth=1, label=words["held out"])
    axis.set(yscale="log", ylabel=words["nats"])
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]) if high / low < 20 else LogLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def draw_rates(axis: "Axes", run: Run, words: Words) -> None:
    """Draw the learning rates; groups of parameters with the same one are one line."""
    from matplotlib.ticker import MaxNLocator

    steps, groups = select(run.rows, "learning_rates")
    distinct = sorted({tuple(values) for values in groups.tolist()}, key=max, reverse=True)
    for values, color in zip(distinct, COLORS, strict=False):
        axis.plot(steps, values, color=color)
        axis.annotate(f"{max(values):.3g}", (steps[int(np.argmax(values))], max(values)), (4, 3), color=color,
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axis.set(ylabel=words["rates"], ylim=(0, 1.15 * max(distinct[0]) or None))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter("{x:g}")


def draw_speed(axis: "Axes", run: Run, words: Words) -> None:
    _draw_noisy(axis, run, "tokens_per_s", 1, "{:,.0f}", words)
    axis.set_ylabel(words["tokens/s"])
    axis.yaxis.set_major_formatter("{x:,.0f}")


def draw_mfu(axis: "Axes", run: Run, words: Words) -> None:
    _draw_noisy(axis, run, "mfu", 100, "{:.1f} %", words)
    axis.set_ylabel("MFU (%)")


def draw_use(axis: "Axes", run: Run, words: Words) -> None:
    _draw_noisy(axis, run, "gpu_utilization", 1, "{:.0f} %", words)
    axis.set(ylabel=words["use"] + " (%)", ylim=(0, 102))


def draw_power(axis: "Axes", run: Run, words: Words) -> None:
    _draw_noisy(axis, run, "gpu_power_w", 1, "{:,.0f} W", words)
    axis.set_ylabel(words["power"] + " (W)")


def _draw_noisy(axis: "Axes", run: Run, name: str, factor: float, form: str, words: Words) -> None:
    """Draw every rank's values faintly and their mean smoothed; the median is the panel's title."""
    steps, ranks = select(run.rows, name)
    ranks = factor * ranks
    mean = np.nanmean(ranks, axis=0)
    for place, values in enumerate(ranks):
        label = words["every step"] if place == 0 else None
        axis.plot(steps, values, color=BLUE, alpha=0.3 / len(ranks) ** 0.5, linewidth=0.6, label=label)
    axis.plot(steps, smooth(mean), color=BLUE, linewidth=1.4, label=words["smoothed"])
    axis.set_title(f"{words['median']} {form.format(np.median(mean))}", loc="left")
    axis.set_ylim(0, 1.1 * np.nanquantile(ranks, 0.995) or None)  # one odd step must not flatten the others


def draw_waits(axis: "Axes", run: Run, words: Words) -> None:
    """Draw what share of each step was spent waiting, smoothed."""
    for name, color in (("data_wait_s", ORANGE), ("rank_wait_s", BLUE)):
        rows = [row for row in run.rows if row.get(name) is not None and row.get("step_s")]
        if rows:
            share = [100 * row[name] / row["step_s"] for row in rows]
            axis.plot([row["step"] for row in rows], smooth(np.array(share)), color=color, label=words[name])
    axis.set(ylabel=words["share of step"], ylim=(0, None))


def draw_memory(axis: "Axes", run: Run, words: Words) -> None:
    """Draw the most memory each rank has held so far."""
    import matplotlib

    is_gpu = bool(select(run.rows, "reserved_memory_bytes")[0].size)
    for name, style in (("peak_memory_bytes", "-"), ("reserved_memory_bytes", "--")):
        steps, ranks = select(run.rows, name)
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, len(ranks)))
        for rank, (values, color) in enumerate(zip(ranks, colors, strict=True)):
            is_named = style == "-" and rank % math.ceil(len(ranks) / NUM_NAMED_RANKS) == 0
            label = words["rank"].format(rank=rank) if is_named else None
            axis.plot(steps, values / GIB, style, color=color, linewidth=1.2, label=label)
    axis.set_title(words["allocated, reserved dashed"] if is_gpu else words["resident"], loc="left")
    axis.set(ylabel=words["peak GiB"], ylim=(0, 1.1 * axis.get_ylim()[1]))


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean of the last 25 values (2 % of a long run) at each place, of as many as there are at the start."""
    window = min(len(values), max(25, len(values) // 50))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


# What a chart is called: what must have been recorded, and how it is drawn.
CHARTS: dict[str, tuple[str, Callable[["Axes", Run, Words], None]]] = {
    "loss": ("loss", draw_loss),
    "learning_rates": ("learning_rates", draw_rates),
    "throughput": ("tokens_per_s", draw_speed),
    "mfu": ("mfu", draw_mfu),
    "waits": ("data_wait_s", draw_waits),
    "memory": ("peak_memory_bytes", draw_memory),
    "gpu_use": ("gpu_utilization", draw_use),
    "gpu_power": ("gpu_power_w", draw_power),
}
