"""Everything about several processes: starting them, sharding a model over them, agreeing on numbers.

The model does not know. Each rank runs the same program on its own micro-batches; FSDP2 gathers weights before
they are used and sums gradients afterwards. One rank is the same program with nothing to gather.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.files import StoredTensor, cast_tensor

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # torchrun then makes a new store at each restart
TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others before it gives up


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which one this is."""

    rank: int
    size: int
    num_local: int  # of them on this machine
    device: torch.device
    store: dist.Store

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return every rank's values, in the order of ranks."""
        # On the device: NCCL moves nothing else.
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own)
        return torch.stack(everyone).tolist()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up each value over the ranks, in double precision and the same order on all of them."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.sum([0.0])

    def is_first_to_fail(self) -> bool:
        """Tell whether no other rank has reported a failure: one cause makes all ranks fail, one should speak."""
        return self.store.add("failures", 1) == 1


def start_ranks() -> Ranks:
    """Join the other processes that `torchrun` started, or be the only one.

    Raises: ValueError, on every rank, when there are more ranks on this machine than GPUs, or torchrun was told to
        restart ranks on several machines in a way that cannot work.
    """
    defaults = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    num_local = int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        if num_local > torch.cuda.device_count():
            raise ValueError(
                f"{num_local} ranks for the {torch.cuda.device_count()} GPUs of this machine: "
                f"use --nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    is_one_machine = num_local == int(os.environ["WORLD_SIZE"])
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if may_restart and not is_one_machine and not os.environ.get(FRESH_STORE):
        raise ValueError(f"--max-restarts on several machines wants {FRESH_STORE}=1 before torchrun on each of them")
    store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    if is_one_machine:
        # torchrun's store outlives the ranks: after a restart it still says where the killed ones were. (Machines count
        # their restarts each for itself, so that several would not agree on this name.)
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return Ranks(rank, size, num_local, device, store)


def start_fake_ranks(size: int, num_local: int, device: torch.device) -> Ranks:
    """Be the first of `size` ranks of which the others do not exist: for simulating what one rank does.

    Collectives return at once, with memory as in truth and values that mean nothing.
    """
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=size)
    return Ranks(0, size, num_local, device, store)


def is_loss_of_a_rank(error: Exception) -> bool:
    """Tell whether this rank failed only because another one is gone."""
    # gloo's errors have no type of their own.
    return isinstance(error, dist.DistError) or any(said in str(error) for said in ("by peer", "Connection refused"))


