"""Checkpoints that resume exactly: trained weights, optimizer state and position, each rank writing its own part.

`checkpoints/step-<n>/` is written under a temporary name and renamed when complete, so a folder with its final name
is whole, whenever the run was killed. What is drawn at random depends on the step's number alone (data/packing.py),
so the number is all the position there is. Frozen weights are not saved: the stage's start holds them.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from train.parallel import Ranks

OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)  # not strict: frozen weights are not in it


def save_checkpoint(
    folder: Path, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer, num_kept: int, ranks: Ranks
) -> None:
    """Write `folder/step-<step>`, then remove all but the newest `num_kept`.

    Raises: OSError on every rank when any rank cannot write; older checkpoints are then untouched.
    """
    final, partial = folder / f"step-{step:06d}", folder / f"step-{step:06d}.partial"
    if ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.wait()
    try:
        dcp.save(_state(objective, optimizer), checkpoint_id=partial)
    except CheckpointException as error:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        causes = {str(failure[0]) for failure in error.failures.values()}
        raise OSError(f"cannot save {final}: {'; '.join(sorted(causes))}") from error
    if ranks.is_first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(folder)[:-num_kept]:
            shutil.rmtree(old)
    ranks.wait()


def load_checkpoint(checkpoint: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's weights and optimizer state in place; return the number of steps it has done.

    Raises: ValueError when it belongs to another model.
    """
    state = _state(objective, optimizer)
    try:
        dcp.load(state, checkpoint_id=checkpoint)
    except CheckpointException as error:
        causes = {str(failure[0]) for failure in error.failures.values()}
        raise ValueError(f"{checkpoint} does not fit this stage: {'; '.join(sorted(causes))}") from error
    set_state_dict(
        objective,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=OPTIONS,
    )
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def _state(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(objective, optimizer, options=OPTIONS)
    return {"model": model_state, "optimizer": optimizer_state}
