"""The configuration is strict: a typo that silently became a default would cost somebody a day."""

from pathlib import Path
from typing import Any

import pytest

from train.config import TrainConfig, format_config, is_same_result, load_configs, make_config

MINIMAL: dict[str, Any] = {"name": "a", "train": "full", "data": "a.json"}
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1.0}, "unknown key 'learning_rat', did you mean 'learning_rate'"),
        ({"zzz": 1}, "unknown key 'zzz'; known are name"),
        ({"batch_size": 1.5}, "batch_size = 1.5 is a float, expected a whole number"),
        ({"batch_size": True}, "batch_size = True is a bool, expected a whole number"),
        ({"branched": 1}, "branched = 1 is a int, expected true or false"),
        ({"data": ""}, "data must be given"),
        ({"train": "everything"}, "train = 'everything', expected one of vision, language, projector, lora, full"),
        ({"epochs": -1.0}, "epochs = -1.0, expected a finite number of at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan, expected a finite number"),
        ({"batch_size": 0}, "batch_size = 0, expected more"),
        ({"warmup_ratio": 1.0}, "warmup_ratio = 1.0"),
        ({"beta2": 1.0}, "beta2 = 1.0"),
        ({"stop_at": 2.0}, "stop_at = 2.0"),
        ({"name": "../elsewhere"}, "is a folder inside runs/"),
        ({"max_tokens": 9000}, "a document must fit a micro-batch"),
        ({"eval_every": 5}, "measure on held_out, which is not given"),
        ({"stop_at": 0.5, "held_out": "b.json"}, "stop_at needs eval_every"),
        ({"train": "projector", "vision_learning_rate": 1.0}, "goes with train = 'full', not 'projector'"),
        ({"train": "projector", "projector_learning_rate": 1.0}, "goes with train = 'full' or 'lora', not 'projector'"),
        ({"train": "full", "bits": 4}, "bits = 4 are frozen weights, train = 'full' trains them"),
        ({"train": "lora", "bits": 5}, "bits = 5, expected one of 16, 8, 4"),
        ({"train": "lora", "lora_rank": 0}, "lora_rank = 0, expected more"),
        ({"train": "lora", "lora_dropout": 1.0}, "lora_dropout = 1.0 is a share"),
        ({"parallel": "zero3"}, "parallel = 'zero3', expected one of fsdp, hsdp, ddp"),
        ({"base": "vicuna"}, "base and vision_tower belong to a model, which is not given"),
    ],
)
def test_each_mistake_has_its_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^stage\.toml: ") as error:
        make_config(MINIMAL | change, "stage.toml")
    assert message in str(error.value)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    config = make_config(MINIMAL | {"data": 'quo"te\\.json', "epochs": 2, "branched": True}, "here")
    (tmp_path / "config.toml").write_text(format_config(config), encoding="utf-8")
    assert load_configs([tmp_path / "config.toml"]) == [config]


def test_a_run_is_known_again_by_what_it_learns(tmp_path: Path) -> None:
    """Not by where it runs or how often it saves; a file that another version wrote is another run."""
    config = make_config(MINIMAL, "here")
    file = tmp_path / "config.toml"
    file.write_text(format_config(config), encoding="utf-8")
    elsewhere = make_config(MINIMAL | {"parallel": "ddp", "checkpoint_layers": 3, "save_every": 7}, "here")
    assert is_same_result(file, elsewhere)
    assert not is_same_result(file, make_config(MINIMAL | {"learning_rate": 1.0}, "here"))
    file.write_text(format_config(config) + "shard_size = 1\n", encoding="utf-8")
    assert not is_same_result(file, config)


def test_overrides_apply_to_every_stage_and_are_typed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\ntrain = "full"\ndata = "x"\n', encoding="utf-8")
    files = [tmp_path / "a.toml", tmp_path / "b.toml"]
    configs = load_configs(files, ["batch_size=7", "train=projector", "branched=true", "learning_rate=1"])
    assert [(c.batch_size, c.train, c.branched, c.learning_rate) for c in configs] == [(7, "projector", True, 1.0)] * 2
    with pytest.raises(ValueError, match="need different names"):
        load_configs([files[0], files[0]])
    with pytest.raises(ValueError, match=r"neither a \.toml file nor key=value"):
        load_configs(files, ["batch_size"])
    with pytest.raises(FileNotFoundError, match=r"missing\.toml is missing"):
        load_configs([tmp_path / "missing.toml"])


def test_broken_toml_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("name = \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.toml is not TOML"):
        load_configs([tmp_path / "broken.toml"])


def test_shipped_configurations_are_valid() -> None:
    files = sorted((ROOT / "train/configs").glob("*.toml"))
    assert len(files) >= 4
    assert all(isinstance(config, TrainConfig) for config in load_configs(files))
