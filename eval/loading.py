"""The models that are scored: found and hashed first, read only when there is something to answer."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import Tokenizer, find_tokenizer
from eval.answers import hash_files, hash_tensors
from model.adapter_files import Adapter
from model.config import LlavaConfig
from model.llava import Llava
from model.machine import describe_machine
from model.quantize import pack_for_decoding
from model.weights import Checkpoint, build_llava, choose_dtype, open_checkpoint

SMALL_TRUNK_NUMBERS = 4_000_000  # keys and values of a picture


@dataclass(frozen=True)
class Model:
    """A model whose files are open."""

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    dtype: torch.dtype
    bits: int
    results: Path  # where its results folders are
    settings: dict[str, Any]  # what of it decides answers


def open_model(
    path: str,
    base: str | None = None,
    adapter: str | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype | None = None,
    bits: int = 16,
    device: str = "cpu",
    out: Path | None = None,
) -> Model:
    """List a model's tensors, and hash what they hold.

    Args:
        path, base, adapter, vision_tower: see `open_checkpoint`.
        dtype: None is the stored one where the device can calculate in it.
        out: where its results folders are to be; None is `eval/` beside the model or adapter, or below `runs/`.
    Raises: FileNotFoundError or ValueError for a model that is not whole.
    """
    checkpoint = open_checkpoint(path, base, vision_tower, adapter)
    tokenizer = Tokenizer(find_tokenizer(*checkpoint.folders))
    dtype = dtype or choose_dtype(checkpoint.dtype, device)
    settings = {
        "model": path,
        "model_base": base,
        "adapter": adapter,
        "vision_tower": vision_tower,
        "model_hash": hash_tensors(checkpoint.tensors, f"{checkpoint.config} {hash_files([tokenizer.file])}"),
        "adapter_hash": None if checkpoint.adapter is None else hash_adapter(checkpoint.adapter),
        "dtype": str(dtype).removeprefix("torch."),
        "bits": bits,
    }
    own = adapter or path
    run = Path(own).resolve().parent if Path(own).is_dir() else Path("runs") / own.rpartition("/")[2]
    name = f"{path} + {adapter}" if adapter else path
    return Model(name, checkpoint, tokenizer, dtype, bits, out or run / "eval", settings)


def hash_adapter(adapter: Adapter) -> str:
    """Return a hash of what a LoRA adds; what it trained whole is among the model's tensors."""
    factors = {
        f"{layer}.{name}": tensor
        for layer, pair in adapter.factors.items()
        for name, tensor in (("lora_A", pair.lora_A), ("lora_B", pair.lora_B))
    }
    return hash_tensors(factors, str({layer: pair.scaling for layer, pair in adapter.factors.items()}))


def load_model(model: Model, device: str) -> Llava:
    """Read the weights; "cuda" is this rank's card."""
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    llava = build_llava(model.checkpoint, model.dtype, device, model.bits)
    if model.bits == 4 and device == "cpu" and model.dtype == torch.bfloat16:
        pack_for_decoding(llava)
    return llava


def choose_batch_size(config: LlavaConfig) -> int:
    """Return how many questions to have in work: 32 leave a 13B's trunks room beside its weights on a 32 GB card.

    Tiny models, whose time goes into starting operations, get more.
    """
    numbers_per_token = 2 * config.text.num_hidden_layers * config.text.num_key_value_heads * config.text.head_size
    return 256 if numbers_per_token * config.vision.num_patches < SMALL_TRUNK_NUMBERS else 32


def describe_session(device: str, batch_size: int, num_ranks: int) -> dict[str, Any]:
    """Return what may be another when a run goes on, and may change an answer in bf16."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "batch_size": batch_size,
        "world_size": num_ranks,
        "attention": "trunk and branches (model/attention.py)",
        **describe_machine(device),
    }
