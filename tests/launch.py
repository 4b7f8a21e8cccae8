"""Start the project's scripts as a user does: as processes, under torchrun where there are several ranks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def training_command(num_ranks: int, *arguments: str) -> list[str]:
    """Return the command that trains with `num_ranks` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return [*(launcher if num_ranks > 1 else [sys.executable]), str(ROOT / "train/main.py"), *arguments]


def environment() -> dict[str, str]:
    """Return this process's environment for a child with one thread, so that sums are made in one order."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run_training(folder: Path, num_ranks: int, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """Train in `folder`; the caller looks at the exit code."""
    return subprocess.run(
        training_command(num_ranks, *arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_script(folder: Path, script: str, *arguments: str, text_in: str = "") -> subprocess.CompletedProcess:
    """Run one of the entry scripts in `folder`."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        env=environment(),
        input=text_in,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
