"""What a token may look at. The LLaMA is told by an object, so that its layers need not know.

- `CausalAttention`: B rows, each token sees itself and what came before.
- `PackedAttention`: one row that holds many documents; none sees another.
- `CachedAttention`: B rows, each token sees itself and what earlier calls stored of its row.

Shapes: B rows, T tokens, C slots of a cache, H heads, K key/value heads (H a multiple of K), d head size.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Shapes: q (B, H, T, d), k and v (B, K, T, d) -> (B, H, T, d)."""
        ...


class CausalAttention:
    """Each row on its own, every token up to the one asking."""

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class PackedAttention:
    """Documents laid end to end in one row (B = 1), attention within each document only.

    A document may also branch: its trunk (branch 0) is seen by all that follows, and each branch 1, 2, ... sees the
    trunk and itself. Independent questions about one picture share the picture's cost that way.

    Note: branches are this project's addition; official LLaVA sees the earlier turns of a conversation.
    """

    def __init__(self, cu_seqlens: list[int], branch_ids: Tensor | None = None) -> None:
        """Args:
        cu_seqlens: borders of the documents, 0 first and T last.
        branch_ids: (T,) branch of every token, or None where no document branches.
        """
        self.lengths = [end - start for start, end in pairwise(cu_seqlens)]
        if branch_ids is None:
            self.masks: list[Tensor | None] = [None] * len(self.lengths)
        else:
            self.masks = [_branch_mask(ids) for ids in branch_ids.split(self.lengths)]

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One kernel per document beats one kernel with a block mask over the row (5 x on CPU): most of it is empty.
        documents = zip(
            q.split(self.lengths, dim=2), k.split(self.lengths, dim=2), v.split(self.lengths, dim=2), self.masks,
            strict=True,
        )  # fmt: skip
        return torch.cat(
            [
                F.scaled_dot_product_attention(qi, ki, vi, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
                for qi, ki, vi, mask in documents
            ],
            dim=2,
        )


def _branch_mask(branch_ids: Tensor) -> Tensor | None:
    """(T,) -> (T, T), True where the row's token may see the column's; None for a plain causal document."""
    if not branch_ids.any():
        return None
    seen = (branch_ids == 0) | (branch_ids[:, None] == branch_ids)
    return seen.tril()


class CachedAttention:
    """New tokens see themselves and what the cache holds of their row. Their own keys and values are stored first.

    A key's slot is its position, so a token sees the slots up to its own; what padding wrote behind them it does not.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        position_ids: Tensor,
        num_slots: int,
        start: int | None = None,
    ) -> None:
        """Args:
        keys, values: of every layer, (B, K, C, d), written in place.
        position_ids: (B, T), no row beyond `num_slots`.
        num_slots: how many of the C slots to look at; more cost time, but change nothing.
        start: the first token's position where all rows have the same, which needs no index and often no mask.
        """
        self.keys, self.values, self.start = keys, values, start
        self.rows = torch.arange(len(position_ids), device=position_ids.device)[:, None]
        self.position_ids, self.num_slots = position_ids, num_slots
        self.mask: Tensor | None = None
        if start is None or (start > 0 and position_ids.shape[1] > 1):
            slots = torch.arange(num_slots, device=position_ids.device)
            self.mask = (slots <= position_ids[:, :, None])[:, None]  # (B, 1, T, num_slots)

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer_index], self.values[layer_index]
        dtype, num_tokens = q.dtype, k.shape[2]
        q, k, v = q.to(keys.dtype), k.to(keys.dtype), v.to(keys.dtype)
        if self.start is None:
            keys[self.rows, :, self.position_ids] = k.transpose(1, 2)  # indexed: (B, T, K, d)
            values[self.rows, :, self.position_ids] = v.transpose(1, 2)
        else:
            keys[:, :, self.start : self.start + num_tokens] = k
            values[:, :, self.start : self.start + num_tokens] = v
        if self.start == 0:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = keys[:, :, : self.num_slots], values[:, :, : self.num_slots]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        return out.to(dtype)
