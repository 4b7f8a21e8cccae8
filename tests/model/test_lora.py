"""Adapters: PEFT's and the official ones load whole, merged is unmerged, and what does not fit is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.llava import Llava
from model.lora import LoraLinear, attach_adapter, load_adapter, merge_weight
from model.quantize import QuantizedLinear
from model.weights import load_llava, open_checkpoint
from tests.model.checkpoints import (
    LINEARS,
    make_model,
    make_peft_model,
    our_logits,
    their_logits,
    write_clip,
    write_hf,
    write_json,
    write_official,
    write_official_lora,
    write_vicuna,
)
from tests.model.small_llava import relative_difference

TOLERANCE = 3e-6  # fp32; measured: at most 8e-7
NUM_PADDING_ROWS = 5


@pytest.fixture(scope="module")
def llava() -> Llava:
    return make_model(seed=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, llava: Llava) -> Path:
    return write_hf(tmp_path_factory.mktemp("base") / "base", llava, NUM_PADDING_ROWS, names="disk")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(b"not a tokenizer")
    return file


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, llava: Llava) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip", llava)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": None},
        {"target_modules": ["gate_proj", "o_proj"]},
        {"target_modules": ["q_proj", "v_proj"]},  # as a list it means the vision tower's, too
        {"rank_pattern": {"mlp.up_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 9, "k_proj": 2}},
        {"target_modules": r".*language_model\.layers\.1\.mlp\.(up|down)_proj"},
        {"layers_to_transform": [0], "target_modules": ["gate_proj", "up_proj"]},
    ],
    ids=["regex", "rsLoRA", "no projector", "list", "tower too", "patterns", "one layer", "layers_to_transform"],
)
def test_peft_adapters_agree_with_peft(tmp_path: Path, llava: Llava, base: Path, changes: dict[str, Any]) -> None:
    """Merged, and beside the weights, both answer as PEFT does; without the adapter it would be another answer."""
    adapted = make_peft_model(llava, NUM_PADDING_ROWS, **changes)
    adapted.save_pretrained(tmp_path / "any-name")
    expected = their_logits(adapted)
    merged = load_llava(base, adapter=tmp_path / "any-name")
    assert relative_difference(our_logits(merged), expected) < TOLERANCE
    assert relative_difference(our_logits(load_llava(base)), expected) > 0.05

    checkpoint = open_checkpoint(tmp_path / "any-name", base=base)
    assert checkpoint.adapter is not None
    beside = load_llava(base)
    beside.load_state_dict({name: t.load() for name, t in checkpoint.tensors.items()}, strict=True)
    attach_adapter(beside, checkpoint.adapter, torch.float32, "cpu")
    assert relative_difference(our_logits(beside), expected) < TOLERANCE
    assert sum(isinstance(module, LoraLinear) for module in beside.modules()) == len(checkpoint.adapter.factors)


@pytest.mark.parametrize("bits", [8, 4])
def test_over_quantised_weights_the_adapter_stays_beside_them(
    tmp_path: Path, llava: Llava, base: Path, bits: int
) -> None:
    """What is rounded is the base alone: with the base's own rounded weights, merged or beside is the same."""
    make_peft_model(llava, NUM_PADDING_ROWS).save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    beside = load_llava(base, adapter=tmp_path / "adapter", bits=bits)
    rounded, expected = load_llava(base, bits=bits), load_llava(base, adapter=tmp_path / "adapter")
    for layer, factors in adapter.factors.items():
        linear = rounded.get_submodule(layer)
        assert isinstance(linear, QuantizedLinear)
        weight = linear.dequantize(torch.float32)
        merged = merge_weight(weight, factors.lora_A.load(), factors.lora_B.load(), factors.scaling)
        expected.get_parameter(f"{layer}.weight").data = merged
    assert relative_difference(our_logits(beside), our_logits(expected)) < TOLERANCE
    assert relative_difference(our_logits(beside), our_logits(rounded)) > 0.05


def test_old_peft_names_load(tmp_path: Path, llava: Llava, base: Path) -> None:
    """Before transformers 4.52 the language model was `language_model.model`; some files keep PEFT's `.default`."""
    adapted = make_peft_model(llava, NUM_PADDING_ROWS)
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {
        name.replace("model.model.language_model.", "model.language_model.model.")
        .replace("model.model.multi_modal_projector", "model.multi_modal_projector")
        .replace(".lora_A.", ".lora_A.default."): tensor
        for name, tensor in load_file(file).items()
    }
    assert not renamed.keys() & load_file(file).keys()
    save_file(renamed, file)
    assert relative_difference(our_logits(load_llava(base, adapter=tmp_path / "adapter")), their_logits(adapted)) < 2e-6


