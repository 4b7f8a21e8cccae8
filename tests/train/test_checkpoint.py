"""Checkpoints of a small module on several ranks: they hold what was saved, fit any number of ranks, or say why not."""

import functools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from train.checkpoint import CheckpointWriter, list_checkpoints, load_checkpoint
from train.parallel import Ranks, gather, start_ranks

ABOUT = {"name": "short", "learning_rate": 0.01, "shape": (5, 7)}
Values = dict[str, Any]  # numbers by name, as lists: tensors do not outlive the process they come from
T = TypeVar("T")

# A server imports torch once, and each rank is forked from it in no time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "pytest"])


def on_ranks(num_ranks: int, work: Callable[..., T], *arguments: object) -> list[T]:
    """Return what `work(ranks, *arguments)` returns on each of several new processes."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    with ProcessPoolExecutor(num_ranks, mp_context=CONTEXT) as pool:
        results = [pool.submit(be_rank, rank, num_ranks, port, work, *arguments) for rank in range(num_ranks)]
        return [result.result(timeout=60) for result in results]


def be_rank(rank: int, num_ranks: int, port: int, work: Callable[..., T], *arguments: object) -> T:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{num_ranks}", "LOCAL_RANK": f"{rank}", "MASTER_PORT": f"{port}"}
    ranks = start_ranks()
    try:
        return work(ranks, *arguments)
    finally:
        dist.destroy_process_group()


def build(num_shards: int, ranks: Ranks, seed: int, width: int = 7) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return three layers over `num_shards` ranks, the middle one frozen, and an optimizer with two groups."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 11), nn.Linear(11, 3))
    module[1].requires_grad_(False)
    mesh = init_device_mesh("cpu", (ranks.size // num_shards, num_shards), mesh_dim_names=("replicate", "shard"))
    if num_shards > 1:
        for layer in module:
            fully_shard(layer, mesh=mesh)
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    fully_shard(module, mesh=mesh, ignored_params=frozen if num_shards == 1 else set())
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim > 1) is is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.02}]
    return module, torch.optim.AdamW(groups, lr=0.01, fused=True)


def do_steps(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        torch.manual_seed(step)
        module(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def read_values(module: nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    """Return all weights, and what AdamW keeps, as they are now."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        tensors[name] = parameter
        tensors |= {f"{name} {kind}": tensor for kind, tensor in optimizer.state[parameter].items()}
    return {name: gather(tensor).tolist() for name, tensor in tensors.items()}


