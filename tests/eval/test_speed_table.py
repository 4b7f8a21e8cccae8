"""The README's table: the newest result of each case, in the order of the suites, and what was missed is said."""

import re
from typing import Any

import pytest

from eval.measure import make_goal
from eval.speed import RESULTS, ROOT, SUITES, read_results
from eval.speed_table import HEADER, make_table

CPU = "x86_64 CPU avx2 avx512f"


def make_result(suite: str, value: float, device: str = CPU, commit: str = "c0", **case: Any) -> dict[str, Any]:
    goals = [make_goal(f"{suite}: ours to theirs", value, at_least=1.25)]
    return {"suite": suite, **case, "goals": goals, "environment": {"device": device, "commit": commit}}


def read_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    header, line, *rows = make_table(results, SUITES).splitlines()
    assert header == f"| {' | '.join(HEADER)} |"
    assert line.count("---") == len(HEADER)
    return [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows]


def test_newest_result_of_a_case_wins() -> None:
    results = [make_result("load", 1.0, commit="old", size="1b"), make_result("load", 1.5, commit="new", size="1b")]
    assert read_rows(results) == [
        ["`load` 1b", "load: ours to theirs", "1.5", "at least 1.25", "reached", "CPU", "new"]
    ]


def test_cases_are_kept_apart() -> None:
    """By size, type, batch, part, vocabulary, and where it ran; another CPU is the same case."""
    cases: list[dict[str, Any]] = [
        {"size": "1b"},
        {"size": "7b"},
        {"size": "7b", "dtype": "bfloat16"},
        {"size": "7b", "dtype": "float32"},
        {"size": "7b", "dtype": "bfloat16", "batch": 8},
        {"size": "7b", "device": "NVIDIA H100 80GB HBM3"},
        {"vocab_size": 768},
        {"vocab_size": 32000},
        {"part": "rows"},
    ]
    rows = read_rows([make_result("generate", 2.0, **case) for case in cases])
    names = [row[0].removeprefix("`generate` ") for row in rows]
    assert names == [
        "1b",
        "7b",
        "7b, bf16",
        "7b, fp32",
        "7b, bf16, batch 8",
        "7b",
        "768 pieces",
        "32000 pieces",
        "rows",
    ]
    assert [row[-2] for row in rows] == ["CPU"] * 5 + ["H100 80GB HBM3"] + ["CPU"] * 3
    assert len(read_rows([make_result("generate", 2.0), make_result("generate", 2.0, device="x86_64 CPU avx2")])) == 1


def test_misses_are_said() -> None:
    result = make_result("eval", 1.2)
    result["goals"].append(make_goal("bytes of a rank", 12_345.6, at_most=0.07))
    assert [row[2:5] for row in read_rows([result])] == [
        ["1.2", "at least 1.25", "**missed**"],
        ["12,346", "at most 0.07", "**missed**"],
    ]


def test_rows_come_in_the_order_of_the_suites() -> None:
    rows = read_rows([make_result(suite, 1.0) for suite in reversed(SUITES)])
    assert [row[0] for row in rows] == [f"`{suite}`" for suite in SUITES]


def test_results_that_have_no_goal_have_no_row() -> None:
    without = [make_result("load", 1.0) | {"goals": []}, {"suite": "load", "environment": {}}]
    assert read_rows([*without, make_result("of earlier times", 1.0)]) == []


def test_goals_fit_the_line() -> None:
    """Long ones lose their end; what would end a cell is replaced."""
    result = make_result("generate", 2.0, size="7b", dtype="bfloat16", batch=32, device="NVIDIA H100 80GB HBM3")
    result["goals"] = [make_goal("a|b " + "words " * 40, 1.0, at_least=1.0)]
    ((_, goal, *_),) = read_rows([result])
    assert goal.startswith("a/b words")
    assert goal.endswith("words ...")
    assert all(len(line) <= 155 for line in make_table([result], SUITES).splitlines())


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readmes_show_the_committed_results(readme: str) -> None:
    """Between two comments stands what `python eval/speed.py --table` prints."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- speed table -->\n\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)
    table = make_table(read_results(RESULTS), SUITES)
    assert {name for name in SUITES if f"`{name}` " in table} >= {"train", "generate", "eval", "data", "load"}
    assert shown == table
