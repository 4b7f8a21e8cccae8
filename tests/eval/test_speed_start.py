"""A job's start is the trainer's own, every part of it is timed, and the table follows from the figures."""

import argparse
import math
from typing import Any

import pytest
import torch

from eval.speed_start import AGAIN, FIRST, compare, list_goals, print_result
from eval.speed_start_rank import DATA, FILL, FUNCTIONS, PARTS, STEP
from eval.speed_weights import SIZES, make_random_checkpoint
from model.files import StoredTensor

NUM_ROWS = 150


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("start")
    arguments = argparse.Namespace(size="tiny", device="cpu", repeats=1, rows=NUM_ROWS, checkpoint_dir=folder)
    (result,) = compare(arguments)
    return result


def test_every_part_takes_time(measured: dict[str, Any]) -> None:
    assert measured["rows"] == NUM_ROWS
    for case, parts in ((FIRST, set(PARTS) - {STEP}), (AGAIN, set(PARTS))):
        assert {part for part in PARTS if 0 < measured["median"][case].get(part, 0) < math.inf} == parts
    assert set(FUNCTIONS.values()) < set(PARTS)


def test_a_rank_holds_an_eighth(measured: dict[str, Any]) -> None:
    """Of the weights in bf16, and of what is trained beside them in fp32."""
    tensors = make_random_checkpoint(SIZES["tiny"], torch.bfloat16).tensors
    eighth = sum(tensor.num_bytes for tensor in tensors.values()) / 8
    assert eighth < measured["median"][AGAIN]["weights_bytes"] < 4 * eighth


def test_goals_and_table_follow_from_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    given = dict.fromkeys(PARTS, 1.0) | {FILL: 8.0, STEP: 50.0}
    given |= {"weights_bytes": 4e9, "private_peak_bytes": 4.7e9, "file_pages_bytes": 3.3e9, "disk_bytes": 0.1e9}
    others, private, disk = list_goals(given)
    assert others["value"] == len(PARTS) - 2
    assert private["value"] == pytest.approx(1.0)
    assert disk["value"] == pytest.approx(0.025)
    assert [others["reached"], disk["reached"]] == [True, False]
    rounds = {
        "median": {FIRST: given | {DATA: 99.0}, AGAIN: given},
        "spread": {AGAIN: {figure: [value, value] for figure, value in given.items()}},
    }
    print_result({"size": "13b", "ranks": 8, "rows": 5, "repeats": 1, "step_tokens": 64, "goals": [], **rounds})
    printed = capsys.readouterr().out
    assert f"most of it is {STEP}; {DATA} without its index took 99.0 s" in printed
    assert "0.50 GB/s of weights" in printed
    assert f"{50 / (len(PARTS) - 2 + 58):.1%}" in printed


@pytest.mark.parametrize("rows", [slice(0, 3), slice(40, 77), slice(None)])
def test_rows_of_random_weights_are_the_whole_ones(rows: slice) -> None:
    tensor: StoredTensor = make_random_checkpoint(SIZES["small"], torch.float16).tensors[
        "language_model.layers.0.mlp.down_proj.weight"
    ]
    whole = tensor.load()
    assert torch.equal(tensor.read(rows), whole[rows])
    assert len(whole.unique(dim=0)) == len(whole)
    assert float(whole.float().std()) == pytest.approx(tensor.shape[1] ** -0.5, rel=0.02)
