"""Time how a LoRA job starts: one rank of eight, from the command to the end of its first step, part by part.

Each time it is a new process that imports what `train/main.py` imports and runs the trainer's own `run_stage`
(`eval/speed_start_rank.py`), with the settings of the size's recipe in `train/configs`, on as many rows as LLaVA's
mixture has (--size tiny and small: on few). The other ranks do not exist, so joining them and waiting for them takes
nothing; `compile` is off. The checkpoint holds random weights in bf16.

The first time there is no index beside the rows, and what the rank reads is put into the page cache. That run ends
before the step and counts for the index alone; the others find both. The first batch is the loader's, of 16 documents,
from its worker processes. On a CPU the first step is then of one document of 64 tokens without a picture, for
completeness: how long it takes says nothing of a GPU, where it is of the loader's batch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from eval.measure import ROOT, describe_environment, format_median, make_goal, print_goals, print_table, summarize
from eval.speed_data_files import FULL, make_picture, write_rows
from eval.speed_start_rank import DATA, FILL, NUM_RANKS, PARTS, STEP, STEP_TOKENS
from eval.speed_weights import HF_BF16, SIZES, prepare_checkpoint

REPEATS = 3
NUM_ROWS = {"tiny": 300, "small": 20_000}
NUM_PICTURES = 64
CARD_GIB = 32
FIRST, AGAIN = "the first time", "again"
MB = 1e6


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    size, repeats = arguments.size, arguments.repeats or REPEATS
    environment = describe_environment(arguments.device)
    checkpoint = prepare_checkpoint(arguments.checkpoint_dir, size, HF_BF16)
    num_rows = arguments.rows or NUM_ROWS.get(size, FULL.rows)
    with tempfile.TemporaryDirectory(prefix="speed_start_") as name:
        folder = Path(name)
        make_data(folder, num_rows)
        rounds = {}
        for case, times in ((FIRST, 1), (AGAIN, repeats)):
            does_step = case == AGAIN
            rounds[case] = [start_rank(size, checkpoint, folder, arguments.device, does_step) for _ in range(times)]
    summary = summarize(rounds)
    return [
        {
            "suite": "start",
            "size": size,
            "ranks": NUM_RANKS,
            "rows": num_rows,
            "step_tokens": STEP_TOKENS if arguments.device == "cpu" else None,
            "repeats": repeats,
            **summary,
            "goals": list_goals(summary["median"][AGAIN]),
            "environment": environment,
        }
    ]


def make_data(folder: Path, num_rows: int) -> None:
    """Write rows like those of LLaVA's mixture, all about a few pictures."""
    generator = np.random.default_rng(0)
    names = [f"{number}.jpg" for number in range(NUM_PICTURES)]
    for name in names:
        make_picture(640, 480, generator).save(folder / name, quality=90)
    write_rows(folder / "rows.json", names, min(FULL.conversations, num_rows), num_rows, generator)


def start_rank(size: str, checkpoint: Path, folder: Path, device: str, does_step: bool) -> dict[str, float]:
    """Start a job in a new process; return the seconds of its parts, and bytes."""
    print(f"starting a job of {size}", file=sys.stderr, flush=True)
    settings = {
        "model": str(checkpoint),
        "data": str(folder / "rows.json"),
        "image_folder": str(folder),
        "max_tokens": min(2048, SIZES[size].text.max_position_embeddings),
        "card_gib": CARD_GIB,
        "compile": False,
    }
    request: dict[str, Any] = {
        "recipe": str(ROOT / f"train/configs/llava_{'13b' if size == '13b' else '7b'}_lora.toml"),
        "overrides": [f"{key}={json.dumps(value)}" for key, value in settings.items()],
        "device": device,
        "does_step": does_step,
        "run": str(folder),
        "result": str(folder / "result.json"),
    }
    script = str(ROOT / "eval/speed_start_rank.py")
    request["commanded"] = time.monotonic()
    subprocess.run([sys.executable, script, json.dumps(request)], stdout=sys.stderr, check=True)
    return json.loads(Path(request["result"]).read_text(encoding="utf-8"))


def list_goals(again: dict[str, float]) -> list[dict[str, Any]]:
    others = sum(again[part] for part in PARTS if part not in (FILL, STEP))
    room = 1.1 * again["weights_bytes"] + 300 * MB
    return [
        make_goal("seconds of all but reading weights and the step", others, at_most=30),
        make_goal(
            "peak private memory before the step / (1.1 x this rank's weights + 300 MB)",
            again["private_peak_bytes"] / room,
            at_most=1,
        ),
        make_goal("bytes read from the disk / bytes of this rank's weights", disk_share(again), at_most=0.01),
    ]


def disk_share(again: dict[str, float]) -> float:
    """Return what was not in the page cache after all."""
    return again["disk_bytes"] / again["weights_bytes"]


def print_result(result: dict[str, Any]) -> None:
    """Print one row per part, then the goals."""
    median = result["median"]
    again = median[AGAIN]
    print(f"a LoRA job of {result['size']} starts, one rank of {result['ranks']}, {result['rows']} rows of data")
    print(f"seconds: medians (lowest to highest) of {result['repeats']}\n")
    total = sum(again[part] for part in PARTS)
    rows = [["", "s", "share"]]
    rows += [[part, format_median(result, AGAIN, part, digits=3), f"{again[part] / total:.1%}"] for part in PARTS]
    rows.append(["in all", f"{total:.3f}", ""])
    print_table(rows)
    longest = max(PARTS, key=lambda part: again[part])
    print(f"most of it is {longest}; {DATA} without its index took {median[FIRST][DATA]:.1f} s")
    print(f"reading rows: {again['weights_bytes'] / again[FILL] / 1e9:.2f} GB/s of weights", end="; ")
    figures = ("weights_bytes", "private_peak_bytes", "file_pages_bytes", "disk_bytes")
    weights, private, files, disk = (again[figure] / MB for figure in figures)
    print(
        f"MB: {weights:.0f} weights, {private:.0f} private at most, {files:.0f} mapped, {disk:.0f} read from the disk"
    )
    if result["step_tokens"]:
        print(f"the step is of one document of {result['step_tokens']} tokens: it says nothing of a GPU's")
    print()
    print_goals(result["goals"])
