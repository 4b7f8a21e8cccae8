"""Checkpoints of random weights to measure on: the sizes, and the layouts in which both sides can read them.

They say nothing sensible; loading and answering take as long as with trained weights.
"""

import functools
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.measure import ROOT
from model.config import CONFIGS, VIT_L_14_336, LlavaConfig
from model.convert import export
from model.files import StoredTensor, open_tensors, read_json, replace_folder, write_json
from model.llama import LlamaConfig
from model.llava import Llava
from model.vision import VisionConfig
from model.weights import Checkpoint, list_shapes

SIZES = {
    "tiny": CONFIGS["tiny"],
    "small": LlavaConfig(
        vision=VisionConfig(
            image_size=336, patch_size=14, hidden_size=256, intermediate_size=1024,
            num_hidden_layers=6, num_attention_heads=4, layer_norm_eps=1e-5, select_layer=-2,
        ),
        text=LlamaConfig(
            vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0,
        ),
    ),
    "1b": LlavaConfig(
        vision=VIT_L_14_336,
        text=LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
        ),
    ),
    "7b": CONFIGS["llava-1.5-7b"],
    "13b": CONFIGS["llava-1.5-13b"],
}  # fmt: skip

# The same files are read by this project and by transformers; what the official code wrote is read by this one alone.
HF_BF16, HF_FP16, OFFICIAL_BIN = "hf-bf16", "hf-fp16", "official-bin-fp16"
BLOCK_NUMBERS = 2**22 - 3  # a prime, so that no row of a matrix is another one again


def prepare_checkpoint(parent: Path, size: str, kind: str) -> Path:
    """Return the folder of a checkpoint, written first if it is not there; one shard of it is in memory at a time."""
    folder = parent / size / kind
    if folder.is_dir():
        return folder
    print(f"writing {folder}", flush=True)
    checkpoint = make_random_checkpoint(SIZES[size], torch.bfloat16 if kind == HF_BF16 else torch.float16)
    with replace_folder(folder) as temporary:
        export(checkpoint, "official" if kind == OFFICIAL_BIN else "hf", temporary)
        if kind == OFFICIAL_BIN:
            write_as_bin(temporary)
    return folder


def make_random_checkpoint(config: LlavaConfig, dtype: torch.dtype) -> Checkpoint:
    """Return a checkpoint whose tensors are made when they are read, the same each time."""
    with torch.device("meta"):
        shapes = list_shapes(Llava(config).state_dict())
    tensors = {name: make_random_tensor(name, shape, dtype) for name, shape in shapes.items()}
    # The small vocabulary serves every size: nothing that is measured reads or writes words.
    return Checkpoint(config, tensors, adapter=None, folders=(ROOT / "data/tiny",))


def make_random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    """Norms are 1, biases 0, and the rest is scaled so that activations keep their size.

    One block of numbers is repeated, from another place in each tensor: drawing 13 billion would take minutes.
    """

    def read(rows: slice) -> Tensor:
        if name.endswith("bias") or "norm" in name:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)[rows]
        row_numbers = math.prod(shape[1:])
        start, stop, _ = rows.indices(shape[0])
        first = (zlib.crc32(name.encode()) + start * row_numbers) % BLOCK_NUMBERS
        num_numbers = (stop - start) * row_numbers
        block = (draw_block() * row_numbers**-0.5).to(dtype).roll(-first)
        return block.repeat(-(-num_numbers // BLOCK_NUMBERS))[:num_numbers].view(stop - start, *shape[1:])

    return StoredTensor(shape, dtype, name, read)


@functools.cache
def draw_block() -> Tensor:
    """Return the same normal numbers at every call."""
    return torch.empty(BLOCK_NUMBERS).normal_(generator=torch.Generator().manual_seed(0))


def write_as_bin(folder: Path) -> None:
    """Replace a folder's safetensors by what the official code's `torch.save` writes."""
    for file in folder.glob("*.safetensors"):
        # Cloned: a tensor that lies within a larger storage is saved with all of that.
        tensors = {name: tensor.load().clone() for name, tensor in open_tensors(file).items()}
        torch.save(tensors, folder / _bin_name(file.name))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        values = read_json(index)
        values["weight_map"] = {name: _bin_name(shard) for name, shard in values["weight_map"].items()}
        write_json(folder / "pytorch_model.bin.index.json", values)
        index.unlink()


def _bin_name(name: str) -> str:
    return f"pytorch_{name.removesuffix('.safetensors')}.bin"


def load_transformers(folder: Path, device: str) -> Any:
    """Read a checkpoint of the `hf` layout in bf16 as the peer does."""
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = None if device == "cpu" else device  # on a GPU this needs accelerate
    return LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map=place
    ).eval()
