"""What a token may look at. The LLaMA is told by an object, so that its layers need not know.

- `CausalAttention`: B rows, each token sees itself and what came before.
- `PackedAttention`: one row that holds many documents; none sees another.
- `CachedAttention`: B rows, each token sees itself and what earlier calls stored of its row.
- `TrunkAttention`, `BranchedAttention`: trunks are stored, and then seen by all of their branches.
- `RecordingAttention`: causal, and remembers how much some tokens looked at others; `model/inside.py` reads it.

Shapes: B rows, T tokens, C slots of a cache, H heads, K key/value heads (H a multiple of K), d head size,
G trunks of P tokens, J branches of a trunk, A tokens that are watched.
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
        keys, values = self.keys[layer_index], self.values[layer_index]  # on CPUs in fp32: stored is cast
        if self.start is None:
            keys[self.rows, :, self.position_ids] = k.transpose(1, 2).to(keys.dtype)  # indexed: (B, T, K, d)
            values[self.rows, :, self.position_ids] = v.transpose(1, 2).to(values.dtype)
        else:
            keys[:, :, self.start : self.start + k.shape[2]] = k
            values[:, :, self.start : self.start + v.shape[2]] = v
        keys, values = keys[:, :, : self.num_slots], values[:, :, : self.num_slots]
        out = F.scaled_dot_product_attention(
            q.to(keys.dtype), keys, values, attn_mask=self.mask, is_causal=self.start == 0, enable_gqa=True
        )
        return out.to(q.dtype)


class TrunkAttention:
    """Like `CausalAttention`, and what branches will see is stored: the batch's rows become the trunks `places`."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], places: Tensor) -> None:
        """Args:
        keys, values: of every layer, (G, K, P, d), written in place.
        """
        self.keys, self.values, self.places = keys, values, places

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer_index], self.values[layer_index]
        dtype = q.dtype
        q, k, v = q.to(keys.dtype), k.to(keys.dtype), v.to(keys.dtype)
        keys[self.places], values[self.places] = k, v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).to(dtype)


