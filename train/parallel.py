"""Everything about several processes: starting them, sharding a model over them, agreeing on numbers.

The model does not know. Each rank runs the same program on its own micro-batches; FSDP2 gathers weights before
they are used and sums gradients afterwards. One rank is the same program with nothing to gather.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others before it gives up


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which one this is."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up each value over the ranks, in double precision."""
        # On the device: NCCL moves nothing else.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.sum([0.0])

    def is_first_to_fail(self) -> bool:
        """Tell whether no other rank has reported a failure: one cause makes all ranks fail, one should speak."""
        return self.store.add("failures", 1) == 1


def start_ranks() -> Ranks:
    """Join the other processes that `torchrun` started, or be the only one.

    Raises: ValueError when there are more ranks on this machine than GPUs.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}: "
                f"use --nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return Ranks(rank, size, device, store)


def leave_ranks(exit_code: int) -> NoReturn:
    """End this process at once, without the interpreter's tear-down.

    After a failure a collective that will never complete must not keep it alive; after success, threads of the
    communication library that meet a half torn down interpreter now and then abort a process whose work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def shard(objective: nn.Module, blocks: Sequence[nn.Module], shard_size: int, dtype: torch.dtype, ranks: Ranks) -> None:
    """Spread an objective's parameters over the ranks, in place.

    Args:
        blocks: modules gathered one at a time; what is outside them is gathered for the whole step. Each must run in
            every step: FSDP cannot accumulate gradients over a group that was never gathered.
        shard_size: ranks that share one copy; 0 is all of them, 1 gives every rank a copy of its own.
        dtype: of computing. Trained parameters stay in float32, gradients are summed in float32.
    Raises: ValueError when shard_size does not divide the number of ranks.
    """
    shard_size = shard_size or ranks.size
    if ranks.size % shard_size:
        raise ValueError(f"shard_size = {shard_size} does not divide the {ranks.size} ranks")
    mesh = init_device_mesh(
        ranks.device.type, (ranks.size // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
    )
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if shard_size > 1:  # with a whole copy on every rank there is nothing to gather block by block
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def backward(loss: Tensor, objective: nn.Module, ranks: Ranks, is_last: bool) -> None:
    """Add a loss's gradients; only after a step's last micro-batch are they summed over the ranks."""
    assert isinstance(objective, FSDPModule)
    objective.set_requires_gradient_sync(is_last)
    (loss * ranks.size).backward()  # FSDP averages over ranks; the loss is already a share of the global mean


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to at most `max_norm` (0 for any); return their norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def gather(parameter: Tensor) -> Tensor:
    """Return the whole of a sharded parameter on the CPU. Every rank must ask."""
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).cpu()
