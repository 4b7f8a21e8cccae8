"""Charts show what was recorded, where it belongs."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from data import charts
from data.charts import BLUE, CHARTS, COLORS, GREEN, ORANGE, Style, draw_panels, draw_together
from data.run_words import RUN_WORDS
from data.runs import Run

ENGLISH = Style(RUN_WORDS["en"])


def make_run(name: str = "a run", stride: int = 1, **recorded: Any) -> Run:
    rows = [{"step": step, "loss": 2.0 / step, "step_s": 2.0} | recorded for step in range(1, 60 * stride, stride)]
    return Run(Path(name), name, {}, rows, [])


def open_pixels(picture: bytes | None) -> np.ndarray:
    assert picture is not None
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def count_pixels(picture: bytes | None, color: str) -> int:
    wanted = 255 * np.array(matplotlib.colors.to_rgb(color))
    return int((np.abs(open_pixels(picture) - wanted).sum(axis=2) < 10).sum())


def test_only_what_was_recorded_is_drawn() -> None:
    run = make_run(mfu=None, tokens_per_s=900.0)
    drawn = {kind: draw_panels(kind, [run], ENGLISH) for kind in CHARTS}
    assert [kind for kind, picture in drawn.items() if picture] == ["loss", "throughput"]
    assert count_pixels(drawn["loss"], ORANGE) == 0
    assert count_pixels(draw_panels("loss", [make_run(held_out_loss=1.0)], ENGLISH), ORANGE) > 200
    assert draw_panels("loss", [], ENGLISH) is None
    assert draw_together([make_run()], ENGLISH) is not None
    assert draw_together([Run(Path("x"), "x", {}, [], [])], ENGLISH) is None


def test_runs_lie_over_each_other_in_one_panel() -> None:
    one, two, three = (draw_together([make_run(name) for name in names], ENGLISH) for names in ("a", "ab", "abc"))
    assert open_pixels(one).shape == open_pixels(three).shape
    assert [count_pixels(picture, GREEN) > 200 for picture in (one, two, three)] == [False, False, True]
    many = draw_together([make_run(str(number)) for number in range(len(COLORS) + 2)], ENGLISH)
    assert many is not None


def find_height(picture: bytes | None, color: str) -> int:
    wanted = 255 * np.array(matplotlib.colors.to_rgb(color))
    is_near = np.abs(open_pixels(picture) - wanted).sum(axis=2) < 10
    return int(is_near.sum(axis=1).argmax())


def test_a_line_lies_at_its_value_on_either_axis() -> None:
    """Held-out loss 1 between a training loss of 10 and of 0.1: half way up by logarithms, near the bottom else."""
    rows = [{"step": step, "loss": 10.0 if step < 30 else 0.1, "held_out_loss": 1.0} for step in range(1, 60)]
    run = Run(Path("r"), "r", {}, rows, [])
    logarithmic, linear = (
        draw_panels("loss", [run], Style(RUN_WORDS["en"], window=1, is_log=is_log)) for is_log in (True, False)
    )
    places = []
    for picture in (logarithmic, linear):
        is_blue = np.abs(open_pixels(picture) - 255 * np.array(matplotlib.colors.to_rgb(BLUE))).sum(axis=2) < 10
        rows_of_blue = np.flatnonzero(is_blue.sum(axis=1) > 100)
        top, bottom = rows_of_blue[0], [row for row in rows_of_blue if row < 0.72 * len(is_blue)][-1]
        places.append((bottom - find_height(picture, ORANGE)) / (bottom - top))
    assert places[0] == pytest.approx(0.5, abs=0.03)
    assert places[1] == pytest.approx(0.9 / 9.9, abs=0.03)


def test_the_legend_says_when_not_every_step_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    original = charts._name_steps

    def name_steps(steps: np.ndarray, style: Style) -> str:
        said.append(original(steps, style))
        return said[-1]

    monkeypatch.setattr(charts, "_name_steps", name_steps)
    for stride in (1, 17):
        draw_panels("loss", [make_run(stride=stride)], ENGLISH)
    assert said == ["every step", "one step in 17"]


def test_a_window_is_counted_in_steps() -> None:
    values, style = np.array([1.0, 3.0, 5.0, 7.0]), Style(RUN_WORDS["en"], window=20)
    assert charts._smooth(np.array([10, 20, 30, 40]), values, style).tolist() == [1.0, 2.0, 4.0, 6.0]


def test_one_thread_at_a_time_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib's settings are those of the process: fonts of two languages would be mixed."""
    is_locked: list[bool] = []

    def draw(axis: Any, run: Run, style: Style) -> None:
        is_locked.append(charts.DRAWING.locked())

    monkeypatch.setitem(CHARTS, "loss", ("loss", draw))
    draw_panels("loss", [make_run("a"), make_run("b")], ENGLISH)
    assert is_locked == [True, True]
    assert not charts.DRAWING.locked()


def test_both_languages_name_the_same() -> None:
    assert RUN_WORDS["en"].keys() == RUN_WORDS["zh"].keys()
    assert {f"{kind} chart" for kind in CHARTS} <= RUN_WORDS["en"].keys()
