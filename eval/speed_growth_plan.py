"""What `--suite growth` plans: a card's memory and a step's time from eight to 1,024 ranks, and over tokens and layers.

Nothing is measured: the first of so many ranks is simulated as `train/plan.py` does it, real model in full depth and
real FSDP with tensors that have no memory; times are its arithmetic, which knows one speed of the network and no
latency.

Expect two bends of fsdp: what is not shared (activations, two gathered layers) is left of the memory at about 64 ranks,
and beyond 256 (7B) or 512 (13B) it rises a little: an adapter's factor has 128 rows, and FSDP deals and gathers whole
ones, so that 1,024 ranks gather it, and its gradient, padded to 1,024 rows. With 1,024 rows it goes on falling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eval.measure import make_goal, print_goals, print_table, run_in_new_process
from eval.speed_growth_steps import fit_line
from eval.speed_weights import SIZES
from train.config import make_config
from train.memory import GIB, TOKENS_PER_DOCUMENT, Workload
from train.parallel import start_fake_ranks
from train.plan import Machine, reckon_times, simulate

CARDS_PER_MACHINE = 8
BUS_BYTES_PER_S, FLOPS = 20e9, 145e12  # as train/plan.py assumes
HOP_S = 10e-6  # assumed, from one card to the next; the plan has no latency


@dataclass(frozen=True)
class Case:
    """A LoRA stage on so many ranks."""

    size: str
    parallel: str
    ranks: int
    documents: int  # of a rank's forward pass, of 800 tokens each
    layers: int
    checkpoint_layers: int


def plan_growth(is_tiny: bool) -> dict[str, Any]:
    """Plan series over ranks, tokens and layers, each number of ranks in a process of its own."""
    sizes, documents = (("tiny",), 2) if is_tiny else (("7b", "13b"), 16)
    all_ranks = [8, 16] if is_tiny else [2**power for power in range(3, 11)]
    quarters = (2, 4) if is_tiny else (1, 2, 4, 8)  # of the usual tokens and depth
    largest = sizes[-1]
    depth = SIZES[largest].text.num_hidden_layers
    series = {
        f"ranks, {size} {parallel}": [of(size, parallel, ranks, documents) for ranks in all_ranks]
        for size in sizes for parallel in ("fsdp", "hsdp")
    }  # fmt: skip
    for kind, share in (("none", 0), ("all", 1)):
        counts = [documents * quarter // 4 for quarter in quarters]
        series[f"tokens, {largest}, {kind} checkpointed"] = [
            replace(of(largest, "fsdp", 8, count), checkpoint_layers=share * depth) for count in counts
        ]
        depths = [depth * quarter // 4 for quarter in quarters]
        series[f"layers, {largest}, {kind} checkpointed"] = [
            replace(of(largest, "fsdp", 8, documents), layers=layers, checkpoint_layers=share * layers)
            for layers in depths
        ]
    cases = dict.fromkeys(case for row in series.values() for case in row)
    planned: dict[Case, dict[str, float]] = {}
    for ranks in all_ranks:
        alike = [case for case in cases if case.ranks == ranks]
        planned |= dict(zip(alike, run_in_new_process(plan_cases, alike), strict=True))
    points = {
        name: [{**vars(case), "tokens": case.documents * TOKENS_PER_DOCUMENT, **planned[case]} for case in row]
        for name, row in series.items()
    }
    return {"series": points, "goals": list_goals(points)}


def of(size: str, parallel: str, ranks: int, documents: int) -> Case:
    """Return a case with all of its layers, all checkpointed."""
    layers = SIZES[size].text.num_hidden_layers
    return Case(size, parallel, ranks, documents, layers, layers)


def plan_cases(cases: Sequence[Case]) -> list[dict[str, float]]:
    """Return the peak's bytes and a step's seconds; all of the cases have the same number of ranks."""
    num_ranks = cases[0].ranks
    ranks = start_fake_ranks(num_ranks, CARDS_PER_MACHINE, torch.device("cpu"))
    machine = Machine(num_ranks, CARDS_PER_MACHINE, 32 * GIB, BUS_BYTES_PER_S, FLOPS)
    planned = []
    for case in cases:
        values: dict[str, Any] = {"name": "growth", "train": "lora", "data": "none", "parallel": case.parallel}
        values |= {"checkpoint_layers": case.checkpoint_layers, "batch_size": case.documents * num_ranks}
        config, model = make_config(values, "the suite"), SIZES[case.size]
        model = replace(model, text=replace(model.text, num_hidden_layers=case.layers))
        work = Workload(case.documents * TOKENS_PER_DOCUMENT, case.documents, 1)
        memory = simulate(config, model, work, ranks)
        times = reckon_times(config, model, work, machine, TOKENS_PER_DOCUMENT)
        planned.append({"peak_bytes": memory.peak, "gathered_bytes": memory.at_peak["gathered"], **times})
    return planned


def list_goals(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    goals = []
    for name, points in series.items():
        what, peaks = name.split(",")[0], [point["peak_bytes"] for point in points]
        if what == "ranks":
            # Shares shrink with the ranks that have them; where none are shared any further nothing may grow.
            is_shared = "fsdp" in name
            goals.append(
                make_goal(
                    f"{name}: memory of {points[-1]['ranks']} to that of {points[0]['ranks']}",
                    peaks[-1] / peaks[0],
                    at_most=0.99 if is_shared else 1.001,
                )
            )
            slowest = max(point["step_s"] for point in points) / points[0]["step_s"]
            goals.append(make_goal(f"{name}: slowest step to that of {points[0]['ranks']}", slowest, at_most=1.1))
        else:
            off = fit_line([point[what] for point in points], peaks)["off"]
            goals.append(make_goal(f"{name}: memory is off a line by a share of", off, at_most=0.05))
    return goals


def print_plan(result: Mapping[str, Any]) -> None:
    """Print a table for each series, then the goals."""
    print(
        f"planned LoRA steps, {CARDS_PER_MACHINE} cards a machine, {BUS_BYTES_PER_S / 1e9:g} GB/s between any two, "
        f"{FLOPS / 1e12:g} TFLOP/s a card\n"
    )
    for name, points in result["series"].items():
        rows = [[name, "tokens a card", "layers", "GiB", "gathered", "computing s", "gathering s", "gradients s"]]
        rows[0] += ["step s", "s of hops"]
        for point in points:
            row = [str(point["ranks"]), str(point["tokens"]), str(point["layers"])]
            row += [f"{point[figure] / GIB:.3f}" for figure in ("peak_bytes", "gathered_bytes")]
            row += [f"{point[figure]:.3f}" for figure in ("compute_s", "gather_s", "gradients_s", "step_s")]
            rows.append([*row, f"{count_hops(point) * HOP_S:.2f}"])
        print_table(rows)
    print(
        f"Hops are not in the plan: a ring of so many cards passes every layer's weights on that often, forward and\n"
        f"backward; here at {1e6 * HOP_S:g} us each, assumed. NCCL's trees and hsdp have fewer.\n"
    )
    print_goals(result["goals"])


def count_hops(point: Mapping[str, Any]) -> int:
    """Return how often a ring passes weights on in a step: two gathers of every layer, one exchange of gradients."""
    in_ring = point["ranks"] if point["parallel"] == "fsdp" else CARDS_PER_MACHINE
    return 3 * point["layers"] * (in_ring - 1)
