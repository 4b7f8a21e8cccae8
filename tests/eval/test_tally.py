"""Intervals cover what they should, p-values are as rare as they say, and scores need not be means."""

import time

import numpy as np
import pytest

from eval.tally import NUM_SWAPS, Part, compare_parts, divide, mcnemar, mean_part


def flip(random: np.random.Generator, probability: float, number: int) -> list[float]:
    return [float(value) for value in random.random(number) < probability]


def names(number: int, per_picture: int = 1) -> list[str]:
    return [f"{place // per_picture}.png" for place in range(number)]


def f1(sums: np.ndarray) -> np.ndarray:
    """Of true positives, false positives and false negatives."""
    hits, false_alarms, misses = sums[..., 0], sums[..., 1], sums[..., 2]
    return divide(np.stack([2 * hits, 2 * hits + false_alarms + misses], axis=-1))


def test_a_mean_by_hand() -> None:
    part = mean_part(["a", "b", "a", "c"], [1, 0, 0.5, 0.3])
    assert part.num_questions == 4
    assert part.clusters == ("a", "b", "c")
    assert part.sums.tolist() == [[1.5, 2], [0, 1], [0.3, 1]]
    assert part.score == pytest.approx(1.8 / 4)


def test_a_mean_of_nothing_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="0 pictures' names for 0 values"):
        mean_part([], [])


def test_division_by_nothing_is_zero() -> None:
    assert divide(np.array([[3, 4], [0, 0]])).tolist() == [0.75, 0]


def test_a_large_sample_has_the_textbook_interval() -> None:
    values = [1.0] * 1400 + [0.0] * 600
    low, high = mean_part(names(2000), values).interval()
    half = 1.96 * (0.7 * 0.3 / 2000) ** 0.5  # 0.0201
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.0015)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """200 data sets of 150 questions, 40 % right in truth; 95 % of the intervals, give or take 2 x 1.5 %."""
    random = np.random.default_rng(1)
    intervals = [mean_part(names(150), flip(random, 0.4, 150)).interval() for _ in range(200)]
    covered = sum(low <= 0.4 <= high for low, high in intervals) / len(intervals)
    assert 0.91 <= covered <= 0.99


def test_questions_about_one_picture_count_less_than_as_many_pictures() -> None:
    """Five questions that stand or fall together are one: the interval is sqrt(5) times as wide."""
    values = np.repeat(flip(np.random.default_rng(2), 0.5, 300), 5).tolist()
    alone = mean_part(names(1500), values).interval()
    together = mean_part(names(1500, per_picture=5), values).interval()
    assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(5**0.5, rel=0.1)


def test_questions_without_a_picture_stand_for_themselves() -> None:
    values = flip(np.random.default_rng(2), 0.5, 300)
    assert mean_part([""] * 300, values).interval() == mean_part(names(300), values).interval()


def test_a_score_that_is_no_mean_against_a_plain_bootstrap() -> None:
    random = np.random.default_rng(3)
    sums = np.stack([random.integers(3, size=80), random.integers(2, size=80), random.integers(2, size=80)], axis=1)
    part = Part(400, tuple(names(80)), sums, f1)
    hits, false_alarms, misses = sums.sum(axis=0)
    assert part.score == pytest.approx(2 * hits / (2 * hits + false_alarms + misses))
    scores = []
    for _ in range(4000):
        hits, false_alarms, misses = sum(sums[random.integers(80)] for _ in range(80))
        scores.append(2 * hits / (2 * hits + false_alarms + misses))
    assert part.interval() == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.008)


def test_intervals_where_resamples_cannot_tell() -> None:
    """All of n right: below 0.025 ** (1 / n) that would happen in less than 2.5 % of the cases (Clopper-Pearson)."""
    assert mean_part(names(20), [1.0] * 20).interval() == pytest.approx((0.025 ** (1 / 20), 1))  # 0.832
    assert mean_part(names(20), [0.0] * 20).interval() == pytest.approx((0, 1 - 0.025 ** (1 / 20)))  # 0.168
    assert mean_part(["a"] * 4, [1, 1, 1, 1]).interval() == pytest.approx((0.025, 1))
    assert mean_part(["a"] * 4, [1, 0, 1, 0]).interval() == pytest.approx((0.025, 0.975))
    points = Part(2, ("a", "b"), np.array([[2.0, 1], [2, 1]]), lambda sums: 1000 * divide(sums), best=2000)
    assert points.interval() == pytest.approx((2000 * 0.025**0.5, 2000))


def test_one_mistake_makes_no_interval_surer_than_none() -> None:
    perfect = mean_part(names(1000), [1.0] * 1000).interval()
    nearly = mean_part(names(1000), [1.0] * 999 + [0.0]).interval()
    assert nearly[0] <= perfect[0]
    assert nearly[1] <= perfect[1] == 1


def test_a_difference_by_hand() -> None:
    """Of six pictures three are right only in the second: chance does that, or the reverse, in 2 of 8 cases."""
    first = mean_part(names(6), [1, 0, 0, 0, 1, 0])
    second = mean_part(names(6), [1, 1, 1, 1, 1, 0])
    found = compare_parts(first, second)
    assert found.difference == pytest.approx(3 / 6)
    assert found.p_value == pytest.approx(2 / 8, abs=0.015)
    assert found.interval[0] >= 0
    assert found.interval[1] == pytest.approx(5 / 6)


