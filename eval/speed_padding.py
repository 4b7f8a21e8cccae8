"""Count the tokens spent on padding: official LLaVA's sampler beside this project's packing. Nothing is timed.

Official LLaVA (`group_by_modality_length`) gives every rank equally many rows of one kind, with pictures or without,
balances the sums of their words, and pads each rank's rows to the longest of them. As sums are what it balances, a rank
gets long rows and short ones. This project deals a step's rows by their tokens and lays them end to end.

What is counted is tokens that the model has to process per real token: of all ranks, and with every rank taking as long
as the slowest, since they wait for each other. The lengths are drawn, not those of a data set: text lognormal, its
standard deviation as large as its mean, beside a picture's tokens in most rows.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.packing import deal
from eval.measure import describe_environment, make_goal, print_goals, print_table

SEED = 0
NUM_STEPS = 100
NUM_RANKS = 8
ROWS_PER_RANK = 16
MEAN_TEXT_TOKENS = (150, 250, 350)
TEXT_ONLY_SHARE = 0.06
IMAGE_TOKENS = 576
MAX_TOKENS = 2048  # of a row; both sides cut what is longer
MICRO_BATCH_TOKENS = 8192
TOKENS_PER_WORD = 1.3  # the official sampler counts words between blanks, and nothing for the picture


@dataclass(frozen=True)
class Lengths:
    """How long the rows of a data set are."""

    tokens: np.ndarray  # what the model reads
    words: np.ndarray  # what the official sampler goes by
    has_image: np.ndarray


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Count both ways' tokens for data sets of shorter and longer text."""
    counts = [count_tokens(mean) for mean in MEAN_TEXT_TOKENS]
    return [
        {
            "suite": "padding",
            "steps": NUM_STEPS,
            "ranks": NUM_RANKS,
            "rows_per_rank": ROWS_PER_RANK,
            "text_only_share": TEXT_ONLY_SHARE,
            "image_tokens": IMAGE_TOKENS,
            "max_tokens": MAX_TOKENS,
            "micro_batch_tokens": MICRO_BATCH_TOKENS,
            "tokens_per_word": TOKENS_PER_WORD,
            "counts": counts,
            "goals": [
                make_goal(
                    "packing: tokens of the slowest rank to real tokens",
                    max(count["packed_slowest"] for count in counts),
                    at_most=1.05,
                )
            ],
            "environment": describe_environment(arguments.device),
        }
    ]


def count_tokens(mean_text_tokens: int) -> dict[str, float]:
    """Return how many tokens are processed per real one, over an epoch of either way's steps."""
    generator = np.random.default_rng((SEED, mean_text_tokens))
    lengths = draw_lengths(mean_text_tokens, NUM_STEPS * NUM_RANKS * ROWS_PER_RANK, generator)
    official = order_officially(lengths.words, lengths.has_image, NUM_RANKS, ROWS_PER_RANK, generator)
    padded = pad(lengths.tokens[official], NUM_RANKS, ROWS_PER_RANK)
    packed = pack_steps(lengths.tokens[generator.permutation(len(lengths.tokens))])
    real = lengths.tokens.sum()
    return {
        "mean_text_tokens": mean_text_tokens,
        "mean_tokens": float(lengths.tokens.mean()),
        "padded": float(padded.sum() / real),
        "padded_slowest": float(NUM_RANKS * padded.max(axis=1).sum() / real),
        "packed_slowest": float(NUM_RANKS * packed.max(axis=1).sum() / real),
    }


def draw_lengths(mean_text_tokens: float, num_rows: int, generator: np.random.Generator) -> Lengths:
    """Draw rows: lognormal text with a standard deviation of its mean, and pictures."""
    variance = math.log(2)  # of the logarithm
    text = np.ceil(generator.lognormal(math.log(mean_text_tokens) - variance / 2, math.sqrt(variance), num_rows))
    has_image = generator.random(num_rows) >= TEXT_ONLY_SHARE
    tokens = np.minimum(text + IMAGE_TOKENS * has_image, MAX_TOKENS).astype(np.int64)
    return Lengths(tokens, np.ceil(text / TOKENS_PER_WORD).astype(np.int64), has_image)


def order_officially(
    words: np.ndarray, has_image: np.ndarray, num_ranks: int, rows_per_rank: int, generator: np.random.Generator
) -> np.ndarray:
    """Return the order in which official LLaVA reads its rows: step after step, in each rank after rank.

    A step is made of one kind of rows, which are shuffled, cut into steps and shared out. Steps of both kinds follow
    in random order. What each kind has left over, up to a whole step, comes last, in the order of the file.
    """
    size = num_ranks * rows_per_rank
    steps: list[list[int]] = []
    left_over: list[int] = []
    for rows in (np.flatnonzero(has_image), np.flatnonzero(~has_image)):
        shuffled = generator.permutation(rows).tolist()
        *whole, last = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        steps += [[row for share in share_out(step, words, num_ranks) for row in share] for step in whole]
        left_over += last
    mixed = [row for index in generator.permutation(len(steps)) for row in steps[index]]
    return np.array(mixed + sorted(left_over))


def share_out(rows: Sequence[int], words: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Share rows among ranks, equally many each: from the longest on, to who has the fewest words and still room."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for row in sorted(rows, key=lambda row: -words[row]):
        with_room = [share for share in shares if len(share) < len(rows) // num_ranks]
        min(with_room, key=lambda share: sum(words[share])).append(row)
    return shares


def pad(tokens: np.ndarray, num_ranks: int, rows_per_rank: int) -> np.ndarray:
    """Return how many tokens each rank processes in each step (steps, ranks): its rows are as long as their longest."""
    return tokens.reshape(-1, num_ranks, rows_per_rank).max(axis=2) * rows_per_rank


def pack_steps(tokens: np.ndarray) -> np.ndarray:
    """Return how many tokens each rank processes between two times of waiting (micro-batches, ranks)."""
    counts: list[tuple[int, ...]] = []
    for step in tokens.reshape(-1, NUM_RANKS * ROWS_PER_RANK):
        shares = deal(step.tolist(), NUM_RANKS, MICRO_BATCH_TOKENS)
        counts += zip(*([int(step[rows].sum()) for rows in share] for share in shares), strict=True)
    return np.array(counts)


def print_result(result: dict[str, Any]) -> None:
    """Print a line per mean length."""
    print(
        f"tokens processed per real token, {result['steps']} steps of {result['ranks']} ranks x "
        f"{result['rows_per_rank']} rows; text lognormal, CV 1;\na picture's {result['image_tokens']} tokens in "
        f"{1 - result['text_only_share']:.0%} of the rows; rows of at most {result['max_tokens']} tokens\n"
    )
    names = {
        "padded": "official, padded",
        "padded_slowest": "official, slowest rank",
        "packed_slowest": "packed, slowest rank",
    }
    rows = [["text tokens per row, mean", *names.values(), "official to packed"]]
    for count in result["counts"]:
        ratio = count["padded_slowest"] / count["packed_slowest"]
        rows.append([str(count["mean_text_tokens"]), *(f"{count[name]:.3f}" for name in names), f"{ratio:.2f}"])
    print_table(rows)
    print_goals(result["goals"])
