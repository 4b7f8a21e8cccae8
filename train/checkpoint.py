"""Checkpoints that resume exactly, written while training goes on.

`checkpoints/step-<n>/` is a model folder like any other (`load_llava` reads it), and besides

- `state/`: trained weights and AdamW's state by the parameters' names, in torch.distributed.checkpoint's format. Every
  rank writes its own part, and any number of ranks can read them.
- `state.json`: the step's number, the held-out loss if there is one, and what has to be the same for going on.

It is written as `step-<n>.partial` and renamed when complete, so a folder with its final name is whole whenever the run
was killed. What is drawn at random (order of the data, augmentation, dropout) depends on (seed, step, rank) alone, and
the learning rates on the step, so the step's number is all there is of a position. Frozen weights are not in `state/`:
what the stage started from holds them.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from model.files import read_json, write_json
from train.parallel import Ranks

STATE_FILE = "state.json"
TIMEOUT = timedelta(hours=1)  # for the slowest disk: the other ranks wait while the first writes the model


class CheckpointWriter:
    """Writes `checkpoints/step-<n>/` while training goes on.

    Its thread does everything from writing to renaming; the training meets it in `save` (which copies the state to the
    CPU's memory: 12 bytes a trained number, over all ranks that share them) and otherwise only hears of failures.
    """

    def __init__(
        self,
        folder: Path,
        num_kept: int,
        ranks: Ranks,
        write_model: Callable[[Path, Mapping[str, Tensor]], None],
        about: Mapping[str, Any],
    ) -> None:
        """Remove what a killed run left half written. Every rank must come here.

        Args:
            num_kept: the newest checkpoints that stay; the one with the lowest held-out loss stays, too.
            write_model: writes a model folder of the tensors that `save` is given.
            about: what has to be the same when a run goes on, as JSON has it.
        """
        self.folder = folder
        self.num_kept = num_kept
        self.ranks = ranks
        self.write_model = write_model
        self.about = dict(about)
        if ranks.is_first:
            for leftover in folder.glob("step-*.partial*"):
                shutil.rmtree(leftover)
        # The thread's collectives have a group of their own, or they would be taken for the training's.
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def save(
        self,
        step: int,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, Tensor],
        held_out_loss: float | None,
    ) -> None:
        """Copy the state and begin to write it; wait for the save before, if need be. Every rank must come here.

        Args:
            tensors: what `write_model` is given, on the first rank: whole, on the CPU, and changed by nobody.
        Raises: OSError on every rank when any rank could not write the save before.
        """
        self.finish()
        # Copies, even of what is on the CPU already: the optimizer changes weights in place.
        state = {key: tensor.to("cpu", copy=True) for key, tensor in _list_state(objective, optimizer).items()}
        self.writing = self.thread.submit(self._write, step, state, tensors, held_out_loss)

    def poll(self) -> None:
        """Return at once; for after each step.

        Raises: OSError when a save has failed, here perhaps a step earlier than on another rank.
        """
        if self.writing and self.writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the last save is complete.

        Raises: OSError on every rank when any rank could not write it; nothing is left of it, older ones are untouched.
        """
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()

    def _write(
        self, step: int, state: dict[str, Tensor], tensors: Mapping[str, Tensor], held_out_loss: float | None
    ) -> None:
        final = self.folder / f"step-{step:06d}"
        partial = final.with_name(final.name + ".partial")

        def write_model() -> None:
            if self.ranks.is_first:
                partial.mkdir(parents=True)
                self.write_model(partial, tensors)

        def write_state() -> None:
            # Without looking ahead: everything is on the CPU, and it would occupy GPU 0, which is any thread's first.
            writer = dcp.FileSystemWriter(partial / "state", per_thread_copy_ahead=0)
            dcp.save(state, storage_writer=writer, process_group=self.group)

        def complete() -> None:
            if self.ranks.is_first:
                files = {path.name: path.stat().st_size for path in sorted((partial / "state").iterdir())}
                own = {"step": step, "num_ranks": self.ranks.size, "torch": torch.__version__, "files": files}
                write_json(partial / STATE_FILE, {**own, "held_out_loss": held_out_loss, "about": self.about})
                partial.rename(final)
                self._prune()

        def clean_up() -> None:
            if self.ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)

        try:
            for work in (write_model, write_state, complete):
                self._do_on_all(work)
        except OSError as error:
            self._do_on_all(clean_up)  # before any rank hears of it: the first to do so ends the run
            raise OSError(
                f"cannot save {final}: {error}; older checkpoints are untouched, and with the cause removed the same "
                "command goes on from the last of them"
            ) from error

    def _do_on_all(self, work: Callable[[], None]) -> None:
        """Do one part of a save; when it fails on any rank, fail on all. Later parts find earlier ones done."""
        cause, own_error = None, None
        try:
            work()
        except (Exception, CheckpointException) as error:
            cause, own_error = _describe(error), error
        causes: list[str | None] = [None] * self.ranks.size
        dist.all_gather_object(causes, cause, group=self.group)
        if failures := sorted({cause for cause in causes if cause}):
            raise OSError("; ".join(failures)) from own_error

    def _prune(self) -> None:
        """Remove all checkpoints but the newest, and the best of all."""
        checkpoints = list_checkpoints(self.folder)
        losses = {path: read_json(path / STATE_FILE)["held_out_loss"] for path in checkpoints}
        measured = [path for path in checkpoints if losses[path] is not None]
        kept = {*checkpoints[-self.num_kept :], *sorted(measured, key=losses.__getitem__)[:1]}
        for path in checkpoints:
            if path not in kept:
                shutil.rmtree(path.rename(path.with_name(path.name + ".partial")))  # never half a folder of its name


