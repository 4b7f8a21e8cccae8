"""Records survive a kill, and the loss picture shows what is in them."""

from pathlib import Path

import numpy as np
from PIL import Image

from train.metrics import MetricsFile, plot_loss, read_metrics, smooth


def test_resuming_drops_steps_that_will_be_done_again_and_a_line_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first = MetricsFile(file, first_step=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": 1.0 / step})
    first.close()
    with file.open("a", encoding="utf-8") as out:
        out.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3]
    again = MetricsFile(file, first_step=2)
    again.write({"step": 3, "loss": 7.0})
    again.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(file)] == [(1, 1.0), (2, 0.5), (3, 7.0)]


def test_smooth_is_a_mean_of_what_came_before() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]


def test_picture_has_all_three_curves(tmp_path: Path) -> None:
    """Blue for training, orange for held-out loss, green for exact match."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl", first_step=0)
    for step in range(1, 60):
        row = {"step": step, "loss": 2.0 / step}
        metrics.write(row | ({"held_out_loss": 3.0 / step, "exact_match": step / 60} if step % 10 == 0 else {}))
    metrics.close()
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):
        assert (np.abs(pixels - colour).sum(axis=1) < 10).sum() > 50, colour
