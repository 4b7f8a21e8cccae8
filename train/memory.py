"""Memory of a training step: counted storage by storage as it runs, or estimated by arithmetic before it starts.

Shapes: T tokens of one forward pass, D hidden size, I intermediate size, V vocabulary.
"""

import math
import os
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import LlavaConfig
from model.llama import LlamaConfig
from train.config import TrainConfig
from train.loss import LOGITS_CHUNK_TOKENS
from train.parallel import Ranks

GIB = 2**30
TOKENS_STEP = 256  # token budgets are proposed in multiples of it
TOKENS_PER_DOCUMENT = 800  # mean of LLaVA's 665 thousand rows, a picture's 576 among them
SUPERVISED_SHARE = 0.2  # of the tokens, assumed

# What no tensor shows, on a GPU: CUDA context and libraries, NCCL's buffers; and gaps between the allocator's blocks.
CONTEXT_BYTES, NCCL_BYTES, FRAGMENTATION = 0.6 * GIB, 0.8 * GIB, 0.04
CPU_PROCESS_BYTES = 0.5 * GIB

PASSES = ("forward", "backward")


class LiveMemory(TorchDispatchMode):
    """Count the bytes of every storage made inside the block until it is freed. Fake tensors count like real ones.

    What a storage is for follows from when it was made, which the caller says (`phase`), and from FSDP's own operators,
    which gather weights and reduce gradients.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.phase = "other"
        self.by_kind: Counter[str] = Counter()
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}

    def __enter__(self) -> Self:
        # FSDP frees gathered weights by resizing their storage to nothing, which no operator reports.
        resize = torch.UntypedStorage.resize_

        def resize_and_note(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if storage._cdata in self._storages:
                self._note(storage, "gathered")
            return storage

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_and_note)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def forget_peak(self) -> None:
        """Look for the highest point from here on."""
        self.peak, self.at_peak = self.now, self.by_kind.copy()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a sharded tensor, whose local part comes by again
        out = func(*args, **(kwargs or {}))
        for storage, tensor in _storages_of(out):
            if storage._cdata not in self._storages:
                is_logits = self.phase in PASSES and tensor.shape[-1:] == (self.vocab_size,)
                self._note(storage, "logits" if is_logits else self.phase)
        if func.namespace in ("fsdp", "c10d"):  # what they read and write was made for them
            kind = "gradients" if "chunk_cat" in func.name() or "reduce" in func.name() else "gathered"
            for storage, _ in _storages_of((args, kwargs)):
                if storage._cdata in self._storages and self._storages[storage._cdata][0] in PASSES:
                    self._note(storage, kind)
        return out

    def _note(self, storage: torch.UntypedStorage, kind: str) -> None:
        """Take up a storage, or what has become of it."""
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known:
            self._add(known[0], -known[1])
        reference = known[2] if known else weakref.ref(storage, lambda _: self._drop(key))
        self._storages[key] = (kind, size, reference)
        self._add(kind, size)

    def _drop(self, key: int) -> None:
        kind, size, _ = self._storages.pop(key)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self.by_kind[kind] += size
        self.now += size
        if self.now > self.peak:
            self.forget_peak()


def _storages_of(tree: Any) -> list[tuple[torch.UntypedStorage, Tensor]]:
    return [(leaf.untyped_storage(), leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Workload:
    """What one card reads in an optimizer step."""

    num_tokens: int  # of one forward pass, at most
    num_documents: int  # of one forward pass, a picture in each
    num_micro_batches: int


def plan_workload(config: TrainConfig, num_ranks: int, tokens_per_document: float = TOKENS_PER_DOCUMENT) -> Workload:
    """Return what a configuration asks of a card: its forward passes may be as long as `micro_batch_tokens`."""
    documents = -(-config.batch_size // num_ranks)
    num_tokens = min(config.micro_batch_tokens, documents * config.max_tokens)
    num_documents = min(documents, max(1, round(num_tokens / tokens_per_document)))
    return Workload(num_tokens, num_documents, max(1, math.ceil(documents * tokens_per_document / num_tokens)))


@dataclass(frozen=True)
class Group:
    """Weights that are gathered together."""

    frozen_bytes: float
    num_trained: int = 0


@dataclass(frozen=True)
class Weights:
    """A model's weights as sharding groups them."""

    layer: Group  # each of the LLaMA's
    embedding: Group
    head: Group
    tower_layer: Group
    root: Group  # projector, last norm, what is left of the tower: gathered for the whole step
    num_layers: int
    num_tower_layers: int  # that are run

    @property
    def num_trained(self) -> int:
        layers = self.num_layers * self.layer.num_trained + self.num_tower_layers * self.tower_layer.num_trained
        return layers + self.embedding.num_trained + self.head.num_trained + self.root.num_trained

    @property
    def frozen_bytes(self) -> float:
        layers = self.num_layers * self.layer.frozen_bytes + self.num_tower_layers * self.tower_layer.frozen_bytes
        return layers + self.embedding.frozen_bytes + self.head.frozen_bytes + self.root.frozen_bytes


