"""Sizes: the named architectures are exactly the published ones, and `config.json` says everything or is refused."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from model.config import CONFIGS, LLAMA_7B, LLAMA_13B, VIT_L_14_336, LlavaConfig
from model.llama import Llama
from model.llava import Llava
from model.projector import Projector
from model.vision import VisionTower
from tests.model.small_llava import CONFIG


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers the weights hold, and in how many tensors."""
    tensors = model.state_dict().values()
    return sum(tensor.numel() for tensor in tensors), len(tensors)


def test_parameter_counts_are_the_published_ones() -> None:
    """A layer, bias or tied weight too many or too few shows in the count. On "meta" no memory is needed."""
    with torch.device("meta"):
        assert count_parameters(Llama(LLAMA_7B)) == (6_738_415_616, 291)
        assert count_parameters(Llama(LLAMA_13B)) == (13_015_864_320, 363)
        assert count_parameters(VisionTower(VIT_L_14_336)) == (303_507_456, 391)
        assert count_parameters(Projector(1024, 4096)) == (20_979_712, 4)
        assert count_parameters(Projector(1024, 5120)) == (31_467_520, 4)
        assert count_parameters(Llava(CONFIGS["llava-1.5-7b"])) == (7_062_902_784, 291 + 391 + 4)
        assert count_parameters(Llava(CONFIGS["llava-1.5-13b"])) == (13_350_839_296, 363 + 391 + 4)


def test_official_image_is_576_tokens() -> None:
    assert VIT_L_14_336.num_patches == 576


@pytest.mark.parametrize("config", [*CONFIGS.values(), CONFIG], ids=[*CONFIGS, "small"])
def test_config_survives_json(config: LlavaConfig) -> None:
    assert LlavaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_whole_number_is_a_float_size() -> None:
    """JSON writers other than Python's drop the ".0"."""
    values = CONFIG.to_dict()
    values["text_config"]["rope_theta"] = 500
    assert LlavaConfig.from_dict(values) == CONFIG


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
@pytest.mark.parametrize("value", ["absent", None, [], "sizes"])
def test_config_without_a_part_is_refused(part: str, value: Any) -> None:
    values = CONFIG.to_dict()
    values[part] = value
    if value == "absent":
        del values[part]
    with pytest.raises(ValueError, match=f"^config.json has no object '{part}': this is not a plain-llava"):
        LlavaConfig.from_dict(values)


def test_unknown_keys_are_all_named() -> None:
    """A size that is not understood would change the model: reading past it is no option."""
    values = CONFIG.to_dict()
    values["text_config"] |= {"rope_scaling": None, "attention_bias": True}
    message = "^config.json text_config has keys this model does not know: attention_bias, rope_scaling$"
    with pytest.raises(ValueError, match=message):
        LlavaConfig.from_dict(values)


def test_missing_keys_are_all_named() -> None:
    values = CONFIG.to_dict()
    del values["vision_config"]["select_layer"], values["vision_config"]["patch_size"]
    with pytest.raises(ValueError, match=r"^config\.json vision_config lacks patch_size, select_layer$"):
        LlavaConfig.from_dict(values)


@pytest.mark.parametrize(
    ("part", "name", "value", "shown"),
    [
        ("text_config", "hidden_size", "48", "'48'"),
        ("text_config", "num_key_value_heads", None, "None"),
        ("text_config", "vocab_size", 131.5, "131.5"),
        ("text_config", "rms_norm_eps", "1e-5", "'1e-5'"),
        ("text_config", "rope_theta", True, "True"),
        ("vision_config", "num_hidden_layers", True, "True"),
        ("vision_config", "image_size", [21, 21], r"\[21, 21\]"),
        ("text_config", "num_hidden_layers", -1, "-1"),
    ],
)
def test_wrong_type_is_named_with_its_value(part: str, name: str, value: Any, shown: str) -> None:
    values = CONFIG.to_dict()
    values[part][name] = value
    with pytest.raises(ValueError, match=f"^config.json {part}.{name} = {shown}, expected a (whole )?number above 0$"):
        LlavaConfig.from_dict(values)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("vision_config", "num_attention_heads", 5, "vision_config: heads do not divide hidden_size"),
        ("vision_config", "patch_size", 5, "vision_config: patch_size does not divide image_size"),
        ("vision_config", "select_layer", 0, "vision_config: select_layer is -1 or a layer before"),
        ("vision_config", "select_layer", -9, "vision_config: select_layer is -1 or a layer before"),
        ("text_config", "num_attention_heads", 7, "text_config: heads do not divide hidden_size"),
        ("text_config", "num_key_value_heads", 3, "text_config: key/value heads do not divide heads"),
    ],
)
def test_sizes_that_do_not_fit_each_other(part: str, name: str, value: int, message: str) -> None:
    """Heads enter no tensor's shape, so strict loading alone would not notice."""
    values = CONFIG.to_dict()
    values[part][name] = value
    with pytest.raises(ValueError, match=message):
        LlavaConfig.from_dict(values)
