"""Weights in 8 and 4 bits: what the codes are, how far a weight moves, and that every path multiplies with the same.

Shapes: O output features, I input features, G groups in a row.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import CausalAttention
from model.config import CONFIGS
from model.generate import generate
from model.llava import Llava
from model.quantize import (
    GROUP_SIZE,
    KERNEL_ROWS,
    LINEARS,
    QuantizedLinear,
    pack_for_decoding,
    quantize_linears,
    quantize_weight,
)
from tests.model.small_llava import CONFIG, make_llava, make_prompt, relative_difference

# Some three times what is measured (0.0061 at most, up to 4096 x 4096), as max|a - b| / max|b|, between a kernel and
# the plain path in bf16: the plain path rounds the weights first, and the 4-bit kernel's offset of a group is rounded.
KERNEL_TOLERANCE = 0.02
GRADIENT_TOLERANCE = 1e-6
GIB = 2**30

# One row each; 150 inputs are two groups and 22 of a third, where a partial group ends.
ROWS = {
    "gaussian": torch.randn(150, generator=torch.Generator().manual_seed(0)) * 0.02,
    "heavy tails": torch.distributions.Cauchy(0.0, 0.02).icdf(
        torch.rand(150, generator=torch.Generator().manual_seed(1)) * 0.998 + 0.001
    ),
    "all zero": torch.zeros(150),
    "constant": torch.full((150,), 0.7),
    "negative constant": torch.full((150,), -0.7),
    "one outlier": torch.full((150,), 0.001).index_fill(0, torch.tensor(3), -9.0),
    "only the partial group": torch.cat([torch.zeros(128), torch.linspace(0.5, 0.6, 22)]),
    "a zero that is no whole step": torch.linspace(-0.37, 1.0, 150),
    "tiny": torch.linspace(-1e-30, 2e-30, 150),
    "huge": torch.linspace(-1e30, 2e30, 150),
}


def make_linear(out_features: int, in_features: int, bits: int, seed: int = 0) -> tuple[QuantizedLinear, Tensor]:
    """Return a quantised linear and the fp32 weight it was made of."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05
    linear = QuantizedLinear(in_features, out_features, bits)
    linear.load_state_dict(quantize_weight(weight, bits))
    return linear, weight


