"""What `--suite growth` measures: LoRA steps of the trainer, over tokens of a pass, layers, and supervised tokens.

All steps of a series are made in one process in turn, so that a machine that slows down bends no line. Memory is what a
step takes above weights and optimizer state: on a GPU its allocator's, on a CPU every storage is counted.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from data.packing import Batch
from eval.measure import make_goal, print_goals, print_table, run_in_new_process, wait_for
from eval.speed_memory import fill_at_random
from eval.speed_weights import SIZES
from model.config import LlavaConfig
from train.config import TrainConfig, make_config
from train.memory import SUPERVISED_SHARE, LiveMemory, Workload, count_weights
from train.optim import make_optimizer
from train.parallel import Ranks, shard, start_fake_ranks
from train.plan import make_batch, run_step
from train.stage import build_objective, count_flops_per_token

REPEATS = 3
MIB = 2**20
SERIES = {  # what grows, and what it is called
    "tokens": "tokens of a pass",
    "layers": "layers",
    "supervised": "supervised tokens",
}
FIGURES = ("median_s", "peak_bytes")


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass, and the optimizer's step."""

    documents: int
    length: int  # of each document, in tokens
    layers: int
    is_checkpointed: bool  # all layers, or none
    supervised: int

    @property
    def tokens(self) -> int:
        return self.documents * self.length


@dataclass(frozen=True)
class Sizes:
    """How far a series goes."""

    length: int  # of a document; with a picture
    documents: tuple[int, ...]  # of a pass
    layers: tuple[int, ...]
    layers_documents: int  # of a pass, where layers grow
    supervised_documents: int
    supervised: tuple[int, ...]


# 800 tokens are the mean of LLaVA's rows.
FULL = Sizes(800, (1, 2, 5, 10, 20), (2, 4, 8, 16), 2, 16, (0, 2500, 5000, 10_000))
TINY = Sizes(200, (1, 2, 4), (1, 2, 3), 2, 2, (0, 100, 200))


def measure_steps(size: str, device: str, repeats: int | None) -> dict[str, Any]:
    """Measure three series of steps, each in a process of its own."""
    sizes, num_layers = TINY if size == "tiny" else FULL, SIZES[size].text.num_hidden_layers
    share = SUPERVISED_SHARE
    both = (False, True)

    def of(documents: int, layers: int, is_checkpointed: bool, supervised: int | None = None) -> Pass:
        count = int(share * documents * sizes.length) if supervised is None else supervised
        return Pass(documents, sizes.length, layers, is_checkpointed, count)

    passes = {
        "tokens": [of(count, num_layers, checkpointed) for checkpointed in both for count in sizes.documents],
        "layers": [
            of(sizes.layers_documents, layers, checkpointed) for checkpointed in both for layers in sizes.layers
        ],
        "supervised": [of(sizes.supervised_documents, num_layers, True, count) for count in sizes.supervised],
    }
    repeats = repeats or REPEATS
    series = {name: run_in_new_process(measure, size, row, device, repeats) for name, row in passes.items()}
    lines = {name: fit_lines(name, row) for name, row in series.items()}
    head = {name: count_head(name, passes["supervised"][-1]) for name in dict.fromkeys((size, "7b"))}
    return {
        "repeats": repeats,
        "series": series,
        "lines": lines,
        "head_share": head,
        "goals": list_goals(series, lines, head),
    }


