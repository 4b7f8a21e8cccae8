"""Who trains in `eval/speed_train.py`, and on what: the same documents, in everybody's own way."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID, Rendered
from data.packing import Batch, Step, deal, pack
from eval.speed_padding import IMAGE_TOKENS, MAX_TOKENS, draw_lengths
from eval.speed_weights import load_transformers
from model.config import LlavaConfig
from train.config import TrainConfig, make_config
from train.loop import StopRequest, do_step
from train.optim import make_optimizer
from train.parallel import backward, fill, shard, start_ranks
from train.stage import build_objective, compile_layers
from train.start import list_sources, open_start

LORA_RANK, LORA_ALPHA = 16, 32
LEARNING_RATE = 1e-4
MEAN_TEXT_TOKENS = 250
SUPERVISED_SHARE = 0.6  # of the text
MICRO_BATCH_TOKENS = 8192  # of ours
TARGETS = r".*language_model\.layers.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

DEFAULT, TUNED, TUNED_COMPILED = "peft, default", "peft, tuned", "peft, tuned, compiled"
OURS, OURS_COMPILED = "ours", "ours, compiled"


@dataclass(frozen=True)
class Document:
    """A row of a data set as the model reads it."""

    text: Rendered
    pixels: Tensor | None  # (3, S, S)

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Work:
    """What every contestant is to do."""

    folder: Path  # of the checkpoint
    config: LlavaConfig
    documents: Sequence[Document]  # of a step
    rows_per_batch: int  # of the peers
    device: str

    @property
    def num_supervised(self) -> int:
        return sum(document.text.num_supervised for document in self.documents)


@dataclass(frozen=True)
class Trainer:
    """A contestant, ready: passes it makes in a step, the longest first, and the whole step. Both return a loss."""

    passes: Sequence[Callable[[], float]]
    step: Callable[[], float]


def make_documents(config: LlavaConfig, number: int) -> list[Document]:
    """Draw rows of LLaVA's lengths: words and pixels are random, the end of the text is supervised."""
    generator = np.random.default_rng(0)
    lengths = draw_lengths(MEAN_TEXT_TOKENS, number, generator)
    longest = min(MAX_TOKENS, config.text.max_position_embeddings)
    documents = []
    for tokens, has_image in zip(lengths.tokens.tolist(), lengths.has_image.tolist(), strict=True):
        num_patches = config.vision.num_patches if has_image else 0
        num_words = min(tokens - IMAGE_TOKENS * has_image, longest - num_patches - 1)
        words = generator.integers(3, config.text.num_words, num_words).tolist()
        input_ids = [1, *[IMAGE_TOKEN_ID] * num_patches, *words]
        num_silent = len(input_ids) - int(SUPERVISED_SHARE * num_words)
        labels = [IGNORE_INDEX] * num_silent + input_ids[num_silent:]
        positions = list(range(len(input_ids)))
        size = config.vision.image_size
        pixels = torch.from_numpy(generator.standard_normal((3, size, size), dtype=np.float32))
        text = Rendered(input_ids, labels, positions, [0] * len(input_ids), num_images=int(has_image))
        documents.append(Document(text, pixels if has_image else None))
    return documents


def make_batches(work: Work, is_grouped: bool) -> list[list[Document]]:
    """Return the peers' batches: in the order the documents come, or each of documents of like length."""
    documents, size = list(work.documents), work.rows_per_batch
    if is_grouped:
        documents.sort(key=len)
    return [documents[start : start + size] for start in range(0, len(documents), size)]


