"""Records survive a kill, and the pictures show what is in them."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from data.runs import read_metrics
from train.metrics import MetricsFile, draw_curves, memory_bytes

BLUE, ORANGE, GREEN, PURPLE, RED = "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red"
PICTURES = ("loss.png", "memory.png", "throughput.png")


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


def test_memory_of_a_cpu_is_resident() -> None:
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
    memory = memory_bytes(torch.device("cpu"))
    assert memory["reserved_memory_bytes"] is None
    assert memory["peak_memory_bytes"] is not None
    assert 0.9 * resident < memory["peak_memory_bytes"] < 100 * resident


def test_memory_of_a_gpu_is_what_pytorch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {"cuda:3": 5}[str(device)])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: {"cuda:3": 7}[str(device)])
    assert memory_bytes(torch.device("cuda", 3)) == {"peak_memory_bytes": 5, "reserved_memory_bytes": 7}


def write_run(folder: Path, **recorded: Any) -> None:
    """Record 59 steps of what every run has, and of what is given."""
    metrics = MetricsFile(folder / "metrics.jsonl", first_step=0)
    for step in range(1, 60):
        row = {"step": step, "loss": 2.0 / step, "tokens_per_s": 900.0 + step, "step_s": 2.0}
        metrics.write(row | {"peak_memory_bytes": [1e9 + 1e7 * step, 2e9]} | recorded)
    metrics.close()


def count_pixels(picture: Path, color: str | tuple) -> int:
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    wanted = 255 * np.array(matplotlib.colors.to_rgb(color))
    return int((np.abs(pixels - wanted).sum(axis=1) < 10).sum())


def test_pictures_show_all_that_was_recorded(tmp_path: Path) -> None:
    held_out = {"held_out_loss": 0.3, "exact_match": 0.6}
    waits = {"data_wait_s": 0.5, "rank_wait_s": 0.1, "mfu": 0.4}
    memory = {"reserved_memory_bytes": [3e9, 4e9], "gpu_memory_used_bytes": [5e9, 6e9]}
    write_run(tmp_path, **held_out, **waits, **memory, gpu_utilization=[90.0, None], gpu_power_w=[400.0, 500.0])
    draw_curves(tmp_path, "a run")
    shown: dict[str, list[Any]] = {"loss.png": [BLUE, ORANGE, GREEN], "throughput.png": [BLUE, ORANGE, GREEN, PURPLE]}
    shown["memory.png"] = [BLUE, RED, *(matplotlib.colormaps["viridis"](share) for share in (0.0, 0.9))]
    for name, colors in shown.items():
        for color in colors:
            assert count_pixels(tmp_path / name, color) > 200, (name, color)


def test_a_line_lies_at_its_value(tmp_path: Path) -> None:
    """Waiting takes 25 % and 5 % of the steps; the axis begins at 0, so the lines' heights are as 5 to 1."""
    write_run(tmp_path, data_wait_s=0.5, rank_wait_s=0.1)
    draw_curves(tmp_path, "a run")
    pixels = np.asarray(Image.open(tmp_path / "throughput.png").convert("RGB")).astype(int)

    def find_row(color: str) -> int:
        is_near = np.abs(pixels - 255 * np.array(matplotlib.colors.to_rgb(color))).sum(axis=2) < 10
        return int(is_near.sum(axis=1).argmax())

    is_black = (pixels.sum(axis=2) < 60).sum(axis=1)
    bottom = np.flatnonzero(is_black > 0.7 * pixels.shape[1])[-1]
    assert (bottom - find_row(ORANGE)) / (bottom - find_row(PURPLE)) == pytest.approx(5, rel=0.1)


def test_a_run_on_cpus_has_its_pictures_without_what_only_gpus_record(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("mfu", "reserved_memory_bytes", "gpu_utilization", "gpu_power_w", "gpu_memory_used_bytes"))
    write_run(tmp_path, **nothing)
    draw_curves(tmp_path, "a run")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(PICTURES)
    assert count_pixels(tmp_path / "throughput.png", GREEN) == 0
    assert count_pixels(tmp_path / "memory.png", RED) == 0


def test_a_run_that_was_stopped_at_once_has_no_pictures(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl", first_step=0).close()
    draw_curves(tmp_path, "a run")
    assert list(tmp_path.glob("*.png")) == []
