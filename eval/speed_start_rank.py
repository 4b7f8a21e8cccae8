"""One rank of eight from the command to the end of its first step, for `eval/speed_start.py`, which runs this file.

The trainer's own functions do it, `run_stage` from its beginning; a clock is put around those that it calls. The other
ranks do not exist: collectives return at once. The file is a script, for Python's start and imports are timed, too.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ENTERED = time.monotonic()

PYTHON, TORCH, IMPORTS, CONFIG, RANKS = "Python", "import torch", "import train.main", "configuration", "ranks (fake)"
STARTING, PLAN, DATA = "opening the checkpoint", "checking the plan", "opening the data"
MODEL, SOURCES, SHARD, FILL = "model on meta", "listing sources", "sharding", "reading this rank's rows"
OPTIMIZER, REST, BATCH, STEP = "optimizer", "all else of run_stage", "first batch", "first step"
FUNCTIONS = {
    "open_start": STARTING,
    "check_plan": PLAN,
    "open_data": DATA,
    "build_objective": MODEL,
    "list_sources": SOURCES,
    "shard": SHARD,
    "fill": FILL,
    "make_optimizer": OPTIMIZER,
}
PARTS = (PYTHON, TORCH, IMPORTS, CONFIG, RANKS, *FUNCTIONS.values(), REST, BATCH, STEP)

NUM_RANKS = 8
STEP_TOKENS = 64  # of the first step's only document, on a CPU


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.time(part):
                return function(*arguments, **options)

        return timed


def main() -> None:
    request = json.loads(sys.argv[1])
    clock = Clock()
    clock.seconds[PYTHON] = ENTERED - request["commanded"]
    for module, part in (("torch", TORCH), ("train.main", IMPORTS)):
        with clock.time(part):
            importlib.import_module(module)
    figures = start_job(request, clock)
    Path(request["result"]).write_text(json.dumps({**clock.seconds, **figures}), encoding="utf-8")


def start_job(request: dict[str, Any], clock: Clock) -> dict[str, float]:
    """Run a stage until its first step is done, or could be; return bytes."""
    import torch

    from eval.measure import MemoryWatch, wait_for
    from eval.page_cache import count_disk_bytes
    from train import stage
    from train.config import load_configs
    from train.loop import StopRequest
    from train.memory import Workload
    from train.parallel import start_fake_ranks
    from train.plan import make_batch, run_step

    figures: dict[str, float] = {}
    device = torch.device(request["device"])

    def do_first_step(objective: Any, optimizer: Any, loader: Any, *_: object, **__: object) -> bool:
        """Stand in for `train.loop.train`."""
        inside = sum(clock.seconds.get(part, 0) for part in FUNCTIONS.values())
        clock.seconds[REST] = time.monotonic() - entered - inside
        watching.close()
        figures["private_peak_bytes"] = memory.private_peak_bytes
        figures["file_pages_bytes"] = memory.file_pages_bytes
        parameters = [p.to_local() if hasattr(p, "to_local") else p for p in objective.parameters()]
        figures["weights_bytes"] = sum(parameter.nbytes for parameter in parameters)
        with clock.time(BATCH):
            batches = next(iter(loader)).micro_batches
        if not request["does_step"]:
            return False
        if device.type == "cpu":
            batches = [make_batch(Workload(STEP_TOKENS, 1, 1), objective.llava.config, config, device)]
        with clock.time(STEP):
            for _phase in run_step(objective, optimizer, [batch.to(device) for batch in batches], ranks):
                pass
            wait_for(request["device"])
        return False

    with clock.time(CONFIG):
        (config,) = load_configs([Path(request["recipe"])], request["overrides"])
    with clock.time(RANKS):
        ranks = start_fake_ranks(NUM_RANKS, NUM_RANKS, device)
    with ExitStack() as patches:
        for function, part in FUNCTIONS.items():
            patches.enter_context(mock.patch.object(stage, function, clock.wrap(getattr(stage, function), part)))
        patches.enter_context(mock.patch.object(stage, "train", do_first_step))
        patches.enter_context(mock.patch.object(stage, "CheckpointWriter"))  # its gloo group wants all eight ranks
        watching = ExitStack()
        memory = watching.enter_context(MemoryWatch())
        entered = time.monotonic()
        stage.run_stage(config, Path(request["run"]), None, ranks, StopRequest(), False)
    figures["disk_bytes"] = count_disk_bytes()
    return figures


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
