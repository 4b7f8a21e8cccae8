"""Ranks that are killed again and again, by torchrun started again each time, leave what an undisturbed run leaves."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch import environment, run_training, training_command
from tests.train.test_resume import (
    assert_same_as_undisturbed,
    kill_all,
    list_ranks,
    lora_settings,
    num_lines,
    wait_until,
    write_config,
)
from train.checkpoint import list_checkpoints

NUM_KILLS = 20
NUM_STEPS = 70  # more than what the moments below let pass


@pytest.fixture(scope="module")
def config_file(easy_vqa_folder: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small steps with dropout and augmentation, and a checkpoint after every second one."""
    settings: dict[str, Any] = {"batch_size": 2, "micro_batch_tokens": 100, "max_steps": NUM_STEPS, "save_every": 2}
    settings |= lora_settings(tiny_model_folder)
    return write_config(tmp_path_factory.mktemp("config"), easy_vqa_folder, settings)


def test_20_kills_change_nothing(config_file: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    finished = run_training(undisturbed, 2, str(config_file))
    assert finished.returncode == 0, finished.stderr

    chance = random.Random(1)
    command = training_command(2, str(config_file))
    command.insert(command.index("--standalone"), f"--max-restarts={NUM_KILLS + 5}")
    num_interrupted_saves = 0
    killed: list[int] = []
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
        try:
            for _ in range(NUM_KILLS):
                ranks = wait_for_new_ranks(process, killed)
                wait_until(choose_moment(tmp_path / "runs/short", chance), process)
                os.kill(chance.choice(ranks), signal.SIGKILL)
                num_interrupted_saves += any(tmp_path.glob("runs/short/checkpoints/*.partial"))
                killed += ranks
            assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
        finally:
            if process.poll() is None:
                kill_all(process)
    assert num_interrupted_saves > 0
    assert_same_as_undisturbed(tmp_path, undisturbed)


def wait_for_new_ranks(process: subprocess.Popen, killed: list[int]) -> list[int]:
    """Return the ranks that torchrun has started since the last kill, as soon as there are two."""
    ranks: list[int] = []

    def are_there() -> bool:
        ranks[:] = [pid for pid in list_ranks(process) if pid not in killed]
        return len(ranks) == 2

    wait_until(are_there, process)
    return ranks


def choose_moment(run: Path, chance: random.Random) -> Callable[[], bool]:
    """Return a condition that comes true at some moment of ranks that have just been started.

    While they start, after 1 to 4 of their steps, or when they save next.
    """
    kind = chance.choice(["starting", "training", "training", "saving", "saving"])
    if kind == "starting":
        deadline = time.monotonic() + chance.uniform(0, 3)
        return lambda: time.monotonic() > deadline
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    before = last_change(metrics)
    saved = list_checkpoints(checkpoints)
    num_lines_wanted = chance.randint(1, 4) + (int(saved[-1].name.removeprefix("step-")) if saved else 0)

    def has_come() -> bool:
        if last_change(metrics) in (None, before):  # what lies there is from ranks before
            return False
        if num_lines(metrics) < num_lines_wanted:
            return False
        return kind == "training" or any(checkpoints.glob("*.partial"))

    return has_come


def last_change(file: Path) -> int | None:
    """Return when a file was written to, in nanoseconds; None where there is none."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None
