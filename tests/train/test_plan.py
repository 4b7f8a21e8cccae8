"""The plan's figures: simulated memory is real memory, the estimate is near it, and who cannot fit hears what would."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from model.config import CONFIGS, LlavaConfig  # noqa: E402
from tests.launch import environment, run_script  # noqa: E402
from train.config import TrainConfig, make_config  # noqa: E402
from train.memory import (  # noqa: E402
    LiveMemory,
    Workload,
    check_plan,
    count_weights,
    estimate_memory,
    list_changes,
    plan_workload,
)
from train.parallel import Ranks, start_fake_ranks, start_ranks  # noqa: E402
from train.plan import extrapolate, simulate  # noqa: E402
from train.stage import build_objective  # noqa: E402

NUM_RANKS = 2
SMALL = LlavaConfig(
    vision=replace(CONFIGS["tiny"].vision, num_hidden_layers=2),
    text=replace(CONFIGS["tiny"].text, vocab_size=131, hidden_size=96, intermediate_size=200, num_hidden_layers=2),
)
WORK = Workload(num_tokens=300, num_documents=2, num_micro_batches=1)
CHANGES = {
    "4 bits": {"train": "lora", "lora_rank": 8, "bits": 4, "lora_dropout": 0.1, "checkpoint_layers": 1},
    "full": {"train": "full", "vision_learning_rate": 1e-4},
}


def config_of(**changes: object) -> TrainConfig:
    return make_config({"name": "planned", "train": "lora", "data": "none.json", **changes}, "the test")


def real_peaks(ranks: Ranks) -> dict[str, int]:
    return {
        name: simulate(config_of(**change), SMALL, WORK, ranks, is_fake=False).peak for name, change in CHANGES.items()
    }


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """The first of two ranks of which the other does not exist; shared, as a process has one group."""
    yield start_fake_ranks(NUM_RANKS, NUM_RANKS, torch.device("cpu"))
    torch.distributed.destroy_process_group()


def test_simulated_memory_is_what_real_tensors_take(ranks: Ranks, tmp_path: Path) -> None:
    """Fake tensors, real tensors beside a rank that does not exist, and two real ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
    ended = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    measured = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    beside_nobody = real_peaks(ranks)
    for name, change in CHANGES.items():
        simulated = simulate(config_of(**change), SMALL, WORK, ranks).peak
        assert beside_nobody[name] == pytest.approx(simulated, rel=0.05), name
        for rank in range(NUM_RANKS):
            assert measured[rank][name] == pytest.approx(simulated, rel=0.05), name


def test_every_storage_is_counted_until_it_is_freed() -> None:
    with LiveMemory(vocab_size=7) as memory:
        memory.phase = "forward"
        kept = torch.zeros(1000)
        view = kept[:500]
        assert memory.now == 4000
        logits = torch.zeros(3, 7)
        assert memory.by_kind == {"forward": 4000, "logits": 84}
        del logits, kept
        assert memory.now == 4000, "a view keeps its storage"
        view.untyped_storage().resize_(0)
        assert memory.now == 0
        assert memory.peak == 4084
        assert memory.at_peak == {"forward": 4000, "logits": 84}


