"""What a run records: `metrics.jsonl`, one line a step, and `loss.png`, drawn from it."""

import json
import resource
from pathlib import Path
from typing import Any

import torch


class MetricsFile:
    """Lines of JSON, flushed one by one; resuming drops the lines of steps that will be done again."""

    def __init__(self, file: Path, first_step: int) -> None:
        if file.exists():
            kept = [row for row in read_metrics(file) if row["step"] <= first_step]
            shorter = file.with_suffix(".partial")
            shorter.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            shorter.replace(file)
        self.file = file.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`; a last line cut short by a kill is left out."""
    *lines, _ = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_utilization(device: torch.device) -> int | None:
    """Return the share of time the GPU was busy, in percent; None on a CPU."""
    return torch.cuda.utilization(device) if device.type == "cuda" else None


def plot_loss(metrics_file: Path, picture: Path, title: str) -> None:
    """Draw training loss (every step and smoothed) and held-out loss and exact match over the steps."""
    import matplotlib  # here, not above: it takes half a second that only the rank that draws should spend

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics_file)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["held_out_loss"], row["exact_match"]) for row in rows if "held_out_loss" in row]
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training loss, every step")
        axis.plot(steps, smooth(losses), color="tab:blue", label="training loss, smoothed")
    axis.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)", title=title, yscale="log")
    axis.grid(alpha=0.3)
    lines = axis.get_lines()
    if held_out:
        steps, losses, matches = zip(*held_out, strict=True)
        axis.plot(steps, losses, "o-", color="tab:orange", markersize=4, label="held-out loss")
        right = axis.twinx()
        right.plot(steps, matches, "s--", color="tab:green", markersize=4, label="held-out exact match")
        right.set(ylabel="exact match", ylim=(0, 1.02))
        lines = [*axis.get_lines(), *right.get_lines()]
    figure.legend(handles=lines, loc="outside lower center", ncols=2)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def smooth(values: tuple[float, ...] | list[float], window: int = 25) -> list[float]:
    """Return the mean of the last `window` values at each place, of as many as there are at the start."""
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - window) : end])]
