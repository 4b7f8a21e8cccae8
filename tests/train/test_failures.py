"""What a user can get wrong ends in one clear message, on every rank, with a non-zero exit."""

import fcntl
import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import environment, run_training, training_command


@pytest.fixture
def workplace(tmp_path: Path, easy_vqa_folder: Path, tiny_model_folder: Path) -> Path:
    """A folder with a small valid stage: `stage.toml`, `rows.json`, pictures."""
    rows = json.loads((easy_vqa_folder / "captions_train.json").read_text(encoding="utf-8"))[:12]
    write_rows(tmp_path, rows)
    settings = {
        "name": "short",
        "train": "projector",
        "model": str(tiny_model_folder),
        "data": "rows.json",
        "image_folder": str(easy_vqa_folder / "images"),
        "template": "plain",
        "max_tokens": 100,
        "batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "dtype": "float32",
    }
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (tmp_path / "stage.toml").write_text(text, encoding="utf-8")
    return tmp_path


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def read_rows(folder: Path) -> list[dict]:
    return json.loads((folder / "rows.json").read_text(encoding="utf-8"))


def swap_turns(folder: Path) -> None:
    rows = read_rows(folder)
    rows[3]["conversations"].append({"from": "gpt", "value": "again"})
    write_rows(folder, rows)


def break_one_image(folder: Path) -> None:
    """One of all pictures, so that one rank alone meets it."""
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    rows = read_rows(folder)
    rows[3]["image"] = str(folder / "broken.png")
    write_rows(folder, rows)


def keep_one_row(folder: Path) -> None:
    write_rows(folder, read_rows(folder)[:1])


def empty_answers(folder: Path) -> None:
    rows = read_rows(folder)
    for row in rows[:6]:
        row["conversations"][0]["value"] = "<image>\n" + "red " * 200
        row["template"] = "vicuna_v1"
    write_rows(folder, rows)


MISTAKES: list[tuple[Callable[[Path], None] | None, tuple[str, ...], str]] = [
    (None, ("learning_rat=1",), "unknown key 'learning_rat', did you mean 'learning_rate'?"),
    (swap_turns, (), "rows.json, row 3: turns out of order: turn 2 is from 'gpt', expected 'human'"),
    (break_one_image, ("batch_size=12",), "rows.json, row 3:"),
    (keep_one_row, (), "rows.json has 1 samples for 2 ranks: use at most 1 ranks"),
    (None, ("model=nowhere",), "'nowhere' does not exist: give a model's folder"),
    (None, ("shard_size=3",), "shard_size = 3 does not divide the 2 ranks"),
    (empty_answers, ("batch_size=12",), "have no supervised token"),
    (None, ("learning_rate=1e30", "max_steps=3", "warmup_ratio=0.0", "max_grad_norm=0"), "stopped before they reach"),
]


@pytest.mark.parametrize(("spoil", "arguments", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_each_mistake_has_one_message(
    workplace: Path, spoil: Callable[[Path], None] | None, arguments: tuple[str, ...], message: str
) -> None:
    if spoil:
        spoil(workplace)
    ended = run_training(workplace, 2, "stage.toml", *arguments, timeout_s=90)
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr
    assert message in errors[0]
    assert 'main.py", line' not in ended.stderr, ended.stderr  # no traceback but torchrun's own
    assert not (workplace / "runs/short/final").exists()


def test_two_runs_do_not_share_a_folder(workplace: Path) -> None:
    """Ranks that outlive a killed torchrun would otherwise write into the run that was started again."""
    (workplace / "runs").mkdir()
    with (workplace / "runs/.short.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = run_training(workplace, 1, "stage.toml", timeout_s=90)
    assert refused.returncode != 0
    assert refused.stderr.count("error: another process is training runs/short") == 1
    assert not (workplace / "runs/short").exists()


def test_weights_that_are_not_finite_do_not_train(workplace: Path, tiny_model_folder: Path) -> None:
    """A NaN stops before the optimizer step, and what was saved before stays."""
    folder = workplace / "poisoned"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (folder / name).write_bytes((tiny_model_folder / name).read_bytes())
    tensors = load_file(tiny_model_folder / "model.safetensors")
    tensors["language_model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    ended = run_training(workplace, 2, "stage.toml", "model=poisoned", timeout_s=90)
    assert ended.returncode != 0
    assert ended.stderr.count("error: the loss is nan") == 1


@pytest.mark.parametrize("limit_bytes", [100_000, 3_000_000], ids=["checkpoint", "final"])
def test_full_disk_ends_clearly_and_leaves_nothing_half_written(workplace: Path, limit_bytes: int) -> None:
    """A limit on the size of files stands in for a full disk: writing fails in the middle of a file."""
    before = run_training(workplace, 2, "stage.toml", timeout_s=90)
    assert before.returncode == 0, before.stderr
    good = (workplace / "runs/short/final/model.safetensors").read_bytes()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    save_every = 1 if limit_bytes < len(good) / 10 else 0
    ended = subprocess.run(
        training_command(2, "stage.toml", f"save_every={save_every}"),
        cwd=workplace, env=environment(), capture_output=True, text=True, timeout=90, check=False, preexec_fn=limit,
    )  # fmt: skip
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr
    assert "cannot" in errors[0]
    (aside,) = workplace.glob("runs/short-until-*")
    assert (aside / "final/model.safetensors").read_bytes() == good
    leftovers = [path for path in workplace.glob("runs/short/**/*") if path.name.endswith(".partial")]
    assert leftovers == []
    assert not (workplace / "runs/short/final").exists()
