"""Adapters: PEFT's and the official ones load whole, merged is unmerged, and what does not fit is refused.

Several beside one base answer as each does alone; what we write, PEFT reads.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.adapter_files import LoraSettings, load_adapter, merge_weight, write_adapter
from model.attention import CausalAttention
from model.convert import export_peft
from model.generate import generate
from model.llava import Llava
from model.lora import LoraLinear, SwitchedModule, add_lora, attach_adapter, merge_lora, unmerge_lora, use_adapters
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
from tests.model.small_llava import make_pixels, make_prompt, relative_difference
from tests.model.test_convert import assert_identical, load_strictly, read_adapter
from tests.model.test_parity import run_ours

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


VOCABULARY = ["multi_modal_projector", "embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, llava: Llava) -> dict[str, Path]:
    """Two that share nothing but the base: other linears, ranks and scales, and other modules trained whole."""
    folder = tmp_path_factory.mktemp("adapters")
    some = {"r": 3, "use_rslora": True, "target_modules": rf".*language_model.*\.({'|'.join(LINEARS[2:6])})"}
    make_peft_model(llava, NUM_PADDING_ROWS).save_pretrained(folder / "first")
    make_peft_model(llava, NUM_PADDING_ROWS, seed=8, modules_to_save=VOCABULARY[1:], **some).save_pretrained(
        folder / "second"
    )
    return {"first": folder / "first", "second": folder / "second"}


def load_with_adapters(base: Path, adapters: dict[str, Path], bits: int = 16) -> Llava:
    model = load_llava(base, bits=bits)
    for name, folder in adapters.items():
        attach_adapter(model, load_adapter(folder), torch.float32, "cpu", name)
    return model


@torch.no_grad()
def answer(model: Llava, rows: list[int]) -> Tensor:
    """Return logits (B, T, V) of some of five prompts, each with an image."""
    layouts = ["ttIttt", "tItttt", "tttItt", "Ittttt", "tttttI"]
    input_ids = torch.stack([make_prompt(layouts[row], seed=row) for row in rows])
    return run_ours(model, input_ids, make_pixels(5)[rows])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_each_row_answers_as_its_adapter_does_alone(base: Path, adapters: dict[str, Path], bits: int) -> None:
    """The base in its own words, too: what it says without an adapter is what it said before there was one."""
    model = load_with_adapters(base, adapters, bits)
    names = ["second", None, "first", "first", "second"]
    with use_adapters(model, names):
        mixed = answer(model, [0, 1, 2, 3, 4])
    alone = {
        None: load_llava(base, bits=bits),
        "first": load_llava(base, adapter=adapters["first"], bits=bits),
        "second": load_llava(base, adapter=adapters["second"], bits=bits),
    }
    for row, name in enumerate(names):
        expected = answer(alone[name], [row])
        assert relative_difference(mixed[row : row + 1], expected) < TOLERANCE
        with use_adapters(model, name):
            assert relative_difference(answer(model, [row]), expected) < TOLERANCE
        for other in {None, "first", "second"} - {name}:
            assert relative_difference(answer(alone[other], [row]), expected) > 0.05
    with use_adapters(model, None):
        assert torch.equal(answer(model, [0, 2]), answer(alone[None], [0, 2]))
    assert relative_difference(answer(model, [0, 2]), answer(alone["first"], [0, 2])) < TOLERANCE  # attached first


def test_rows_with_different_adapters_generate_side_by_side(base: Path, adapters: dict[str, Path]) -> None:
    """Prefill and decoding; rows of one image each, of any lengths."""
    model = load_with_adapters(base, adapters)
    prompts, names = (
        [make_prompt(layout, seed=5) for layout in ("ttIttt", "tIt", "tttttIttt")],
        ["first", None, "second"],
    )
    pixel_values = make_pixels(3)
    with use_adapters(model, names):
        together = generate(model, prompts, pixel_values, -1, 7)
    alone = []
    for row, name in enumerate(names):
        with use_adapters(model, name):
            alone += generate(model, [prompts[row]], pixel_values[row : row + 1], -1, 7)
    assert together == alone
    with use_adapters(model, "second"):
        assert generate(model, prompts, pixel_values, -1, 7) != alone


def test_mixed_rows_compile_without_a_break(base: Path, adapters: dict[str, Path]) -> None:
    """`generate` may compile its steps, for any number of rows; here they are only traced, which is what can fail."""
    llama = load_with_adapters(base, adapters).language_model
    compiled = torch.compile(run_both_kinds, backend="eager", fullgraph=True, dynamic=True)
    x = torch.randn(3, 2, 48, generator=torch.Generator().manual_seed(0))
    with use_adapters(llama, ["first", None, "second"]), torch.inference_mode():
        modules = llama.get_submodule("layers.1.self_attn.o_proj"), llama.lm_head
        assert torch.equal(compiled(*modules, x), run_both_kinds(*modules, x))


def run_both_kinds(linear: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    return head(linear(x))


def test_gradients_flow_through_mixed_rows(base: Path, adapters: dict[str, Path]) -> None:
    """Each adapter learns from its own rows: the sum of what they teach alone."""
    gradients: list[dict[str, Tensor]] = []
    input_ids = torch.stack([make_prompt("ttIttt", seed=row) for row in range(2)])
    for choices in ([["first", "second"]], [["first", None], [None, "second"]]):
        model = load_with_adapters(base, adapters).requires_grad_(False)
        factors = {name: p.requires_grad_() for name, p in model.named_parameters() if ".lora_" in name}
        for names in choices:
            with use_adapters(model, names):
                logits = run_ours(model, input_ids, make_pixels(2))
                logits[[row for row, name in enumerate(names) if name]].sin().sum().backward()
        gradients.append({name: p.grad for name, p in factors.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 2 * (7 + 4)
    for name, gradient in gradients[0].items():
        assert relative_difference(gradient, gradients[1][name]) < 1e-5, name


def test_a_choice_that_fits_no_batch_or_no_adapter_is_refused(base: Path, adapters: dict[str, Path]) -> None:
    model = load_with_adapters(base, adapters)
    input_ids = torch.stack([make_prompt("ttItt", seed=row) for row in range(2)])
    features = model.encode_images(make_pixels(2))
    with use_adapters(model, ["first", "second", None]):
        with pytest.raises(ValueError, match=r"adapters were chosen for 3 rows, but 2 came"):
            model(input_ids, torch.arange(13).expand(2, -1), CausalAttention(), features)
        with pytest.raises(ValueError, match=r"adapters were chosen for 3 rows, but 2 came \(of text, or images"):
            model.encode_images(make_pixels(2))
    with use_adapters(model, ["first"] * 3), pytest.raises(ValueError, match="chosen for 3 rows, but 2 came"):
        model(input_ids, torch.arange(13).expand(2, -1), CausalAttention(), features)
    with (
        pytest.raises(ValueError, match="no adapter 'third': the model has first, second"),
        use_adapters(model, [None, "third"]),
    ):
        pass
    with pytest.raises(ValueError, match="no adapter"), use_adapters(load_llava(base), "first"):
        pass
    # An error inside the block, too, leaves the choice as it was.
    before = answer(model, [1])
    with pytest.raises(ZeroDivisionError), use_adapters(model, "second"):
        raise ZeroDivisionError
    assert torch.equal(answer(model, [1]), before)


@pytest.mark.parametrize("name", ["first", "second"])
def test_merging_and_unmerging_a_live_model(base: Path, adapters: dict[str, Path], name: str) -> None:
    model, merged = load_with_adapters(base, adapters), load_llava(base, adapter=adapters[name])
    shared = model.state_dict()  # as another model or a mapped file may share the weights
    before = {key: tensor.clone() for key, tensor in shared.items()}
    with use_adapters(model, name):
        beside = answer(model, [0, 1])
    merge_lora(model, name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in shared.items())
    for key, tensor in model.state_dict().items():
        if key.endswith("base_layer.weight") and "layers" in key:
            assert relative_difference(tensor, merged.get_parameter(key.replace(".base_layer", ""))) < 1e-6
    assert relative_difference(answer(model, [0, 1]), beside) < TOLERANCE
    with use_adapters(model, name):
        assert relative_difference(answer(model, [0, 1]), beside) < TOLERANCE
    for other in (None, "first" if name == "second" else "second", [name, None]):
        with (
            pytest.raises(ValueError, match=f"adapter '{name}' is merged into the weights"),
            use_adapters(model, other),
        ):
            pass
    with pytest.raises(ValueError, match=f"adapter '{name}' is merged already: unmerge_lora it first"):
        merge_lora(model, name)
    unmerge_lora(model, name)
    for key, tensor in model.state_dict().items():
        assert relative_difference(tensor, before[key]) < 1e-6
    with use_adapters(model, name):
        assert relative_difference(answer(model, [0, 1]), beside) < TOLERANCE
    with pytest.raises(ValueError, match=f"adapter '{name}' is not merged, merged is None"):
        unmerge_lora(model, name)
    with pytest.raises(ValueError, match="no adapter 'third'"):
        merge_lora(model, "third")


def test_merging_into_quantised_weights_is_refused(base: Path, adapters: dict[str, Path]) -> None:
    model = load_with_adapters(base, adapters, bits=4)
    before = answer(model, [0])
    with pytest.raises(
        ValueError, match="q_proj is a QuantizedLinear, which cannot take an adapter in: leave it beside"
    ):
        merge_lora(model, "first")
    assert torch.equal(answer(model, [0]), before)


def test_attaching_what_does_not_fit_changes_nothing(tmp_path: Path, llava: Llava, base: Path) -> None:
    """All of it is checked before the first layer is touched."""
    make_peft_model(llava, NUM_PADDING_ROWS, modules_to_save=VOCABULARY).save_pretrained(tmp_path / "adapter")
    model = load_llava(base)
    names = list(model.state_dict())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    cases: list[tuple[str, str, Tensor | None]] = [
        ("model.language_model.layers.1.mlp.up_proj.lora_A.weight", r"up_proj is \(112, 48\) in the base.*\(112, 64\)",
         torch.zeros(4, 64)),
        ("lm_head.weight", r"language_model.lm_head is .*\(136, 48\).* in the base, .*\(9, 48\)", torch.zeros(9, 48)),
        ("model.multi_modal_projector.linear_2.bias", "projector is .*linear_2.bias.* in the base", None),
        ("model.language_model.norm.weight", "has trained language_model.norm.weight whole: only", torch.zeros(48)),
    ]  # fmt: skip
    for name, message, tensor in cases:
        changed = {key: value for key, value in tensors.items() if key != f"base_model.model.{name}"}
        save_file(changed if tensor is None else {**changed, f"base_model.model.{name}": tensor}, file)
        with pytest.raises(ValueError, match=message):
            attach_adapter(model, load_adapter(tmp_path / "adapter"), torch.float32, "cpu")
        assert list(model.state_dict()) == names
    save_file(tensors, file)
    for bad in ("", "a.b", "keys"):
        with pytest.raises(ValueError, match=f"an adapter cannot be called '{bad}'"):
            attach_adapter(model, load_adapter(tmp_path / "adapter"), torch.float32, "cpu", bad)
    attach_adapter(model, load_adapter(tmp_path / "adapter"), torch.float32, "cpu", "one")
    with pytest.raises(ValueError, match="the model has an adapter 'one' already"):
        attach_adapter(model, load_adapter(tmp_path / "adapter"), torch.float32, "cpu", "one")


def test_over_quantised_weights_modules_trained_whole_are_not_wrapped(base: Path, adapters: dict[str, Path]) -> None:
    """`load_llava` with an adapter has one model to answer with: the base's projector is not kept."""
    model = load_llava(base, adapter=adapters["second"], bits=4)
    assert not any(isinstance(module, SwitchedModule) for module in model.modules())
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 2 * 4


