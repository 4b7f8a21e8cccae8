"""What a user can get wrong ends in one clear message, on every rank, with a non-zero exit."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.adapter_files import LoraSettings
from model.config import CONFIGS
from model.llava import Llava
from model.lora import add_lora
from model.weights import write_lora
from tests.conftest import TINY_TOKENIZER
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


def write_adapter_of_another_base(folder: Path) -> None:
    """An adapter trained beside a LLaMA that is wider than the tiny one."""
    text = replace(CONFIGS["tiny"].text, hidden_size=160, intermediate_size=400)
    settings = LoraSettings(rank=4, alpha=8)
    with torch.device("meta"):
        wider = Llava(replace(CONFIGS["tiny"], text=text))
        add_lora(wider, settings)
    trained = (name for name in wider.state_dict() if ".lora_" in name or name.startswith("projector."))
    tensors = {name: torch.ones(wider.state_dict()[name].shape) for name in trained}
    (folder / "adapter").mkdir()
    write_lora(folder / "adapter", wider.config, tensors, settings, "wider", TINY_TOKENIZER)


LORA = ("train=lora", "lora_rank=4", "lora_alpha=8")
MISTAKES: list[tuple[Callable[[Path], None] | None, tuple[str, ...], str]] = [
    (None, ("learning_rat=1",), "unknown key 'learning_rat', did you mean 'learning_rate'?"),
    (swap_turns, (), "rows.json, row 3: turns out of order: turn 2 is from 'gpt', expected 'human'"),
    (break_one_image, ("batch_size=12",), "rows.json, row 3:"),
    (keep_one_row, (), "rows.json has 1 samples for 2 ranks: use at most 1 ranks"),
    (None, ("model=nowhere",), "'nowhere' does not exist: give a model's folder"),
    (None, (*LORA, "card_gib=0.01"), "GiB on each rank"),
    (write_adapter_of_another_base, (*LORA, "model=adapter", "base={model}"), "does not fit its"),
    (empty_answers, ("batch_size=12",), "have no supervised token"),
    (None, ("learning_rate=1e30", "max_steps=3", "warmup_ratio=0.0", "max_grad_norm=0"), "stopped before they reach"),
]


@pytest.mark.parametrize(("spoil", "arguments", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_each_mistake_has_one_message(
    workplace: Path,
    tiny_model_folder: Path,
    spoil: Callable[[Path], None] | None,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    if spoil:
        spoil(workplace)
    arguments = tuple(argument.replace("{model}", str(tiny_model_folder)) for argument in arguments)
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


def test_a_killed_rank_ends_the_others(workplace: Path) -> None:
    """It cannot say why it ended; one of the others says that it did."""
    run = subprocess.Popen(
        training_command(3, "stage.toml", "max_steps=100000", "epochs=1e9"),
        cwd=workplace, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = workplace / "runs/short/metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()):
        assert run.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert errors.count("error: another rank died without a word") == 1, errors
    assert 'main.py", line' not in errors, errors


def test_an_adapter_goes_on_only_as_what_it_is(workplace: Path, tiny_model_folder: Path) -> None:
    """A finished adapter can be trained further, with its own rank and scale; with others there is one message."""
    first = run_training(workplace, 1, "stage.toml", *LORA, f"model={tiny_model_folder}", "name=first", "max_steps=4")
    assert first.returncode == 0, first.stderr
    further = ("model=runs/first/final", f"base={tiny_model_folder}", "name=second")
    second = run_training(workplace, 2, "stage.toml", *LORA, *further, "warmup_ratio=0.0")
    assert second.returncode == 0, second.stderr
    losses = [json.loads((workplace / f"runs/{name}/metrics.jsonl").read_text().split("\n")[0])["loss"]
              for name in ("first", "second")]  # fmt: skip
    assert losses[1] < 0.9 * losses[0]  # it starts from what the first learned
    refused = run_training(workplace, 1, "stage.toml", *LORA, *further, "lora_rank=5", "name=third")
    assert refused.returncode != 0
    assert "is an adapter of (rank, scale) [(4, 2.0)]" in refused.stderr


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
