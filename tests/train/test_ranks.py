"""How many processes share a step changes nothing but the order of sums."""

import json
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.runs import read_metrics
from tests.launch import ROOT, environment, run_training

NUM_STEPS = 3
TRAINED_TOWER = "vision_learning_rate=2e-4"


@pytest.fixture(scope="module")
def data_file(easy_vqa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations about pictures and 8 without any: some ranks meet micro-batches of text alone."""
    rows = json.loads((easy_vqa_folder / "vqa_train.json").read_text(encoding="utf-8"))[:24]
    rows += [row for row in json.loads((easy_vqa_folder / "text_train.json").read_text()) if "template" not in row][:8]
    file = tmp_path_factory.mktemp("data") / "mixed.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def write_config(folder: Path, data_file: Path, images: Path) -> Path:
    """Write what the runs of this file have in common."""
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
        "warmup_ratio": 0.0,
        "dtype": "float32",
    }
    config = folder / "short.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
    return config


def train_few_steps(
    folder: Path, data_file: Path, images: Path, num_ranks: int, *changes: str
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Return the metrics and the final weights of a short run."""
    config = write_config(folder, data_file, images)
    finished = run_training(folder, num_ranks, str(config), *changes)
    assert finished.returncode == 0, finished.stderr
    run = folder / "runs/short"
    return read_metrics(run / "metrics.jsonl"), load_file(run / "final/model.safetensors")


LORA = ("train=lora", "lora_rank=6", "lora_alpha=12")
KINDS: dict[str, tuple[str, ...]] = {
    "full": ("train=full", TRAINED_TOWER),
    "lora": LORA,
    "projector": ("train=projector",),
    "lora over 4 bits": (*LORA, "bits=4"),
    "lora and vocabulary": (*LORA, "lora_vocabulary=true"),
}
# (ranks, parallel, checkpoint_layers); one process is (1, fsdp, 0)
VARIANTS = [(2, "fsdp", 0), (2, "ddp", 3), (3, "fsdp", 2), (3, "hsdp", 0)]
Gradients = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def gradients(
    data_file: Path, easy_vqa_folder: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Gradients:
    """The first step's loss and gathered gradients of every kind, on every number of ranks."""
    folder = tmp_path_factory.mktemp("gradients")
    config = write_config(folder, data_file, easy_vqa_folder / "images")
    for num_ranks in (1, 2, 3):
        ways = [way for way in [(1, "fsdp", 0), *VARIANTS] if way[0] == num_ranks]
        variants = {
            f"{kind} {way}": [
                *settings,
                f"model={tiny_model_folder}",
                f"parallel={way[1]}",
                f"checkpoint_layers={way[2]}",
            ]
            for kind, settings in KINDS.items()
            for way in ways
        }
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        finished = subprocess.run(
            [*launcher, str(ROOT / "tests/train/step_gradients.py"), str(folder), str(config), json.dumps(variants)],
            cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
    return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("way", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_reproduce_the_losses_and_gradients_of_one_process(
    gradients: Gradients, kind: str, way: tuple[int, str, int]
) -> None:
    """Some ranks have micro-batches of text alone, and micro-batches are accumulated: neither may matter."""
    expected, found = gradients[f"{kind} {(1, 'fsdp', 0)}"], gradients[f"{kind} {way}"]
    assert found.keys() == expected.keys()
    assert len(expected) > 4
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        # The absolute part is for key biases, whose true gradient is zero: a softmax does not see them.
        tolerance = 1e-6 * gradient.abs().max().item() + 1e-8 * largest
        worst = (found[name] - gradient).abs().max().item()
        assert worst <= tolerance, f"{name}: {worst} of {gradient.abs().max().item()}"


@pytest.fixture(scope="module")
def one_rank(
    data_file: Path, easy_vqa_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The run all others are compared with: one process, four or more micro-batches a step."""
    images = easy_vqa_folder / "images"
    metrics, weights = train_few_steps(tmp_path_factory.mktemp("one"), data_file, images, 1, TRAINED_TOWER)
    assert all(row["micro_batches"] >= 4 for row in metrics)
    return metrics, weights


@pytest.mark.parametrize(
    ("num_ranks", "change"),
    [
        pytest.param(2, "parallel=ddp", id="2 ranks, a copy each"),
        pytest.param(2, "parallel=fsdp", id="2 ranks, sharded"),
        pytest.param(3, "parallel=fsdp", id="3 ranks, sharded unevenly"),
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
    images = easy_vqa_folder / "images"
    metrics, weights = train_few_steps(tmp_path, data_file, images, num_ranks, TRAINED_TOWER, change)
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


def test_two_machines_reproduce_one(
    one_rank: tuple[list[dict], dict[str, torch.Tensor]], data_file: Path, easy_vqa_folder: Path, tmp_path: Path
) -> None:
    """Two torchrun agents of two ranks each: sharded inside a machine, replicated across."""
    config = write_config(tmp_path, data_file, easy_vqa_folder / "images")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
    ]
    command = [*launcher, f"--rdzv-endpoint={endpoint}", "--rdzv-id=two", str(ROOT / "train/main.py"), str(config)]
    command += [TRAINED_TOWER, "parallel=hsdp"]
    agents = [
        subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for agent in agents:
        _, errors = agent.communicate(timeout=300)
        assert agent.returncode == 0, errors
    metrics = read_metrics(tmp_path / "runs/short/metrics.jsonl")
    assert len(metrics[0]["peak_memory_bytes"]) == 4
    for row, expected_row in zip(metrics, one_rank[0], strict=True):
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(expected_row["grad_norm"], rel=1e-5)


def test_loss_falls(one_rank: tuple[list[dict], dict[str, torch.Tensor]]) -> None:
    losses = [row["loss"] for row in one_rank[0]]
    assert all(later < earlier for earlier, later in pairwise(losses)), losses


def test_bfloat16_trains_float32_weights(
    data_file: Path, easy_vqa_folder: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Trained weights stay in fp32 whatever computes them: small updates would vanish in bf16."""
    config = write_config(tmp_path, data_file, easy_vqa_folder / "images")
    changes = (*LORA, f"model={tiny_model_folder}", "dtype=bfloat16", "checkpoint_layers=2", "lora_dropout=0.1")
    finished = run_training(tmp_path, 2, str(config), *changes)
    assert finished.returncode == 0, finished.stderr
    metrics = read_metrics(tmp_path / "runs/short/metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    factors = load_file(tmp_path / "runs/short/final/adapter_model.safetensors")
    assert len(factors) > 4
    for name, factor in factors.items():
        assert factor.dtype == torch.float32, name
        assert not torch.equal(factor.bfloat16().float(), factor), name