SETTINGS = [
    LoraSettings(rank=5, alpha=7),
    LoraSettings(rank=5, alpha=7, use_rslora=True, dropout=0.1, targets=("v_proj", "o_proj", "down_proj")),
]


@pytest.mark.parametrize("with_vocabulary", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=["all", "rsLoRA, some"])
def test_what_a_run_writes_is_read_by_us_and_by_peft(
    tmp_path: Path, base: Path, settings: LoraSettings, with_vocabulary: bool
) -> None:
    """As trained, over 16 and over 4 bits; the folder's other files stay."""
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "tokenizer.model").write_bytes(b"not a tokenizer")
    generator = torch.Generator().manual_seed(4)
    trained: dict[str, Tensor] = {}
    for bits in (16, 4):
        model = load_llava(base, bits=bits)
        add_lora(model, settings)
        for name, parameter in model.named_parameters():
            is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            if ".lora_" in name or name.startswith("projector.") or (with_vocabulary and is_vocabulary):
                if name not in trained:
                    trained[name] = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.data = trained[name]
        write_adapter(tmp_path / "final", trained, settings, str(base))
        loaded = load_llava(tmp_path / "final", base=base, bits=bits)
        assert relative_difference(our_logits(loaded), our_logits(model)) < TOLERANCE
        assert relative_difference(our_logits(load_llava(base, bits=bits)), our_logits(model)) > 0.05
        if bits == 16:
            adapted = PeftModel.from_pretrained(load_strictly(base), tmp_path / "final").eval()
            assert relative_difference(our_logits(model), their_logits(adapted)) < TOLERANCE
            adapted.save_pretrained(str(tmp_path / "theirs"))
            assert_identical(read_adapter(tmp_path / "final"), read_adapter(tmp_path / "theirs"))
    written = json.loads((tmp_path / "final" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["modules_to_save"] == (VOCABULARY if with_vocabulary else VOCABULARY[:1])
    assert (written["lora_dropout"], written["base_model_name_or_path"]) == (settings.dropout, str(base))
    assert (tmp_path / "final" / "tokenizer.model").is_file()


def test_an_adapter_is_written_in_fp32_and_even_when_it_has_learned_nothing(tmp_path: Path) -> None:
    """A run may stop at step 0; `convert` refuses such an adapter, a checkpoint must not."""
    layer = "language_model.layers.0.mlp.up_proj"
    tensors = {f"{layer}.lora_A.default": torch.ones(5, 48).bfloat16(), f"{layer}.lora_B.default": torch.zeros(112, 5)}
    settings = LoraSettings(rank=5, alpha=7, targets=("up_proj",))
    write_adapter(tmp_path / "adapter", tensors, settings, "base")
    written = read_adapter(tmp_path / "adapter")
    assert [(name, tensor.dtype) for name, tensor in written.items()] == [
        (f"base_model.model.model.{layer}.lora_{side}.weight", torch.float32) for side in "AB"
    ]
    with pytest.raises(ValueError, match="every lora_B is zero"):
        export_peft(load_adapter(tmp_path / "adapter"), None, tmp_path / "peft")
    with pytest.raises(ValueError, match=r"has trained language_model\.norm\.weight whole: only projector"):
        write_adapter(tmp_path / "other", {**tensors, "language_model.norm.weight": torch.ones(48)}, settings, "base")
    assert not (tmp_path / "other").exists()


def test_peft_to_ours_to_peft_keeps_the_vocabulary(tmp_path: Path, llava: Llava) -> None:
    make_peft_model(llava, NUM_PADDING_ROWS, modules_to_save=VOCABULARY).save_pretrained(tmp_path / "before")
    export_peft(load_adapter(tmp_path / "before"), None, tmp_path / "after")
    assert_identical(read_adapter(tmp_path / "after"), read_adapter(tmp_path / "before"))