def test_answers_about_one_picture_are_exchanged_together() -> None:
    """Two pictures with five better answers each are two changes, not ten: by chance in 2 of 4 cases."""
    pictures = names(20, per_picture=5)
    found = compare_parts(mean_part(pictures, [0] * 10 + [1] * 10), mean_part(pictures, [1] * 20))
    assert found.p_value == pytest.approx(2 / 4, abs=0.02)


def test_a_paired_difference_has_the_textbook_interval() -> None:
    random = np.random.default_rng(4)
    first = np.array(flip(random, 0.6, 3000))
    second = np.where(random.random(3000) < 0.2, flip(random, 0.8, 3000), first)
    found = compare_parts(mean_part(names(3000), first.tolist()), mean_part(names(3000), second.tolist()))
    mean, error = (second - first).mean(), (second - first).std() / 3000**0.5
    assert found.interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.0015)
    assert found.p_value == pytest.approx(1 / (NUM_SWAPS + 1))  # the least there is


def test_swapping_the_two_changes_signs_and_nothing_else() -> None:
    random = np.random.default_rng(5)
    order = random.permutation(120)
    values = [flip(random, probability, 240) for probability in (0.5, 0.6)]
    pictures = names(240, per_picture=2)
    first, second = (mean_part(pictures, some) for some in values)
    reordered = Part(second.num_questions, tuple(second.clusters[k] for k in order), second.sums[order], divide)
    forth, back, other = (
        compare_parts(first, second),
        compare_parts(second, first),
        compare_parts(reordered, first),
    )
    assert back.difference == -forth.difference
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]))
    assert back.p_value == forth.p_value
    assert other == back  # in whichever order the pictures are


def test_equal_runs_do_not_differ() -> None:
    part = mean_part(names(50), [0.3, 0.9] * 25)
    found = compare_parts(part, part)
    assert (found.difference, found.interval, found.p_value) == (0, (0, 0), 1)


def test_other_pictures_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="the two scores are not about the same pictures"):
        compare_parts(mean_part(["a", "b"], [1, 0]), mean_part(["a", "c"], [1, 0]))


@pytest.mark.parametrize("is_mean", [True, False], ids=["mean", "F1"])
def test_chance_alone_makes_all_p_values_alike(is_mean: bool) -> None:
    """60 pairs of equally good runs, three questions a picture that stand and fall together."""
    random = np.random.default_rng(6)
    p_values = []
    for _ in range(60):
        ease = random.random(100)[:, None]
        sums = [(random.random((100, 3)) < ease).astype(float) for _ in range(2)]
        if is_mean:
            sums = [np.stack([some.sum(axis=1), np.full(100, 3.0)], axis=1) for some in sums]
        parts = [Part(300, tuple(names(100)), some, divide if is_mean else f1) for some in sums]
        p_values.append(compare_parts(*parts).p_value)
    assert sum(p < 0.05 for p in p_values) <= 8  # 3 expected; more than 8 in 3 of 1,000 cases
    assert 0.35 < np.mean(p_values) < 0.65  # 0.5 give or take 4 x 0.037


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (1, 9, 22 / 1024),  # 2 x (1 + 10) / 2 ** 10
        (0, 5, 2 / 32),
        (3, 0, 2 / 8),
        (2, 6, 74 / 256),  # 2 x (1 + 8 + 28) / 2 ** 8
        (4, 4, 1),
        (0, 0, 1),
    ],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p_value: float) -> None:
    first = [1.0] * only_first + [0.0] * only_second + [1, 0, 1]
    second = [0.0] * only_first + [1.0] * only_second + [1, 0, 1]
    assert mcnemar(first, second) == (only_first, only_second, pytest.approx(p_value))
    assert mcnemar(second, first) == (only_second, only_first, pytest.approx(p_value))


def test_mcnemar_and_swapping_agree() -> None:
    random = np.random.default_rng(7)
    first, second = flip(random, 0.5, 200), flip(random, 0.58, 200)
    swapped = compare_parts(mean_part(names(200), first), mean_part(names(200), second)).p_value
    assert mcnemar(first, second)[2] == pytest.approx(swapped, abs=0.015)


def test_mcnemar_takes_many_changes() -> None:
    """30,000 against 30,500: (500 / sqrt(60,500)) = 2.03 standard deviations."""
    first, second = [1.0] * 30_000 + [0.0] * 30_500, [0.0] * 30_000 + [1.0] * 30_500
    assert mcnemar(first, second)[2] == pytest.approx(0.0422, abs=0.0005)


def test_mcnemar_is_about_right_and_wrong() -> None:
    with pytest.raises(ValueError, match=r"McNemar's test takes answers that are right \(1\) or wrong \(0\)"):
        mcnemar([1, 0.3], [1, 0])


def test_a_benchmark_of_vqa_v2s_size_takes_seconds() -> None:
    """214,000 questions about 40,504 pictures, a tenth of the answers changed."""
    random = np.random.default_rng(8)
    pictures = [str(place) for place in random.integers(40_504, size=214_000)]
    first, other = random.choice([0, 0.3, 0.6, 0.9, 1], size=(2, 214_000))
    second = np.where(random.random(214_000) < 0.1, other, first)
    parts = [mean_part(pictures, values.tolist()) for values in (first, second)]
    started = time.perf_counter()
    parts[0].interval()
    compare_parts(*parts)
    assert time.perf_counter() - started < 20  # 3 s on one core that has nothing else to do