def count_weights(config: TrainConfig, sizes: LlavaConfig) -> Weights:
    """Count a stage's weights, frozen and trained."""
    text, vision, width = sizes.text, sizes.vision, number_bytes(config)
    linears = list_linears(text)
    trains_llama, trains_tower = config.train in ("language", "full"), config.vision_learning_rate > 0
    targets = config.lora_targets.replace(" ", "").split(",") if config.lora_targets else list(linears)

    def group(numbers: int, is_trained: bool) -> Group:
        return Group(0, numbers) if is_trained else Group(numbers * width)

    layer = group(sum(i * o for i, o in linears.values()) + 2 * text.hidden_size, trains_llama)
    if config.bits != 16:
        codes = {8: 1 + 2 / text.hidden_size, 4: 0.5 + 3 / 64}[config.bits]
        layer = Group(sum(i * o for i, o in linears.values()) * codes + 2 * text.hidden_size * width)
    if config.train == "lora":
        layer = replace(layer, num_trained=config.lora_rank * sum(sum(linears[name]) for name in targets))
    vocabulary = group(text.vocab_size * text.hidden_size, trains_llama or config.lora_vocabulary)
    tower_numbers = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    tower_numbers += 9 * vision.hidden_size + vision.intermediate_size  # biases and norms
    num_used = vision.num_hidden_layers + 1 + vision.select_layer
    if config.train == "language" or config.features:
        num_used = 0
    projector_numbers = (vision.hidden_size + text.hidden_size + 2) * text.hidden_size
    outside = [
        group(projector_numbers, config.train in ("projector", "lora", "full")),
        group(text.hidden_size, trains_llama),  # the last norm
    ]
    if not config.features:  # then there is no tower
        outside += [
            group((3 * vision.patch_size**2 + vision.num_patches + 4) * vision.hidden_size, trains_tower),
            group((vision.num_hidden_layers - num_used) * tower_numbers + 2 * vision.hidden_size, False),  # not run
        ]
    root = Group(sum(part.frozen_bytes for part in outside), sum(part.num_trained for part in outside))
    tower_layer = group(tower_numbers, trains_tower)
    return Weights(layer, vocabulary, vocabulary, tower_layer, root, text.num_hidden_layers, num_used)


def list_linears(text: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of the linears of a LLaMA's layer."""
    hidden, intermediate = text.hidden_size, text.intermediate_size
    key_value = text.num_key_value_heads * text.head_size
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, key_value),
        "v_proj": (hidden, key_value),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }


def number_bytes(config: TrainConfig) -> int:
    """Return the bytes of a number in the type of computing."""
    return {"bfloat16": 2, "float32": 4}[config.dtype]


