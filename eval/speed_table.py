"""What the suites of `eval/speed.py` should reach and do, as the README's table: the newest result of each case."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

# What tells a case from another one, and how it is called, where a result has it.
CASE = {
    "part": "{}",
    "size": "{}",
    "dtype": "{}",
    "batch": "batch {}",
    "documents": "{} rows",
    "vocab_size": "{} pieces",
}
HEADER = ("suite", "goal", "is", "should be", "", "device", "commit")
MAX_GOAL_CHARACTERS = 64  # of the row's 150 or so
LETTERS = {"bfloat16": "bf16", "float32": "fp32"}


def make_table(results: Sequence[Mapping[str, Any]], suites: Sequence[str]) -> str:
    """Return a Markdown table, a row a goal, in the order of `suites`; what is of no suite or has no goals is left out.

    Args:
        results: the lines of `speed.jsonl`, the newest last.
    """
    newest: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for result in results:
        if result["suite"] in suites and result.get("goals"):
            newest[_name_case(result), _name_device(result)] = result
    in_order = sorted(newest.values(), key=lambda result: suites.index(result["suite"]))  # else as they first came
    rows = [HEADER, ("---",) * len(HEADER), *(row for result in in_order for row in _list_goals(result))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _list_goals(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    about = (_name_device(result), result["environment"]["commit"])
    return [(_name_case(result), *_describe_goal(goal), *about) for goal in result["goals"]]


def _describe_goal(goal: Mapping[str, Any]) -> tuple[str, ...]:
    what = textwrap.shorten(goal["goal"].replace("|", "/"), MAX_GOAL_CHARACTERS, placeholder=" ...")
    wanted = f"at most {goal['at_most']:g}" if "at_most" in goal else f"at least {goal['at_least']:g}"
    return what, _format_number(goal["value"]), wanted, "reached" if goal["reached"] else "**missed**"


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _name_case(result: Mapping[str, Any]) -> str:
    parts = [template.format(LETTERS.get(result[key], result[key])) for key, template in CASE.items() if key in result]
    return f"`{result['suite']}` {', '.join(parts)}".rstrip()


def _name_device(result: Mapping[str, Any]) -> str:
    """Return a GPU's name without its maker's, or "CPU"."""
    device: str = result["environment"]["device"]
    return "CPU" if " CPU" in device else device.removeprefix("NVIDIA ")
