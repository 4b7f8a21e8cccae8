"""What a token may look at. The LLaMA is told by an object, so that its layers need not know.

- `CausalAttention`: B rows, each token sees itself and what came before.
- `PackedAttention`: one row that holds many documents; none sees another.
- `model.generate.KVCache`: the same, with the keys and values of earlier calls.

Shapes: B rows, T tokens, H heads, K key/value heads (H a multiple of K), d head size.
"""

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