def load_checkpoint(
    checkpoint: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, about: Mapping[str, Any]
) -> int:
    """Put a checkpoint's weights and optimizer state in place, bit for bit; return the number of steps it has done.

    The number of ranks may be another one than at saving. Every rank must come here.
    Raises: ValueError when it belongs to another run, was written by another version of torch, or is damaged.
    """
    remedy = f"remove {checkpoint}, and the run goes on from the checkpoint before it"
    try:
        saved = read_json(checkpoint / STATE_FILE)
        step, version, files, saved_about = (saved[key] for key in ("step", "torch", "files", "about"))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint / STATE_FILE} is damaged ({_describe(error)}): {remedy}") from error
    about = json.loads(json.dumps(dict(about)))  # as JSON has it: tuples are lists
    if differences := [
        f"{key} was {json.dumps(saved_about.get(key))} and is {json.dumps(about.get(key))}"
        for key in sorted(saved_about.keys() | about.keys())
        if saved_about.get(key) != about.get(key)
    ]:
        raise ValueError(
            f"{checkpoint} belongs to another run ({'; '.join(differences)}): use another name=..., or start from its "
            f"weights with model={checkpoint}"
        )
    old, new = (".".join(text.split(".")[:2]) for text in (version, torch.__version__))
    if old != new:
        raise ValueError(
            f"{checkpoint} was written by torch {version}, this is {torch.__version__}: install torch=={old}.*, or "
            f"start a new run from its weights with model={checkpoint}"
        )
    sizes = {path.name: path.stat().st_size for path in (checkpoint / "state").glob("*")}
    if damaged := [name for name, size in files.items() if sizes.get(name) != size]:
        raise ValueError(f"{checkpoint / 'state'}: {', '.join(damaged)} missing or cut off: {remedy}")
    try:
        dcp.load(_list_state(objective, optimizer), checkpoint_id=checkpoint / "state")
    except CheckpointException as error:
        raise ValueError(
            f"{checkpoint} is damaged, or of another model ({_describe(error)}): {remedy}, or use another name=..."
        ) from error
    return step


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    complete = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def _list_state(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all tensors that a step changes, themselves; AdamW's are made, as zeros, where no step has been yet."""
    state = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            adam = optimizer.state[parameter]
            if not adam:
                adam["step"] = torch.zeros((), device=parameter.device)
                adam |= {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            state[name] = parameter.detach()
            state |= {f"{name}/{kind}": tensor for kind, tensor in adam.items()}
    return state


def _describe(error: BaseException) -> str:
    """Return an error as one line; what several ranks met alike once."""
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({_describe(cause) for cause, _ in error.failures.values()}))
    return f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]
