"""LLaMA: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Source: Touvron et al. 2023; parameter names as in Hugging Face's LlamaForCausalLM.
Shapes: B rows, T tokens, D hidden size, H heads, K key/value heads, d head size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from model.attention import Attend


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int  # rows of embed_tokens and lm_head
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    num_padding_rows: int = 0  # of vocab_size, at its end: rows no word has (llava-hf pads 32000 words to 32064 rows)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_words(self) -> int:
        """How many ids the tokenizer knows; an answer is made of these."""
        return self.vocab_size - self.num_padding_rows


class Llama(nn.Module):
    """A decoder that starts from embeddings, so that image features can stand among the words."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # In training the first so many layers keep only their input, and compute the rest again in backward.
        self.checkpoint_layers = 0

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Return the final hidden states. `lm_head` is the caller's: it is wanted at few of the positions.

        Shapes: inputs_embeds (B, T, D), position_ids (B, T) -> (B, T, D).
        """
        cos, sin = rotary_tables(position_ids, self.config.head_size, self.config.rope_theta, inputs_embeds.dtype)
        hidden_states = inputs_embeds
        for index, layer in enumerate(self.layers):
            if index < self.checkpoint_layers and torch.is_grad_enabled():
                hidden_states = checkpoint(layer, hidden_states, cos, sin, attend, use_reentrant=False)
            else:
                hidden_states = layer(hidden_states, cos, sin, attend)
        return self.norm(hidden_states)


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_size = config.head_size
        key_value_size = config.num_key_value_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        # (B, T, heads * d) -> (B, heads, T, d); q has H heads, k and v have K
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(self.index, q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Normalize.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Plain autograd would also keep silu(gate): in training that is an eighth of a layer's memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


class _Normalize(torch.autograd.Function):
    """x / rms(x) * weight, keeping x for backward where plain autograd would keep it in fp32, twice as large.

    In fp32, cast back, and only then scaled: this order is what the released weights were trained with.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        inverse_rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return weight * (x32 * inverse_rms).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normalized = x.float() * inverse_rms
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normalized.to(x.dtype)).sum(dim=tuple(range(x.dim() - 1)))
        gradient32 = (gradient * weight).float()
        along = (gradient32 * normalized).mean(-1, keepdim=True)
        x_gradient = (gradient32 - normalized * along).mul_(inverse_rms).to(x.dtype)
        return x_gradient, weight_gradient, None


def rotary_tables(position_ids: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position's angles, computed in fp32. (B, T) -> two of (B, 1, T, d)."""
    exponents = torch.arange(0, head_size, 2, device=position_ids.device).float() / head_size
    angles = position_ids[:, None, :, None].float() * (1.0 / theta**exponents)  # (B, 1, T, d / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + d/2) of a head by its position's angle. (B, heads, T, d) -> the same.

    Note: Hugging Face pairs the halves of a head; the original LLaMA code pairs neighbours (its q and k rows differ).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
