"""The growth suite: lines are fitted and judged as they should be, and every part measures what its name says."""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from data.rows import RowFile
from eval.speed_growth import PRINT, compare, print_result
from eval.speed_growth_plan import count_hops, of
from eval.speed_growth_rows import list_goals, measure_rows, write_rows
from eval.speed_growth_steps import Pass, count_head, fit_line
from tests.conftest import TINY_TOKENIZER


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    """Every part's result by its name, and the folder of the pictures."""
    folder = tmp_path_factory.mktemp("growth")
    arguments = argparse.Namespace(
        size="tiny", device="cpu", repeats=1, rows=2000, tokenizer=TINY_TOKENIZER, out=folder / "new/growth.jsonl"
    )
    results = json.loads(json.dumps(compare(arguments)))
    return {result["part"]: result for result in results}, folder / "new"


def test_every_part_is_printed_and_drawn(
    measured: tuple[dict[str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    parts, folder = measured
    assert parts.keys() == PRINT.keys()
    for name, result in parts.items():
        print_result(result)
        printed = capsys.readouterr().out
        assert all(goal["goal"] in printed for goal in result["goals"])
        assert (folder / f"growth_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_steps_need_what_they_compute(measured: tuple[dict[str, dict[str, Any]], Path]) -> None:
    """Memory is counted, not timed: it grows with tokens and layers, and not with what is supervised of a few."""
    series = measured[0]["steps"]["series"]
    assert series.keys() == {"tokens", "layers", "supervised"}
    for name in ("tokens", "layers"):
        kept = [point["peak_bytes"] for point in series[name] if not point["is_checkpointed"]]
        again = [point["peak_bytes"] for point in series[name] if point["is_checkpointed"]]
        assert all(low < high for low, high in itertools.pairwise(kept))
        assert kept[-1] > 1.2 * again[-1]
        assert all(point["median_s"] > 0 for point in series[name])
    assert [point["supervised"] for point in series["supervised"]] == [0, 100, 200]
    assert len({point["tokens"] for point in series["supervised"]}) == 1


def test_ranks_share_weights(measured: tuple[dict[str, dict[str, Any]], Path]) -> None:
    series = measured[0]["ranks"]["series"]
    fsdp, hsdp = ([point["peak_bytes"] for point in series[f"ranks, tiny {parallel}"]] for parallel in ("fsdp", "hsdp"))
    assert fsdp[0] == hsdp[0] == hsdp[1] > fsdp[1]
    all_goals = measured[0]["ranks"]["goals"]
    assert [goal["reached"] for goal in all_goals if "fsdp: memory" in goal["goal"]] == [True]


def test_index_grows_with_the_rows(measured: tuple[dict[str, dict[str, Any]], Path]) -> None:
    rows = measured[0]["rows"]
    assert [point["rows"] for point in rows["points"]] == [1000, 2000]
    small, large = (point["index_bytes"] for point in rows["points"])
    assert large - small == pytest.approx(1000 * (3 * 8 + 4 + len("0.png")), abs=64)
    assert rows["left_out_rows"] == []


def test_a_size_without_room_on_the_disk_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.speed_growth_rows.BYTES_OF_ROW", 2**60)
    with pytest.raises(ValueError, match="no room for 1000 rows"):
        measure_rows(10_000, TINY_TOKENIZER, 1)


def test_goals_of_rows_find_what_grows_faster_than_they_do() -> None:
    def point(rows: int, opened_s: float, middle_step_s: float) -> dict[str, Any]:
        again = {"opened_s": 1.0, "shuffled_s": 0.1, "middle_step_s": middle_step_s, "private_bytes": 16.0 * rows}
        return {"rows": rows, "median": {"the first time": {"opened_s": opened_s}, "again": again}}

    straight = [point(1000, 0.1, 0.02), point(10_000, 1, 0.02), point(100_000, 10, 0.02)]
    assert all(goal["reached"] for goal in list_goals(straight))
    growing = [*straight[:2], point(100_000, 20, 0.05)]
    assert [goal["value"] for goal in list_goals(growing) if not goal["reached"]] == pytest.approx([2, 2.5])


def test_rows_are_conversations_that_share_pictures(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 20)
    rows = RowFile(tmp_path / "rows.jsonl")
    assert len(rows) == 20
    assert rows.flaws == {}
    assert [rows[number]["id"] for number in (0, 19)] == ["000000000000", "000000000019"]
    assert [rows.images[number] for number in (0, 7, 8, 19)] == ["0.png", "7.png", "0.png", "3.png"]


def test_line_and_exponent() -> None:
    straight = fit_line([1, 2, 4, 8], [5, 7, 11, 19])
    assert straight["slope"] == pytest.approx(2)
    assert straight["at_zero"] == pytest.approx(3)
    assert straight["off"] == pytest.approx(0, abs=1e-9)
    squared = fit_line([1, 2, 4, 8], [1, 4, 16, 64])
    assert squared["exponent"] == pytest.approx(2)
    assert squared["off"] > 0.2


def test_head_is_small_in_a_large_model() -> None:
    """What is supervised meets 32,000 words of 4,096 numbers; every token meets 6.5 thousand million in the layers."""
    each = Pass(documents=16, length=800, layers=32, is_checkpointed=False, supervised=10_000)
    assert count_head("7b", each) == pytest.approx(10_000 / 12_800 * 32_000 * 4096 / 6.48e9, rel=0.2)
    assert count_head("small", each) > 10 * count_head("7b", each)


def test_hops_of_a_ring() -> None:
    assert count_hops(vars(of("13b", "fsdp", 1024, 16))) == 3 * 40 * 1023
    assert count_hops(vars(of("13b", "hsdp", 1024, 16))) == 3 * 40 * 7
