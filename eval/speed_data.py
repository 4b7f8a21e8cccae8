"""Time the way of data to the model: preparing, checking, loading, opening; and whether training waits for it.

Loading is done by `StepDataset` as one of eight ranks (which renders the text of the whole step, and opens its own
pictures), also from tar shards and from features made ahead; by `StepDataset` as the only rank; and as official LLaVA
does it: Pillow, a square ground and `CLIPImageProcessor`, `transformers`' tokenizer for the whole conversation and
again for each of its rounds (that is how the official labels come about), rows padded to the longest. Before the clock
starts, rows of both are compared: the ids and labels are the same, and the pixels, bit for bit. Every process has one
thread, as a loader's worker has. What the trainer then waits for is measured by `eval/speed_data_wait.py`.

Files are made for the purpose, of the published formats and sizes, and are in the page cache: what a disk adds is not
measured. Text is lognormal, of so many words that LLaMA's vocabulary makes about 250 tokens of them on average; the
tiny vocabulary, the default, makes more of them, which takes both sides longer. One word in 30 is new, as this
project's tokenizer remembers the others. --size tiny makes a few of everything.
"""

import argparse
import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.check import inspect_picture
from data.packing import StepDataset
from data.prepare import coco, visual_genome
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.report import Report
from data.rows import RowWriter
from data.tokenizer import Tokenizer
from eval.measure import (
    MemoryWatch,
    describe_environment,
    format_median,
    make_goal,
    print_goals,
    print_table,
    summarize,
    take_turns,
)
from eval.speed_data_files import FULL, TINY, WORDS, make_files
from eval.speed_data_loading import (
    LOADERS,
    NUM_COMPARED,
    NUM_PATCHES,
    NUM_RANKS,
    OFFICIAL,
    OURS,
    OURS_ALONE,
    OURS_FEATURES,
    OURS_SHARDS,
    ROWS_PER_RANK,
    SEED,
    compare_rows,
    official_loader,
    open_steps,
    our_loader,
)
from eval.speed_data_wait import NUM_WORKERS, WORKERS, list_waiting_goals, print_waiting, train, write_start

REPEATS = 3
NUM_READ = 2000  # rows, at random
STEP_S = {"13B LoRA": 6.9, "7B LoRA": 3.7}  # of 16 rows of 800 tokens on each of 8 GPUs, as train/plan.py plans them
TOKENS_PER_EATEN_ROW = 800
COCO, GENOME, CHECK = "preparing coco", "preparing visual_genome", "checking"
FIRST, AGAIN = "the first time", "again"
MB = 1e6


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    environment = describe_environment("cpu")
    sizes = TINY if arguments.size == "tiny" else FULL
    num_rows = arguments.rows or sizes.rows
    repeats = arguments.repeats or REPEATS
    with tempfile.TemporaryDirectory(prefix="speed_data_") as name:
        folder = Path(name)
        shutil.copyfile(arguments.tokenizer, folder / "tokenizer.model")
        make_files(folder, sizes, num_rows)
        write_start(folder)
        turns: dict[str, Callable[[], dict[str, float]]] = {
            COCO: functools.partial(prepare, "coco", folder),
            GENOME: functools.partial(prepare, "visual_genome", folder),
            CHECK: functools.partial(check, folder),
            **{name: functools.partial(load, name, folder, sizes.steps) for name in LOADERS},
            **{name: functools.partial(train, WORKERS[name], folder, sizes.training_steps) for name in WORKERS},
        }
        compare_rows(folder)
        open_ = functools.partial(open_rows, folder)
        rounds = take_turns({FIRST: open_}, repeats=1) | take_turns(turns | {AGAIN: open_}, repeats)
        summary = summarize(rounds)
        median = summary["median"]
        samples_per_s = {name: median[name]["samples_per_s"] for name in LOADERS}
        result = {
            "suite": "data",
            "vocab_size": Tokenizer(arguments.tokenizer).vocab_size,
            "repeats": repeats,
            "sizes": asdict(sizes) | {"rows": num_rows},
            "files": describe_files(folder),
            "compared_rows": NUM_COMPARED,
            **summary,
            "ratio": {name: rate / samples_per_s[OFFICIAL] for name, rate in samples_per_s.items()},
            "feeding": {model: count_workers(step_s, samples_per_s[OURS]) for model, step_s in STEP_S.items()},
            "goals": list_goals(median),
            "environment": environment,
        }
    return [result]


