"""How long the trainer waits for its data: `train/main.py` run as its users do, by what `metrics.jsonl` says.

The model is the smallest that reads pictures as they are (336 pixels, 576 tokens each), so that a step's data cost what
they cost a large model, and the rest of the step a small part of that: a larger one waits for a smaller share. The
trainer calculates with one thread, and its workers share what cores are left, as a GPU leaves them all. What is shown
is that the step does not wait for data, not that preparing it costs nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.runs import METRICS, read_metrics, select
from eval.measure import ROOT, format_median, make_goal, print_table
from eval.speed_data_loading import IMAGE_SIZE, MICRO_BATCH_TOKENS, OPTIONS, ROWS_PER_RANK
from model.config import CONFIGS
from model.llava import Llava, initialize_weights
from model.weights import save_llava

NUM_WORKERS = 4  # of the stages in train/configs
WITHOUT, WITH = "training without workers", f"training with {NUM_WORKERS} workers"
WORKERS = {WITHOUT: 0, WITH: NUM_WORKERS}
PATCH_SIZE = 14  # pixels
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def write_start(folder: Path) -> None:
    """Write the random model that the runs start from."""
    tiny = CONFIGS["tiny"]
    config = replace(
        tiny,
        vision=replace(tiny.vision, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        text=replace(tiny.text, max_position_embeddings=OPTIONS.max_tokens),
    )
    llava = Llava(config)
    initialize_weights(llava, config.text.hidden_size**-0.5, seed=0)
    save_llava(folder / "model", config, llava.state_dict(), ROOT / "data/tiny/tokenizer.model")


def train(num_workers: int, folder: Path, num_steps: int) -> dict[str, float]:
    """Train, and return what shares of its steps the trainer waits for data, the first third of them left out.

    Those are when the workers start; later there are always some steps ready (two a worker).

    Raises: RuntimeError with what the trainer says when it fails.
    """
    settings = {
        "name": "waiting",
        "train": "lora",
        "lora_rank": 16,
        "model": str(folder / "model"),
        "data": str(folder / "rows.json"),
        "image_folder": str(folder / "images"),
        "max_tokens": OPTIONS.max_tokens,
        "batch_size": ROWS_PER_RANK,
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "max_steps": num_steps,
        "num_workers": num_workers,
        "dtype": "float32",
    }
    with tempfile.TemporaryDirectory(dir=folder) as name:
        stage = Path(name) / "waiting.toml"
        stage.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
        command = [sys.executable, str(ROOT / "train/main.py"), stage.name]
        ended = subprocess.run(command, cwd=name, env=ONE_THREAD, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {ended.stderr[-2000:]}")
        rows = read_metrics(Path(name) / "runs/waiting" / METRICS)
    (_, waited_s), (_, step_s) = select(rows, "data_wait_s"), select(rows, "step_s")
    later = slice(num_steps // 3, None)
    shares = (waited_s / step_s)[0, later]
    return {
        "first_wait_s": float(waited_s[0, 0]),
        "wait_s": float(np.median(waited_s[0, later])),
        "wait_share": float(np.median(shares)),
        "highest_wait_share": float(shares.max()),
        "trained_step_s": float(np.median(step_s[0, later])),
    }


def list_waiting_goals(median: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    return [
        make_goal(f"{WITH}: share of a step that waits", median[WITH]["wait_share"], at_most=0.01),
        make_goal(f"{WITH}: the same, the step that waits most", median[WITH]["highest_wait_share"], at_most=0.05),
    ]


def print_waiting(result: Mapping[str, Any]) -> None:
    rows = [[f"steps of {ROWS_PER_RANK} rows", "ms", "ms waiting for data", "share, %", "highest share, %"]]
    rows[0].append("ms waiting for the first")
    for name in WORKERS:
        cells = [format_median(result, name, figure, 1000, 1) for figure in ("trained_step_s", "wait_s")]
        cells += [format_median(result, name, figure, 100, 2) for figure in ("wait_share", "highest_wait_share")]
        rows.append([name, *cells, format_median(result, name, "first_wait_s", 1000)])
    print_table(rows)
