"""Write a model in another layout: `python -m model.convert SRC --to hf|official|peft --out DIR [--base BASE]`.

- `hf`        what transformers loads as LlavaForConditionalGeneration, and vLLM, lmms-eval, ms-swift, LLaMA-Factory
- `official`  what the official LLaVA code loads
- `peft`      an adapter that PEFT puts on a model of the `hf` layout

SRC is anything that `load_llava` reads; with `--base` an adapter is merged into its base, in fp32. Tensors keep the
type they are stored in, and pass through memory one shard at a time.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import find_tokenizer
from data.tokenizer_json import write_tokenizer_json
from model.adapter_files import Adapter, load_adapter, merge_adapter, write_peft
from model.files import SHARD_BYTES, StoredTensor, read_json, replace_folder, write_json, write_shards
from model.hub import resolve_folder
from model.layout_files import CHAT_TEMPLATE, IMAGE_TOKEN, PAD_TOKEN, hf_files, official_files
from model.layouts import Layout, to_layout
from model.weights import Checkpoint, open_checkpoint

HF_ROUND_ROWS = 64  # llava-hf pads its vocabulary to a multiple of this
TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder or repository of a model or an adapter")
    parser.add_argument("--to", choices=["hf", "official", "peft"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--base", help="what an adapter or a projector belongs to")
    parser.add_argument("--vision-tower", help="CLIP to take the tower from")
    arguments = parser.parse_args()
    try:
        if arguments.out.exists():
            raise ValueError(f"{arguments.out} is there already: remove it, or choose another --out")
        if arguments.to == "peft":
            export_peft(load_adapter(resolve_folder(arguments.source)), arguments.base, arguments.out)
        else:
            checkpoint = open_checkpoint(arguments.source, arguments.base, arguments.vision_tower)
            export(checkpoint, arguments.to, arguments.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.out}")


def export(checkpoint: Checkpoint, layout: Layout, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a whole model, an adapter merged into it, in the official or the llava-hf layout.

    Raises: OSError when it cannot be written; nothing is left then.
    """
    stored = checkpoint.tensors
    if checkpoint.adapter is not None:
        _check_trained(checkpoint.adapter)
        stored = merge_adapter(stored, checkpoint.adapter)
    config, text = checkpoint.config, checkpoint.config.text
    num_rows = text.num_words
    if layout == "hf":
        num_rows = text.vocab_size
        if text.num_padding_rows < 2:  # <image> and <pad> need a row each
            num_rows = -(-(text.num_words + 2) // HF_ROUND_ROWS) * HF_ROUND_ROWS
    tensors = {
        to_layout(name, layout): _fit_rows(name, tensor, text.num_words, num_rows) for name, tensor in stored.items()
    }
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    files = hf_files(config, num_rows, dtype) if layout == "hf" else official_files(config, dtype)
    with replace_folder(folder) as temporary:
        for name, values in files.items():
            write_json(temporary / name, values)
        _write_tokenizer(temporary, find_tokenizer(*checkpoint.folders), layout)
        write_shards(temporary, tensors, shard_bytes)


def export_peft(adapter: Adapter, base: str | None, folder: Path) -> None:
    """Write an adapter, and what was trained whole with it, as PEFT does for a model of the llava-hf layout.

    Raises: ValueError for an adapter that learned nothing, or that holds more than PEFT can put on that model; OSError.
    """
    _check_trained(adapter)
    with replace_folder(folder) as temporary:
        write_peft(temporary, adapter, base)


def _check_trained(adapter: Adapter) -> None:
    """B starts at zero: where every B is zero still, training never reached the adapter, or it was not gathered."""
    if not any(factors.lora_B.load().any() for factors in adapter.factors.values()):
        raise ValueError(
            f"{adapter.folder}: every lora_B is zero, the adapter changes nothing: was it saved before training?"
        )


def _fit_rows(name: str, tensor: StoredTensor, num_words: int, num_rows: int) -> StoredTensor:
    """Cut the vocabulary's padding off, or pad with the mean row, which no word's logit can lose against."""
    is_vocabulary = name in {"language_model.embed_tokens.weight", "language_model.lm_head.weight"}
    if not is_vocabulary or tensor.shape[0] == num_rows:
        return tensor

    def read(rows: slice) -> Tensor:
        weight = tensor.read(slice(num_words))
        if num_rows > num_words:
            mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
            weight = torch.cat([weight, mean.expand(num_rows - num_words, -1)])
        return weight[rows]

    return StoredTensor((num_rows, *tensor.shape[1:]), tensor.dtype, tensor.source, read)


def _write_tokenizer(folder: Path, source: Path, layout: Layout) -> None:
    """Copy the vocabulary's files; transformers also needs a tokenizer.json that knows <image>."""
    for name in TOKENIZERS:
        if (source.parent / name).is_file():
            shutil.copyfile(source.parent / name, folder / name)
    if layout == "hf":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        if not _knows_image(folder / TOKENIZERS[1]):
            write_tokenizer_json(source, (IMAGE_TOKEN, PAD_TOKEN), folder / TOKENIZERS[1])


def _knows_image(tokenizer_json: Path) -> bool:
    if not tokenizer_json.is_file():
        return False
    added = read_json(tokenizer_json).get("added_tokens", [])
    return any(token.get("content") == IMAGE_TOKEN for token in added)


if __name__ == "__main__":
    main()