def prepare(source: str, folder: Path) -> dict[str, float]:
    """Prepare a data set as `python -m data.prepare` does."""
    root = folder / source
    started = time.perf_counter()
    rows = {"coco": coco, "visual_genome": visual_genome}[source].read(root, Options(), Leaks([root]), Report(source))
    with RowWriter(root / "rows.json") as writer:
        for row in rows:
            writer.write(row)
    return {"rows_per_s": writer.num_rows / (time.perf_counter() - started)}


def check(folder: Path) -> dict[str, float]:
    """Look at every picture as `python -m data.check` does in each of its processes."""
    images = folder / "images"
    names = [str(file.relative_to(images)) for file in sorted(images.rglob("*.jpg"))]
    inspect_picture(images, names[0])
    started = time.perf_counter()
    problems = [inspect_picture(images, name)["problem"] for name in names]
    seconds = time.perf_counter() - started
    assert not any(problems), problems
    return {"pictures_per_s": len(names) / seconds}


def load(name: str, folder: Path, num_steps: int) -> dict[str, float]:
    """Make one rank's share of steps with one thread, as a loader's worker does, after one of warm-up."""
    torch.set_num_threads(1)
    make_share = official_loader(folder) if name == OFFICIAL else our_loader(name, folder)
    make_share(0)
    started = time.perf_counter()
    counts = [make_share(step) for step in range(1, num_steps + 1)]
    seconds = time.perf_counter() - started
    samples, tokens = map(sum, zip(*counts, strict=True))
    return {"samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds, "step_s": seconds / num_steps}


def open_rows(folder: Path) -> dict[str, float]:
    """Open the large file as one of eight ranks, read rows at random, and start a loader's worker."""
    with MemoryWatch() as memory:
        started = time.perf_counter()
        steps = open_steps(OURS, folder, "many.json")
        seconds = time.perf_counter() - started
    of_rank = measure_memory()
    rows = steps.dataset.rows
    numbers = np.random.default_rng(SEED).integers(0, len(rows), NUM_READ).tolist()
    started = time.perf_counter()
    for number in numbers:
        rows[number]
    rate = NUM_READ / (time.perf_counter() - started)
    of_worker = next(iter(DataLoader(WorkerMemory(steps), batch_size=None, num_workers=1)))
    return {
        "opened_s": seconds,
        "private_peak_bytes": memory.private_peak_bytes,
        **{f"rank_{figure}": value for figure, value in of_rank.items()},
        **{f"worker_{figure}": value for figure, value in of_worker.items()},
        "read_rows_per_s": rate,
    }


class WorkerMemory(Dataset[dict[str, int]]):
    """What a loader's worker holds once it has made some steps."""

    def __init__(self, steps: StepDataset) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> dict[str, int]:
        for step in range(2):
            self.steps[step]
        return measure_memory()


def measure_memory() -> dict[str, int]:
    """Return this process's memory: what it has alone, and that with its part of what it shares with others (PSS)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    kib = {name.rstrip(":"): int(value) for name, value, _ in map(str.split, lines)}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"private_bytes": 1024 * private, "pss_bytes": 1024 * kib["Pss"]}


def describe_files(folder: Path) -> dict[str, float]:
    """Return how large what was made is, on average."""
    dataset = open_steps(OURS_ALONE, folder).dataset
    texts = [dataset.render(number) for number in range(len(dataset))]
    text_tokens = sum(len(text) + text.num_cut - NUM_PATCHES * text.num_images for text in texts)
    sizes = [file.stat().st_size for file in (folder / "images").rglob("*.jpg")]
    return {
        "picture_bytes": sum(sizes) / len(sizes),
        "tokens_per_row": sum(map(len, texts)) / len(texts),
        "text_tokens_per_row": text_tokens / len(texts),
        "tokens_per_word": len(dataset.tokenizer.encode(" ".join(WORDS))) / len(WORDS),
        "cut_share": sum(text.num_cut > 0 for text in texts) / len(texts),
        "opened_bytes": (folder / "many.json").stat().st_size,
    }


def count_workers(step_s: float, samples_per_s: float) -> dict[str, float]:
    """Return what training eats and how many loader processes feed it.

    Args:
        step_s: of 16 rows on each of 8 GPUs.
        samples_per_s: that one process makes.
    """
    workers = ROWS_PER_RANK / step_s / samples_per_s
    return {
        "step_s": step_s,
        "eaten_tokens_per_s": NUM_RANKS * ROWS_PER_RANK * TOKENS_PER_EATEN_ROW / step_s,
        "workers_per_gpu": workers,
        "busy_cores": NUM_RANKS * workers,
        "cores": NUM_RANKS * math.ceil(workers),
    }


def list_goals(median: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    goals = []
    for model, step_s in STEP_S.items():
        workers = count_workers(step_s, median[OURS]["samples_per_s"])["workers_per_gpu"]
        goals.append(make_goal(f"{model}: loader workers that a GPU needs", workers, at_most=NUM_WORKERS))
    for name in (OURS, OURS_ALONE, OURS_SHARDS):
        ratio = median[name]["samples_per_s"] / median[OFFICIAL]["samples_per_s"]
        goals.append(make_goal(f"{name}: x the official way's samples/s", ratio, at_least=1.3))
    goals += list_waiting_goals(median)
    goals.append(make_goal("seconds of opening again", median[AGAIN]["opened_s"], at_most=10))
    for process in ("rank", "worker"):
        private = median[AGAIN][f"{process}_private_bytes"] / MB
        goals.append(make_goal(f"MB that a {process} has alone", private, at_most=1000))
    return goals


def print_result(result: dict[str, Any]) -> None:
    """Print a table for each part of the way, then the goals."""
    sizes, files, median = result["sizes"], result["files"], result["median"]
    print(
        f"{sizes['pictures']} pictures of {files['picture_bytes'] / 1000:.0f} KB, {sizes['conversations']} "
        f"conversations of {files['text_tokens_per_row']:.0f} text tokens ({files['tokens_per_word']:.1f} a word;\n"
        f"with pictures {files['tokens_per_row']:.0f} tokens, {files['cut_share']:.1%} of the rows are cut); "
        f"medians (lowest to highest) of {result['repeats']}\n"
    )
    rows = [["one process", "rows/s, pictures/s"]]
    rows += [[name, format_median(result, name, "rows_per_s", digits=0)] for name in (COCO, GENOME)]
    print_table([*rows, [CHECK, format_median(result, CHECK, "pictures_per_s", digits=0)]])

    rows = [["loading, one process", "samples/s", "tokens/s", "ms a step of 16", "x official"]]
    for name in LOADERS:
        speed = format_median(result, name, "samples_per_s")
        step_ms = format_median(result, name, "step_s", 1000, digits=0)
        rows.append([name, speed, f"{median[name]['tokens_per_s']:.0f}", step_ms, f"{result['ratio'][name]:.2f}"])
    print_table(rows)
    saved_s = median[OURS]["step_s"] - median[OURS_FEATURES]["step_s"]
    print(
        f"features made ahead save {1000 * saved_s:.0f} ms of a worker's time a step, and the tower's work on the GPU\n"
    )

    print_waiting(result)
    rows = [[f"opening {sizes['rows']} rows, {files['opened_bytes'] / MB:.0f} MB", "s", "MB private, peak"]]
    rows[0] += ["rank: MB private", "PSS", "worker: MB private", "PSS", "rows/s at random"]
    for name in (FIRST, AGAIN):
        memory = [f"{process}_{kind}_bytes" for process in ("rank", "worker") for kind in ("private", "pss")]
        megabytes = [f"{median[name][figure] / MB:.0f}" for figure in ("private_peak_bytes", *memory)]
        opened = format_median(result, name, "opened_s", digits=2)
        rows.append([name, opened, *megabytes, f"{median[name]['read_rows_per_s']:.0f}"])
    print_table(rows)

    rows = [["feeding 8 GPUs x 16 rows", "s a step", "tokens/s eaten", "fed by a worker"]]
    rows[0] += ["workers per GPU", "cores busy", "whole workers"]
    for model, row in result["feeding"].items():
        fed, workers = f"{median[OURS]['tokens_per_s']:.0f}", f"{row['workers_per_gpu']:.3f}"
        eaten = f"{row['eaten_tokens_per_s']:.0f}"
        rows.append([model, f"{row['step_s']}", eaten, fed, workers, f"{row['busy_cores']:.1f}", f"{row['cores']}"])
    print_table(rows)
    print_goals(result["goals"])