def estimate_memory(
    config: TrainConfig, sizes: LlavaConfig, num_ranks: int, num_local: int, work: Workload
) -> dict[str, float]:
    """Return the bytes of one card at a step's highest point, by what they are for, in milliseconds.

    Where that point is depends on the configuration, so several are compared. `tests/train/test_plan.py` sets the
    result beside the simulation: it is within 5 %.
    """
    weights, width, tokens = count_weights(config, sizes), number_bytes(config), work.num_tokens
    num_shards = {"fsdp": num_ranks, "hsdp": num_local, "ddp": 1}[config.parallel]
    layer, head, root = (
        group.frozen_bytes + width * group.num_trained for group in (weights.layer, weights.head, weights.root)
    )
    if num_shards == 1:  # only what is trained is copied into the type of computing
        layer, head, root = 0.0, 0.0, width * weights.num_trained
    num_checkpointed = min(config.checkpoint_layers, weights.num_layers)
    num_kept = weights.num_layers - num_checkpointed
    layer_input, norm = tokens * sizes.text.hidden_size * width, tokens * sizes.text.hidden_size * 4
    kept, working = (tokens * size for size in layer_token_bytes(config, sizes.text))
    tower = 0
    if weights.tower_layer.num_trained:
        per_token = width * (9 * sizes.vision.hidden_size + 2 * sizes.vision.intermediate_size)
        tower = work.num_documents * (sizes.vision.num_patches + 1) * weights.num_tower_layers * per_token
    inputs = num_checkpointed * layer_input + tower
    logits = min(LOGITS_CHUNK_TOKENS, SUPERVISED_SHARE * tokens) * sizes.text.vocab_size * (4 + 2 * width)
    # A group's gradients are summed over the ranks as soon as they are there, and wait in fp32, each rank its share.
    shares = 4 * weights.num_trained / num_shards
    waiting = shares if work.num_micro_batches > 1 else 0
    of_head = waiting + 4 * weights.head.num_trained * (1 + 1 / num_shards)
    of_all = shares + 4 * weights.layer.num_trained
    moments = [
        # gathered weights, gradients, layers' inputs, activations, logits
        (2 * layer + head + root, waiting, inputs, num_kept * kept + 3 * norm + layer_input, 0),  # the last norm
        (layer + 2 * head + root, waiting, inputs, num_kept * kept + 2 * norm, logits),  # the loss
        (layer + root, of_head, inputs, num_kept * kept + 6 * norm, 0),  # the last norm's backward
        (2 * layer + root, of_head, inputs, max(num_kept, 1) * kept + working, 0),  # the last layer's
        (2 * layer + root, of_all, layer_input + tower, kept + working, 0),  # the first layer's
    ]
    kinds = ("gathered", "gradients", "layer inputs", "activations", "logits")
    return {
        "weights": (weights.frozen_bytes + 4 * weights.num_trained) / num_shards,
        "optimizer": 8 * weights.num_trained / num_shards,
        **dict(zip(kinds, max(moments, key=sum), strict=True)),
    }


def layer_token_bytes(config: TrainConfig, text: LlamaConfig) -> tuple[int, int]:
    """Return what a layer of the LLaMA keeps of a token for its backward pass, and what that needs on top of it."""
    width, hidden, intermediate = number_bytes(config), text.hidden_size, text.intermediate_size
    key_value = text.num_key_value_heads * text.head_size
    attention = width * (4 * hidden + 2 * key_value)  # what its norm and its residual read, q, k, v, what comes out
    mlp = width * 2 * intermediate  # gate and up
    inputs = 0  # what a trained matrix multiplies; nothing is kept for frozen ones
    if config.train != "projector":
        inputs = width * (3 * hidden + intermediate)
    if config.train == "lora":
        num_targets = len(config.lora_targets.split(",")) if config.lora_targets else len(list_linears(text))
        inputs += width * num_targets * config.lora_rank
        inputs += (3 * hidden + intermediate) * (config.lora_dropout > 0)  # a mask
    # Gradients of the layer's output and around the SwiGLU; where its output was kept, they take that place.
    working = width * (hidden + (4 if config.train == "projector" else 3) * intermediate)
    return attention + mlp + inputs, working


