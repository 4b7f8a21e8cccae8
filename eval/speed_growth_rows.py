"""What `--suite growth` makes of data sets: rows by the thousand and by ten million, opened, shuffled and packed.

Each file is written, measured in new processes, and deleted before the next one. Its rows are short (310 bytes, one
question) and share eight pictures, so that a row costs what the index, the look for its picture and the order cost.
"""

import functools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data.conversation import IMAGE_MARKER
from data.dataset import ConversationDataset, RenderOptions
from data.packing import StepDataset
from data.tokenizer import Tokenizer
from eval.measure import MemoryWatch, make_goal, print_goals, print_table, summarize, take_turns

REPEATS = 3
NUM_ROWS = (1000, 10_000, 100_000, 1_000_000, 10_000_000)
TINY_LIMIT = 10_000
ROWS_AT_ONCE = 10_000  # of a file that is written
BYTES_OF_ROW = 420  # of the file and its index, for the look at the disk
NUM_PICTURES = 8
NUM_STEPS = 5  # in the middle
OPTIONS = RenderOptions(tokens_per_image=64, image_size=64, max_tokens=512)
NUM_RANKS, BATCH_SIZE, MICRO_BATCH_TOKENS, SEED = 8, 128, 16_384, 0
QUESTION = "What is the colour of the small wooden boat beside the old bridge in the background?"
ANSWER = "The boat that lies beside the bridge is painted in green and white, and its sail is rolled up."
FIRST, AGAIN = "the first time", "again"
MB = 1e6


def measure_rows(limit: int, tokenizer: Path, repeats: int | None) -> dict[str, Any]:
    """Measure files of a thousand rows and more, up to a limit and to what the disk holds.

    Raises: ValueError where the disk has no room for the smallest file.
    """
    points, left_out = [], []
    for num_rows in sorted({*(count for count in NUM_ROWS if count < limit), limit}):
        with tempfile.TemporaryDirectory(prefix="speed_growth_") as name:
            free = shutil.disk_usage(name).free
            if num_rows * BYTES_OF_ROW > free:
                print(f"{num_rows} rows are left out: {free / MB:.0f} MB are free in {name}", file=sys.stderr)
                left_out.append(num_rows)
                continue
            points.append(measure_file(Path(name), num_rows, tokenizer, repeats or REPEATS))
    if not points:
        raise ValueError(f"{name} has no room for {min(left_out)} rows")
    return {"repeats": repeats or REPEATS, "points": points, "left_out_rows": left_out, "goals": list_goals(points)}


def measure_file(folder: Path, num_rows: int, tokenizer: Path, repeats: int) -> dict[str, Any]:
    """Write a file, and return medians and spreads of all that is done with it."""
    file = folder / "rows.jsonl"
    write_pictures(folder)
    write_rows(file, num_rows)
    print(f"{num_rows} rows", file=sys.stderr, flush=True)
    first: dict[str, Callable[[], dict[str, float]]] = {FIRST: functools.partial(open_rows, file, tokenizer)}
    again = {AGAIN: functools.partial(use_rows, file, tokenizer)}
    return {
        "rows": num_rows,
        "file_bytes": file.stat().st_size,
        **summarize(take_turns(first, 1) | take_turns(again, repeats)),
        "index_bytes": file.with_name(file.name + ".index").stat().st_size,
    }


def write_pictures(folder: Path) -> None:
    for number in range(NUM_PICTURES):
        Image.new("RGB", (80, 60), (30 * number, 50, 90)).save(folder / f"{number}.png")


