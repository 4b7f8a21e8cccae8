"""From judged answers to scores with intervals, and to differences that can be told from chance.

Questions about one picture are not independent, so what is drawn again and again (the bootstrap) is pictures. A score
need not be a mean: it is a function of sums over pictures, so any benchmark's own figure gets an interval.

Whether two runs differ is asked by swapping: if they are equally good, it makes no difference which of the two gave
which of a picture's answers. With one question a picture and answers right or wrong, this is McNemar's test.

Source: Efron and Tibshirani 1993, chapter 13 (intervals) and 15 (swapping); McNemar 1947.
Shapes: C pictures, K numbers that are summed, R resamples or swaps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
NUM_SWAPS = 10_000  # p-values down to 1 in 10,001, so that some stay small where 65 question types are compared
NUMBERS_AT_ONCE = 100_000  # of resamples or swaps, C for each of them: as much as stays in the cache
TAIL = 0.025  # on each side of a 95 % interval


@dataclass(frozen=True)
class Part:
    """One line of a table of scores."""

    num_questions: int
    clusters: tuple[str, ...]  # the pictures' names, C of them
    sums: np.ndarray  # (C, K): of each picture, what is summed
    combine: Callable[[np.ndarray], np.ndarray]  # (..., K) -> (...): the score that sums make
    best: float = 1.0  # the highest score there is; the lowest is 0

    @property
    def score(self) -> float:
        return float(self.combine(self.sums.sum(axis=0)))

    def interval(self) -> tuple[float, float]:
        """Return the 95 % percentile bootstrap interval over pictures, the same every time.

        Note: resamples cannot hold what no picture showed. So neither end is surer than the exact binomial interval
        of as many independent pictures, all of them right or all wrong.
        """
        scores = np.concatenate([self.combine(sums) for sums in _resample(self.sums)])
        low, high = np.quantile(scores, [TAIL, 1 - TAIL])
        unseen = 1 - TAIL ** (1 / len(self.clusters))
        return min(float(low), self.best * (1 - unseen)), max(float(high), self.best * unseen)


@dataclass(frozen=True)
class Difference:
    """The second of two scores minus the first, on the same questions."""

    difference: float
    interval: tuple[float, float]  # 95 %, by drawing the same pictures for both
    p_value: float  # two-sided: how often chance alone would make a difference as large


def mean_part(clusters: Sequence[str], values: Sequence[float]) -> Part:
    """Return the part whose score is the mean over questions; `clusters` names each question's picture.

    A question without a picture ("") stands for itself.
    """
    assert len(clusters) == len(values) > 0, f"{len(clusters)} pictures' names for {len(values)} values"
    names = [name or f"question {place}" for place, name in enumerate(clusters)]
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    sums = np.zeros((len(order), 2))
    np.add.at(sums, [order[name] for name in names], np.stack([values, np.ones(len(values))], axis=1))
    return Part(len(values), tuple(order), sums, divide)


def divide(sums: np.ndarray) -> np.ndarray:
    """(..., 2) -> (...): the first by the second; 0 where that is 0."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def compare_parts(first: Part, second: Part) -> Difference:
    """Return how much better the second is. The first and second swapped give the same with the signs changed.

    Raises: ValueError when the parts are not about the same pictures.
    """
    if sorted(first.clusters) != sorted(second.clusters):
        raise ValueError("the two scores are not about the same pictures")
    sums = np.concatenate([part.sums[np.argsort(part.clusters)] for part in (first, second)], axis=1)
    width = first.sums.shape[1]

    def subtract(sums: np.ndarray) -> np.ndarray:
        return second.combine(sums[..., width:]) - first.combine(sums[..., :width])

    difference = second.score - first.score
    drawn = np.concatenate([subtract(resampled) for resampled in _resample(sums)])
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
    by_chance = np.concatenate([subtract(swapped) for swapped in _swap(sums)])
    as_large = (np.abs(by_chance) >= abs(difference) - 1e-9 * first.best).sum()  # sums of 0.3 are not exact
    p_value = (as_large + 1) / (NUM_SWAPS + 1)  # what was seen counts as one of them, so that no p-value is 0
    return Difference(difference, (float(low), float(high)), float(p_value))


def _resample(sums: np.ndarray) -> Iterator[np.ndarray]:
    """Yield sums over pictures drawn with replacement, NUM_RESAMPLES x (K,), some at a time."""
    random, num_clusters = np.random.default_rng(0), len(sums)
    for size in _split(NUM_RESAMPLES, num_clusters):
        drawn = random.integers(num_clusters, size=(size, num_clusters)) + num_clusters * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape) @ sums


def _swap(sums: np.ndarray) -> Iterator[np.ndarray]:
    """Yield both runs' sums, NUM_SWAPS x (2K,), with each picture's exchanged or not by the toss of a coin."""
    first, second = np.split(sums, 2, axis=1)
    changes = (second - first)[(first != second).any(axis=1)]
    random = np.random.default_rng(0)
    for size in _split(NUM_SWAPS, len(changes)):
        moved = random.integers(2, size=(size, len(changes)), dtype=np.int8) @ changes
        yield np.concatenate([first.sum(axis=0) + moved, second.sum(axis=0) - moved], axis=1)


def _split(total: int, num_numbers: int) -> Iterator[int]:
    """Yield how many of `total` are made at once when each takes so many numbers."""
    at_once = max(1, NUMBERS_AT_ONCE // max(1, num_numbers))
    for start in range(0, total, at_once):
        yield min(at_once, total - start)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> tuple[int, int, float]:
    """Return how many questions only the first has right, how many only the second, and the exact two-sided p-value.

    Note: questions are taken to be independent; `compare_parts` is not so sure where there are several about a picture.
    Raises: ValueError for credits other than 0 and 1: the test is about right and wrong.
    """
    if not {*first, *second} <= {0, 1}:
        raise ValueError("McNemar's test takes answers that are right (1) or wrong (0)")
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    num_changed = only_first + only_second
    # Each change is a fair coin if the two are equally good: the binomial tail, in logarithms.
    tail = sum(
        math.exp(_log_choose(num_changed, k) - num_changed * math.log(2))
        for k in range(min(only_first, only_second) + 1)
    )
    return only_first, only_second, min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