def leave_ranks(exit_code: int) -> NoReturn:
    """End this process at once, without the interpreter's tear-down.

    After a failure a collective that will never complete must not keep it alive; after success, threads of the
    communication library that meet a half torn down interpreter now and then abort a process whose work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


@dataclass(frozen=True)
class Block:
    """A part of an objective that is gathered before it runs and given back afterwards."""

    module: nn.Module
    in_backward: bool  # whether backward needs its weights: to train them, or to pass gradients on


def shard(objective: nn.Module, blocks: Sequence[Block], parallel: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """Spread an objective's parameters over the ranks, in place. They may still be on the meta device.

    - "fsdp": the ranks share one copy. A block's weights are gathered when it runs.
    - "hsdp": the ranks of one machine share a copy, gradients are summed over machines: the slow network between them
      carries gradients of what is trained, never weights.
    - "ddp": every rank has a copy of its own, as one rank alone has. Only gradients are exchanged.

    Args:
        blocks: in the order they run; what is outside them is gathered for the whole step. Each must run in every step
            on every rank: FSDP cannot accumulate gradients over a group that was never gathered.
        dtype: of computing. Trained parameters stay in float32, gradients are summed in float32.
    Raises: ValueError when machines have different numbers of ranks, or this torch cannot share quantised weights.
    """
    shard_size = {"fsdp": ranks.size, "hsdp": ranks.num_local, "ddp": 1}[parallel]
    if ranks.size % shard_size:
        raise ValueError(
            f"parallel = '{parallel}' wants equally many ranks on every machine, here are {ranks.num_local} of the "
            f"{ranks.size}: use the same --nproc_per_node everywhere"
        )
    mesh = init_device_mesh(
        ranks.device.type, (ranks.size // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
    )
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if shard_size == 1:  # a whole copy on every rank: frozen weights are none of FSDP's business
        frozen = {parameter for parameter in objective.parameters() if not parameter.requires_grad}
        fully_shard(objective, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=frozen)
        return
    last = max(index for index, block in enumerate(blocks) if block.in_backward)
    try:
        groups = [
            # The last one's backward follows its forward at once: giving it back in between would only cost a gather.
            fully_shard(block.module, mesh=mesh, mp_policy=policy, reshard_after_forward=index != last)
            for index, block in enumerate(blocks)
        ]
    except RuntimeError as error:
        if "floating point" not in str(error):
            raise
        raise ValueError(
            f"FSDP of torch {torch.__version__} cannot share 8- and 4-bit weights: use parallel = 'ddp', or torch 2.13"
        ) from error
    # Said, since FSDP does not see that `lm_head`, which is in a block, is also the language model's.
    in_blocks = {parameter for block in blocks for parameter in block.module.parameters()}
    fully_shard(objective, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=in_blocks)
    # While a block computes, the next one's weights travel: over PCIe that takes about as long as computing.
    for group, following in pairwise(groups):
        group.set_modules_to_forward_prefetch([following])
    for block, group in zip(blocks, groups, strict=True):
        if not block.in_backward:  # FSDP would gather it again, for nothing
            group.set_unshard_in_backward(False)
    backward_order = [group for block, group in zip(blocks, groups, strict=True) if block.in_backward][::-1]
    for group, following in pairwise(backward_order):
        group.set_modules_to_backward_prefetch([following])


def fill(objective: nn.Module, sources: Mapping[str, StoredTensor], device: torch.device) -> None:
    """Give a sharded objective memory on `device` and its values; each rank reads only its own rows.

    Args:
        sources: values of every parameter, by its name in the objective.
    """
    parameters = dict(objective.named_parameters())
    assert parameters.keys() <= sources.keys(), sorted(parameters.keys() - sources.keys())
    assert not list(objective.buffers()), "buffers would be left without values"
    objective.to_empty(device=device)
    for name, parameter in objective.named_parameters():
        source, rows = sources[name], own_rows(parameter)
        assert source.shape == tuple(parameter.shape), (name, source.shape, parameter.shape)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel():
            with torch.no_grad():
                local.copy_(cast_tensor(source.read(rows), local.dtype, "cpu"))


def own_rows(parameter: Tensor) -> slice:
    """Return which rows of a whole parameter this rank holds: FSDP2 deals the first axis as torch.chunk does."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    shard_axis = parameter.device_mesh.ndim - 1
    num_shards = parameter.device_mesh.size(shard_axis)
    rows_each = -(-parameter.shape[0] // num_shards)
    start = min(parameter.device_mesh.get_local_rank(shard_axis) * rows_each, parameter.shape[0])
    stop = min(start + rows_each, parameter.shape[0])
    assert len(parameter.to_local()) == stop - start
    return slice(start, stop)


def backward(loss: Tensor, objective: nn.Module, ranks: Ranks, is_last: bool) -> None:
    """Add a loss's gradients: summed at once over the ranks that share a copy, over copies after a step's last one.

    Waiting with the former, too, would leave every rank with whole gradients: 48 GiB in full tuning of the 13B.
    """
    assert isinstance(objective, FSDPModule)
    objective.set_requires_all_reduce(is_last)
    (loss * ranks.size).backward()  # FSDP averages over ranks; the loss is already a share of the global mean


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to at most `max_norm` (0 for any); return their norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def gather(parameter: Tensor) -> Tensor:
    """Return a copy of the whole of a sharded parameter on the CPU. Every rank must ask."""
    parameter = parameter.detach()
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.to("cpu", copy=True)
