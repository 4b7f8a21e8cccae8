"""What numbers were made on: hardware, versions and commit, to be written beside them."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")


def describe_machine(device: str | torch.device) -> dict[str, Any]:
    """Return the names of the device, the versions and the commit."""
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    is_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else describe_cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def describe_cpu() -> str:
    """Return what decides its speed beside its clock: a CPU without bf16 arithmetic is some 10 times slower in bf16."""
    file = Path("/proc/cpuinfo")
    found = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return " ".join([platform.machine(), "CPU", *(flag for flag in CPU_FLAGS if flag in found)])
