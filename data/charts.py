"""Charts of runs as PNG pictures on white: of each kind one, with a panel for every run; losses also in one panel.

Colours are Okabe's and Ito's, which people tell apart whatever their colour vision, and which print well.
"""

import functools
import io
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.fonts import find_chinese_font
from data.runs import Run, select, smooth

if TYPE_CHECKING:  # importing it takes half a second that only who draws should spend
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLORS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#000000")
GIB = 2**30
NUM_COLUMNS = 2
NUM_NAMED_RANKS = 8
DRAWING = threading.Lock()  # Matplotlib's settings are those of the whole process
Words = Mapping[str, str]


@dataclass(frozen=True)
class Style:
    """How charts are drawn."""

    words: Words
    width_inches: float = 8.0
    window: int | None = None  # steps that a line is smoothed over; None: 25, or 2 % of a long run
    is_log: bool = True  # the axis of losses


def draw_panels(kind: str, runs: Sequence[Run], style: Style) -> bytes | None:
    """Return a picture with a panel for every run that recorded what this kind of chart shows; None where none did.

    Raises: ValueError where words or names are Chinese and no font for them is installed.
    """
    recorded, draw = CHARTS[kind]
    shown = [run for run in runs if select(run.rows, recorded)[0].size]
    if not shown:
        return None

    def draw_panel(run: Run, axis: "Axes") -> None:
        draw(axis, run, style)
        told = axis.get_title("left")
        axis.set_title(f"{run.name}: {told}" if told else run.name, fontsize=9, loc="left")

    return _draw([functools.partial(draw_panel, run) for run in shown], shown, 2.5, style)


def draw_together(runs: Sequence[Run], style: Style) -> bytes | None:
    """Return a picture with the losses of all runs in one panel; None where no run has any. Raises: as above."""
    shown = [run for run in runs if select(run.rows, "loss")[0].size]
    return _draw([lambda axis: draw_losses(axis, shown, style)], shown, 3.1, style) if shown else None


def _draw(panels: Sequence[Callable[["Axes"], None]], runs: Sequence[Run], height: float, style: Style) -> bytes:
    """Draw panels of a height in inches side by side, their legend below."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot no window is looked for and no figure stays behind
    from matplotlib.ticker import MaxNLocator

    settings: Any = {"font.size": 9, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"axes.unicode_minus": False, "font.family": [choose_font(runs, style.words)]}
    num_rows = math.ceil(len(panels) / NUM_COLUMNS)
    written = io.BytesIO()
    with DRAWING, matplotlib.rc_context(settings):
        figure = Figure(figsize=(style.width_inches, 0.5 + height * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, min(len(panels), NUM_COLUMNS), squeeze=False)
        labels: dict[str, Any] = {}
        for axis, draw_panel in zip(grid.flat, panels, strict=False):
            draw_panel(axis)
            axis.set_xlabel(style.words["step"])
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.grid(alpha=0.25, linewidth=0.6)
            labels |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        for axis in grid.flat[len(panels) :]:
            axis.set_axis_off()
        if labels:
            figure.legend(labels.values(), labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
        figure.savefig(written, dpi=150, facecolor="white", metadata={"Software": None})
    return written.getvalue()


def choose_font(runs: Sequence[Run], words: Words) -> str:
    """Return a font that has every character of the charts. Raises: ValueError saying what to install."""
    if "".join([*words.values(), *(run.name for run in runs)]).isascii():
        return "DejaVu Sans"  # comes with Matplotlib
    font = find_chinese_font()
    if font is None:
        raise ValueError("no font with Chinese characters is installed for the charts: apt install fonts-noto-cjk")
    return font


def draw_loss(axis: "Axes", run: Run, style: Style) -> None:
    """Draw training loss, every step and smoothed, and held-out loss."""
    steps, losses = select(run.rows, "loss")
    axis.plot(steps, losses[0], color=BLUE, alpha=0.25, linewidth=0.6, label=_name_steps(steps, style))
    axis.plot(steps, _smooth(steps, losses[0], style), color=BLUE, linewidth=1.4, label=style.words["smoothed"])
    held_out_steps, held_out = select(run.rows, "held_out_loss")
    if held_out.size:
        label = style.words["held out"]
        axis.plot(held_out_steps, held_out[0], "o-", color=ORANGE, markersize=3, linewidth=1, label=label)
    _scale_losses(axis, style)


def draw_losses(axis: "Axes", runs: Sequence[Run], style: Style) -> None:
    """Draw the runs' losses over each other: smoothed, every step faintly, and held-out loss dashed."""
    for run, color in zip(runs, itertools.cycle(COLORS)):
        steps, losses = select(run.rows, "loss")
        axis.plot(steps, losses[0], color=color, alpha=0.15, linewidth=0.5)
        axis.plot(steps, _smooth(steps, losses[0], style), color=color, linewidth=1.4, label=run.name)
        held_out_steps, held_out = select(run.rows, "held_out_loss")
        if held_out.size:
            axis.plot(held_out_steps, held_out[0], "o--", color=color, markersize=3, linewidth=1)
    axis.plot([], [], "o--", color="gray", markersize=3, linewidth=1, label=style.words["held out"])
    _scale_losses(axis, style)


