"""Examples become batches: one optimizer step at a time, split over ranks and micro-batches without padding.

A *step* is `batch_size` documents drawn from a seeded stream. Everything else follows from the step's number: its
documents, how they are dealt to ranks and micro-batches, and each picture's augmentation. So the stream is the
same for any number of loader workers and ranks, and it resumes at any step. Each rank renders the text of the whole
step (that is cheap), deals all documents by length, and opens only its own pictures.

Shapes: T tokens of one packed row, A of them supervised, N images, S image size in pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.conversation import IGNORE_INDEX, Rendered
from data.dataset import ConversationDataset


@dataclass(frozen=True)
class Batch:
    """Documents laid end to end in one row: what one forward pass reads."""

    input_ids: Tensor  # (T,)
    labels: Tensor  # (T,), IGNORE_INDEX where nothing is learned
    supervised: Tensor  # (A,), places of the tokens that are learned; known here, so that no GPU must be asked
    position_ids: Tensor  # (T,), from 0 in every document
    branch_ids: Tensor | None  # (T,), None where no document branches
    cu_seqlens: list[int]  # borders of the documents: 0, ..., T
    pixel_values: Tensor | None  # (N, 3, S, S) in reading order, None where no document has a picture to encode
    patch_features: Tensor | None  # (N, P, D) of the vision tower, where pictures were encoded ahead
    rows: list[int]  # which rows of the file the documents are

    @property
    def lengths(self) -> list[int]:
        """The documents' lengths, in tokens."""
        return [end - start for start, end in pairwise(self.cu_seqlens)]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device`; from pinned memory they come while the GPU goes on working."""
        return self._change_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch with its tensors in memory that a GPU reads by itself."""
        return self._change_tensors(Tensor.pin_memory)

    def _change_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {key: change(value) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Step:
    """One rank's share of an optimizer step, and what every rank knows of the whole."""

    micro_batches: list[Batch]
    num_supervised: int  # tokens with a label in the whole step, over all ranks: the loss's denominator
    num_tokens: int  # tokens in the whole step
    num_documents: int  # documents in the whole step
    rows_without_labels: list[int]  # documents of the whole step from which nothing can be learned
    num_cut: int  # documents of the whole step that were too long, and lost their end
    waste: float  # share of the ranks' time, in tokens, that they wait for the one with the most

    def pin_memory(self) -> "Step":
        """Return the step with its batches in pinned memory; a DataLoader with `pin_memory=True` calls it."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


def pack(documents: Sequence[tuple[int, Rendered, Tensor | None]], is_encoded: bool = False) -> Batch:
    """Lay documents (row number, text, picture) end to end.

    Args:
        is_encoded: pictures are features (P, D), not pixels (3, S, S).
    """
    texts = [text for _, text, _ in documents]
    labels = _join(text.labels for text in texts)
    pictures = [picture for _, _, picture in documents if picture is not None]
    stacked = torch.stack(pictures) if pictures else None
    branch_ids = _join(text.branch_ids for text in texts)
    return Batch(
        input_ids=_join(text.input_ids for text in texts),
        labels=labels,
        supervised=(labels != IGNORE_INDEX).nonzero().squeeze(1),
        position_ids=_join(text.position_ids for text in texts),
        branch_ids=branch_ids if branch_ids.any() else None,
        cu_seqlens=[0, *np.cumsum([len(text) for text in texts]).tolist()],
        pixel_values=None if is_encoded else stacked,
        patch_features=stacked if is_encoded else None,
        rows=[row for row, _, _ in documents],
    )


def _join(lists: Iterable[list[int]]) -> Tensor:
    """Lay lists end to end, (T,). NumPy reads them in an eighth of the time that `torch.tensor` takes."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), dtype=np.int64))


def deal(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Deal documents to ranks and micro-batches, longest first to the lightest share.

    Returns: `shares[rank][micro_batch]`, lists of indices into `lengths`. All ranks have equally many micro-batches,
        about as few as keep each within `max_tokens`; none is empty (an idle rank would leave the others waiting).
    Raises: ValueError when there are fewer documents than ranks, or no dealing that keeps to `max_tokens` is found.
    """
    if len(lengths) < num_ranks:
        raise ValueError(f"{len(lengths)} samples cannot be shared by {num_ranks} ranks: raise batch_size")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    num_micro_batches = max(1, -(-sum(lengths) // (num_ranks * max_tokens)))
    while num_micro_batches * num_ranks <= len(lengths):
        bins: list[list[int]] = [[] for _ in range(num_micro_batches * num_ranks)]
        weights = [0] * len(bins)
        for index in order:
            lightest = weights.index(min(weights))
            bins[lightest].append(index)
            weights[lightest] += lengths[index]
        if max(weights) <= max_tokens:
            _even_out(bins, lengths)
            # Ranks wait for each other at every micro-batch: those that they run together are alike.
            bins.sort(key=lambda bin_: (-sum(lengths[index] for index in bin_), bin_))
            shares = [bins[rank::num_ranks] for rank in range(num_ranks)]
            return [[sorted(micro_batch) for micro_batch in share] for share in shares]
        num_micro_batches += 1
    raise ValueError(
        f"{len(lengths)} documents of up to {max(lengths)} tokens cannot be dealt to {num_ranks} ranks in "
        f"micro-batches of at most {max_tokens} tokens: raise micro_batch_tokens"
    )


def _even_out(bins: list[list[int]], lengths: Sequence[int]) -> None:
    """Swap documents between the heaviest and the lightest share as long as that brings the two closer."""
    weights = [sum(lengths[index] for index in bin_) for bin_ in bins]
    while True:
        heavy, light = weights.index(max(weights)), weights.index(min(weights))
        gap = weights[heavy] - weights[light]
        swaps = [
            (abs(gap - 2 * (lengths[i] - lengths[j])), a, b)
            for a, i in enumerate(bins[heavy])
            for b, j in enumerate(bins[light])
        ]
        left, a, b = min(swaps)
        if left >= gap:
            return
        moved = lengths[bins[heavy][a]] - lengths[bins[light][b]]
        bins[heavy][a], bins[light][b] = bins[light][b], bins[heavy][a]
        weights[heavy] -= moved
        weights[light] += moved


def measure_waste(shares: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int]) -> float:
    """Return the share of the ranks' time, counted in tokens, in which they wait: micro-batches run side by side."""
    loads = [[sum(lengths[index] for index in micro_batch) for micro_batch in share] for share in shares]
    slots = len(shares) * sum(map(max, zip(*loads, strict=True)))
    return 1 - sum(map(sum, loads)) / slots


class StepDataset(Dataset[Step]):
    """Item i is optimizer step i of one rank; the loader's workers can make steps in any order."""

    def __init__(
        self,
        dataset: ConversationDataset,
        batch_size: int,
        micro_batch_tokens: int,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        if len(dataset) < num_ranks:
            raise ValueError(
                f"{dataset.file} has {len(dataset)} samples for {num_ranks} ranks: use at most {len(dataset)} ranks"
            )
        if batch_size < num_ranks:
            raise ValueError(f"batch_size = {batch_size} samples cannot be shared by {num_ranks} ranks: raise it")
        self.dataset = dataset
        self.batch_size = batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, step: int) -> Step:
        draws = range(step * self.batch_size, (step + 1) * self.batch_size)
        return self.make_step([(self._row(draw), (self.seed, draw)) for draw in draws])

    def make_step(self, draws: Sequence[tuple[int, tuple[int, int] | None]]) -> Step:
        """Make a step of the given rows, each with the seed of its augmentation (None for none)."""
        texts = [self.dataset.render(row) for row, _ in draws]
        supervised = [text.num_supervised for text in texts]
        lengths = [len(text) for text in texts]
        shares = deal(lengths, self.num_ranks, self.micro_batch_tokens)
        numbers = [int(self.dataset.row_numbers[index]) for index, _ in draws]
        micro_batches = [
            pack(
                [(numbers[i], texts[i], self.dataset.load_picture(*draws[i])) for i in micro_batch],
                is_encoded=self.dataset.features is not None,
            )
            for micro_batch in shares[self.rank]
        ]
        return Step(
            micro_batches,
            num_supervised=sum(supervised),
            num_tokens=sum(lengths),
            num_documents=len(texts),
            rows_without_labels=[row for row, count in zip(numbers, supervised, strict=True) if count == 0],
            num_cut=sum(text.num_cut > 0 for text in texts),
            waste=measure_waste(shares, lengths),
        )

    def _row(self, draw: int) -> int:
        """Return the row of draw number `draw`: every epoch is a permutation of its own."""
        epoch, place = divmod(draw, len(self.dataset))
        if self.order[0] != epoch:
            self.order = (epoch, self.dataset.permute(epoch, self.seed))
        return int(self.order[1][place])


def held_out_steps(steps: StepDataset, num_rows: int) -> Iterator[Step]:
    """Yield the first `num_rows` rows as steps, for measuring: no shuffling, no augmentation, every row once."""
    num_rows = min(num_rows, len(steps.dataset))
    assert num_rows >= steps.num_ranks, "every rank needs a row"
    starts = list(range(0, num_rows, steps.batch_size))
    if len(starts) > 1 and num_rows - starts[-1] < steps.num_ranks:
        starts.pop()  # a remainder too small to give every rank a document joins the step before it
    for start, end in zip(starts, [*starts[1:], num_rows], strict=True):
        yield steps.make_step([(row, None) for row in range(start, end)])