class BranchedAttention:
    """New tokens of several branches, laid end to end in one row (B = 1): each sees its trunk, and its branch up to it.

    A trunk's keys lie in memory once, and the queries of all its branches meet them in one product; heads that share
    keys stand side by side there like branches. A branch's own keys are another product; one softmax spans both.
    """

    def __init__(
        self,
        trunks: tuple[Sequence[Tensor], Sequence[Tensor]],
        branches: tuple[Sequence[Tensor], Sequence[Tensor]],
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        """Args:
        trunks: keys and values of every layer, (G, K, P, d).
        branches: keys and values of every layer, (G, J, K, C, d), written in place.
        rows: the branches with new tokens, each once; j of trunk g is g * J + j.
        starts, counts: how many tokens each of them holds already, and how many are new.
        """
        (num_trunks, _, trunk_length, _), device = trunks[0][0].shape, trunks[0][0].device
        num_branches = branches[0][0].shape[1]
        lengths = torch.tensor(counts)
        columns = torch.cat([torch.arange(count) for count in counts])
        trunk, branch, slots = (
            torch.tensor(values).repeat_interleave(lengths)
            for values in ([row // num_branches for row in rows], [row % num_branches for row in rows], starts)
        )
        slots += columns
        used = trunk.unique()
        if 2 * len(used) > num_trunks:  # then to compute for all costs less than to pick out their keys
            used = torch.arange(num_trunks)
        # Products need a grid. A cell without a token looks at slot 0 of its branch, and nobody looks at it.
        cells = (torch.searchsorted(used, trunk), branch, columns)
        last_seen = torch.zeros(len(used), num_branches, max(counts), dtype=torch.long)
        last_seen[cells] = slots
        hidden = torch.arange(int(slots.max()) + 1) > last_seen[:, None, :, None, :, None]
        self.trunks, self.branches = trunks, branches
        self.hidden = hidden.to(device)  # (G, 1, J, 1, T, slots): a key's slot is its place in the branch
        self.used = None if len(used) == num_trunks else used.to(device)
        self.cells = tuple(x.to(device) for x in cells)
        self.places = tuple(x.to(device) for x in (trunk, branch, slots))
        self.position_ids = trunk_length + self.places[2][None]

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Shapes: q (1, H, N, d), k and v (1, K, N, d), N the sum of `counts` -> (1, H, N, d)."""
        trunk_keys, trunk_values, keys, values = (kind[layer_index] for kind in (*self.trunks, *self.branches))
        (trunk, branch, slots), num_slots = self.places, self.hidden.shape[-1]
        keys[trunk, branch, :, slots] = k[0].transpose(0, 1).to(keys.dtype)  # indexed: (N, K, d)
        values[trunk, branch, :, slots] = v[0].transpose(0, 1).to(keys.dtype)
        if self.used is not None:
            trunk_keys, trunk_values, keys, values = (
                x[self.used] for x in (trunk_keys, trunk_values, keys[..., :num_slots, :], values[..., :num_slots, :])
            )
        keys, values = (x[..., :num_slots, :].transpose(1, 2) for x in (keys, values))  # (G, K, J, slots, d)
        num_trunks, num_groups, num_branches = keys.shape[:3]
        _, num_heads, _, head_size = q.shape
        # Scores and their softmax are in fp32, as in fused kernels.
        queries = keys.new_zeros(
            num_trunks, num_branches, self.hidden.shape[-2], num_heads, head_size, dtype=torch.float32
        )
        queries[self.cells] = q[0].transpose(0, 1).float() * head_size**-0.5
        queries = queries.unflatten(3, (num_groups, -1)).permute(0, 3, 1, 4, 2, 5)  # (G, K, J, H / K, T, d)
        shape = queries.shape
        trunk_scores = queries.flatten(2, 4) @ trunk_keys.float().mT  # (G, K, J * H / K * T, P)
        scores = queries.flatten(3, 4) @ keys.float().mT  # (G, K, J, H / K * T, slots)
        scores = scores.unflatten(3, shape[3:5]).masked_fill_(self.hidden, -torch.inf).flatten(2, 4)
        highest = torch.maximum(trunk_scores.amax(-1, keepdim=True), scores.amax(-1, keepdim=True))
        trunk_weights, weights = trunk_scores.sub_(highest).exp_(), scores.sub_(highest).exp_()
        total = trunk_weights.sum(-1, keepdim=True) + weights.sum(-1, keepdim=True)
        trunk_weights, weights = (x.div_(total).to(values.dtype) for x in (trunk_weights, weights))
        out = weights.unflatten(2, (num_branches, -1)) @ values
        out = out.flatten(2, 3) + trunk_weights @ trunk_values
        out = out.view(shape).permute(0, 2, 4, 1, 3, 5)[self.cells]  # (G, J, T, K, H / K, d) -> (N, K, H / K, d)
        return out.flatten(1, 2).transpose(0, 1)[None].to(q.dtype)


class RecordingAttention:
    """Like `CausalAttention`, to the last bit, and how much some tokens looked at some others is kept.

    What fused kernels never write down, the softmax of q k^T / sqrt(d), is computed beside them, for these tokens only.
    """

    def __init__(self, watched: Tensor, targets: Tensor, dtype: torch.dtype = torch.float16) -> None:
        """Args:
        watched: (A,) positions of the tokens whose looks are kept.
        targets: (P,) positions of the tokens that are looked at, each once.
        dtype: what the weights are kept in, on the CPU; they are computed in fp32.
        """
        self.watched, self.targets, self.dtype = watched, targets, dtype
        self.weights: list[Tensor] = []  # of every layer, (B, H, A, P): fractions of 1
        self.shares: list[Tensor] = []  # of every layer, (B, H, A) fp32: their sums, unrounded; the rest went elsewhere

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert layer_index == len(self.weights), "one object records one forward pass"
        num_tokens, num_groups, head_size = k.shape[2], k.shape[1], k.shape[3]
        # Heads that share keys stand together.
        queries = (q[:, :, self.watched].float() * head_size**-0.5).unflatten(1, (num_groups, -1))
        scores = queries @ k[:, :, None].float().mT  # (B, K, H / K, A, d) -> (B, K, H / K, A, T)
        columns = torch.arange(num_tokens, device=k.device)
        scores = scores.masked_fill(columns > self.watched[:, None], -torch.inf)
        weights = scores.softmax(dim=-1).flatten(1, 2)[..., self.targets]  # (B, H, A, T) -> (B, H, A, P)
        self.weights.append(weights.to("cpu", self.dtype))
        self.shares.append(weights.sum(dim=-1).cpu())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