def _scale_losses(axis: "Axes", style: Style) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axis.set(yscale="log" if style.is_log else "linear", ylabel=style.words["nats"])
    low, high = axis.get_ylim()
    is_wide = style.is_log and high / low >= 20
    axis.yaxis.set_major_locator(LogLocator() if is_wide else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def draw_rates(axis: "Axes", run: Run, style: Style) -> None:
    """Draw the learning rates; groups of parameters with the same one are one line."""
    from matplotlib.ticker import MaxNLocator

    steps, groups = select(run.rows, "learning_rates")
    distinct = sorted({tuple(values) for values in groups.tolist()}, key=max, reverse=True)
    for values, color in zip(distinct, COLORS, strict=False):
        axis.plot(steps, values, color=color)
        axis.annotate(f"{max(values):.3g}", (steps[int(np.argmax(values))], max(values)), (4, 3), color=color,
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axis.set(ylabel=style.words["rates"], ylim=(0, 1.15 * max(distinct[0]) or None))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter("{x:g}")


def draw_speed(axis: "Axes", run: Run, style: Style) -> None:
    _draw_noisy(axis, run, "tokens_per_s", 1, "{:,.0f}", style)
    axis.set_ylabel(style.words["tokens/s"])
    axis.yaxis.set_major_formatter("{x:,.0f}")


def draw_mfu(axis: "Axes", run: Run, style: Style) -> None:
    _draw_noisy(axis, run, "mfu", 100, "{:.1f} %", style)
    axis.set_ylabel("MFU (%)")


def draw_use(axis: "Axes", run: Run, style: Style) -> None:
    _draw_noisy(axis, run, "gpu_utilization", 1, "{:.0f} %", style)
    axis.set(ylabel=style.words["use"] + " (%)", ylim=(0, 102))


def draw_power(axis: "Axes", run: Run, style: Style) -> None:
    _draw_noisy(axis, run, "gpu_power_w", 1, "{:,.0f} W", style)
    axis.set_ylabel(style.words["power"] + " (W)")


def _draw_noisy(axis: "Axes", run: Run, name: str, factor: float, form: str, style: Style) -> None:
    """Draw every rank's values faintly and their mean smoothed; the median is the panel's title."""
    steps, ranks = select(run.rows, name)
    ranks = factor * ranks
    mean = np.nanmean(ranks, axis=0)
    for place, values in enumerate(ranks):
        label = _name_steps(steps, style) if place == 0 else None
        axis.plot(steps, values, color=BLUE, alpha=0.3 / len(ranks) ** 0.5, linewidth=0.6, label=label)
    axis.plot(steps, _smooth(steps, mean, style), color=BLUE, linewidth=1.4, label=style.words["smoothed"])
    axis.set_title(f"{style.words['median']} {form.format(np.median(mean))}", loc="left")
    axis.set_ylim(0, 1.1 * np.nanquantile(ranks, 0.995) or None)  # one odd step must not flatten the others


def draw_waits(axis: "Axes", run: Run, style: Style) -> None:
    """Draw what share of each step was spent waiting, smoothed."""
    for name, color in (("data_wait_s", ORANGE), ("rank_wait_s", BLUE)):
        rows = [row for row in run.rows if row.get(name) is not None and row.get("step_s")]
        if rows:
            steps = np.array([row["step"] for row in rows])
            share = np.array([100 * row[name] / row["step_s"] for row in rows])
            axis.plot(steps, _smooth(steps, share, style), color=color, label=style.words[name])
    axis.set(ylabel=style.words["share of step"], ylim=(0, None))


def draw_memory(axis: "Axes", run: Run, style: Style) -> None:
    """Draw the most memory each rank has held so far."""
    import matplotlib

    is_gpu = bool(select(run.rows, "reserved_memory_bytes")[0].size)
    for name, line in (("peak_memory_bytes", "-"), ("reserved_memory_bytes", "--")):
        steps, ranks = select(run.rows, name)
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, len(ranks)))
        for rank, (values, color) in enumerate(zip(ranks, colors, strict=True)):
            is_named = line == "-" and rank % math.ceil(len(ranks) / NUM_NAMED_RANKS) == 0
            label = style.words["rank"].format(rank=rank) if is_named else None
            axis.plot(steps, values / GIB, line, color=color, linewidth=1.2, label=label)
    axis.set_title(style.words["allocated, reserved dashed"] if is_gpu else style.words["resident"], loc="left")
    axis.set(ylabel=style.words["peak GiB"], ylim=(0, 1.1 * axis.get_ylim()[1]))


def _smooth(steps: np.ndarray, values: np.ndarray, style: Style) -> np.ndarray:
    return smooth(values, style.window and max(1, style.window // _measure_gap(steps)))


def _name_steps(steps: np.ndarray, style: Style) -> str:
    gap = _measure_gap(steps)
    return style.words["every step"] if gap == 1 else style.words["one step in many"].format(stride=gap)


def _measure_gap(steps: np.ndarray) -> int:
    """Return how many steps lie between two rows: of a long run not all may have been read."""
    return int(np.median(np.diff(steps))) if len(steps) > 1 else 1


# What a chart is called: what must have been recorded, and how it is drawn.
CHARTS: dict[str, tuple[str, Callable[["Axes", Run, Style], None]]] = {
    "loss": ("loss", draw_loss),
    "learning_rates": ("learning_rates", draw_rates),
    "throughput": ("tokens_per_s", draw_speed),
    "mfu": ("mfu", draw_mfu),
    "waits": ("data_wait_s", draw_waits),
    "memory": ("peak_memory_bytes", draw_memory),
    "gpu_use": ("gpu_utilization", draw_use),
    "gpu_power": ("gpu_power_w", draw_power),
}
