"""Which token comes next: the likeliest, or one drawn from what penalty, temperature, top-k and top-p leave.

The steps and their order are those of Hugging Face's `generate`, so that its users find the settings they know.

Shapes: B rows, V words of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # 0 takes the likeliest; above, probabilities are those of logits / temperature
    top_p: float = 1.0  # sample from the most probable tokens that hold this much of the probability
    seed: int = 0  # row i of a batch draws with seed + i, whatever the other rows are
    top_k: int = 0  # sample from this many of the most probable tokens; 0 from all
    repetition_penalty: float = 1.0  # above 1, what prompt or answer hold already becomes less likely

    def __post_init__(self) -> None:
        # Below 0.001, logits / temperature could overflow, and the answer is the likeliest token's anyway.
        if not (self.temperature == 0 or 0.001 <= self.temperature < math.inf):
            raise ValueError(f"temperature = {self.temperature}, expected 0 (the likeliest token) or at least 0.001")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}, expected above 0 and at most 1")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed = {self.seed}, expected at least 0 and below 2**62")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}, expected at least 0 (no limit)")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty}, expected above 0 (1 is off)")


GREEDY = Sampling()


def adjust_logits(logits: Tensor, sampling: Sampling, seen: Tensor) -> Tensor:
    """Return the fp32 logits whose softmax is what is sampled from; -inf where a token is out of the question.

    Shapes: logits (B, V), seen (B, V), True for the tokens of the row's prompt and answer -> (B, V).
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        # Multiplied where negative: either way the token becomes less likely.
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)  # tokens that tie with the last one stay
    if sampling.top_p < 1:
        # From the least likely up: a token goes while it and all below hold no more than 1 - top_p. The last one stays.
        ordered, order = logits.sort(dim=-1)
        outside = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return logits


def make_draws(sampling: Sampling, num_rows: int, num_steps: int, device: torch.device) -> Tensor:
    """Return uniform numbers in [0, 1) for every step and row (num_steps, B), the same on every device.

    A row's numbers depend on its index only, so a batch draws what its rows would draw one by one.
    """
    rows = [
        torch.rand(num_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(sampling.seed + index))
        for index in range(num_rows)
    ]
    return torch.stack(rows, dim=1).to(device)


def choose_tokens(logits: Tensor, sampling: Sampling, seen: Tensor, draws: Tensor) -> Tensor:
    """Choose one token per row. (B, V), (B, V), (B,) -> (B,)."""
    logits = adjust_logits(logits, sampling, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = logits.softmax(dim=-1).double()
    # The first token at which the probabilities, laid end to end, exceed the draw; never one of probability 0.
    reached = probabilities.cumsum(dim=-1).masked_fill(probabilities == 0, 0)
    total = reached.amax(dim=-1, keepdim=True)
    return (reached > draws[:, None] * total).int().argmax(dim=-1)
