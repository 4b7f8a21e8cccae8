"""What is measured of a GPU, written for TensorBoard and profiled is what happened, and never stops a run."""

import gzip
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import monitor
from train.monitor import GpuMonitor, StepProfiler, TensorBoardFile

SECOND_VISIBLE = torch.device("cuda", 1)
NOTHING = {"gpu_utilization": None, "gpu_power_w": None, "gpu_memory_used_bytes": None}


class FakeDriver:
    """A pynvml with the samples a test allows: (percent, milliwatts, bytes) of the only card that is asked for."""

    class NVMLError(Exception):
        pass

    def __init__(self, *samples: tuple[int, int, int]) -> None:
        self.samples = list(samples)
        self.allowed = threading.Semaphore(0)

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if not uuid.startswith("GPU-"):
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:  # noqa: N802
        self.allowed.acquire()
        if not self.samples:
            raise self.NVMLError("GPU is lost")
        assert handle == "GPU-of-cuda:1"
        return SimpleNamespace(gpu=self.samples[0][0])

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=self.samples[0][2])

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return self.samples.pop(0)[1]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeDriver], GpuMonitor]:
    """Watch `cuda:1` through a fake driver, without pauses."""

    def start(driver: FakeDriver) -> GpuMonitor:
        monkeypatch.setattr(monitor, "pynvml", driver)
        monkeypatch.setattr(monitor, "SAMPLE_EVERY_S", 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"of-{device}"))
        return GpuMonitor(SECOND_VISIBLE)

    return start


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_readings_are_means_since_the_last_one(watch: Callable[[FakeDriver], GpuMonitor]) -> None:
    driver = FakeDriver((90, 400_000, 7), (70, 500_000, 5), (20, 100_000, 6))
    watched = watch(driver)
    assert watched.read() == NOTHING
    driver.allowed.release(2)
    wait_until(lambda: len(watched.samples) == 2)
    first = {"gpu_utilization": 80.0, "gpu_power_w": 450.0, "gpu_memory_used_bytes": 7}
    assert watched.read() == first
    assert watched.read() == first  # a step may be shorter than the time between two samples
    driver.allowed.release()
    wait_until(lambda: len(watched.samples) == 1)
    assert watched.read() == {"gpu_utilization": 20.0, "gpu_power_w": 100.0, "gpu_memory_used_bytes": 6}
    watched.is_closing.set()
    driver.allowed.release()
    watched.close()
    assert watched.thread is not None
    assert not watched.thread.is_alive()


def test_a_failing_driver_is_reported_once_and_training_goes_on(
    watch: Callable[[FakeDriver], GpuMonitor], capsys: pytest.CaptureFixture[str]
) -> None:
    driver = FakeDriver((90, 400_000, 7))
    watched = watch(driver)
    driver.allowed.release(2)
    assert watched.thread is not None
    watched.thread.join(timeout=10)
    assert watched.read()["gpu_utilization"] == 90.0
    assert watched.read() == watched.read() == NOTHING
    watched.close()
    reported = capsys.readouterr().err
    assert reported.count("cuda:1") == reported.count("GPU is lost") == 1


def test_a_cpu_has_nothing_to_watch() -> None:
    num_threads = threading.active_count()
    watched = GpuMonitor(torch.device("cpu"))
    assert threading.active_count() == num_threads
    assert watched.read() == NOTHING
    watched.close()


def test_tensorboard_reads_the_numbers_back(tmp_path: Path) -> None:
    """Once each, also after going on from step 2 when step 3 had been done already."""
    for first_step, rows in ((0, [(1, 4.0), (2, 3.0), (3, 9.0)]), (2, [(3, 2.0)])):
        events = TensorBoardFile(tmp_path, first_step)
        for step, loss in rows:
            events.write({"step": step, "loss": loss, "mfu": None, "peak_memory_bytes": [5 * step, None, 7 * step]})
        events.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(read.Tags()["scalars"]) == ["loss", "peak_memory_bytes/0", "peak_memory_bytes/2"]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert [event.value for event in read.Scalars("peak_memory_bytes/2")] == [7.0, 14.0, 21.0]


def test_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard = true needs: pip install tensorboard"):
        TensorBoardFile(tmp_path, 0)


def profile_steps(folder: Path, num_steps: int) -> list[str] | None:
    """Run steps of one matrix product each; return the names of what the trace holds, None when there is no trace."""
    profiler = StepProfiler(folder, rank=3)
    matrix = torch.ones(5, 5)
    for _ in range(num_steps):
        matrix = matrix @ matrix / 5
        profiler.step()
    profiler.close()
    file = folder / "trace-rank3.json.gz"
    if not file.exists():
        return None
    return [event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]


def test_trace_holds_the_three_steps_after_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = profile_steps(tmp_path, 9)
    assert names is not None
    assert {name for name in names if name.startswith("ProfilerStep")} == {f"ProfilerStep#{step}" for step in (2, 3, 4)}
    assert names.count("aten::mm") == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("num_steps", "num_profiled"), [(1, 0), (2, 0), (4, 2), (5, 3)])
def test_a_short_run_says_what_its_trace_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_steps: int, num_profiled: int
) -> None:
    names = profile_steps(tmp_path, num_steps)
    assert (names or []).count("aten::mm") == num_profiled
    assert (names is None) == (num_profiled == 0)
    said = capsys.readouterr().out
    assert (f"{num_profiled} steps instead of 3, the run ended after {num_steps}" in said) == (num_profiled < 3)
