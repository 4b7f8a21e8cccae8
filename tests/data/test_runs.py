"""Runs are read as they were written, whatever happened to their files meanwhile."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.runs import Run, highest, latest, median, read_config, read_metrics, read_scores, select, smooth, total


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_smoothing_by_hand() -> None:
    values = np.arange(60.0)
    smoothed = smooth(values)
    assert smoothed[:3].tolist() == [0.0, 0.5, 1.0]
    assert smoothed[59] == np.arange(35.0, 60.0).mean()
    assert smooth(np.array([3.0])).tolist() == [3.0]
    assert smooth(np.array([1.0, 3.0, 5.0, 7.0]), window=2).tolist() == [1.0, 2.0, 4.0, 6.0]
    assert smooth(values, window=1).tolist() == values.tolist()


def test_selecting_keeps_steps_and_ranks_together() -> None:
    """Through what a run may meet: nothing recorded, another number of ranks, a rank without a value."""
    rows: list[dict[str, Any]] = [{"step": 3, "x": [1, 2]}, {"step": 4}, {"step": 5, "x": None}]
    rows += [{"step": 6, "x": [None, math.nan]}, {"step": 7, "x": [3, None, 4]}, {"step": 8, "x": 5}]
    steps, ranks = select(rows, "x")
    assert steps.tolist() == [3, 7, 8]
    np.testing.assert_array_equal(ranks, [[1, 3, 5], [2, math.nan, math.nan], [math.nan, 4, math.nan]])
    steps, ranks = select([{"step": 1, "y": 2}, {"step": 2, "y": math.nan}, {"step": 5, "y": 2.5}], "y")
    assert steps.tolist() == [1, 5]
    assert ranks.tolist() == [[2.0, 2.5]]
    steps, ranks = select(rows, "y")
    assert steps.size == 0
    assert ranks.shape == (0, 0)


def test_numbers_over_the_steps() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "x": 1.0, "m": [3, 9]},
        {"step": 2, "x": 4.0, "m": [5, None]},
        {"step": 3, "x": 1.0, "y": 7},
    ]
    assert total(rows, "x") == 6.0
    assert total(rows, "y") is None
    assert median(rows, "x") == 1.0
    assert highest(rows, "m") == 9.0
    assert latest(rows, "m") == [5, None]
    assert latest(rows, "z") is None
    run = Run(Path("r"), "r", {}, rows[:2], [{"rows": 3}, {"device": "d"}, {"rows": 5}])
    assert run.find("rows") == 5


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    write_rows(file, [{"step": step, "loss": 1.0} for step in range(1, 6)])
    with file.open("a", encoding="utf-8") as opened:
        opened.write('{"step": 6, "lo')
    for at_most in (None, 100, 2):
        assert read_metrics(file, at_most)[-1]["step"] == 5
    with file.open("a", encoding="utf-8") as opened:
        opened.write("\n")
    for at_most in (None, 3):
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 6 is not JSON"):
            read_metrics(file, at_most)
    for row, told in (({"step": 6, "loss": "low"}, "expected numbers"), ([], "is no JSON object")):
        write_rows(file, [row])  # type: ignore[list-item]
        for at_most in (None, 3):
            with pytest.raises(ValueError, match=rf"metrics.jsonl, line 1.* {told}"):
                read_metrics(file, at_most)


def test_of_many_steps_some_are_read(tmp_path: Path) -> None:
    """Evenly, with all that measured held-out data and the last ones."""
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0} | ({"held_out_loss": 2.0} if step == 777 else {}) for step in range(1, 1004)]
    write_rows(file, rows)
    steps = [row["step"] for row in read_metrics(file, at_most=100)]
    assert steps == sorted({*range(11, 1004, 11), 777, 1003})
    assert [row["step"] for row in read_metrics(file, at_most=100, num_last=4)][-4:] == [1000, 1001, 1002, 1003]
    assert read_metrics(file, at_most=1003) == rows


def test_settings_and_scores_that_are_none(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    for text, told in (("train = \n", "is not TOML"), ('"<b>" = 1\n', "'<b>' = 1 is no setting"), ("a = [1]", "'a'")):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=told):
            read_config(config)
    config.write_text('train = "lora"\n', encoding="utf-8")
    assert read_config(config) == {"train": "lora"}

    assert read_scores(tmp_path) == {}
    for task, text in (("b", '{"score": 0.5}'), ("a", '{"n": 3}')):
        (tmp_path / "eval" / task).mkdir(parents=True)
        (tmp_path / "eval" / task / "scores.json").write_text(text, encoding="utf-8")
    assert list(read_scores(tmp_path).items()) == [("a", {"n": 3}), ("b", {"score": 0.5})]
    for text, told in (("{", "is not JSON"), ("[]", "holds a list")):
        (tmp_path / "eval/a/scores.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"eval/a/scores.json {told}"):
            read_scores(tmp_path)
