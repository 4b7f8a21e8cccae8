"""The official sampler is the official one, and what is counted of it and of packing can be checked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import speed_padding
from eval.speed_padding import draw_lengths, order_officially, pack_steps, pad, share_out
from tests.launch import run_script


def test_rows_go_to_the_rank_with_the_fewest_words_while_it_has_room() -> None:
    """By hand: 9 | 8, then 5 to the second (13), 4 to the first (13), 3 to the first (full), 1 to the second."""
    words = np.array([3, 9, 1, 8, 4, 5, 99])
    assert share_out([0, 1, 2, 3, 4, 5], words, 2) == [[1, 4, 0], [3, 5, 2]]


def test_every_row_comes_once_in_steps_of_one_kind_but_for_the_last() -> None:
    """The sizes that the study of the official code was done with: 1000 rows with pictures, 101 without, 8 x 4."""
    generator = np.random.default_rng(3)
    has_image = generator.permutation(np.arange(1101) < 1000)
    words = generator.integers(1, 300, 1101)
    order = order_officially(words, has_image, 8, 4, generator)
    assert sorted(order) == list(range(1101))
    kinds = has_image[order]
    whole = kinds[: 34 * 32].reshape(34, 32)  # 31 steps with pictures and 3 without; 8 and 5 rows are left over
    assert sorted(whole.sum(axis=1)) == [0] * 3 + [32] * 31
    assert not np.array_equal(whole[:, 0], np.sort(whole[:, 0])[::-1])  # the kinds' steps are mixed
    assert sorted(kinds[34 * 32 :]) == [False] * 5 + [True] * 8
    assert list(order[34 * 32 :]) == sorted(order[34 * 32 :])


def test_last_step_of_each_kind_waits_even_when_it_is_whole() -> None:
    has_image = np.array([True] * 12 + [False] * 6)
    order = order_officially(np.ones(18, dtype=int), has_image, 2, 3, np.random.default_rng(0))
    assert has_image[order[:6]].all()
    assert has_image[order[6:]].sum() == 6
    assert list(order[6:]) == sorted(order[6:])


def test_padding_is_to_the_longest_row_of_a_rank() -> None:
    tokens = np.array([2, 5, 3, 7, 1, 1, 9, 4, 4, 6, 6, 6])
    assert pad(tokens, num_ranks=2, rows_per_rank=3).tolist() == [[15, 21], [27, 18]]


def test_packing_counts_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two ranks of up to 10 tokens; the longest first to the lightest of 2 x 2 micro-batches."""
    monkeypatch.setattr(speed_padding, "NUM_RANKS", 2)
    monkeypatch.setattr(speed_padding, "ROWS_PER_RANK", 3)
    monkeypatch.setattr(speed_padding, "MICRO_BATCH_TOKENS", 10)
    assert pack_steps(np.array([7, 6, 5, 4, 3, 1])).tolist() == [[7, 7], [6, 6]]


def test_lengths_are_as_stated() -> None:
    lengths = draw_lengths(250, 100_000, np.random.default_rng(1))
    text = lengths.tokens - 576 * lengths.has_image
    assert lengths.has_image.mean() == pytest.approx(0.94, abs=0.005)
    assert lengths.tokens.max() == 2048
    assert lengths.tokens.min() >= 1
    is_whole = lengths.tokens < 2048
    np.testing.assert_allclose(lengths.words[is_whole] * 1.3, text[is_whole], atol=1.3)
    spoken = 1.3 * lengths.words
    assert spoken.mean() == pytest.approx(250, rel=0.02)
    assert spoken.std() / spoken.mean() == pytest.approx(1, rel=0.03)


def test_suite_writes_what_it_prints(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "eval/speed.py", "--suite", "padding", "--out", "speed.jsonl")
    assert ended.returncode == 0, ended.stderr
    (result,) = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert result["suite"] == "padding"
    assert [count["mean_text_tokens"] for count in result["counts"]] == [150, 250, 350]
    for count in result["counts"]:
        assert 1 < count["packed_slowest"] < 1.05 < count["padded"] < count["padded_slowest"]
        for name in ("padded", "padded_slowest", "packed_slowest"):
            assert f"{count[name]:.3f}" in ended.stdout
    assert [goal["reached"] for goal in result["goals"]] == [True]
    assert {"device", "commit"} <= result["environment"].keys()