def add_reserve(peak_bytes: float) -> float:
    """Return what a GPU needs to hold tensors of so many bytes."""
    return peak_bytes * (1 + FRAGMENTATION) + CONTEXT_BYTES + NCCL_BYTES


def check_plan(config: TrainConfig, sizes: LlavaConfig, ranks: Ranks) -> None:
    """Stop a stage that cannot fit before anything is loaded.

    Raises: ValueError with what is needed, and the smallest changes that would fit.
    """
    if config.train == "vision":
        return
    on_gpu = ranks.device.type == "cuda"
    if config.card_gib:
        available = config.card_gib * GIB
    elif on_gpu:
        available = float(torch.cuda.get_device_properties(ranks.device).total_memory)
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks.num_local

    def need(changed: TrainConfig, num_ranks: int = ranks.size) -> float:
        work = plan_workload(changed, num_ranks)
        tensors = sum(estimate_memory(changed, sizes, num_ranks, ranks.num_local, work).values())
        return add_reserve(tensors) if on_gpu else tensors + CPU_PROCESS_BYTES

    if need(config) <= available:
        return
    work = plan_workload(config, ranks.size)
    parts = estimate_memory(config, sizes, ranks.size, ranks.num_local, work)
    listed = "".join(f"{name} {size / GIB:.1f}, " for name, size in parts.items() if size >= GIB / 20)
    num_layers = sizes.text.num_hidden_layers
    all_checkpointed = replace(config, checkpoint_layers=num_layers)
    changes = list_changes(config, num_layers, ranks.size)
    fitting = [text for text, changed, num_ranks in changes if need(changed, num_ranks) <= available]
    if not fitting:
        changes = list_changes(all_checkpointed, num_layers, ranks.size)
        also = f"checkpoint_layers = {num_layers} and "
        fitting = [also + text for text, changed, num_ranks in changes if need(changed, num_ranks) <= available]
    smallest: dict[str, str] = {}
    for text in fitting:
        smallest.setdefault(text.rpartition(" ")[0], text)
    advice = "; or ".join(smallest.values())
    raise ValueError(
        f"a step needs about {need(config) / GIB:.1f} GiB on each rank ({listed}and a reserve), and a rank has "
        f"{available / GIB:.1f}: use {advice or 'a smaller model or larger cards'} (train/plan.py tells more)"
    )


def list_changes(config: TrainConfig, num_layers: int, num_ranks: int) -> list[tuple[str, TrainConfig, int]]:
    """Return single changes that save memory, with the number of ranks after them; of each kind the smallest first."""
    changes = [
        (f"checkpoint_layers = {k}", replace(config, checkpoint_layers=k), num_ranks)
        for k in range(config.checkpoint_layers + 1, num_layers + 1)
    ]
    changes += [
        (f"micro_batch_tokens = {tokens}", replace(config, micro_batch_tokens=tokens), num_ranks)
        for tokens in range(config.micro_batch_tokens - TOKENS_STEP, config.max_tokens - 1, -TOKENS_STEP)
    ]
    if config.parallel != "fsdp" and num_ranks > 1:
        changes.append(("parallel = fsdp", replace(config, parallel="fsdp"), num_ranks))
    if config.bits == 16 and config.train in ("projector", "lora"):
        changes.append(("bits = 4", replace(config, bits=4), num_ranks))
    if config.parallel != "ddp":
        more = range(2 * num_ranks, min(16 * num_ranks, config.batch_size) + 1, num_ranks)
        changes += [(f"cards, at least {count}", config, count) for count in more]
    return changes
