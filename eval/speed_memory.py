"""Set what a training step takes of one card beside what the plan says: the first rank of eight that do not exist.

Collectives reach nobody, but memory comes and goes as with eight cards: weights are real shards, gathered copies have
their size, and values mean nothing. What is missing is NCCL's buffers and the time that data would travel. On a GPU its
allocator is capped at what a card of 32 GB has to give; on a CPU every storage is counted.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.measure import describe_environment, make_goal, print_goals, print_table, run_in_new_process, wait_for
from eval.speed_weights import SIZES
from model.config import LlavaConfig
from train.config import TrainConfig, make_config
from train.memory import GIB, Workload
from train.optim import make_optimizer
from train.parallel import shard, start_fake_ranks
from train.plan import make_batch, run_step, simulate
from train.stage import build_objective

NUM_RANKS = 8
CAP_GIB = 28.5
NUM_STEPS = 3
DOCUMENTS = ((16, 800), (16, 2048))  # of a forward pass, and tokens of each: LLaVA's mean rows, and the longest
TINY_DOCUMENTS = ((4, 256),)


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Plan a LoRA's step with all layers checkpointed and with half of them, and measure it, each in a new process."""
    environment = describe_environment(arguments.device)
    num_layers = SIZES[arguments.size].text.num_hidden_layers
    steps = [
        (arguments.size, num_documents, length, checkpoint_layers)
        for num_documents, length in (TINY_DOCUMENTS if arguments.size == "tiny" else DOCUMENTS)
        for checkpoint_layers in (num_layers, num_layers // 2)
    ]
    cases: list[dict[str, Any]] = []
    for step, planned in zip(steps, run_in_new_process(plan_bytes, steps), strict=True):
        case: dict[str, Any] = dict(zip(("documents", "document_tokens", "checkpoint_layers"), step[1:], strict=True))
        case["planned_bytes"] = planned
        if arguments.device == "cpu" or planned < CAP_GIB * GIB:
            case |= run_in_new_process(measure, *step, arguments.device)
            case["difference"] = case["peak_bytes"] / planned - 1
        cases.append(case)
    measured = [case for case in cases if "difference" in case]
    goals = [
        make_goal(
            f"{describe(case)}: measured peak is off the plan by a share of", abs(case["difference"]), at_most=0.07
        )
        for case in measured
    ]
    return [
        {
            "suite": "memory",
            "size": arguments.size,
            "ranks": NUM_RANKS,
            "cap_gib": CAP_GIB if arguments.device != "cpu" else None,
            "cases": cases,
            "goals": goals,
            "environment": environment,
        }
    ]


def set_up(
    size: str, num_documents: int, length: int, checkpoint_layers: int
) -> tuple[TrainConfig, LlavaConfig, Workload]:
    values = {"name": "memory", "train": "lora", "data": "none", "checkpoint_layers": checkpoint_layers}
    return make_config(values, "the suite"), SIZES[size], Workload(num_documents * length, num_documents, 1)


def plan_bytes(steps: Sequence[tuple[str, int, int, int]]) -> list[int]:
    ranks = start_fake_ranks(NUM_RANKS, NUM_RANKS, torch.device("cpu"))
    return [simulate(*set_up(*step), ranks).peak for step in steps]


def measure(size: str, num_documents: int, length: int, checkpoint_layers: int, device: str) -> dict[str, float]:
    """Return the highest point of the memory, and on a GPU what its allocator held and how long a step computes."""
    config, sizes, work = set_up(size, num_documents, length, checkpoint_layers)
    ranks = start_fake_ranks(NUM_RANKS, NUM_RANKS, torch.device(device))
    if not device.startswith("cuda"):
        return {"peak_bytes": simulate(config, sizes, work, ranks, is_fake=False).peak}
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GIB * GIB / total))
    _, objective = build_objective(config, sizes)
    shard(objective, objective.blocks(), config.parallel, getattr(torch, config.dtype), ranks)
    objective.to_empty(device=device)
    for parameter in objective.parameters():
        fill_at_random(parameter.detach())
    optimizer = make_optimizer(objective, {"": config.learning_rate}, config.weight_decay, config.beta2)
    batch = make_batch(work, sizes, config, ranks.device)
    seconds = []
    for _ in range(NUM_STEPS):
        wait_for(device)
        started = time.perf_counter()
        for _ in run_step(objective, optimizer, [batch], ranks):
            pass
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "computing_s": min(seconds),
    }


@torch.no_grad()
def fill_at_random(parameter: Tensor) -> None:
    """Fill this rank's share. Numbers that overflow would not take longer, but matrices of zeros take less power."""
    own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    if own.is_floating_point():
        own.normal_(std=0.02)
    else:
        own.random_(0, 127)


def describe(case: dict[str, Any]) -> str:
    return f"{case['documents']} x {case['document_tokens']}, {case['checkpoint_layers']} checkpointed"


def print_result(result: dict[str, Any]) -> None:
    """Print one row per case, then the goals."""
    print(f"a LoRA step of {result['size']} on one of {result['ranks']} cards, GiB\n")
    rows = [["documents x tokens", "planned", "measured", "difference", "allocator held", "s computing"]]
    for case in result["cases"]:
        row = [describe(case), f"{case['planned_bytes'] / GIB:.3f}"]
        if "difference" in case:
            row += [f"{case['peak_bytes'] / GIB:.3f}", f"{case['difference']:+.1%}"]
            row += (
                [f"{case['reserved_bytes'] / GIB:.3f}", f"{case['computing_s']:.2f}"] if "computing_s" in case else []
            )
        else:
            row.append("too large")
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    print_table(rows)
    print_goals(result["goals"])