def write_rows(file: Path, num_rows: int) -> None:
    """Write rows that differ in their ids and pictures: quickly, for ten million are 3 GB."""
    turns = [{"from": "human", "value": f"{IMAGE_MARKER}\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    ends = [json.dumps({"image": f"{n}.png", "conversations": turns})[1:] + "\n" for n in range(NUM_PICTURES)]
    with file.open("w", encoding="utf-8") as opened:
        for start in range(0, num_rows, ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, num_rows))
            opened.write("".join(f'{{"id": "{n:012d}", {ends[n % NUM_PICTURES]}' for n in numbers))


def open_rows(file: Path, tokenizer: Path) -> dict[str, float]:
    """Open a file as a stage of training does."""
    read = Tokenizer(tokenizer)
    with MemoryWatch() as memory:
        started = time.perf_counter()
        ConversationDataset(file, file.parent, read, OPTIONS)
        seconds = time.perf_counter() - started
    return {"opened_s": seconds, "opened_private_bytes": memory.private_peak_bytes}


def use_rows(file: Path, tokenizer: Path) -> dict[str, float]:
    """Open a file that has its index, shuffle it, and make a step as one of eight ranks."""
    read = Tokenizer(tokenizer)
    with MemoryWatch() as memory:
        started = time.perf_counter()
        dataset = ConversationDataset(file, file.parent, read, OPTIONS)
        opened = time.perf_counter()
        dataset.permute(1, SEED)
        shuffled = time.perf_counter()
        steps = StepDataset(dataset, BATCH_SIZE, MICRO_BATCH_TOKENS, SEED, 0, NUM_RANKS)
        steps[0]
        first = time.perf_counter()
        middle = time_steps(steps, len(dataset) // BATCH_SIZE // 2)
    return {
        "opened_s": opened - started,
        "shuffled_s": shuffled - opened,
        "first_step_s": first - shuffled,
        "middle_step_s": statistics.median(middle),
        "private_bytes": memory.private_peak_bytes,
    }


def time_steps(steps: StepDataset, first_step: int) -> list[float]:
    """Return the seconds of making some steps."""
    seconds = []
    for step in range(first_step, first_step + NUM_STEPS):
        started = time.perf_counter()
        steps[step]
        seconds.append(time.perf_counter() - started)
    return seconds


def list_goals(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Say what the largest file may take, and what of it must not grow faster than the rows."""
    smallest, middle, largest = points[0], points[-1 - len(points) // 2], points[-1]
    rows = largest["rows"]

    def per_row(point: Mapping[str, Any]) -> float:
        return point["median"][FIRST]["opened_s"] / point["rows"]

    again, at_first = largest["median"][AGAIN], smallest["median"][AGAIN]
    private = max(0, again["private_bytes"] - at_first["private_bytes"]) / rows
    middle_step = again["middle_step_s"] / at_first["middle_step_s"]
    first_opening = per_row(largest) / per_row(middle)
    return [
        make_goal(f"first opening: s per row of {rows} to those of {middle['rows']}", first_opening, at_most=1.15),
        make_goal(f"{rows} rows: seconds of opening again", again["opened_s"], at_most=60),
        make_goal(f"{rows} rows: seconds of shuffling", again["shuffled_s"], at_most=5),
        make_goal(f"middle step: s of {rows} rows to that of {smallest['rows']}", middle_step, at_most=1.25),
        make_goal(f"private bytes per row, {rows} rows", private, at_most=64),
    ]


def print_rows(result: Mapping[str, Any]) -> None:
    """Print what a file of each size takes, then the goals."""
    print(f"rows of a data set, {NUM_PICTURES} pictures; medians of {result['repeats']}, the first opening once\n")
    rows = [["rows", "file MB", "index MB", "first opening s", "us a row", "again s", "us a row", "shuffling s"]]
    rows[0] += ["first step s", "middle step s", "private MB", "first: private MB"]
    for point in result["points"]:
        first, again, count = point["median"][FIRST], point["median"][AGAIN], point["rows"]
        row = [f"{count}", f"{point['file_bytes'] / MB:.1f}", f"{point['index_bytes'] / MB:.2f}"]
        for opened in (first["opened_s"], again["opened_s"]):
            row += [f"{opened:.3f}", f"{1e6 * opened / count:.2f}"]
        row += [f"{again[figure]:.4f}" for figure in ("shuffled_s", "first_step_s", "middle_step_s")]
        private = (again["private_bytes"], first["opened_private_bytes"])
        rows.append(row + [f"{value / MB:.1f}" for value in private])
    print_table(rows)
    for count in result["left_out_rows"]:
        print(f"{count} rows are left out: the disk has too little room\n")
    print_goals(result["goals"])