def make_dequantized(model: Llava) -> Llava:
    """Return a small model whose plain linears hold what the quantised ones of `model` stand for."""
    plain = make_llava()
    state = {name: tensor for name, tensor in model.state_dict().items() if "proj.weight_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state[f"{name}.weight"] = module.dequantize(torch.float32)
    plain.load_state_dict(state)
    return plain


def test_eight_bits_by_hand() -> None:
    """The largest magnitude of a row is code 127; the scales 1/2 and 2 are bf16 exactly."""
    weight = torch.tensor([[63.5, -10.0, 0.24, 0.26], [-254.0, 3.1, 0.0, 100.0]])
    tensors = quantize_weight(weight, 8)
    assert tensors["weight_scale"].tolist() == [[0.5], [2.0]]
    assert tensors["weight_codes"].tolist() == [[127, -20, 0, 1], [-127, 2, 0, 50]]
    linear = QuantizedLinear(4, 2, 8)
    linear.load_state_dict(tensors)
    assert linear.dequantize(torch.float32).tolist() == [[63.5, -10.0, 0.0, 0.5], [-254.0, 4.0, 0.0, 100.0]]


def test_four_bits_by_hand() -> None:
    """From -2.5 to 5 in 15 steps of 0.5: zero is code 5. Byte j holds inputs j (low) and j + 32 (high) of the group."""
    weight = torch.zeros(1, 66)
    weight[0, 0], weight[0, 1], weight[0, 32], weight[0, 33] = -2.5, 5.0, 0.6, -0.4
    weight[0, 64], weight[0, 65] = 3.0, 15.0  # a second group: steps of 1, zero is code 0
    tensors = quantize_weight(weight, 4)
    assert tensors["weight_scale"].tolist() == [[0.5, 1.0]]
    assert tensors["weight_zero"].tolist() == [[5, 0]]
    assert tensors["weight_codes"][0, 0].tolist() == [0 | 6 << 4, 15 | 4 << 4] + [5 | 5 << 4] * 30
    assert tensors["weight_codes"][0, 1].tolist() == [3, 15] + [0] * 30
    linear = QuantizedLinear(66, 1, 4)
    linear.load_state_dict(tensors)
    expected = weight.clone()
    expected[0, 32], expected[0, 33] = 0.5, -0.5
    assert torch.equal(linear.dequantize(torch.float32), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_no_weight_moves_more_than_half_a_step(bits: int, row: Tensor) -> None:
    weight = torch.stack([row, row.flip(0), 3 * row])
    tensors = quantize_weight(weight, bits)
    linear = QuantizedLinear(150, 3, bits)
    linear.load_state_dict(tensors)
    moved = (linear.dequantize(torch.float32).double() - weight.double()).abs()
    steps = tensors["weight_scale"].double().repeat_interleave(150 if bits == 8 else GROUP_SIZE, dim=1)[:, :150]
    assert (moved <= steps / 2 * (1 + 1e-5)).all()
    # A step is no wider than the range asks for, but for the rounding of the scale up to a bf16.
    span = weight.abs().amax(dim=1) / 127 if bits == 8 else (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0))
    assert (steps.amax(dim=1) <= span.double() / (1 if bits == 8 else 15) * (1 + 2**-7)).all()
    assert (linear.dequantize(torch.float32)[weight == 0] == 0).all()


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.0092), (4, 0.0925)])
def test_error_on_gaussian_weights(bits: int, limit: float) -> None:
    """Relative to the weights' norm; measured 0.0083 (rows of 2048) and 0.0913."""
    linear, weight = make_linear(512, 2048, bits)
    assert float((linear.dequantize(torch.float32) - weight).norm() / weight.norm()) < limit


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_in_and_out(bits: int, dtype: torch.dtype) -> None:
    """The same numbers give the same codes in any dtype; a weight is rounded to the wanted dtype once."""
    weight = (torch.randn(5, 70, generator=torch.Generator().manual_seed(2)) * 0.05).bfloat16().half()
    tensors, twin = quantize_weight(weight.to(dtype), bits), quantize_weight(weight.to(dtype), bits)
    linear = QuantizedLinear(70, 5, bits)
    linear.load_state_dict(tensors)
    for name, tensor in quantize_weight(weight.to(dtype).float(), bits).items():
        assert torch.equal(tensors[name], tensor)
        assert torch.equal(tensors[name], twin[name])
    assert torch.equal(linear.dequantize(dtype), linear.dequantize(torch.float32).to(dtype))
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(linear(x), F.linear(x, linear.dequantize(dtype)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("multiplies_bf16", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 40)])
@pytest.mark.parametrize(("out_features", "in_features"), [(48, 64), (80, 128), (32, 192), (176, 100)])
def test_kernels_agree_with_the_plain_path(
    bits: int,
    multiplies_bf16: bool,
    shape: tuple[int, int],
    out_features: int,
    in_features: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On either kind of CPU, whichever this one is."""
    monkeypatch.setattr("model.quantize.MULTIPLIES_BF16", multiplies_bf16)
    linear, _ = make_linear(out_features, in_features, bits)
    x = torch.randn(*shape, in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = F.linear(x, linear.dequantize(torch.bfloat16))
    linear.pack_for_decoding()
    assert relative_difference(linear(x), plain) < KERNEL_TOLERANCE


@pytest.mark.parametrize("multiplies_bf16", [False, True])
def test_8_bit_kernel_is_for_few_rows_where_bf16_is_multiplied(
    multiplies_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row more takes the plain path, to the last bit; elsewhere, and with few rows, other roundings show."""
    monkeypatch.setattr("model.quantize.MULTIPLIES_BF16", multiplies_bf16)
    linear, _ = make_linear(80, 128, bits=8)
    weight = linear.dequantize(torch.bfloat16)
    x = torch.randn(1, KERNEL_ROWS + 1, 128, generator=torch.Generator().manual_seed(6)).bfloat16()
    few = x[:, 1:]
    assert torch.equal(linear(x), F.linear(x, weight)) == multiplies_bf16
    assert not torch.equal(linear(few), F.linear(few, weight))


def test_offsets_that_are_far_from_the_middle_agree() -> None:
    """All weights above 0: the zero is code 0, and the kernel's offset is 8 steps."""
    weight = torch.rand(32, 128, generator=torch.Generator().manual_seed(4)) * 0.1 + 0.03
    linear = QuantizedLinear(128, 32, 4)
    linear.load_state_dict(quantize_weight(weight, 4))
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    plain = F.linear(x, linear.dequantize(torch.bfloat16))
    linear.pack_for_decoding()
    assert linear.packed_codes is not None
    assert relative_difference(linear(x), plain) < KERNEL_TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_model_answers_like_the_plain_one(bits: int) -> None:
    """Greedy answers need the same likeliest token each time, so the logits are compared; the answer must only come."""
    model = make_llava(seed=5).bfloat16()
    quantize_linears(model, bits)
    prompts = [make_prompt("tttttt", seed=6)]
    position_ids = torch.arange(6)[None]
    with torch.no_grad():
        plain = make_dequantized(model).bfloat16()(prompts[0][None], position_ids, CausalAttention())
        pack_for_decoding(model)
        fast = model(prompts[0][None], position_ids, CausalAttention())
    assert relative_difference(fast, plain) < 2 * KERNEL_TOLERANCE  # 14 linears one after another
    assert len(generate(model, prompts, None, eos_token_id=-1, max_new_tokens=8)[0]) == 8


def test_packed_weights_do_not_train() -> None:
    model = make_llava().bfloat16()
    quantize_linears(model, 4)
    pack_for_decoding(model)
    linear = model.get_submodule("language_model.layers.0.self_attn.q_proj")
    assert isinstance(linear, QuantizedLinear)
    assert set(linear.state_dict()) == {"packed_codes", "packed_scale_zero"}  # one copy of the weights
    with pytest.raises(ValueError, match="with a gradient: load the model again"):
        linear(torch.ones(2, 48, dtype=torch.bfloat16, requires_grad=True))
    with pytest.raises(ValueError, match=r"got torch\.float32 on cpu: load the model again"):
        linear(torch.ones(2, 48))
    with pytest.raises(ValueError, match="cannot be read back"):
        linear.dequantize(torch.float32)
    pack_for_decoding(model)  # once more changes nothing


def test_packing_wants_bf16() -> None:
    model = make_llava()
    quantize_linears(model, 4)
    with pytest.raises(ValueError, match=r"bf16 model on the CPU, not torch\.float32 on cpu"):
        pack_for_decoding(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_of_the_input(bits: int) -> None:
    """It is the dequantised linear's, and what waits for the backward pass is the codes, not a 16-bit weight."""
    linear, _ = make_linear(96, 320, bits)
    x = torch.randn(2, 5, 320, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = linear(x)
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) == count_bytes(linear)
    assert count_bytes(linear) < 96 * 320 * 2 * (0.52 if bits == 8 else 0.28)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    (gradient,) = torch.autograd.grad(out, x, up)
    (expected,) = torch.autograd.grad(F.linear(x, linear.dequantize(torch.bfloat16)), x, up)
    assert torch.equal(gradient, expected)
    with torch.inference_mode():
        assert not linear(x).requires_grad


class Adapted(nn.Module):
    """LoRA without dropout: base(x) + 2 * (x A^T) B^T."""

    def __init__(self, base: nn.Module, in_features: int, out_features: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.a = nn.Parameter(torch.randn(3, in_features, generator=generator) * in_features**-0.5)
        self.b = nn.Parameter(torch.randn(out_features, 3, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * F.linear(F.linear(x, self.a), self.b)


def adapt(model: Llava) -> dict[str, Tensor]:
    """Put adapters on every linear of the LLaMA, run a loss, return the adapters' gradients by name."""
    model.requires_grad_(False)
    for index, layer in enumerate(model.language_model.layers):
        for place, name in enumerate(LINEARS):
            parent, _, child = name.rpartition(".")
            linear = layer.get_submodule(name)
            assert isinstance(linear, QuantizedLinear | nn.Linear)
            adapted = Adapted(linear, linear.in_features, linear.out_features, seed=10 * index + place)
            setattr(layer.get_submodule(parent), child, adapted)
    input_ids = torch.stack([make_prompt("t" * 11, seed=3), make_prompt("t" * 11, seed=4)])
    hidden_states = model(input_ids, torch.arange(11).expand_as(input_ids), CausalAttention())
    logits = model.language_model.lm_head(hidden_states[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_train_as_on_the_dequantised_model(bits: int) -> None:
    model = make_llava(seed=9)
    quantize_linears(model, bits)
    expected, gradients = adapt(make_dequantized(model)), adapt(model)
    assert set(gradients) == set(expected)
    assert len(gradients) == 2 * len(LINEARS) * CONFIG.text.num_hidden_layers
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert relative_difference(gradient, expected[name]) < GRADIENT_TOLERANCE, name


def count_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


# GiB of the linears, of the LLaMA and the projector, and of all with the vision tower (in 16 bits 13.16 and 24.87).
SIZES = {
    ("llava-1.5-7b", 4): (3.298, 3.826, 4.392),
    ("llava-1.5-7b", 8): (6.034, 6.562, 7.127),
    ("llava-1.5-13b", 4): (6.462, 7.132, 7.697),
    ("llava-1.5-13b", 8): (11.820, 12.490, 13.055),
}


@pytest.mark.parametrize(("name", "bits"), SIZES)
def test_bytes_of_the_released_models(name: str, bits: int) -> None:
    with torch.device("meta"):
        model = Llava(CONFIGS[name]).to(torch.bfloat16)
    quantize_linears(model, bits)
    linears = sum(count_bytes(module) for module in model.modules() if isinstance(module, QuantizedLinear))
    language = count_bytes(model.language_model) + count_bytes(model.projector)
    sizes = (linears / GIB, language / GIB, count_bytes(model) / GIB)
    assert sizes == pytest.approx(SIZES[name, bits], abs=0.001)
    if bits == 4:
        assert language <= (4.2 if name == "llava-1.5-7b" else 7.7) * GIB


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_seven_linears_are_replaced(bits: int) -> None:
    with torch.device("meta"):
        model = Llava(CONFIG)
    before = {name: parameter for name, parameter in model.named_parameters() if "_proj.weight" not in name}
    quantize_linears(model, bits)
    wanted = {f"language_model.layers.{index}.{name}" for index in (0, 1) for name in LINEARS}
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == wanted
    for name, parameter in model.named_parameters():
        assert parameter.is_meta
        assert parameter.requires_grad == (name.rpartition(".")[0] not in wanted)
        assert name.rpartition(".")[0] in wanted or "vision_tower" in name or parameter is before[name]
    # What is loaded, name for name and shape for shape, is what quantize_weight returns.
    for name in wanted:
        linear = model.get_submodule(name)
        assert isinstance(linear, QuantizedLinear)
        made = quantize_weight(torch.ones(linear.out_features, linear.in_features), bits)
        state = linear.state_dict()
        assert {key: (t.shape, t.dtype) for key, t in made.items()} == {
            key: (t.shape, t.dtype) for key, t in state.items()
        }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bits: int, value: float) -> None:
    weight = torch.zeros(3, 70, dtype=torch.float16)
    weight[1, 65] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(weight, bits)


def test_other_requests_are_refused() -> None:
    model = make_llava()
    for attempt in (
        lambda: quantize_linears(model, 3),
        lambda: QuantizedLinear(64, 16, 16),
        lambda: quantize_weight(torch.zeros(2, 64), 2),
    ):
        with pytest.raises(ValueError, match="expected 4 or 8"):
            attempt()
    quantize_linears(model, 8)
    with pytest.raises(ValueError, match=r"layer 0's self_attn\.q_proj is a QuantizedLinear"):
        quantize_linears(model, 8)
