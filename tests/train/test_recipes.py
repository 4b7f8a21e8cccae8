"""The shipped recipes say what the official scripts say, 7B and 13B the same, and nothing of the tiny data is cut."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from data.conversation import parse_turns, render_conversation
from data.rows import load_rows
from data.tokenizer import Tokenizer
from model.config import CONFIGS
from tests.conftest import TINY_TOKENIZER
from train.config import TrainConfig, load_configs
from train.optim import schedule

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "train/configs"
SIZES = ("7b", "13b")

# LLaVA's scripts/v1_5: what all of them say, and what each says (pretrain.sh, finetune.sh, finetune_lora.sh,
# finetune_task_lora.sh). 0 for max_grad_norm: their DeepSpeed settings clip nothing.
EVERYWHERE: dict[str, Any] = {
    "epochs": 1, "warmup_ratio": 0.03, "weight_decay": 0, "beta2": 0.999, "max_grad_norm": 0, "max_tokens": 2048,
    "dtype": "bfloat16", "vision_learning_rate": 0, "num_workers": 4, "branched": False, "augment_pixels": 0,
}  # fmt: skip
STAGE_2 = {"batch_size": 128, "template": "vicuna_v1", "aspect": "pad"}
LORA = {
    "train": "lora", "learning_rate": 2e-4, "projector_learning_rate": 2e-5, "lora_rank": 128, "lora_alpha": 256,
    "lora_dropout": 0.05, "lora_rslora": False, "lora_targets": "", "lora_vocabulary": False,
}  # fmt: skip
OFFICIAL: dict[str, dict[str, Any]] = {
    "pretrain": {
        "train": "projector", "learning_rate": 1e-3, "batch_size": 256, "template": "plain", "aspect": "square",
        "bits": 16,
    },
    "finetune": {"train": "full", "learning_rate": 2e-5, "projector_learning_rate": 0, "bits": 16} | STAGE_2,
    "lora": LORA | STAGE_2 | {"bits": 16},
    "qlora": LORA | STAGE_2 | {"bits": 4},
    "task_lora": LORA | STAGE_2 | {"bits": 16},
    "zh_lora": LORA | STAGE_2 | {"bits": 16, "epochs": 3},
}  # fmt: skip
STARTS = {
    "pretrain": ("lmsys/vicuna-{}-v1.5", "openai/clip-vit-large-patch14-336"),
    "finetune": ("runs/llava-{}-pretrain/final", ""),
    "lora": ("runs/llava-{}-pretrain/final", ""),
    "qlora": ("runs/llava-{}-pretrain/final", ""),
    "task_lora": ("liuhaotian/llava-v1.5-{}", ""),
    "zh_lora": ("liuhaotian/llava-v1.5-{}", ""),
}


def load_recipe(size: str, kind: str) -> TrainConfig:
    (config,) = load_configs([CONFIG_FOLDER / f"llava_{size}_{kind}.toml"])
    return config


def test_every_file_loads() -> None:
    """All at once, so no two write the same run; the names here are all there are."""
    files = sorted(CONFIG_FOLDER.glob("*.toml"))
    assert len(load_configs(files)) == len(files)
    recipes = {f"llava_{size}_{kind}" for size in SIZES for kind in OFFICIAL}
    assert {file.stem for file in files if not file.stem.startswith("tiny_")} == recipes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", OFFICIAL)
def test_recipes_are_the_official_ones(size: str, kind: str) -> None:
    config = dataclasses.asdict(load_recipe(size, kind))
    expected = EVERYWHERE | OFFICIAL[kind]
    assert {key: config[key] for key in expected} == expected
    start, tower = STARTS[kind]
    assert (config["model"], config["vision_tower"]) == (start.format(size), tower)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", OFFICIAL)
def test_recipes_fit_their_machine(size: str, kind: str) -> None:
    """Every layer recomputes its activations, and a card takes its share of an average batch in one micro-batch."""
    config = load_recipe(size, kind)
    assert config.checkpoint_layers == CONFIGS[f"llava-1.5-{size}"].text.num_hidden_layers
    assert config.peak_tflops == 209.5
    assert config.save_every > 0
    assert config.parallel == ("ddp" if kind == "qlora" else "fsdp")
    num_cards = {"qlora": 1, "finetune": 8 if size == "7b" else 16}.get(kind, 8)
    average_tokens = 600 if kind == "pretrain" else 800
    num_micro_batches = config.batch_size / num_cards * average_tokens / config.micro_batch_tokens
    assert math.ceil(num_micro_batches) == (13 if kind == "qlora" else 1)


@pytest.mark.parametrize("kind", OFFICIAL)
def test_sizes_differ_only_where_they_must(kind: str) -> None:
    small, large = (dataclasses.asdict(load_recipe(size, kind)) for size in SIZES)
    differing = {key for key in small if small[key] != large[key]}
    assert differing == {"name", "model", "checkpoint_layers"} | (
        {"micro_batch_tokens"} if kind == "finetune" else set()
    )
    assert small["name"] == large["name"].replace("13b", "7b")


@pytest.mark.parametrize("size", SIZES)
def test_schedules_are_the_official_ones(size: str) -> None:
    """558,128 rows make 2181 steps, 66 of them warm-up, 665,298 rows 5198 and 156; official logs show 2.8205e-6."""
    for kind, num_rows, num_steps, num_warmup in (("pretrain", 558_128, 2181, 66), ("finetune", 665_298, 5198, 156)):
        config = load_recipe(size, kind)
        assert math.ceil(config.epochs * num_rows / config.batch_size) == num_steps
        below, at = (schedule(step, num_steps, config.warmup_ratio) for step in (num_warmup - 1, num_warmup))
        assert below < 1 == at
    assert config.learning_rate * schedule(22, num_steps, config.warmup_ratio) == pytest.approx(2.8205e-6, rel=1e-4)


def test_tiny_recipes_cut_nothing(tiny_zh_folder: Path) -> None:
    """A row longer than max_tokens would lose its last questions, and nobody would see it."""
    tokenizer = Tokenizer(TINY_TOKENIZER)
    for file in CONFIG_FOLDER.glob("tiny_*.toml"):
        (config,) = load_configs([file])
        for row in load_rows(tiny_zh_folder.parent / Path(config.data).relative_to("runs"))[::5]:
            template = row.get("template", config.template)
            rendered = render_conversation(parse_turns(row), tokenizer, 64, template, config.branched)
            assert len(rendered) <= config.max_tokens, (file, row["id"])