@pytest.mark.parametrize("base_kind", ["vicuna", "llava"])
def test_official_adapter(tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path, base_kind: str) -> None:
    """Released on Vicuna, tuned further on LLaVA; W + 1.5 B A for alpha 6 and rank 4, and a projector of its own."""
    if base_kind == "vicuna":
        base = write_vicuna(tmp_path / "base", llava, tokenizer)
    else:
        base = write_official(tmp_path / "base", llava, str(clip), False, tokenizer)
    factors = write_official_lora(tmp_path / "adapter", llava, str(clip))
    loaded = load_llava(tmp_path / "adapter", base=base)
    assert len(factors) == 2 * 7
    for name, (lora_A, lora_B) in factors.items():
        ours = name.replace("model.", "language_model.", 1)
        weight = llava.get_submodule(ours).weight
        assert isinstance(weight, Tensor)
        expected = weight.double() + 1.5 * lora_B.double() @ lora_A.double()
        assert relative_difference(loaded.get_parameter(f"{ours}.weight").double(), expected) < 1e-6
    rest = torch.load(tmp_path / "adapter" / "non_lora_trainables.bin")
    assert torch.equal(loaded.projector.linear_1.weight, rest["base_model.model.model.mm_projector.0.weight"].float())
    assert torch.equal(loaded.language_model.norm.weight, llava.language_model.norm.weight)
    assert loaded.config.chat_template == "llava_v1"


def test_merging_adds_in_fp32() -> None:
    """In half precision the product would be rounded before it is added."""
    generator = torch.Generator().manual_seed(0)
    weight, lora_A, lora_B = (torch.randn(shape, generator=generator).half() for shape in ((30, 20), (3, 20), (30, 3)))
    exact = weight.double() + 0.7 * lora_B.double() @ lora_A.double()
    assert torch.equal(merge_weight(weight, lora_A, lora_B, 0.7), exact.half())
    assert not torch.equal(weight + 0.7 * (lora_B @ lora_A), exact.half())


def test_an_adapter_says_what_it_needs(tmp_path: Path, llava: Llava, clip: Path) -> None:
    """Its `base_model_name_or_path` is a folder of somebody else's machine: never followed, only shown."""
    write_official_lora(tmp_path / "adapter", llava, str(clip))
    message = re.escape(
        f"{tmp_path / 'adapter'} is an adapter: say with --model-base (base=) what it belongs to "
        "(it was trained on './checkpoints/vicuna-7b-v1-5')"
    )
    with pytest.raises(ValueError, match=message):
        load_llava(tmp_path / "adapter")


def test_an_adapter_of_another_size_is_refused(tmp_path: Path, llava: Llava, base: Path) -> None:
    make_peft_model(llava, NUM_PADDING_ROWS).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("up_proj.lora_A.weight"):
            tensors[name] = torch.zeros(4, 64)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not fit its base") as error:
        load_llava(base, adapter=tmp_path / "adapter")
    assert "language_model.layers.1.mlp.up_proj is (112, 48) in the base, the adapter was trained on (112, 64)" in str(
        error.value
    )
    assert "7B and 13B are not exchangeable" in str(error.value)


Damage = Callable[[dict[str, Tensor], dict[str, Any]], Any]
LAYER = "base_model.model.model.language_model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, _: tensors.pop(f"{LAYER}.lora_B.weight"), "has only lora_A: a LoRA has both"),
        (
            lambda tensors, _: [tensors.pop(f"{LAYER}.lora_{side}.weight") for side in "AB"],
            "lacks matrices that adapter_config.json names: mlp.up_proj of layers 1",
        ),
        (lambda _, settings: settings.update(target_modules=[*LINEARS, "lm_head"]), "names: none of lm_head"),
        (lambda tensors, _: tensors.clear(), "holds no LoRA matrices"),
        (lambda tensors, _: tensors.update(magnitude=torch.zeros(3)), "unknown magnitude"),
        (lambda _, settings: settings.update(use_dora=True), "use_dora = True: only False is known"),
        (lambda _, settings: settings.update(peft_type="IA3"), "peft_type = 'IA3': only 'LORA'"),
        (lambda _, settings: settings.update(bias="all"), "bias = 'all': only 'none'"),
        (lambda _, settings: settings.update(lora_alpha="high"), "lora_alpha = 'high', expected a number"),
        (lambda tensors, _: tensors.update({f"{LAYER}.lora_B.weight": torch.zeros(112, 3)}), "lora_B (112, 3)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incomplete_or_foreign_adapter_is_refused(
    tmp_path: Path, llava: Llava, base: Path, damage: Damage, message: str
) -> None:
    """An adapter that loads by half answers like something between two models, and nobody sees why."""
    folder = tmp_path / "adapter"
    make_peft_model(llava, NUM_PADDING_ROWS).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    damage(tensors, settings)
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_llava(base, adapter=folder)


def test_an_adapter_without_its_matrices_is_refused(tmp_path: Path, llava: Llava, base: Path) -> None:
    make_peft_model(llava, NUM_PADDING_ROWS).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model\.safetensors or adapter_model\.bin"):
        load_adapter(tmp_path / "adapter")


def test_two_adapters_are_refused(tmp_path: Path, llava: Llava) -> None:
    make_peft_model(llava, NUM_PADDING_ROWS).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter itself: only one can be loaded"):
        load_llava(tmp_path / "adapter", adapter=tmp_path / "adapter")
