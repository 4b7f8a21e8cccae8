"""Look at a run from outside: how busy its GPU is, TensorBoard, a profiler's trace of three steps."""

import statistics
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pynvml
import torch
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

SAMPLE_EVERY_S = 0.5
NUM_WARMUP_STEPS, NUM_PROFILED_STEPS = 2, 3


class GpuMonitor:
    """Asks the driver twice a second, in a thread, how busy a GPU is; on a CPU there is no thread and nothing to know.

    An error of the driver's library ends the watching and is reported; training goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: deque[tuple[int, float, int]] = deque()  # utilisation in percent, power in watts, bytes used
        self.latest: dict[str, float | None] = dict.fromkeys(
            ("gpu_utilization", "gpu_power_w", "gpu_memory_used_bytes")
        )
        self.is_closing = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True) if device.type == "cuda" else None
        if self.thread:
            self.thread.start()

    def read(self) -> dict[str, float | None]:
        """Return means since the last read, and the most memory used on the card by all processes.

        They are those of the read before when no sample was taken since, and None when there will be none.
        """
        samples = [self.samples.popleft() for _ in range(len(self.samples))]
        if samples:
            utilization, power, used = zip(*samples, strict=True)
            self.latest = {
                "gpu_utilization": statistics.fmean(utilization),
                "gpu_power_w": statistics.fmean(power),
                "gpu_memory_used_bytes": max(used),
            }
        elif not (self.thread and self.thread.is_alive()):
            self.latest = dict.fromkeys(self.latest)
        return self.latest

    def close(self) -> None:
        self.is_closing.set()
        if self.thread:
            self.thread.join(timeout=5)  # a driver that hangs must not keep the run from ending

    def _watch(self) -> None:
        try:
            pynvml.nvmlInit()
            # By its identity: the driver counts all cards, PyTorch those that CUDA_VISIBLE_DEVICES lets through.
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(self.device).uuid}")
            while not self.is_closing.is_set():
                rates, memory = pynvml.nvmlDeviceGetUtilizationRates(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
                self.samples.append((rates.gpu, pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, memory.used))
                self.is_closing.wait(SAMPLE_EVERY_S)
        except pynvml.NVMLError as error:
            tqdm.write(
                f"{self.device}: its utilisation and power are not recorded from here on, NVML says: {error}",
                file=sys.stderr,
            )


class TensorBoardFile:
    """The numbers of `metrics.jsonl`'s rows as TensorBoard scalars; those of a list are `name/0`, `name/1`, ...

    Resuming hides what was recorded of steps that will be done again.
    Raises: ValueError when TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tensorboard = true needs: pip install tensorboard") from error
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1, flush_secs=10)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            parts = {f"{name}/{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
            for tag, part in parts.items():
                if tag != "step" and isinstance(part, int | float):
                    self.writer.add_scalar(tag, part, row["step"])

    def close(self) -> None:
        self.writer.close()


class StepProfiler:
    """Writes `trace-rank<r>.json.gz` of three training steps after two of warming up; then it costs nothing more.

    The file opens in https://ui.perfetto.dev and chrome://tracing.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = folder / f"trace-rank{rank}.json.gz"
        self.num_steps = 0
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profile: profile | None = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=NUM_WARMUP_STEPS, active=NUM_PROFILED_STEPS, repeat=1),
            on_trace_ready=self._write,
        )
        self.profile.start()

    def step(self) -> None:
        """Note that a training step has ended."""
        if self.profile:
            self.num_steps += 1
            self.profile.step()
            if self._num_profiled == NUM_PROFILED_STEPS:
                self.close()

    def close(self) -> None:
        """Stop profiling; when the run was too short, write the steps there are and say so."""
        if not self.profile:
            return
        self.profile.stop()
        self.profile = None
        if self._num_profiled < NUM_PROFILED_STEPS:
            tqdm.write(
                f"{self.file}: {self._num_profiled} steps instead of {NUM_PROFILED_STEPS}, the run ended after "
                f"{self.num_steps} and {NUM_WARMUP_STEPS} were for warming up"
            )

    @property
    def _num_profiled(self) -> int:
        return max(0, self.num_steps - NUM_WARMUP_STEPS)

    def _write(self, finished: profile) -> None:
        if self._num_profiled:  # else the first step to profile has only begun
            finished.export_chrome_trace(str(self.file))