@pytest.mark.parametrize(
    ("name", "change", "num_tokens", "num_micro_batches"),
    [
        ("llava-1.5-13b", {"checkpoint_layers": 2, "lora_dropout": 0.05}, 8192, 2),
        ("llava-1.5-7b", {"checkpoint_layers": 0, "bits": 4, "parallel": "ddp"}, 4096, 1),
        ("llava-1.5-7b", {"checkpoint_layers": 1, "train": "full"}, 8192, 1),
        ("llava-1.5-7b", {"checkpoint_layers": 3, "train": "full"}, 8192, 2),
        ("llava-1.5-7b", {"checkpoint_layers": 3, "bits": 4, "parallel": "ddp"}, 4096, 2),
        ("llava-1.5-7b", {"checkpoint_layers": 3, "train": "projector"}, 8192, 1),
        ("llava-1.5-7b", {"checkpoint_layers": 3, "train": "projector", "features": "made/ahead"}, 8192, 1),
        ("llava-1.5-7b", {"checkpoint_layers": 1, "train": "language"}, 8192, 1),
    ],
)
def test_estimate_is_near_the_simulation(
    ranks: Ranks, name: str, change: dict[str, object], num_tokens: int, num_micro_batches: int
) -> None:
    sizes = replace(CONFIGS[name], text=replace(CONFIGS[name].text, num_hidden_layers=3))
    work = Workload(num_tokens, num_tokens // 2048, num_micro_batches)
    config = config_of(**change)
    estimate = estimate_memory(config, sizes, NUM_RANKS, NUM_RANKS, work)
    assert sum(estimate.values()) == pytest.approx(simulate(config, sizes, work, ranks).peak, rel=0.05)


def test_shallow_models_tell_of_deep_ones(ranks: Ranks) -> None:
    deep = replace(SMALL, text=replace(SMALL.text, num_hidden_layers=8))
    config, work = config_of(train="language", checkpoint_layers=4), replace(WORK, num_tokens=2000)
    simulated = simulate(config, deep, work, ranks).peak
    assert extrapolate(config, deep, work, ranks)(4) == pytest.approx(simulated, rel=0.01)


def test_workload_follows_the_batch() -> None:
    config = config_of(batch_size=128, micro_batch_tokens=8192)
    assert plan_workload(config, 8) == Workload(8192, 10, 2)
    assert plan_workload(replace(config, micro_batch_tokens=16384), 8) == Workload(16384, 16, 1)
    assert plan_workload(replace(config, batch_size=16, max_tokens=512), 8).num_tokens == 1024, "two short documents"


def test_what_cannot_fit_is_stopped_with_what_would(ranks: Ranks) -> None:
    sizes = CONFIGS["llava-1.5-13b"]
    config = config_of(micro_batch_tokens=16384, card_gib=24.0)
    with pytest.raises(ValueError, match=r"checkpoint_layers = \d+") as stopped:
        check_plan(config, sizes, replace(ranks, size=8, num_local=8))
    number = int(str(stopped.value).partition("checkpoint_layers = ")[2].partition(";")[0])
    check_plan(replace(config, checkpoint_layers=number), sizes, replace(ranks, size=8, num_local=8))
    with pytest.raises(ValueError, match="GiB"):
        check_plan(replace(config, checkpoint_layers=number - 1), sizes, replace(ranks, size=8, num_local=8))


def test_one_card_for_13b_is_told_of_4_bits_and_of_more_cards(ranks: Ranks) -> None:
    config = config_of(micro_batch_tokens=4096, checkpoint_layers=40, card_gib=24.0)
    with pytest.raises(ValueError, match=r"use bits = 4; or cards, at least 2 "):
        check_plan(config, CONFIGS["llava-1.5-13b"], replace(ranks, size=1, num_local=1))
    with pytest.raises(ValueError, match="a smaller model or larger cards"):
        check_plan(replace(config, card_gib=2.0), CONFIGS["llava-1.5-13b"], replace(ranks, size=1, num_local=1))


def test_changes_begin_with_the_smallest() -> None:
    changes = list_changes(config_of(max_tokens=1024, micro_batch_tokens=2048, checkpoint_layers=38), 40, 2)
    texts = [text for text, _, _ in changes]
    assert texts[:3] == ["checkpoint_layers = 39", "checkpoint_layers = 40", "micro_batch_tokens = 1792"]
    assert {"bits = 4", "cards, at least 4"} <= set(texts)


def test_tiny_runs_are_never_stopped(ranks: Ranks) -> None:
    for file in sorted((ROOT / "train/configs").glob("tiny*.toml")):
        values = {"train": "full", "dtype": "float32"} | {"name": file.stem}
        check_plan(config_of(**values), CONFIGS["tiny"], ranks)


def test_weights_are_counted_exactly() -> None:
    for change in (
        {"train": "lora", "bits": 4, "lora_targets": "q_proj,up_proj"},
        {"train": "full"},
        {"train": "lora", "features": "made/ahead"},
    ):
        config = config_of(**change)
        weights = count_weights(config, CONFIGS["tiny"])
        _, objective = build_objective(config, CONFIGS["tiny"])
        parameters = list(objective.parameters())
        assert weights.num_trained == sum(p.numel() for p in parameters if p.requires_grad)
        frozen_bytes = sum(p.nbytes for p in parameters if not p.requires_grad)
        assert weights.frozen_bytes == pytest.approx(frozen_bytes, rel=0.02), "the last group of a row is filled up"


def test_command_plans_a_stage(tmp_path: Path) -> None:
    stage = tmp_path / "stage.toml"
    stage.write_text('name = "planned"\ntrain = "language"\ndata = "none.json"\nmodel = "tiny"\nbatch_size = 64\n')
    options = ["--documents", "6400", "--tokens-per-card", "2048", "--json"]
    ended = run_script(tmp_path, "train/plan.py", str(stage), "epochs=2", *options)
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout.splitlines()[-1])
    assert plan["fits"]
    assert plan["best_checkpoint_layers"] == 0
    assert plan["tokens_per_card"] == 2048 < plan["max_tokens_per_card"]
    assert plan["extrapolated_peak_gib"] == pytest.approx(plan["peak_gib"])
    assert plan["epoch_h"] == pytest.approx(100 * plan["step_s"] / 3600)
    assert "fits 32.0" in ended.stdout


def test_unknown_sizes_are_asked_for(tmp_path: Path) -> None:
    stage = tmp_path / "stage.toml"
    stage.write_text('name = "planned"\ntrain = "lora"\ndata = "none.json"\nmodel = "someone/llava"\n')
    ended = run_script(tmp_path, "train/plan.py", str(stage))
    assert ended.returncode == 1
    assert "use --size 7b or 13b" in ended.stderr


if __name__ == "__main__":
    real = start_ranks()
    (Path(sys.argv[1]) / f"{real.rank}.json").write_text(json.dumps(real_peaks(real)))
