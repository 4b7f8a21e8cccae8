"""A run that was stopped, killed or could not save goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import environment, run_training, training_command
from train.metrics import read_metrics

NUM_STEPS = 40


@pytest.fixture(scope="module")
def config_file(easy_vqa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 small steps with accumulation on 2 ranks, a checkpoint every 20."""
    rows = json.loads((easy_vqa_folder / "captions_train.json").read_text(encoding="utf-8"))[:50]
    folder = tmp_path_factory.mktemp("config")
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = {
        "name": "short",
        "train": "full",
        "model": "tiny",
        "data": str(folder / "rows.json"),
        "image_folder": str(easy_vqa_folder / "images"),
        "template": "plain",
        "augment_pixels": 2,
        "max_tokens": 100,
        "micro_batch_tokens": 160,
        "batch_size": 8,
        "epochs": 100,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-3,
        "vision_learning_rate": 2e-4,
        "dtype": "float32",
        "save_every": 20,
    }
    file = folder / "short.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
    return file


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs/short/final/model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finished = run_training(folder, 2, str(config_file))
    assert finished.returncode == 0, finished.stderr
    return folder


def kill_all(process: subprocess.Popen) -> None:
    """Kill torchrun and its ranks: they are sessions of their own, and go on when torchrun alone is killed."""
    for pid in [*list_ranks(process), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def list_ranks(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


@contextmanager
def running(folder: Path, config_file: Path) -> Iterator[subprocess.Popen]:
    """A run that the test may end as it likes, and that never outlives it."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            training_command(2, str(config_file)), cwd=folder, env=environment(), stdout=log, stderr=log
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_all(process)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def assert_same_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    expected, weights = final_weights(undisturbed), final_weights(folder)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    rows, expected_rows = (read_metrics(f / "runs/short/metrics.jsonl") for f in (folder, undisturbed))
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in expected_rows]


def test_20_and_20_steps_equal_40_after_sigkill(config_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/short"
    with running(tmp_path, config_file) as process:
        wait_until(lambda: num_lines(run / "metrics.jsonl") >= 25, process)
        kill_all(process)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000020"]
    assert not (run / "final").exists()
    finished = run_training(tmp_path, 2, str(config_file))
    assert finished.returncode == 0, finished.stderr
    assert "going on from step 20" in finished.stdout
    assert_same_as_undisturbed(tmp_path, undisturbed)


def test_killed_while_saving(config_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A half-written checkpoint has a name of its own and is never taken for one."""
    partial = tmp_path / "runs/short/checkpoints/step-000020.partial"
    with running(tmp_path, config_file) as process:
        wait_until(partial.exists, process)
        kill_all(process)
    assert not (tmp_path / "runs/short/checkpoints/step-000020").exists()
    finished = run_training(tmp_path, 2, str(config_file))
    assert finished.returncode == 0, finished.stderr
    assert not partial.exists()
    assert_same_as_undisturbed(tmp_path, undisturbed)


def test_sigterm_saves_and_exits_cleanly(config_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/short"
    with running(tmp_path, config_file) as process:
        wait_until(lambda: num_lines(run / "metrics.jsonl") >= 5, process)
        os.kill(list_ranks(process)[1], signal.SIGTERM)  # one rank alone is told; all agree
        assert process.wait(timeout=60) == 0
    assert "stopped, the same command goes on from here" in (tmp_path / "log").read_text()
    (checkpoint,) = (run / "checkpoints").iterdir()
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    assert 5 <= stopped_at < 20
    assert len(read_metrics(run / "metrics.jsonl")) == stopped_at
    finished = run_training(tmp_path, 2, str(config_file))
    assert finished.returncode == 0, finished.stderr
    assert_same_as_undisturbed(tmp_path, undisturbed)


def test_other_settings_do_not_resume_and_nothing_is_deleted(config_file: Path, undisturbed: Path) -> None:
    """A finished run is moved aside by the next one of its name; an unfinished one with other settings is refused."""
    finished = run_training(undisturbed, 1, str(config_file), "max_steps=2", "save_every=1", "stop_at=0")
    assert finished.returncode == 0, finished.stderr
    (aside,) = undisturbed.glob("runs/short-until-*")
    assert len(read_metrics(aside / "metrics.jsonl")) == NUM_STEPS
    final = undisturbed / "runs/short/final"
    final.rename(undisturbed / "somewhere")
    refused = run_training(undisturbed, 2, str(config_file), "max_steps=3")
    assert refused.returncode != 0
    assert refused.stderr.count("holds an unfinished run with other settings") == 1
    aside.rename(undisturbed / "runs/kept")
    (undisturbed / "runs/short").rename(undisturbed / "runs/other")
    (undisturbed / "runs/kept").rename(undisturbed / "runs/short")
