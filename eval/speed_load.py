"""Time reading a checkpoint, and how much memory it takes, each contestant in a new process.

The peer is transformers' `from_pretrained` on the same files, as they are stored and with a change from fp16 to bf16;
the limit is reading the files once. Time counts until the call has returned, and until every page of the model has
been looked at: a mapped file is only then read. Files are in the page cache, imports are done, and a tiny model has
been loaded by the same call before the clock starts.

What eight ranks read of a disk is counted apart, where files can be dropped from the page cache: all eight at once, and
then one alone.
"""

import argparse
import functools
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.measure import (
    MemoryWatch,
    describe_environment,
    format_median,
    make_goal,
    print_goals,
    print_table,
    run_in_new_process,
    summarize,
    take_turns,
    wait_for,
)
from eval.page_cache import count_disk_bytes, drop_from_cache
from eval.speed_weights import HF_BF16, HF_FP16, OFFICIAL_BIN, load_transformers, prepare_checkpoint
from model.weights import Checkpoint, load_llava, open_checkpoint

REPEATS = 5
PAGE_BYTES = 4096
MB = 1e6
NUM_RANKS, RANK = 8, 3
NOTHING_MB = 50  # what private memory may rise by where the files themselves are the model


def read_files(folder: Path, device: str = "cpu") -> list[Tensor]:
    """Read every weight once, into one buffer that is used again and again."""
    buffer = bytearray(16 * 2**20)
    for file in list_weights(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return []


def load_ours(folder: Path, device: str, **options: Any) -> list[Tensor]:
    return list(load_llava(folder, device=device, **options).parameters())


def load_rank(folder: Path, device: str) -> list[Tensor]:
    return list(read_rank(open_checkpoint(folder), RANK, device))


def read_rank(checkpoint: Checkpoint, rank: int, device: str) -> Iterator[Tensor]:
    """Read one rank's rows of every tensor, as sharded training does."""
    for tensor in checkpoint.tensors.values():
        start, end = (number * tensor.shape[0] // NUM_RANKS for number in (rank, rank + 1))
        yield tensor.read(slice(start, end)).to(device, copy=True)


def load_peer(folder: Path, device: str) -> list[Tensor]:
    model = load_transformers(folder, device)
    return [*model.parameters(), *model.buffers()]


READING, OURS, OURS_CAST, OURS_BIN = "reading the files", "ours", "ours, fp16 to bf16", "ours, official .bin"
OURS_RANK, PEER, PEER_CAST = "ours, one rank of 8", "transformers", "transformers, fp16 to bf16"

CONTESTANTS: dict[str, tuple[str, Callable[[Path, str], list[Tensor]]]] = {
    READING: (HF_BF16, read_files),
    OURS: (HF_BF16, load_ours),
    PEER: (HF_BF16, load_peer),
    OURS_CAST: (HF_FP16, functools.partial(load_ours, dtype=torch.bfloat16)),
    PEER_CAST: (HF_FP16, load_peer),
    OURS_BIN: (OFFICIAL_BIN, load_ours),
    OURS_RANK: (HF_BF16, load_rank),
    "ours, 8 bits": (HF_BF16, functools.partial(load_ours, bits=8)),
    "ours, 4 bits": (HF_BF16, functools.partial(load_ours, bits=4)),
}


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    environment = describe_environment(arguments.device)
    kinds = [kind for kind, _ in CONTESTANTS.values()]
    folders, warm_up = (
        {kind: prepare_checkpoint(arguments.checkpoint_dir, size, kind) for kind in kinds}
        for size in (arguments.size, "tiny")
    )
    turns = {
        name: functools.partial(measure, name, folders[kind], warm_up[kind], arguments.device)
        for name, (kind, _) in CONTESTANTS.items()
    }
    repeats = arguments.repeats or REPEATS
    summary = summarize(take_turns(turns, repeats))
    median = summary["median"]
    ranks = measure_ranks(folders[HF_BF16], warm_up[HF_FP16])  # not the same, where the size is tiny
    ratio = {
        name: {
            "time_to_reading": row["touched_s"] / median[READING]["touched_s"],
            "time_to_transformers": row["touched_s"] / median[find_peer(name)]["touched_s"],
            "file_pages_to_files": row["file_pages_bytes"] / row["files_bytes"],
        }
        for name, row in median.items()
    }
    return [
        {
            "suite": "load",
            "size": arguments.size,
            "repeats": repeats,
            **summary,
            "ratio": ratio,
            "ranks": ranks,
            "goals": list_goals(median) + list_rank_goals(ranks),
            "environment": environment,
        }
    ]


def measure(name: str, folder: Path, warm_up: Path, device: str) -> dict[str, float]:
    """Load once; the process is new."""
    load = CONTESTANTS[name][1]
    load(warm_up, device)
    read_files(folder)
    gc.collect()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wait_for(device)
    with MemoryWatch() as memory:
        started = time.perf_counter()
        tensors = load(folder, device)
        wait_for(device)
        loaded_s = time.perf_counter() - started
        touch_pages(tensors)
        wait_for(device)
        touched_s = time.perf_counter() - started
    return {
        "loaded_s": loaded_s,
        "touched_s": touched_s,
        "files_bytes": sum(file.stat().st_size for file in list_weights(folder)),
        "model_bytes": sum(tensor.nbytes for tensor in tensors),
        "private_peak_bytes": memory.private_peak_bytes,
        "file_pages_bytes": memory.file_pages_bytes,
        **({"gpu_peak_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {}),
    }


def measure_ranks(folder: Path, warm_up: Path) -> dict[str, Any]:
    """Return what eight ranks, each a process, read from the disk at once, and then one of them alone."""
    files = list_weights(folder)
    measure = functools.partial(measure_rank, folder, warm_up)
    if kept := drop_from_cache(files):
        return {"not_measured": f"{kept} bytes of the files stay in the page cache"}
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(NUM_RANKS, mp_context=context, max_tasks_per_child=1) as executor:
        at_once = list(executor.map(measure, range(NUM_RANKS)))
    if not any(row["disk_bytes"] for row in at_once):
        return {"not_measured": "the system does not count what a process reads of this disk"}
    if kept := drop_from_cache(files):
        return {"not_measured": f"{kept} bytes of the files stay in the page cache"}
    alone = run_in_new_process(measure, RANK, True)
    return {"files_bytes": sum(file.stat().st_size for file in files), "at_once": at_once, "alone": alone}


def measure_rank(folder: Path, warm_up: Path, rank: int, is_keeping: bool = False) -> dict[str, int]:
    """Copy a rank's rows into memory of its own, to stay there or, as eight ranks' may not fit, to be let go of."""
    list(read_rank(open_checkpoint(warm_up), rank, "cpu"))
    before = count_disk_bytes()
    rows_bytes = 0
    kept = []
    with MemoryWatch() as memory:
        checkpoint = open_checkpoint(folder)
        opened = count_disk_bytes()
        for shard in read_rank(checkpoint, rank, "cpu"):
            rows_bytes += shard.nbytes
            if is_keeping:
                kept.append(shard)
    return {
        "rows_bytes": rows_bytes,
        "opening_disk_bytes": opened - before,
        "disk_bytes": count_disk_bytes() - before,
        "private_peak_bytes": memory.private_peak_bytes,
        "file_pages_bytes": memory.file_pages_bytes,
    }


def find_peer(name: str) -> str:
    """Return who does the same: with or without a change of dtype."""
    return PEER_CAST if CONTESTANTS[name][0] == HF_FP16 else PEER


def list_weights(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in {".safetensors", ".bin"})


@torch.no_grad()
def touch_pages(tensors: Iterable[Tensor]) -> None:
    """Look at one number of every page."""
    for tensor in tensors:
        tensor.reshape(-1)[:: max(1, PAGE_BYTES // tensor.element_size())].sum()


def list_goals(median: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    goals = []
    for name in (OURS, OURS_CAST):
        for figure, until in (("loaded_s", "returned"), ("touched_s", "read")):
            times = median[name][figure] / median[find_peer(name)][figure]
            goals.append(make_goal(f"{name}: x transformers' time until {until}", times, at_most=1.0))
    for name in (OURS, OURS_CAST, OURS_BIN):
        times = median[name]["touched_s"] / median[READING]["touched_s"]
        goals.append(make_goal(f"{name}: x the time of reading the files", times, at_most=1.5))
    room = 1.1 * median[OURS_CAST]["model_bytes"] + 300 * MB
    share = median[OURS_CAST]["private_peak_bytes"] / room
    goals.append(make_goal(f"{OURS_CAST}: peak private memory / (1.1 x model + 300 MB)", share, at_most=1.0))
    for name in (OURS, OURS_BIN):
        private = median[name]["private_peak_bytes"] / MB
        goals.append(make_goal(f"{name}: MB of peak private memory", private, at_most=NOTHING_MB))
    rank = median[OURS_RANK]
    for figure, what, room in (("private_peak_bytes", "held", 1.1), ("file_pages_bytes", "mapped", 1.2)):
        share = rank[figure] / rank["files_bytes"]
        goals.append(
            make_goal(f"{OURS_RANK}: part of the files' bytes that is {what}", share, at_most=room / NUM_RANKS)
        )
    return goals


def list_rank_goals(ranks: dict[str, Any]) -> list[dict[str, Any]]:
    if "not_measured" in ranks:
        return []
    alone = ranks["alone"]
    read = sum(row["disk_bytes"] for row in ranks["at_once"]) / ranks["files_bytes"]
    rows = (alone["disk_bytes"] - alone["opening_disk_bytes"]) / alone["rows_bytes"]
    return [
        make_goal(f"{NUM_RANKS} ranks at once: bytes read from the disk / bytes of the files", read, at_most=1.01),
        make_goal("one rank alone: bytes read for its rows / bytes of its rows", rows, at_most=1.15),
    ]


def print_result(result: dict[str, Any]) -> None:
    """Print one row per contestant, then the goals."""
    median = result["median"]
    files_mb = median[READING]["files_bytes"] / MB
    print(f"loading {result['size']}, {files_mb:.0f} MB: medians (lowest to highest) of {result['repeats']}\n")
    rows = [["", "ms until returned", "ms until read", "x reading", "x peer"]]
    rows[0] += ["MB model", "MB private, peak", "x model", "MB of mapped files"]
    for name, row in median.items():
        model, private = row["model_bytes"] / MB, row["private_peak_bytes"] / MB
        rows.append(
            [
                name,
                format_median(result, name, "loaded_s", 1000),
                format_median(result, name, "touched_s", 1000),
                f"{result['ratio'][name]['time_to_reading']:.2f}",
                f"{result['ratio'][name]['time_to_transformers']:.2f}",
                f"{model:.1f}",
                f"{private:.1f}",
                f"{private / model:.3f}" if model else "-",
                f"{row['file_pages_bytes'] / MB:.1f}",
            ]
        )
    print_table(rows)
    rate = files_mb / median[READING]["touched_s"] / 1000
    print(f"limit: reading the files once, {rate:.1f} GB/s; x reading = time until read / time of reading them once")
    print("a mapped file's pages come in blocks, on some kernels of 2 MB: few bytes of small tensors are many pages\n")
    print_ranks(result["ranks"])
    print_goals(result["goals"])


def print_ranks(ranks: dict[str, Any]) -> None:
    """Print one row per rank that read at once, their sum, and the one that read alone."""
    if "not_measured" in ranks:
        print(f"what ranks read from the disk is not measured here: {ranks['not_measured']}\n")
        return
    print(f"{NUM_RANKS} ranks read {ranks['files_bytes'] / MB:.1f} MB of files that are not in the page cache, MB\n")
    figures = list(ranks["alone"])
    at_once = ranks["at_once"]
    total = {figure: sum(row[figure] for row in at_once) for figure in figures}
    named = {f"rank {rank}": row for rank, row in enumerate(at_once)}
    named |= {"in sum": total, f"rank {RANK} alone": ranks["alone"]}
    rows = [["", "its rows", "read, opening", "read in all", "private, peak", "mapped"]]
    rows += [[name, *(f"{row[figure] / MB:.1f}" for figure in figures)] for name, row in named.items()]
    print_table(rows)
    print(
        "of ranks at once, the first to want a page reads it for all; opening reads what lies behind a file's header,"
    )
    print("as much as the system reads ahead; where rows end within a page, two ranks want it")
    print("private: only the one that is alone keeps its rows, for those of eight may not fit this machine\n")