def make_stage(folder: Path) -> TrainConfig:
    """Return the configuration that our trainer would be given."""
    values = {"train": "lora", "lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA, "model": str(folder)}
    return make_config({"name": "speed", "data": "none", **values}, "the suite")


def prepare_ours(work: Work, compile: bool = False) -> Trainer:
    """Make what `train/stage.py` makes of a configuration, with one rank."""
    config = make_stage(work.folder)
    ranks = start_ranks()
    start = open_start(config, None)
    llava, objective = build_objective(config, start.config)
    sources = list_sources(llava, objective, start, config.seed)
    if compile:
        compile_layers(llava)
    shard(objective, objective.blocks(), config.parallel, getattr(torch, config.dtype), ranks)
    fill(objective, sources, ranks.device)
    objective.train()
    optimizer = make_optimizer(objective, {"": LEARNING_RATE}, config.weight_decay, config.beta2)
    lengths = [len(document) for document in work.documents]
    (shares,) = deal(lengths, 1, MICRO_BATCH_TOKENS)
    packed = [
        [(index, work.documents[index].text, work.documents[index].pixels) for index in share] for share in shares
    ]
    micro_batches = [pack(documents) for documents in packed]
    step = Step(micro_batches, work.num_supervised, sum(lengths), len(lengths), [], 0, 0.0)

    def run_pass(batch: Batch) -> float:
        loss_sum, _ = objective(batch.to(ranks.device))
        backward(loss_sum / work.num_supervised, objective, ranks, is_last=True)
        optimizer.zero_grad()
        return loss_sum.item()

    def run_step() -> float:
        return do_step(objective, optimizer, step, config.max_grad_norm, ranks, StopRequest()).loss

    micro_batches.sort(key=lambda batch: -batch.cu_seqlens[-1])
    return Trainer([functools.partial(run_pass, batch) for batch in micro_batches], run_step)


def prepare_peer(work: Work, is_tuned: bool = False, compile: bool = False) -> Trainer:
    """Make transformers' model with PEFT's adapters, and what its Trainer does in a step."""
    from peft import LoraConfig, get_peft_model

    model = load_transformers(work.folder, work.device)
    model.config.use_cache = model.config.text_config.use_cache = False  # as Trainer sets it
    image_token_id = model.config.image_token_id
    settings = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=TARGETS, modules_to_save=["multi_modal_projector"]
    )
    peer: Any = get_peft_model(model, settings, autocast_adapter_dtype=not is_tuned).train()
    if compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True)
    if work.device != "cpu" and not is_tuned:
        peer.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = [pad_batch(batch, image_token_id) for batch in make_batches(work, is_tuned)]
    batches.sort(key=lambda batch: -batch["input_ids"].numel())
    autocast = functools.partial(torch.autocast, torch.device(work.device).type, torch.bfloat16, enabled=not is_tuned)

    def add_gradients(batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: tensor.to(work.device, non_blocking=True) for name, tensor in batch.items()}
        with autocast():
            loss = peer(**inputs, num_items_in_batch=work.num_supervised).loss
        loss.backward()
        return loss.detach()

    def run_pass(batch: dict[str, Tensor]) -> float:
        loss = add_gradients(batch).item()
        optimizer.zero_grad()
        return loss

    def run_step() -> float:
        losses = [add_gradients(batch) for batch in batches]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum().item()

    return Trainer([functools.partial(run_pass, batch) for batch in batches], run_step)


def pad_batch(documents: Sequence[Document], image_token_id: int) -> dict[str, Tensor]:
    """Return what a collator hands on: ids, labels and a mask (B, T), and pictures (N, 3, S, S) if there are any."""
    shape = (len(documents), max(map(len, documents)))
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE_INDEX),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for row, document in enumerate(documents):
        ids = torch.tensor(document.text.input_ids)
        batch["input_ids"][row, : len(document)] = torch.where(ids == IMAGE_TOKEN_ID, image_token_id, ids)
        batch["labels"][row, : len(document)] = torch.tensor(document.text.labels)
        batch["attention_mask"][row, : len(document)] = 1
    pictures = [document.pixels for document in documents if document.pixels is not None]
    return batch | ({"pixel_values": torch.stack(pictures)} if pictures else {})


CONTESTANTS: dict[str, Callable[[Work], Trainer]] = {
    DEFAULT: prepare_peer,
    TUNED: functools.partial(prepare_peer, is_tuned=True),
    TUNED_COMPILED: functools.partial(prepare_peer, is_tuned=True, compile=True),
    OURS: prepare_ours,
    OURS_COMPILED: functools.partial(prepare_ours, compile=True),
}