def write_model(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a model as simply as can be."""
    values = {name: tensor.tolist() for name, tensor in tensors.items()}
    (folder / "model.json").write_text(json.dumps(values), encoding="utf-8")


def save_and_go_on(ranks: Ranks, folder: Path, num_shards: int) -> tuple[Values, Values]:
    """Do 3 steps, save, and do 2 more before anything is written; return what there was at saving and in the end."""
    module, optimizer = build(num_shards, ranks, seed=1)
    has_changed = threading.Event()

    def write_late(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        assert has_changed.wait(timeout=60)
        write_model(folder, tensors)

    writer = CheckpointWriter(folder, 2, ranks, write_late, ABOUT)
    do_steps(module, optimizer, 1, 3)
    at_saving = read_values(module, optimizer)
    whole = {name: gather(parameter) for name, parameter in module.named_parameters()}
    writer.save(3, module, optimizer, whole, held_out_loss=None)
    do_steps(module, optimizer, 4, 5)
    writer.poll()
    assert list_checkpoints(folder) == []
    has_changed.set()
    writer.finish()
    assert list_checkpoints(folder) == [folder / "step-000003"]
    return at_saving, read_values(module, optimizer)


def load_and_go_on(ranks: Ranks, folder: Path, num_shards: int) -> tuple[Values, Values]:
    """Load into a module with other weights and do 2 more steps; return what was loaded, and what there is then."""
    module, optimizer = build(num_shards, ranks, seed=2)
    assert load_checkpoint(list_checkpoints(folder)[-1], module, optimizer, ABOUT) == 3
    loaded = read_values(module, optimizer)
    do_steps(module, optimizer, 4, 5)
    return loaded, read_values(module, optimizer)


def is_frozen(name: str) -> bool:
    return name.startswith("1.")


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        pytest.param((2, 2), (2, 2), id="sharded"),
        pytest.param((2, 1), (2, 1), id="a copy each"),
        pytest.param((2, 2), (3, 3), id="2 ranks to 3"),
        pytest.param((3, 3), (1, 1), id="3 ranks to 1"),
        pytest.param((4, 2), (2, 1), id="2 copies of 2 shards to a copy each"),
    ],
)
def test_loaded_equals_saved_whatever_came_after(
    tmp_path: Path, saving: tuple[int, int], loading: tuple[int, int]
) -> None:
    """Bit for bit, although weights changed before they were written; frozen ones stay as the module had them."""
    (at_saving, later), *others = on_ranks(saving[0], save_and_go_on, tmp_path, saving[1])
    assert all(other == (at_saving, later) for other in others)
    assert all(at_saving[name] != later[name] for name in later if not is_frozen(name))
    for loaded, later_again in on_ranks(loading[0], load_and_go_on, tmp_path, loading[1]):
        assert loaded.keys() == at_saving.keys()
        for name in loaded:
            assert (loaded[name] == at_saving[name]) is not is_frozen(name), name
        assert loaded["0.weight step"] == 3
        assert later_again["0.weight step"] == 5
    (checkpoint,) = tmp_path.iterdir()
    assert {path.name for path in checkpoint.iterdir()} == {"model.json", "state", "state.json"}
    model = json.loads((checkpoint / "model.json").read_text(encoding="utf-8"))
    assert model == {name: at_saving[name] for name in model}


def resume_exactly(ranks: Ranks, folder: Path) -> tuple[Values, Values]:
    module, optimizer = build(ranks.size, ranks, seed=1)
    writer = CheckpointWriter(folder, 2, ranks, write_model, ABOUT)
    do_steps(module, optimizer, 1, 3)
    writer.save(3, module, optimizer, {}, None)
    do_steps(module, optimizer, 4, 9)
    writer.finish()
    undisturbed = read_values(module, optimizer)
    module, optimizer = build(ranks.size, ranks, seed=1)
    first = load_checkpoint(folder / "step-000003", module, optimizer, ABOUT) + 1
    do_steps(module, optimizer, first, 9)
    return undisturbed, read_values(module, optimizer)


def test_steps_after_loading_are_the_same(tmp_path: Path) -> None:
    for undisturbed, resumed in on_ranks(2, resume_exactly, tmp_path):
        assert resumed == undisturbed


def save_many(ranks: Ranks, folder: Path, losses: list[float | None]) -> None:
    module, optimizer = build(ranks.size, ranks, seed=1)
    writer = CheckpointWriter(folder, 2, ranks, write_model, ABOUT)
    for step, loss in enumerate(losses, start=1):
        writer.save(step, module, optimizer, {}, loss)
    writer.finish()


@pytest.mark.parametrize(
    ("losses", "kept"),
    [([None] * 4, [3, 4]), ([0.4, 0.1, 0.3, None, 0.2], [2, 4, 5]), ([0.3, 0.2, 0.1], [2, 3])],
    ids=["nothing measured", "the best is old", "the best is new"],
)
def test_newest_and_best_stay(tmp_path: Path, losses: list[float | None], kept: list[int]) -> None:
    on_ranks(1, save_many, tmp_path, losses)
    assert list_checkpoints(tmp_path) == [tmp_path / f"step-{step:06d}" for step in kept]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints; read only."""
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(2, save_and_go_on, folder, 2)
    return folder


def cut_part(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state/__1_0.distcp", 2000)


def damage_part(checkpoint: Path) -> None:
    (part := checkpoint / "state/__1_0.distcp").write_bytes(b"\0" * part.stat().st_size)


def remove_metadata(checkpoint: Path) -> None:
    (checkpoint / "state/.metadata").unlink()


def cut_json(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state.json", 20)


def remove_json(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()


def change_version(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    (checkpoint / "state.json").write_text(json.dumps(state | {"torch": "2.4.1+cu124"}), encoding="utf-8")


def change_nothing(checkpoint: Path) -> None:
    pass


def refuse_to_load(ranks: Ranks, checkpoint: Path, width: int, about: dict[str, Any]) -> str:
    module, optimizer = build(ranks.size, ranks, seed=2, width=width)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
        load_checkpoint(checkpoint, module, optimizer, about)
    return str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "width", "about", "messages"),
    [
        pytest.param(cut_part, 7, {}, ("state: __1_0.distcp missing or cut off: remove",), id="cut part"),
        pytest.param(damage_part, 7, {}, ("is damaged, or of another model (", ": remove"), id="damaged part"),
        pytest.param(remove_metadata, 7, {}, ("state: .metadata missing or cut off: remove",), id="no metadata"),
        pytest.param(cut_json, 7, {}, ("state.json is damaged (", "is not JSON", ": remove"), id="cut JSON"),
        pytest.param(remove_json, 7, {}, ("state.json is damaged (", "is missing", ": remove"), id="no JSON"),
        pytest.param(change_version, 7, {}, ("written by torch 2.4.1+cu124, this", "torch==2.4.*"), id="another torch"),
        pytest.param(change_nothing, 8, {}, ("is damaged, or of another model (", " for 0."), id="another module"),
        pytest.param(
            change_nothing,
            7,
            {"learning_rate": 0.1, "seed": 2},
            ("(learning_rate was 0.01 and is 0.1; seed was null and is 2): use another name=", "model="),
            id="another run",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    saved: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    width: int,
    about: dict[str, Any],
    messages: tuple[str, ...],
) -> None:
    checkpoint = shutil.copytree(saved / "step-000003", tmp_path / "step-000003")
    spoil(checkpoint)
    for message in on_ranks(2, refuse_to_load, checkpoint, width, ABOUT | about):
        for part in messages:
            assert part in message
        assert str(tmp_path) in message
        assert "\n" not in message
    assert "Traceback" not in capfd.readouterr().err


def fail_to_save(ranks: Ranks, folder: Path, failing_rank: int, is_next_save: bool) -> str:
    """Save once well and once not; return what this rank is told."""

    def write_or_fail(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        if failing_rank == 0 and "2" in folder.name:
            raise PermissionError("no")

    module, optimizer = build(ranks.size, ranks, seed=1)
    writer = CheckpointWriter(folder, 2, ranks, write_or_fail, ABOUT)
    writer.save(1, module, optimizer, {}, None)
    writer.finish()
    if ranks.rank == failing_rank > 0:  # a limit on the size of files stands in for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    writer.save(2, module, optimizer, {}, None)
    do_steps(module, optimizer, 1, 2)
    wait = functools.partial(writer.save, 3, module, optimizer, {}, None) if is_next_save else writer.finish
    with pytest.raises(OSError, match="cannot save") as caught:
        wait()
    return str(caught.value)


@pytest.mark.parametrize("is_next_save", [False, True], ids=["finish", "next save"])
@pytest.mark.parametrize("failing_rank", [0, 1], ids=["model of the first rank", "state of the second"])
def test_one_rank_that_cannot_write_fails_all(tmp_path: Path, failing_rank: int, is_next_save: bool) -> None:
    messages = on_ranks(2, fail_to_save, tmp_path, failing_rank, is_next_save)
    assert len(set(messages)) == 1, messages
    assert messages[0].startswith(f"cannot save {tmp_path / 'step-000002'}: ")
    assert ["no;", "File too large"][failing_rank] in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    on_ranks(1, refuse_nothing, tmp_path / "step-000001")


def refuse_nothing(ranks: Ranks, checkpoint: Path) -> None:
    load_checkpoint(checkpoint, *build(ranks.size, ranks, seed=2), ABOUT)


def die_saving(ranks: Ranks, folder: Path, moment: str) -> None:
    """Save step 3 well; then the first rank is killed at some moment of saving step 4."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    module, optimizer = build(ranks.size, ranks, seed=1)
    writer = CheckpointWriter(folder, 2, ranks, write_model, ABOUT)
    do_steps(module, optimizer, 1, 3)
    writer.save(3, module, optimizer, {}, None)
    writer.finish()
    with pytest.MonkeyPatch.context() as patch:
        if moment == "write":
            writer.write_model = die
        elif moment == "rename":
            patch.setattr(Path, "rename", die)
        else:
            writer.num_kept = 1
            patch.setattr(shutil, "rmtree", die)
        writer.save(4, module, optimizer, {}, None)
        writer.finish()


def go_on_saving(ranks: Ranks, folder: Path) -> None:
    (last,) = list_checkpoints(folder)
    writer = CheckpointWriter(folder, 2, ranks, write_model, ABOUT)
    assert list(folder.iterdir()) == [last]
    module, optimizer = build(ranks.size, ranks, seed=1)
    step = load_checkpoint(last, module, optimizer, ABOUT)
    writer.save(step + 1, module, optimizer, {}, None)
    writer.finish()


@pytest.mark.parametrize(("moment", "last", "other"), [("write", 3, 4), ("rename", 3, 4), ("remove", 4, 3)])
def test_killed_while_saving(tmp_path: Path, moment: str, last: int, other: int) -> None:
    """What is half written, or half removed, has a name of its own, and the next run goes on from what is whole."""
    with pytest.raises(BrokenProcessPool):
        on_ranks(2, die_saving, tmp_path, moment)
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{last:06d}", f"step-{other:06d}.partial"}
    on_ranks(2, go_on_saving, tmp_path)
    assert list_checkpoints(tmp_path) == [tmp_path / f"step-{step:06d}" for step in (last, last + 1)]
