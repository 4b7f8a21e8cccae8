"""Weights of the LLaMA layers in 8 or 4 bits: what is stored is small, what is computed with is x's own dtype.

Only the seven linears of each layer are quantised: they are 96 % of the 7B's LLaMA. Each becomes a `QuantizedLinear`
whose frozen weight is made again at each use, forward and backward; adapters (LoRA) go on top.

    8 bits   weight = code * scale            a scale per output row
    4 bits   weight = (code - zero) * scale   a scale and a zero per group of 64 inputs

Why the 4 bits are not NF4 (Gaussian quantiles, absmax by 64, its scales in 8 bits): it has no kernel in PyTorch.
- relative error on Gaussian weights 0.0913, NF4 0.0920; with heavy tails (Student t, 5 degrees) 0.1125, NF4 0.1050
- answers of the trained tiny model that change: 2 of 9,673, NF4 2 of 9,673
- speed of a token's linears on an AVX2 core, bf16 = 1: packed 1.3, plain 0.17, NF4 0.10; of 640 tokens': packed 4.0
- bytes a weight 0.547, NF4 0.516; with embeddings, head and projector the 7B takes 3.83 GiB, the 13B 7.13
- without zeros, 0.531 bytes: 0.0953 and 0.1290; with groups of 128, 0.523 bytes: 0.1008 and 0.1339

Scales are bf16, so that FSDP2, which casts floating-point parameters to its bf16 `param_dtype`, leaves them alone.

Source: Dettmers et al. 2022, "LLM.int8()" (absmax by rows); Jacob et al. 2018 (scale and zero); Dettmers et al. 2023,
"QLoRA" (adapters on a frozen 4-bit weight).
Shapes: O output features, I input features, G groups in a row = ceil(I / 64).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.llava import Llava

GROUP_SIZE = 64
# PyTorch's kernels multiply in fp32. Where the CPU multiplies bf16, many rows are faster with the weight made again and
# one bf16 product: on an AVX512-BF16 core from 40 rows on; 641 rows take 0.38 of the time. Packed 4-bit weights cannot
# be made again: to keep both would take twice the memory.
MULTIPLIES_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
KERNEL_ROWS = 48
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class QuantizedLinear(nn.Module):
    """A frozen linear without bias. Dimension 0 of every parameter is the output rows, so that all shard alike."""

    weight_codes: nn.Parameter | None
    weight_scale: nn.Parameter | None
    weight_zero: nn.Parameter | None
    packed_codes: nn.Parameter | None
    packed_scale_zero: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bits: int, device: torch.device | str | None = None
    ) -> None:
        """Make room for the parameters; `quantize_weight` returns what goes into them.

        Raises: ValueError unless bits is 4 or 8.
        """
        super().__init__()
        _check_bits(bits)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        num_groups = -(-in_features // GROUP_SIZE)
        if bits == 8:
            self.weight_codes = _freeze(torch.empty(out_features, in_features, dtype=torch.int8, device=device))
            self.weight_scale = _freeze(torch.empty(out_features, 1, dtype=torch.bfloat16, device=device))
            self.weight_zero = None
        else:
            codes_shape, groups_shape = (out_features, num_groups, GROUP_SIZE // 2), (out_features, num_groups)
            self.weight_codes = _freeze(torch.empty(codes_shape, dtype=torch.uint8, device=device))
            self.weight_scale = _freeze(torch.empty(groups_shape, dtype=torch.bfloat16, device=device))
            self.weight_zero = _freeze(torch.empty(groups_shape, dtype=torch.uint8, device=device))
        self.packed_codes = self.packed_scale_zero = None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., I) -> (..., O).

        Raises: ValueError when the weights are packed for decoding and x is not bf16 on the CPU, or needs a gradient.
        """
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        # Elsewhere these kernels are missing, or slower than the plain product (fp16 and fp32: 4 to 20 x).
        suits_kernels = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not needs_gradient
        if self.packed_codes is not None:
            if not suits_kernels:
                raise ValueError(
                    f"weights packed for decoding multiply bf16 on the CPU without gradients, got {x.dtype} on "
                    f"{x.device}{' with a gradient' if needs_gradient else ''}: load the model again, do not pack it"
                )
            x = F.pad(x, (0, -self.in_features % GROUP_SIZE))
            rows = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.flatten(0, -2), self.packed_codes, GROUP_SIZE, self.packed_scale_zero
            )
            return rows.unflatten(0, x.shape[:-1])
        assert self.weight_codes is not None
        assert self.weight_scale is not None
        has_many_rows = MULTIPLIES_BF16 and x.numel() > KERNEL_ROWS * self.in_features
        # The 8-bit kernel reads whole vectors: past the end of a row whose length they do not divide.
        if self.bits == 8 and suits_kernels and not has_many_rows and self.in_features % GROUP_SIZE == 0:
            scale = self.weight_scale.flatten().to(x.dtype)
            rows = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.weight_codes, scale)
            return rows.unflatten(0, x.shape[:-1])
        return _FrozenProduct.apply(x, self.weight_codes, self.weight_scale, self.weight_zero)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (O, I).

        Raises: ValueError after `pack_for_decoding`.
        """
        if self.weight_codes is None or self.weight_scale is None:
            raise ValueError("weights packed for decoding cannot be read back: load the model again, do not pack it")
        return dequantize_weight(self.weight_codes, self.weight_scale, self.weight_zero, self.in_features, dtype)

    def pack_for_decoding(self) -> None:
        """Put the 4-bit codes into the layout of PyTorch's CPU kernel, which depends on the CPU, in place of ours."""
        if self.bits != 4 or self.packed_codes is not None or self.out_features % 16:  # the kernel makes 16 rows a step
            return
        assert self.weight_codes is not None
        assert self.weight_scale is not None
        assert self.weight_zero is not None
        codes = _unpack_nibbles(self.weight_codes).flatten(1).int()
        # The kernel's formula is (code - 8) * scale + offset.
        scale = self.weight_scale.float()
        scale_zero = torch.stack([scale, (8 - self.weight_zero.float()) * scale], dim=-1).to(torch.bfloat16)
        self.packed_codes = _freeze(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.packed_scale_zero = _freeze(scale_zero.transpose(0, 1).contiguous())  # (G, O, 2)
        self.weight_codes = self.weight_scale = self.weight_zero = None


class _FrozenProduct(torch.autograd.Function):
    """x @ weight.T, which keeps the codes for the backward pass and not the weight: 16 bits of it live only briefly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale, zero)
        ctx.in_features = x.shape[-1]
        return F.linear(x, dequantize_weight(codes, scale, zero, x.shape[-1], x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale, zero = ctx.saved_tensors
        return gradient @ dequantize_weight(codes, scale, zero, ctx.in_features, gradient.dtype), None, None, None


def quantize_linears(model: Llava, bits: int) -> None:
    """Replace the linears of the LLaMA's layers. On the meta device no data is touched; weights with data are kept.

    Raises: ValueError unless bits is 4 or 8 and the linears are plain ones, or for a weight that is not finite.
    """
    _check_bits(bits)
    for index, layer in enumerate(model.language_model.layers):
        for name in LINEARS:
            linear = layer.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"layer {index}'s {name} is a {type(linear).__name__}: quantise before adding to it")
            quantized = QuantizedLinear(linear.in_features, linear.out_features, bits, device="meta")
            if not linear.weight.is_meta:
                quantized.load_state_dict(quantize_weight(linear.weight, bits), assign=True)
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, quantized)


def pack_for_decoding(model: Llava) -> None:
    """Make 4-bit answers in bf16 on the CPU fast, one linear at a time; the model can then not be trained or saved.

    8 bits need no packing. Linears whose output features 16 does not divide (no released model's) keep the plain path.
    Raises: ValueError unless the model is in bf16 and on the CPU.
    """
    weight = model.language_model.lm_head.weight
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        raise ValueError(f"packing for decoding wants a bf16 model on the CPU, not {weight.dtype} on {weight.device}")
    for module in model.language_model.layers.modules():
        if isinstance(module, QuantizedLinear):
            module.pack_for_decoding()


@torch.no_grad()
def quantize_weight(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """Return a QuantizedLinear's parameters by name, computed in fp32. No weight moves by more than half a step.

    The last group of a row is filled up with zeros. A range always holds 0, so they change no scale, and 0 stays 0.
    Shapes: weight (O, I) -> 8 bits: codes (O, I) int8, scale (O, 1); 4 bits: codes (O, G, 32) uint8 with the group's
        first half in the low nibbles, scale (O, G), zero (O, G) uint8.
    Raises: ValueError for a value that is not finite, or bits other than 4 and 8.
    """
    _check_bits(bits)
    weight = weight.to(torch.float32, copy=True)  # worked on in place: most of the time goes into touching memory
    if bits == 8:
        scale = _round_up_to_bf16(weight.abs().amax(dim=1, keepdim=True) / 127)
        return {"weight_codes": weight.div_(_avoid_zero(scale)).round_().to(torch.int8), "weight_scale": scale}
    if missing := -weight.shape[1] % GROUP_SIZE:
        weight = F.pad(weight, (0, missing))
    weight = weight.unflatten(1, (-1, GROUP_SIZE))  # (O, G, 64)
    low, high = weight.aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _round_up_to_bf16((high - low) / 15)
    step = _avoid_zero(scale)
    zero = (-low / step).round()
    codes = weight.div_(step[..., None]).round_().add_(zero[..., None]).clamp_(0, 15).to(torch.uint8)
    first, second = codes.chunk(2, dim=-1)
    return {"weight_codes": first | (second << 4), "weight_scale": scale, "weight_zero": zero.to(torch.uint8)}


def dequantize_weight(
    codes: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight (O, I) that `quantize_weight`'s tensors stand for, each value rounded to `dtype` once."""
    if zero is None:
        return codes.to(dtype).mul_(scale)
    steps = _unpack_nibbles(codes).sub_(zero[..., None]).view(torch.int8)  # -15 to 15: subtracted in a byte each
    return steps.to(dtype).mul_(scale[..., None]).flatten(1)[:, :in_features]


def _unpack_nibbles(codes: Tensor) -> Tensor:
    """(O, G, 32) -> (O, G, 64)."""
    return torch.cat([codes & 15, codes >> 4], dim=-1)


def _round_up_to_bf16(value: Tensor) -> Tensor:
    """Round fp32 values of at least 0 up, never down: the largest weight must stay within reach of the largest code.

    Raises: ValueError for a value that is not finite.
    """
    if not value.isfinite().all():
        raise ValueError("the weight holds NaN or infinity: the file is damaged, copy it again")
    # A bf16 is the upper half of an fp32.
    return ((value.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _avoid_zero(scale: Tensor) -> Tensor:
    """Where all weights are 0, any divisor will do."""
    return scale.float().masked_fill(scale == 0, 1.0)


def _freeze(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits = {bits}, expected 4 or 8")