def fit_lines(name: str, points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Fit a line to every figure of every kind in a series."""
    return {
        kind: {figure: fit_line([p[name] for p in row], [p[figure] for p in row]) for figure in FIGURES}
        for kind, row in split_kinds(points).items()
    }


def split_kinds(points: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return a series' points with no layer checkpointed, and those with all; without what was too large."""
    kinds = {"none checkpointed": False, "all checkpointed": True}
    measured = [point for point in points if "median_s" in point]
    found = {name: [p for p in measured if p["is_checkpointed"] == kind] for name, kind in kinds.items()}
    return {name: points for name, points in found.items() if len(points) > 1}


def measure(size: str, passes: Sequence[Pass], device: str, repeats: int) -> list[dict[str, Any]]:
    """Return every pass with its seconds and its bytes; without these where a GPU's memory is too small."""
    ranks = start_fake_ranks(1, 1, torch.device(device))
    built: dict[int, tuple[nn.Module, torch.optim.Optimizer]] = {}
    seconds: dict[Pass, list[float]] = {each: [] for each in passes}
    peaks: dict[Pass, int] = {}
    for repeat in range(-1, repeats):
        for each in passes:
            if each.layers not in built:
                built[each.layers] = build(size, each.layers, ranks)
            objective, optimizer = built[each.layers]
            objective.llava.language_model.checkpoint_layers = each.layers if each.is_checkpointed else 0  # type: ignore[union-attr]
            batch = make_pass_batch(size, each, ranks.device)
            if repeat == -1:  # also warms up
                peak = measure_peak(objective, optimizer, batch, ranks)
                if peak is not None:
                    peaks[each] = peak
            elif each in peaks:
                seconds[each].append(time_step(objective, optimizer, batch, ranks))
    return [
        asdict(each) | {"tokens": each.tokens}
        | ({"median_s": statistics.median(seconds[each]), "spread_s": [min(seconds[each]), max(seconds[each])],
            "peak_bytes": peaks[each]} if each in peaks else {})
        for each in passes
    ]  # fmt: skip


def set_up(size: str, layers: int) -> tuple[TrainConfig, LlavaConfig]:
    """Return a LoRA stage as the recipes have it, and the model with so many layers."""
    sizes = SIZES[size]
    config = make_config({"name": "growth", "train": "lora", "data": "none"}, "the suite")
    return config, replace(sizes, text=replace(sizes.text, num_hidden_layers=layers))


def build(size: str, layers: int, ranks: Ranks) -> tuple[nn.Module, torch.optim.Optimizer]:
    config, sizes = set_up(size, layers)
    _, objective = build_objective(config, sizes)
    shard(objective, objective.blocks(), config.parallel, getattr(torch, config.dtype), ranks)
    objective.to_empty(device=ranks.device)
    for parameter in objective.parameters():
        fill_at_random(parameter.detach())
    return objective, make_optimizer(objective, {"": config.learning_rate}, config.weight_decay, config.beta2)


def make_pass_batch(size: str, each: Pass, device: torch.device) -> Batch:
    config, sizes = set_up(size, each.layers)
    batch = make_batch(Workload(each.tokens, each.documents, 1), sizes, config, device)
    return replace(batch, supervised=torch.arange(1, 1 + each.supervised, device=device))


def time_step(objective: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, ranks: Ranks) -> float:
    """Return the seconds of a step."""
    wait_for(ranks.device.type)
    started = time.perf_counter()
    for _ in run_step(objective, optimizer, [batch], ranks):
        pass
    wait_for(ranks.device.type)
    return time.perf_counter() - started


def measure_peak(objective: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, ranks: Ranks) -> int | None:
    """Return how many bytes a step needs above what is there before it, None where the device has not so many."""
    try:
        if not optimizer.state:
            time_step(objective, optimizer, batch, ranks)  # makes it
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            time_step(objective, optimizer, batch, ranks)
            return torch.cuda.max_memory_allocated() - before
        with LiveMemory(vocab_size=0) as memory:
            time_step(objective, optimizer, batch, ranks)
        return memory.peak
    except torch.OutOfMemoryError:
        return None


def count_head(size: str, each: Pass) -> float:
    """Return what share the supervised tokens of a pass add to its other operations, by arithmetic.

    Of a supervised token `lm_head` makes its logits, and the gradient of what it read: 4 per weight.
    """
    config, sizes = set_up(size, SIZES[size].text.num_hidden_layers)
    llava, _ = build_objective(config, sizes)
    text, weights = sizes.text, count_weights(config, sizes)
    layers = each.tokens * count_flops_per_token(llava) * (4 / 3 if each.is_checkpointed else 1)
    attention = (8 if each.is_checkpointed else 6) * text.num_hidden_layers * text.hidden_size
    attention *= each.documents * each.length**2
    tower = 2 * weights.num_tower_layers * weights.tower_layer.frozen_bytes / 2  # of bf16
    tower *= each.documents * (sizes.vision.num_patches + 1)
    return each.supervised * 4 * text.vocab_size * text.hidden_size / (layers + attention + tower)


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """Fit a straight line and a power.

    Returns: the line's slope and its value at 0; the largest distance of a point from it, as a share of the point;
        and the exponent of growth over the upper half of the points.
    """
    slope, at_zero = np.polyfit(xs, ys, 1)
    line = slope * np.array(xs) + at_zero
    upper = len(xs) // 2
    exponent = np.log(ys[-1] / ys[upper]) / np.log(xs[-1] / xs[upper]) if xs[upper] < xs[-1] else np.nan
    off = float(np.max(np.abs(line / np.array(ys) - 1)))
    return {"slope": float(slope), "at_zero": float(at_zero), "off": off, "exponent": float(exponent)}


def list_goals(
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    lines: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
    head: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Set beside each other what a straight line says and what was measured."""
    goals = []
    for kind, points in split_kinds(series["tokens"]).items():
        middle, last = points[len(points) // 2], points[-1]
        ratio = last["median_s"] / last["tokens"] * middle["tokens"] / middle["median_s"]
        what = f"{kind}: s per token of {last['tokens']} to those of {middle['tokens']}"
        goals.append(make_goal(what, ratio, at_most=1.15))
    for name in ("tokens", "layers"):
        for kind, fitted in lines[name].items():
            for figure, what, limit in (("median_s", "time", 0.1), ("peak_bytes", "memory", 0.05)):
                goal = f"{kind}: {what} is off a line over {SERIES[name]} by a share of"
                goals.append(make_goal(goal, fitted[figure]["off"], at_most=limit))
    none, *_, most = series["supervised"]
    if "median_s" in most:
        added = most["median_s"] / none["median_s"] - 1
        for size, share in head.items():
            what = f"{size}: share that lm_head adds to the operations, {most['supervised']} supervised"
            goals += [make_goal(what, share, at_most=0.03)] if size in ("7b", "13b") else []
        goals.append(make_goal(f"{most['supervised']} supervised: time added beyond lm_head's operations, a share of",
                               added - next(iter(head.values())), at_most=0.05))  # fmt: skip
    return goals


def print_steps(result: Mapping[str, Any]) -> None:
    """Print a table for each series, then the goals."""
    print(f"a LoRA step of {result['size']}; medians (lowest to highest) of {result['repeats']}; MiB above weights\n")
    for name, points in result["series"].items():
        rows = [[SERIES[name], "layers", "checkpointed", "supervised", "s", "us a token", "MiB", "KiB a token"]]
        for point in points:
            row = [str(point[name]), str(point["layers"]), "all" if point["is_checkpointed"] else "none"]
            row += [str(point["supervised"]), *describe(point)]
            rows.append(row)
        print_table(rows)
        for kind, fitted in result["lines"][name].items():
            seconds, peak = (fitted[figure] for figure in FIGURES)
            print(
                f"{kind}: s ~ {SERIES[name]} ^ {seconds['exponent']:.2f}, off a line by {seconds['off']:.1%}; "
                f"bytes ~ ^ {peak['exponent']:.2f}, {peak['off']:.1%}; {peak['slope'] / 1024:.1f} KiB each"
            )
        print()
    none, *_, most = result["series"]["supervised"]
    if "median_s" in most:
        print(f"{most['supervised']} supervised tokens of {most['tokens']} add to a step of none")
        print(f"  {most['median_s'] / none['median_s'] - 1:6.1%}  of its time, measured")
        for size, share in result["head_share"].items():
            print(f"  {share:6.1%}  of its operations, by arithmetic: {size}")
        print()
    print_goals(result["goals"])


def describe(point: Mapping[str, Any]) -> list[str]:
    if "median_s" not in point:
        return ["too large", "-", "-", "-"]
    low, high = point["spread_s"]
    per_token = [f"{1e6 * point['median_s'] / point['tokens']:.1f}", f"{point['peak_bytes'] / MIB:.1f}"]
    seconds = f"{point['median_s']:.3f} ({low:.3f} to {high:.3f})"
    return [seconds, *per_token, f"{point['peak_bytes'] / 1024 / point['tokens']:.1f}"]
