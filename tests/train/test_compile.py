"""Layers through `torch.compile` learn what plain layers learn, and are compiled once, whatever comes."""

import json
import shutil
from pathlib import Path

import pytest

from data.runs import Row, read_metrics
from tests.launch import run_training

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")

SETTINGS = {
    "train": "lora", "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2, "warmup_ratio": 0,
    "max_tokens": 120, "batch_size": 4, "micro_batch_tokens": 240, "max_steps": 3, "checkpoint_layers": 1,
    "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(easy_vqa_folder: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compile")
    rows = json.loads((easy_vqa_folder / "captions_train.json").read_text(encoding="utf-8"))[:16]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    shutil.copytree(tiny_model_folder, folder / "model")
    files = {"model": "model", "data": "rows.json", "held_out": "rows.json"}
    files["image_folder"] = str(easy_vqa_folder / "images")
    for name in ("plain", "compiled"):
        values = {"name": name, "compile": name == "compiled", **files, **SETTINGS}
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder


def train(folder: Path, num_ranks: int, name: str, *overrides: str) -> tuple[list[Row], str]:
    finished = run_training(folder, num_ranks, f"{name}.toml", *overrides)
    assert finished.returncode == 0, finished.stderr
    return read_metrics(folder / "runs" / name / "metrics.jsonl"), finished.stderr


def test_compiled_layers_learn_what_plain_ones_learn(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With layers that are checkpointed and others, batches of many lengths, and weights gathered from another rank."""
    plain, _ = train(workplace, 2, "plain")
    monkeypatch.setenv("TORCH_LOGS", "recompiles,graph_code")
    compiled, log = train(workplace, 2, "compiled")
    assert len(plain) == len(compiled) == 3
    for row, other in zip(plain, compiled, strict=True):
        for figure in ("loss", "grad_norm"):
            assert other[figure] == pytest.approx(row[figure], rel=1e-4), figure
    assert plain[0]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-3)
    assert "TRACED GRAPH" in log  # so that layers were compiled at all
    assert "self.index ==" not in log  # so that a layer's place in the model is no code of its own

    # Without what training drops at random: the mode was not made part of the code.
    monkeypatch.delenv("TORCH_LOGS")
    start = ("model=runs/plain/final", "base=model", "lora_dropout=0.5", "learning_rate=1e-30", "name=measured")
    rerun = run_training(workplace, 1, "compiled.toml", *start)
    assert rerun.returncode == 0, rerun.stderr
    measured = read_metrics(workplace / "runs/measured/metrics.jsonl")[-1]
    assert measured["held_out_loss"] == pytest.approx(plain[-1]["held_out_loss"], rel=1e-4)
