"""Measure how time and memory grow, and draw it: what is not on a straight line, or grows where it should not, shows.

    steps    a LoRA step of the trainer over tokens of a pass, layers, supervised tokens; measured   speed_growth_steps
    ranks    a card's memory and a step's time on 8 to 1,024 ranks; planned, not measured            speed_growth_plan
    rows     opening, shuffling and packing data sets of a thousand to ten million rows; measured    speed_growth_rows

`--rows` limits the last part; ten million rows take 4 GB of the disk while they are measured. The pictures
`growth_steps.png`, `growth_ranks.png` and `growth_rows.png` are drawn beside the file of results.
"""

import argparse
from typing import Any

from eval.measure import describe_environment
from eval.speed_growth_plan import plan_growth, print_plan
from eval.speed_growth_plots import draw_plan, draw_rows, draw_steps
from eval.speed_growth_rows import NUM_ROWS, TINY_LIMIT, measure_rows, print_rows
from eval.speed_growth_steps import measure_steps, print_steps

STEPS, RANKS, ROWS = "steps", "ranks", "rows"
DRAW = {STEPS: draw_steps, RANKS: draw_plan, ROWS: draw_rows}
PRINT = {STEPS: print_steps, RANKS: print_plan, ROWS: print_rows}


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, plan and draw all three."""
    is_tiny = arguments.size == "tiny"
    environment = describe_environment(arguments.device)
    limit = arguments.rows or (TINY_LIMIT if is_tiny else NUM_ROWS[-1])
    parts = {
        STEPS: measure_steps(arguments.size, arguments.device, arguments.repeats),
        RANKS: plan_growth(is_tiny),
        ROWS: measure_rows(limit, arguments.tokenizer, arguments.repeats),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for name, part in parts.items():
        result = {"suite": "growth", "part": name, "size": arguments.size, **part, "environment": environment}
        DRAW[name](result, arguments.out.parent / f"growth_{name}.png")
        results.append(result)
    return results


def print_result(result: dict[str, Any]) -> None:
    """Print one part's tables and goals."""
    PRINT[result["part"]](result)
