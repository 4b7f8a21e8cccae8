"""What one of eight ranks does, seen alone: the others are simulated, so that it can be watched in this process."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from data.conversation import Turn, render_conversation
from data.packing import pack
from data.tokenizer import Tokenizer
from model.config import CONFIGS, LlavaConfig
from model.files import StoredTensor
from tests.conftest import TINY_TOKENIZER
from train.config import TrainConfig, make_config
from train.parallel import Ranks, backward, fill, shard, start_fake_ranks
from train.stage import build_objective
from train.start import Start, list_sources, open_start

NUM_RANKS = 8
SETTINGS = {"name": "a", "data": "a.json", "dtype": "float32", "lora_rank": 4, "lora_alpha": 8}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    yield start_fake_ranks(NUM_RANKS, NUM_RANKS, torch.device("cpu"))
    dist.destroy_process_group()


def make_start(config: TrainConfig, folder: Path, read: Counter[str]) -> Start:
    """A start that counts how many numbers are read of each tensor."""
    start = open_start(replace(config, model=str(folder)), None)

    def counting(name: str, tensor: StoredTensor) -> StoredTensor:
        def read_rows(rows: slice) -> torch.Tensor:
            part = tensor.read(rows)
            read[name] += part.numel()
            return part

        return replace(tensor, read=read_rows)

    return replace(start, tensors={name: counting(name, tensor) for name, tensor in start.tensors.items()})


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        pytest.param({"train": "lora"}, 1 / NUM_RANKS, id="sharded"),
        pytest.param({"train": "lora", "bits": 4}, 1 / NUM_RANKS, id="sharded, 4 bits"),
        pytest.param({"train": "full", "parallel": "hsdp"}, 1 / NUM_RANKS, id="sharded inside the machine"),
        pytest.param({"train": "lora", "parallel": "ddp"}, 1.0, id="a copy each"),
    ],
)
def test_a_rank_reads_only_its_own_rows(
    ranks: Ranks, tiny_model_folder: Path, changes: dict[str, str | int], share: float
) -> None:
    config = make_config(SETTINGS | changes, "here")
    read: Counter[str] = Counter()
    start = make_start(config, tiny_model_folder, read)
    llava, objective = build_objective(config, start.config)
    assert all(parameter.is_meta for parameter in objective.parameters())
    sources = list_sources(llava, objective, start, config.seed)
    shard(objective, objective.blocks(), config.parallel, torch.float32, ranks)
    fill(objective, sources, ranks.device)
    assert read.keys() == start.tensors.keys()
    total = sum(torch.Size(tensor.shape).numel() for tensor in start.tensors.values())
    # A tensor of fewer rows than ranks is still a row each, hence the little more than an eighth.
    assert share <= sum(read.values()) / total < 1.05 * share


def count_gathers(config: TrainConfig, ranks: Ranks, folder: Path) -> Counter[str]:
    """Return how often each group's weights are gathered in one step: forward and backward."""
    start = open_start(replace(config, model=str(folder)), None)
    llava, objective = build_objective(config, start.config)
    sources = list_sources(llava, objective, start, config.seed)
    shard(objective, objective.blocks(), config.parallel, torch.float32, ranks)
    fill(objective, sources, ranks.device)
    text = render_conversation([Turn("human", "red?", True), Turn("gpt", "no")], Tokenizer(TINY_TOKENIZER), 64)
    batch = pack([(0, text, torch.randn(3, 64, 64))])
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        loss, _ = objective(batch)
        backward(loss, objective, ranks, is_last=True)
    prefix = "FSDP::all_gather ("
    names = [event.key for event in recorded.key_averages() for _ in range(event.count)]
    return Counter(name.removeprefix(prefix).removesuffix(")") for name in names if name.startswith(prefix))


@pytest.mark.parametrize("checkpoint_layers", [0, 3])
def test_only_layers_are_gathered_again_in_backward(
    ranks: Ranks, tiny_model_folder: Path, checkpoint_layers: int
) -> None:
    """Each layer of the LLaMA twice, but the last, whose backward follows at once; all that is frozen, once."""
    config = make_config(SETTINGS | {"train": "lora", "checkpoint_layers": checkpoint_layers}, "here")
    gathers = count_gathers(config, ranks, tiny_model_folder)
    sizes: LlavaConfig = CONFIGS["tiny"]
    layers = [f"llava.language_model.layers.{index}" for index in range(sizes.text.num_hidden_layers)]
    tower = [f"llava.vision_tower.layers.{index}" for index in range(sizes.vision.num_hidden_layers - 1)]
    once = [*tower, "llava.language_model.embed_tokens", "token_loss", layers[-1]]
    assert {name: gathers[name] for name in (*once, *layers[:-1])} == {
        **dict.fromkeys(once, 1),
        **dict.fromkeys(layers[:-1], 2),
    }


def test_a_copy_each_gathers_nothing_frozen(ranks: Ranks, tiny_model_folder: Path) -> None:
    config = make_config(SETTINGS | {"train": "lora", "parallel": "ddp", "bits": 4}, "here")
    assert not [name for name in count_gathers(config, ranks, tiny_model_folder) if "layers" in name]


def test_machines_of_different_sizes_are_refused(tiny_model_folder: Path) -> None:
    uneven = Ranks(0, 8, 3, torch.device("cpu"), dist.HashStore())
    _, objective = build_objective(make_config(SETTINGS | {"train": "lora"}, "here"), CONFIGS["tiny"])
    with pytest.raises(ValueError, match="equally many ranks on every machine, here are 3 of the 8"):
        shard(objective, objective.blocks(), "hsdp", torch.float32, uneven)
