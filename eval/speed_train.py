"""Time an optimizer step of LoRA tuning, against transformers with PEFT, on the same weights and documents.

    default   as transformers' Trainer runs it: autocast, PEFT's float32 adapters, documents in the order they come,
              padded to the longest of a batch
    tuned     what its documentation adds: adapters in bf16, no autocast, documents of like length in a batch, and the
              layers through torch.compile
    ours      the trainer's own step (`train/loop.py`): packed, and with `compile = true`

Everyone trains rank 16 beside the seven linears of each layer and the projector, with a frozen tower and no dropout,
AdamW, norms clipped at 1, and the mean over the step's supervised tokens as its loss (Trainer's `num_items_in_batch`),
so that the first loss is the same. Attention is SDPA. On a GPU `default` checkpoints its layers, as official LLaVA's
scripts do: a 7B's batch does not fit otherwise.

Lengths are drawn as in `eval/speed_padding.py`: lognormal text of 250 tokens on average beside a picture's 576, three
fifths of the text supervised. What is counted is real tokens, padding is not. Operations that are needed:

    real tokens * (4 per frozen, 6 per trained weight of the layers) + pictures * (2 per weight of tower and projector)
    + 6 * layers * hidden * sum of squared lengths + supervised tokens * 4 * vocabulary * hidden

and a share of the limit is these per second over those of a large matrix product in bf16. Each contestant is a new
process, that makes two forward and backward passes to warm up, and then a whole step. What it keeps for its backward
pass is counted in a process of its own, of the longest batch, each storage once and parameters not at all.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from eval.measure import (
    describe_environment,
    format_median,
    make_goal,
    measure_product_rate,
    print_goals,
    print_table,
    run_in_new_process,
    summarize,
    take_turns,
    wait_for,
)
from eval.speed_train_contestants import (
    CONTESTANTS,
    DEFAULT,
    OURS,
    OURS_COMPILED,
    TUNED,
    TUNED_COMPILED,
    Work,
    make_batches,
    make_documents,
    make_stage,
)
from eval.speed_weights import HF_BF16, SIZES, prepare_checkpoint
from train.stage import build_objective, count_flops_per_token

REPEATS = 3
ROWS_PER_BATCH = {"cpu": 8, "cuda": 4}
NUM_DOCUMENTS = {"cpu": 32, "cuda": 64}  # of a step
NUM_WARM_UP = 2  # passes
# x the real tokens/s of default and of the faster of tuned, and share of what cards multiply
GOALS = {("cpu", "small"): (2.2, 1.15, None), ("cuda", "7b"): (2.5, 1.2, 0.5)}


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device, repeats = arguments.device, arguments.repeats or REPEATS
    environment = describe_environment(device)
    kind = device.partition(":")[0]
    config = SIZES[arguments.size]
    folder = prepare_checkpoint(arguments.checkpoint_dir, arguments.size, HF_BF16)
    documents = make_documents(config, arguments.documents or NUM_DOCUMENTS[kind])
    work = Work(folder, config, documents, ROWS_PER_BATCH[kind], device)
    turns: dict[str, Callable[[], Any]] = {name: functools.partial(measure, name, work) for name in CONTESTANTS}
    turns["product"] = functools.partial(measure_product_rate, device, torch.bfloat16)
    rounds = take_turns(turns, repeats)
    limit = statistics.median(rounds.pop("product"))
    summary = summarize({name: [figures for figures, _ in rows] for name, rows in rounds.items()})
    kept = {name: run_in_new_process(count_kept_bytes, name, work) for name in CONTESTANTS}
    operations = count_operations(work)
    speeds = {name: row["real_tokens_per_s"] for name, row in summary["median"].items()}
    real_tokens = sum(map(len, documents))
    ratio = {
        name: {
            "tokens_to_default": speed / speeds[DEFAULT],
            "tokens_to_tuned": speed / max(speeds[TUNED], speeds[TUNED_COMPILED]),
            "kept_to_default": kept[name] / kept[DEFAULT],
            "share_of_limit": sum(operations.values()) * speed / real_tokens / limit,
        }
        for name, speed in speeds.items()
    }
    return [
        {
            "suite": "train",
            "size": arguments.size,
            "dtype": "bfloat16",
            "repeats": repeats,
            **describe_work(work),
            "operations": operations,
            "product_operations_per_s": limit,
            **summary,
            "kept_bytes": kept,
            "first_loss": {name: rows[0][1] for name, rows in rounds.items()},
            "ratio": ratio,
            "goals": list_goals(ratio, kind, arguments.size),
            "environment": environment,
        }
    ]


def describe_work(work: Work) -> dict[str, Any]:
    lengths = [len(document) for document in work.documents]
    padded = {
        name: sum(len(batch) * max(map(len, batch)) for batch in make_batches(work, name != DEFAULT))
        for name in (DEFAULT, TUNED)
    }
    return {
        "documents": len(lengths),
        "rows_per_batch": work.rows_per_batch,
        "real_tokens": sum(lengths),
        "document_tokens": {"lowest": min(lengths), "median": statistics.median(lengths), "highest": max(lengths)},
        "padded_tokens": padded,
        "supervised_tokens": work.num_supervised,
        "pictures": sum(document.pixels is not None for document in work.documents),
    }


def measure(name: str, work: Work) -> tuple[dict[str, float], float]:
    """Return one step's figures, and its loss; the process is new."""
    trainer = CONTESTANTS[name](work)
    for run_pass in trainer.passes[:NUM_WARM_UP]:
        run_pass()
    if work.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    wait_for(work.device)
    started = time.perf_counter()
    loss = trainer.step()  # reading the loss waits for the device
    seconds = time.perf_counter() - started
    figures = {"step_s": seconds, "real_tokens_per_s": sum(map(len, work.documents)) / seconds}
    if work.device != "cpu":
        figures["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures, loss


def count_kept_bytes(name: str, work: Work) -> int:
    """Return the bytes that the longest batch's forward pass keeps for its backward pass."""
    longest, *_ = CONTESTANTS[name](work).passes
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses from being used again

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        longest()
    return sum(storage.nbytes() for storage in kept.values())


def count_operations(work: Work) -> dict[str, float]:
    """Return the floating-point operations that a step needs, whoever does it; see this file's beginning."""
    text, vision = work.config.text, work.config.vision
    llava, _ = build_objective(make_stage(work.folder), work.config)
    lengths = [len(document) for document in work.documents]
    num_pictures = sum(document.pixels is not None for document in work.documents)
    tower = [*llava.vision_tower.layers[: llava.vision_tower.num_used_layers], llava.projector]
    tower_weights = sum(parameter.numel() for module in tower for parameter in module.parameters())
    return {
        "layers": count_flops_per_token(llava) * sum(lengths),
        "tower": 2 * tower_weights * vision.num_patches * num_pictures,
        "attention": 6 * text.num_hidden_layers * text.hidden_size * sum(length**2 for length in lengths),
        "lm_head": 4 * text.vocab_size * text.hidden_size * work.num_supervised,
    }


def list_goals(ratio: dict[str, dict[str, float]], kind: str, size: str) -> list[dict[str, Any]]:
    """Set beside its goals whichever of eager and compiled is faster, where the size is the one meant."""
    best = max((OURS, OURS_COMPILED), key=lambda name: ratio[name]["tokens_to_default"])
    row = ratio[best]
    goals = []
    if (kind, size) in GOALS:
        to_default, to_tuned, share = GOALS[kind, size]
        goals.append(make_goal(f"{best}: x default's real tokens/s", row["tokens_to_default"], at_least=to_default))
        goals.append(make_goal(f"{best}: x tuned's real tokens/s", row["tokens_to_tuned"], at_least=to_tuned))
        if share is not None:
            goals.append(make_goal(f"{best}: share of the limit", row["share_of_limit"], at_least=share))
        kept = ratio[OURS]["kept_to_default"]
        goals.append(make_goal(f"{OURS}: x the bytes that default keeps for backward", kept, at_most=0.5))
    return goals


def print_result(result: dict[str, Any]) -> None:
    """Print one row per contestant, what is needed at least, then the goals."""
    lengths, real = result["document_tokens"], result["real_tokens"]
    print(
        f"a LoRA step of {result['size']} in bf16 on {result['documents']} documents of {lengths['lowest']} to "
        f"{lengths['highest']} tokens (median {lengths['median']:.0f}), {result['pictures']} of them with a picture: "
        f"{real} real tokens,\n{result['supervised_tokens']} supervised; in batches of {result['rows_per_batch']} "
        + " and ".join(f"{tokens} when padded as {name}" for name, tokens in result["padded_tokens"].items())
        + f"; medians (lowest to highest) of {result['repeats']}\n"
    )
    rows = [["", "s a step", "real tokens/s", "x default", "x tuned", "share of limit", "MiB kept", "x default"]]
    for name, ratio in result["ratio"].items():
        rows.append(
            [
                name,
                format_median(result, name, "step_s", digits=2),
                f"{result['median'][name]['real_tokens_per_s']:.0f}",
                f"{ratio['tokens_to_default']:.2f}",
                f"{ratio['tokens_to_tuned']:.2f}",
                f"{ratio['share_of_limit']:.2f}",
                f"{result['kept_bytes'][name] / 2**20:.0f}",
                f"{ratio['kept_to_default']:.2f}",
            ]
        )
    print_table(rows)
    print("first loss: " + ", ".join(f"{name} {loss:.5f}" for name, loss in result["first_loss"].items()))
    operations, limit = result["operations"], result["product_operations_per_s"] / 1e9
    total = sum(operations.values())
    print(f"needed: {total / 1e12:.3g} TFLOP, of which " + ", ".join(
        f"{name} {100 * count / total:.0f} %" for name, count in operations.items()
    ))  # fmt: skip
    print(f"limit: one large bf16 matrix product, {limit:.0f} G operations/s; its share is needed / time / limit\n")
    if result["goals"]:
        print_goals(result["goals"])
