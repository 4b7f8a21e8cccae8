"""Write a full-size LLaVA-1.5 of random weights, in the layout of the released one: two `.bin` shards for the 7B.

    python -m tests.make_official --size 7b --tokenizer tokenizer.model --out llava-v1.5-7b

13.5 GB in half precision and, beside it in `<out>-clip`, the vision tower's repository. It says nothing sensible; it is
what loading, memory and speed are measured on where the released weights are not at hand.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

from model.config import CONFIGS
from model.llava import Llava
from tests.model.checkpoints import clip_name, official_config, official_names, write_json

SHARD_BYTES = 9_980_000_000  # of the released 7B's first file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["7b", "13b"], default="7b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="LLaMA's tokenizer.model")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with torch.device("meta"):
        model = Llava(CONFIGS[f"llava-1.5-{arguments.size}"]).half()
    clip = arguments.out.with_name(arguments.out.name + "-clip").resolve()
    write_shards(arguments.out, official_names(model, with_tower=False))
    write_json(arguments.out / "config.json", official_config(model.config, str(clip)))
    shutil.copyfile(arguments.tokenizer, arguments.out / "tokenizer.model")
    tower = {f"vision_model.{clip_name(name)}": t for name, t in model.vision_tower.state_dict().items()}
    vision = {name: value for name, value in vars(model.config.vision).items() if name != "select_layer"}
    write_json(clip / "config.json", {"model_type": "clip", "vision_config": vision})
    torch.save({name: fill(name, tensor, torch.float32) for name, tensor in tower.items()}, clip / "pytorch_model.bin")


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill and write one shard after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save({name: fill(name, tensors[name], torch.float16) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


def fill(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return random weights of a tensor's shape: norms at 1, everything else small."""
    filled = torch.empty(tensor.shape, dtype=dtype)
    if "norm" in name and name.endswith("weight"):
        return filled.fill_(1)
    return filled.normal_(std=0.02)


if __name__ == "__main__":
    main()
