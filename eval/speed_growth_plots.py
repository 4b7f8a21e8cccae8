"""The pictures of `--suite growth`: measured steps, planned ranks, rows of data sets."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.charts import BLUE, COLORS, GIB, GREEN, ORANGE, PINK
from eval.speed_growth_rows import AGAIN, FIRST
from eval.speed_growth_steps import MIB, SERIES, split_kinds

if TYPE_CHECKING:  # importing it takes half a second that only who draws should spend
    from matplotlib.axes import Axes

SETTINGS: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
KIND_COLORS = {"none checkpointed": ORANGE, "all checkpointed": BLUE}
MARKS = "os^D"
# The panels of the planned steps: what grows, what it makes grow, and its unit.
PLANNED = (
    ("ranks", "peak_bytes", GIB),
    ("ranks", "step_s", 1),
    ("tokens", "peak_bytes", GIB),
    ("layers", "peak_bytes", GIB),
)
Point = Mapping[str, Any]


def draw_steps(result: Mapping[str, Any], picture: Path) -> None:
    """Draw time and memory over tokens, layers and supervised tokens: points as measured, and the lines fitted."""
    names = list(SERIES)

    def draw_panel(row: int, column: int, axis: "Axes") -> None:
        name, figure = names[column], ("median_s", "peak_bytes")[row]
        scale = 1 if figure == "median_s" else MIB
        for kind, points in split_kinds(result["series"][name]).items():
            xs, color = [point[name] for point in points], KIND_COLORS[kind]
            line = result["lines"][name][kind][figure]
            fitted = [(line["slope"] * x + line["at_zero"]) / scale for x in xs]
            axis.plot(xs, fitted, color=color, linewidth=1, alpha=0.6)
            axis.plot(xs, [point[figure] / scale for point in points], "o", color=color, markersize=4, label=kind)
            if figure == "median_s":
                low, high = zip(*(point["spread_s"] for point in points), strict=True)
                axis.vlines(xs, low, high, color=color, linewidth=1)
        axis.set(ylabel="MiB above weights, peak" if row else "s of a step", xlabel=SERIES[name] if row else "")
        _start_at_zero(axis)

    tokens = [result["series"][name][0]["tokens"] for name in names]
    layers = [result["series"][name][0]["layers"] for name in names]
    titles = [f"{layers[0]} layers", f"{tokens[1]:,} tokens", f"{tokens[2]:,} tokens, {layers[2]} layers"]
    _draw(picture, (2, 3), draw_panel, titles, f"LoRA steps, {result['size']}: as measured, and straight lines")


def draw_plan(result: Mapping[str, Any], picture: Path) -> None:
    """Draw a card's memory and a step's time over ranks, and memory over tokens and layers."""
    series = result["series"]

    def draw_panel(_: int, column: int, axis: "Axes") -> None:
        what, figure, scale = PLANNED[column]
        chosen = {name: points for name, points in series.items() if name.startswith(what)}
        for (name, points), color, mark in zip(chosen.items(), itertools.cycle(COLORS), itertools.cycle(MARKS)):
            label = name.split(", ", 1)[1]
            ys = [point[figure] / scale for point in points]
            axis.plot([point[what] for point in points], ys, mark + "-", color=color, markersize=4, label=label)
        if what == "ranks":
            ticks = [point["ranks"] for point in next(iter(chosen.values()))]
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
        else:
            _start_at_zero(axis)
        axis.set(
            ylim=(0, 1.15 * axis.get_ylim()[1]),
            ylabel="GiB, peak of a card" if scale == GIB else "s of a step",
            xlabel={"ranks": "ranks", "tokens": "tokens of a card's pass", "layers": "layers"}[what],
        )
        axis.legend(frameon=False, fontsize=8)

    titles = ["memory over ranks", "time over ranks", "memory over tokens", "memory over layers"]
    _draw(picture, (1, 4), draw_panel, titles, "planned LoRA steps; every rank has as many documents", is_shared=False)


def draw_rows(result: Mapping[str, Any], picture: Path) -> None:
    """Draw what data sets of a thousand rows and more take, on logarithmic axes."""
    points = result["points"]
    rows = [point["rows"] for point in points]
    panels: tuple[dict[str, tuple[Callable[[Point], float], str]], ...] = (
        {
            "opening the first time": (lambda point: point["median"][FIRST]["opened_s"], ORANGE),
            "opening again": (lambda point: point["median"][AGAIN]["opened_s"], BLUE),
            "shuffling": (lambda point: point["median"][AGAIN]["shuffled_s"], GREEN),
            "a step in the middle": (lambda point: point["median"][AGAIN]["middle_step_s"], PINK),
        },
        {
            "the file": (lambda point: point["file_bytes"], "gray"),
            "its index": (lambda point: point["index_bytes"], ORANGE),
            "private memory": (lambda point: point["median"][AGAIN]["private_bytes"], BLUE),
        },
    )

    def draw_panel(_: int, column: int, axis: "Axes") -> None:
        for (label, (read, color)), mark in zip(panels[column].items(), MARKS, strict=False):
            axis.plot(rows, [read(point) for point in points], mark + "-", color=color, markersize=4, label=label)
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel=("s", "bytes")[column])
        axis.legend(frameon=False, fontsize=8)

    _draw(picture, (1, 2), draw_panel, ["time", "memory and disk"], "rows of a data set, logarithmic", is_shared=False)


def _start_at_zero(axis: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set(xlim=(0, 1.05 * axis.get_xlim()[1]), ylim=(0, 1.1 * axis.get_ylim()[1]))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter("{x:,.0f}")


def _draw(
    picture: Path,
    shape: tuple[int, int],
    draw_panel: Callable[[int, int, "Axes"], None],
    titles: Sequence[str],
    title: str,
    is_shared: bool = True,
) -> None:
    """Draw rows of panels.

    Args:
        titles: of the columns.
        is_shared: one legend below for all of them.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot no window is looked for and no figure stays behind

    with matplotlib.rc_context(SETTINGS):
        num_rows, num_columns = shape
        figure = Figure(figsize=(3.4 * num_columns, 0.9 + 2.6 * num_rows), layout="constrained")
        for row, axes in enumerate(figure.subplots(*shape, squeeze=False)):
            for column, axis in enumerate(axes):
                draw_panel(row, column, axis)
                axis.grid(alpha=0.25, linewidth=0.6)
                if row == 0:
                    axis.set_title(titles[column], fontsize=9, loc="left")
        if is_shared:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(title, fontsize=11)
        figure.savefig(picture, dpi=150, facecolor="white", metadata={"Software": None})
