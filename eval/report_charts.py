"""The report's charts: of each kind one picture, with a panel for every run that recorded it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.charts import CHARTS, Style, draw_panels
from data.runs import Run
from eval.page import PICTURES

Words = Mapping[str, str]


def draw_charts(runs: Sequence[Run], folder: Path, words: Words) -> dict[str, str]:
    """Draw every kind that some run recorded into `folder`/pictures; return the Markdown that shows each.

    Raises: ValueError where words or names are Chinese and no font for them is installed.
    """
    shown = {}
    for kind in CHARTS:
        if (drawn := draw_panels(kind, runs, Style(words))) is not None:
            picture = folder / PICTURES / f"{kind}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(drawn)
            shown[kind] = f"![{words[f'{kind} chart']}]({PICTURES}/{picture.name})"
    return shown
