"""A run that was stopped, killed or could not save goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from data.runs import read_metrics
from model.weights import load_llava
from tests.launch import environment, run_training, training_command

NUM_STEPS = 40


@dataclass(frozen=True)
class Case:
    """A run, and what it leaves when nothing disturbs it."""

    config_file: Path
    model: str
    undisturbed: Path


@pytest.fixture(scope="module", params=["full", "lora"])
def case(
    request: pytest.FixtureRequest,
    easy_vqa_folder: Path,
    tiny_model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    """40 small steps with accumulation on 2 ranks, a checkpoint every 20."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings: dict[str, Any] = {"micro_batch_tokens": 160, "batch_size": 8, "max_steps": NUM_STEPS, "save_every": 20}
    if request.param == "full":
        settings |= {"train": "full", "model": "tiny", "vision_learning_rate": 2e-4}
    else:
        settings |= lora_settings(tiny_model_folder) | {"parallel": "ddp"}
    config_file = write_config(folder, easy_vqa_folder, settings)
    finished = run_training(folder, 2, str(config_file))
    assert finished.returncode == 0, finished.stderr
    return Case(config_file, settings["model"], folder)


def write_config(folder: Path, easy_vqa_folder: Path, settings: dict[str, Any]) -> Path:
    """Write what a run needs on 50 pictures with captions, of which a micro-batch of 160 tokens holds 6 or 7."""
    rows = json.loads((easy_vqa_folder / "captions_train.json").read_text(encoding="utf-8"))[:50]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = {
        "name": "short",
        "data": str(folder / "rows.json"),
        "image_folder": str(easy_vqa_folder / "images"),
        "template": "plain",
        "augment_pixels": 2,
        "max_tokens": 100,
        "epochs": 100,
        "learning_rate": 1e-3,
        "dtype": "float32",
        **settings,
    }
    file = folder / "short.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
    return file


def lora_settings(base: Path) -> dict[str, Any]:
    return {"train": "lora", "model": str(base), "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1}


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def kill_all(process: subprocess.Popen) -> None:
    """Kill torchrun and its ranks: they are sessions of their own, and go on when torchrun alone is killed."""
    for pid in [*list_ranks(process), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def list_ranks(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
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
    expected, weights = (load_tensors(f / "runs/short/final") for f in (undisturbed, folder))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    rows, expected_rows = (read_metrics(f / "runs/short/metrics.jsonl") for f in (folder, undisturbed))
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in expected_rows]


def test_20_and_20_steps_equal_40_after_sigkill(case: Case, tmp_path: Path) -> None:
    run = tmp_path / "runs/short"
    with running(tmp_path, case.config_file) as process:
        checkpoint = run / "checkpoints/step-000020"
        wait_until(lambda: num_lines(run / "metrics.jsonl") >= 25 and checkpoint.exists(), process)
        kill_all(process)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000020"]
    assert not (run / "final").exists()
    finished = run_training(tmp_path, 2, str(case.config_file))
    assert finished.returncode == 0, finished.stderr
    assert "going on from step 20" in finished.stdout
    assert_same_as_undisturbed(tmp_path, case.undisturbed)


def test_a_checkpoint_is_a_model(case: Case, tmp_path: Path) -> None:
    """Its model folder holds the weights of that very step, and says what they need."""
    checkpoint = case.undisturbed / "runs/short/checkpoints/step-000020"
    dcp_to_torch_save(checkpoint / "state", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    tensors = load_tensors(checkpoint)
    final = load_tensors(case.undisturbed / "runs/short/final")
    trained = {name: tensor for name, tensor in state.items() if "/" not in name}
    assert len(state) == 4 * len(trained)
    assert {bytes_of(tensor) for tensor in trained.values()} <= {bytes_of(tensor) for tensor in tensors.values()}
    assert tensors.keys() == final.keys()
    assert any(not torch.equal(tensors[name], final[name]) for name in final)
    is_lora = (checkpoint / "adapter_config.json").exists()
    load_llava(checkpoint, base=case.model if is_lora else None)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_sigterm_saves_and_exits_cleanly(case: Case, tmp_path: Path) -> None:
    run = tmp_path / "runs/short"
    with running(tmp_path, case.config_file) as process:
        wait_until(lambda: num_lines(run / "metrics.jsonl") >= 5, process)
        os.kill(list_ranks(process)[1], signal.SIGTERM)  # one rank alone is told; all agree
        assert process.wait(timeout=60) == 0
    assert "stopped, the same command goes on from here" in (tmp_path / "log").read_text()
    (checkpoint,) = (run / "checkpoints").iterdir()
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    assert 5 <= stopped_at < 20
    assert len(read_metrics(run / "metrics.jsonl")) == stopped_at
    finished = run_training(tmp_path, 2, str(case.config_file))
    assert finished.returncode == 0, finished.stderr
    assert_same_as_undisturbed(tmp_path, case.undisturbed)


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_other_settings_do_not_resume_and_nothing_is_deleted(case: Case) -> None:
    """A finished run is moved aside by the next one of its name; an unfinished one with other settings is refused."""
    finished = run_training(case.undisturbed, 1, str(case.config_file), "max_steps=2", "save_every=1", "stop_at=0")
    assert finished.returncode == 0, finished.stderr
    (aside,) = case.undisturbed.glob("runs/short-until-*")
    assert len(read_metrics(aside / "metrics.jsonl")) == NUM_STEPS
    final = case.undisturbed / "runs/short/final"
    final.rename(case.undisturbed / "somewhere")
    refused = run_training(case.undisturbed, 2, str(case.config_file), "max_steps=3")
    assert refused.returncode != 0
    assert refused.stderr.count("holds an unfinished run with other settings") == 1
    aside.rename(case.undisturbed / "runs/kept")
    (case.undisturbed / "runs/short").rename(case.undisturbed / "runs/other")
    (case.undisturbed / "runs/kept").rename(case.undisturbed / "runs/short")
