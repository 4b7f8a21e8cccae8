"""The memory suite: the measured and the planned step are the same step, and the table follows from the figures."""

import json
from typing import Any

import pytest

from eval.speed_memory import describe, print_result
from tests.launch import run_script
from train.memory import GIB


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("memory")
    ended = run_script(
        folder, "eval/speed.py", "--suite", "memory", "--size", "tiny", "--device", "cpu", "--out", "memory.jsonl"
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = (folder / "memory.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(line), ended.stdout


def test_measured_memory_is_the_planned(measured: tuple[dict[str, Any], str]) -> None:
    result, printed = measured
    assert [case["checkpoint_layers"] for case in result["cases"]] == [3, 1]
    for case in result["cases"]:
        assert case["peak_bytes"] == pytest.approx(case["planned_bytes"], rel=0.01)
        assert f"{describe(case)}  " in printed
    all_checkpointed, one_checkpointed = (case["peak_bytes"] for case in result["cases"])
    assert all_checkpointed < one_checkpointed


def test_goals_follow_from_the_measurements(measured: tuple[dict[str, Any], str]) -> None:
    result, _ = measured
    assert len(result["goals"]) == len(result["cases"])
    for goal, case in zip(result["goals"], result["cases"], strict=True):
        assert goal["value"] == pytest.approx(abs(case["peak_bytes"] / case["planned_bytes"] - 1))
        assert goal["reached"]


def test_table_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    case = {"documents": 16, "document_tokens": 2048, "checkpoint_layers": 40, "planned_bytes": 26 * GIB}
    seen = {"peak_bytes": 27 * GIB, "difference": 1 / 26, "reserved_bytes": 28 * GIB, "computing_s": 3.25}
    print_result({"size": "13b", "ranks": 8, "cases": [case, case | seen], "goals": []})
    rows = [line.split("checkpointed")[1].split() for line in capsys.readouterr().out.splitlines() if "16 x" in line]
    assert rows == [["26.000", "too", "large", "-", "-", "-"], ["26.000", "27.000", "+3.8%", "28.000", "3.25"]]
