"""How many processes share a step changes nothing but the order of sums."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import run_training
from train.metrics import read_metrics

NUM_STEPS = 3


@pytest.fixture(scope="module")
def data_file(easy_vqa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations about pictures and 8 without any: some ranks meet micro-batches of text alone."""
    rows = json.loads((easy_vqa_folder / "vqa_train.json").read_text(encoding="utf-8"))[:24]
    rows += [row for row in json.loads((easy_vqa_folder / "text_train.json").read_text()) if "template" not in row][:8]
    file = tmp_path_factory.mktemp("data") / "mixed.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def train_few_steps(
    folder: Path, data_file: Path, images: Path, num_ranks: int, *changes: str
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Return the metrics and the final weights of a short run."""
    settings = {
        "name": "short",
        "train": "full",
        "model": "tiny",
        "data": str(data_file),
        "image_folder": str(images),
        "branched": True,
        "max_tokens": 512,
        "micro_batch_tokens": 600,
        "batch_size": 8,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-3,
        "vision_learning_rate": 2e-4,
        "warmup_ratio": 0.0,
        "dtype": "float32",
    }
    config = folder / "short.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
    finished = run_training(folder, num_ranks, str(config), *changes)
    assert finished.returncode == 0, finished.stderr
    run = folder / "runs/short"
    return read_metrics(run / "metrics.jsonl"), load_file(run / "final/model.safetensors")


@pytest.fixture(scope="module")
def one_rank(
    data_file: Path, easy_vqa_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The run all others are compared with: one process, four or more micro-batches a step."""
    metrics, weights = train_few_steps(tmp_path_factory.mktemp("one"), data_file, easy_vqa_folder / "images", 1)
    assert all(row["micro_batches"] >= 4 for row in metrics)
    return metrics, weights


@pytest.mark.parametrize(
    ("num_ranks", "change"),
    [
        pytest.param(2, "shard_size=1", id="2 ranks, a copy each"),
        pytest.param(2, "shard_size=0", id="2 ranks, sharded"),
        pytest.param(3, "shard_size=0", id="3 ranks, sharded unevenly"),
        pytest.param(4, "shard_size=2", id="4 ranks, 2 copies of 2 shards"),
        pytest.param(1, "micro_batch_tokens=8192", id="1 rank, no accumulation"),
    ],
)
def test_ranks_and_accumulation_do_not_change_the_result(
    one_rank: tuple[list[dict], dict[str, torch.Tensor]],
    data_file: Path,
    easy_vqa_folder: Path,
    tmp_path: Path,
    num_ranks: int,
    change: str,
) -> None:
    expected_metrics, expected = one_rank
    metrics, weights = train_few_steps(tmp_path, data_file, easy_vqa_folder / "images", num_ranks, change)
    assert metrics[0]["micro_batches"] < expected_metrics[0]["micro_batches"]
    for row, expected_row in zip(metrics, expected_metrics, strict=True):
        assert row["supervised_tokens"] == expected_row["supervised_tokens"]
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(expected_row["grad_norm"], rel=1e-5)
    assert weights.keys() == expected.keys()
    # Adam divides by the gradient's own size, so where it is nearly zero, rounding moves a weight more than elsewhere:
    # 8e-6 at most where steps are 1e-3, and 4e-10 on average.
    difference = torch.cat([(weights[name] - expected[name]).flatten() for name in expected])
    assert difference.abs().mean() < 1e-8
    assert difference.abs().max() < 1e-4


def test_loss_falls(one_rank: tuple[list[dict], dict[str, torch.Tensor]]) -> None:
    losses = [row["loss"] for row in one_rank[0]]
    assert all(later < earlier for earlier, later in pairwise(losses)), losses


def test_bfloat16_trains_float32_weights(data_file: Path, easy_vqa_folder: Path, tmp_path: Path) -> None:
    """Trained weights stay in fp32 whatever computes them: small updates would vanish in bf16."""
    metrics, weights = train_few_steps(tmp_path, data_file, easy_vqa_folder / "images", 2, "dtype=bfloat16")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert weights["language_model.lm_head.weight"].dtype == torch.float32
    assert weights["vision_tower.post_layernorm.weight"].dtype == torch.bfloat16  # frozen: the loss does not reach it
    rounded = weights["language_model.lm_head.weight"].bfloat16().float()
    assert not torch.equal(rounded, weights["language_model.lm_head.weight"])
