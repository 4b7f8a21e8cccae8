"""Encode a data set ahead of training: `python -m data.features FILE.json --images DIR --model-path MODEL --out DIR`.

A frozen vision tower makes the same features of a picture in every epoch and every stage. Here it sees each distinct
picture of FILE once; its patch features (before the projector, bf16) are stored, and the rows' token ids and labels
beside them. A stage whose `features` names the folder then neither decodes pictures nor loads the tower. How the files
look, and when they are refused, says `data/feature_store.py`.

    torchrun --nproc_per_node=8 -m data.features ...     every rank makes each 8th file, on a card of its own

Stopped at any moment, the same command goes on with the files that are missing; the result is the same, byte for byte.
Shapes: N pictures, S image size in pixels, P patches per picture, D hidden size of the tower.
"""

import argparse
import hashlib
import io
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.conversation import TEMPLATES
from data.dataset import ConversationDataset, RenderOptions
from data.feature_store import (
    PICTURES_PER_SHARD,
    ROWS_PER_SHARD,
    TOKEN_COLUMNS,
    FeatureKey,
    TokenKey,
    arrange_names,
    arrange_rows,
    count_shards,
    features_file,
    finish_store,
    read_digests,
    start_store,
    tokens_file,
    write_tensors,
)
from data.image import ASPECTS, open_image, preprocess_image
from data.pictures import PictureFolder
from data.tokenizer import Tokenizer, find_tokenizer
from model.files import StoredTensor, hash_tensors
from model.vision import VisionConfig, VisionTower
from model.weights import open_checkpoint

TOWER = "vision_tower."


def feature_key(tensors: Mapping[str, StoredTensor], vision: VisionConfig, aspect: str) -> FeatureKey:
    """Say what a model's features depend on.

    Args:
        tensors: the whole model's, by our names.
    """
    tower, sizes = cut_tower(tensors, vision)
    used = {name: tensor for name, tensor in tower.items() if not name.startswith("post_layernorm.")}
    return FeatureKey(hash_tensors(used), sizes.image_size, aspect)


def token_key(file: Path, tokenizer: Tokenizer, options: RenderOptions) -> TokenKey:
    """Say what the ids and labels of a data file depend on."""
    return TokenKey(
        data=hash_file(file),
        tokenizer=hash_file(tokenizer.file),
        tokens_per_image=options.tokens_per_image,
        template=options.template,
        branched=options.branched,
        max_tokens=options.max_tokens,
    )


def hash_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cut_tower(
    tensors: Mapping[str, StoredTensor], vision: VisionConfig
) -> tuple[dict[str, StoredTensor], VisionConfig]:
    """Return the tower that ends with the layer LLaVA reads: its tensors by its own names, and its sizes."""
    num_used = vision.num_hidden_layers + 1 + vision.select_layer
    unused = tuple(f"layers.{number}." for number in range(num_used, vision.num_hidden_layers))
    names = [name.removeprefix(TOWER) for name in tensors if name.startswith(TOWER)]
    tower = {name: tensors[TOWER + name] for name in names if not name.startswith(unused)}
    return tower, replace(vision, num_hidden_layers=num_used, select_layer=-1)


def load_tower(
    tensors: Mapping[str, StoredTensor], vision: VisionConfig, dtype: torch.dtype, device: torch.device
) -> VisionTower:
    """Read the layers of the tower that are used, and nothing else of the model."""
    stored, sizes = cut_tower(tensors, vision)
    with torch.device("meta"):
        tower = VisionTower(sizes)
    tower.load_state_dict({name: tensor.load().to(device, dtype) for name, tensor in stored.items()}, assign=True)
    return tower.eval()


class PictureBatches(Dataset[tuple[Tensor, Tensor] | ValueError]):
    """Pictures by their names, many at a time: pixels (N, 3, S, S) and the sha256 of the files' bytes (N, 32)."""

    def __init__(self, pictures: PictureFolder, image_size: int, aspect: str, dtype: torch.dtype) -> None:
        self.pictures = pictures
        self.image_size = image_size
        self.aspect = aspect
        self.dtype = dtype

    def __getitem__(self, names: Sequence[str]) -> tuple[Tensor, Tensor] | ValueError:
        """Return an error instead of raising it: a loader would bury it in a worker's traceback."""
        pixels, digests = [], []
        for name in names:
            try:
                content = self.pictures.read(name)
                picture = open_image(io.BytesIO(content))
            except (ValueError, OSError) as error:
                return ValueError(
                    f"{self.pictures.folder / name}: {error}; `python -m data.check` finds all pictures that cannot be "
                    "used, --bad-list leaves them out"
                )
            pixels.append(preprocess_image(picture, self.image_size, self.aspect).to(self.dtype))
            digests.append(np.frombuffer(hashlib.sha256(content).digest(), dtype=np.uint8))
        return torch.stack(pixels), torch.from_numpy(np.stack(digests))


class RowShards(Dataset[dict[str, Tensor] | ValueError]):
    """The rendered rows of one file of tokens, by its number."""

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, shard: int) -> dict[str, Tensor] | ValueError:
        first, last = shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, len(self.dataset.rows)) - 1
        used = range(*np.searchsorted(self.dataset.row_numbers, (first, last + 1)).tolist())
        index_of = {int(self.dataset.row_numbers[index]): index for index in used}
        try:
            return arrange_rows(
                self.dataset.render(index_of[number]) if number in index_of else None
                for number in range(first, last + 1)
            )
        except ValueError as error:
            return ValueError(f"{self.dataset.file}, rows {first} to {last}: {error}")


def write_tokens(
    dataset: ConversationDataset, folder: Path, shards: Sequence[int], num_workers: int, is_shown: bool
) -> None:
    """Render rows and write them. Raises: ValueError for one that cannot be rendered; OSError."""
    rows = RowShards(dataset)
    loader = DataLoader(
        rows, batch_size=None, sampler=shards, num_workers=num_workers, prefetch_factor=1 if num_workers else None
    )
    bar = tqdm(shards, unit="file of rows", disable=not is_shown)
    for shard, tensors in zip(bar, loader, strict=True):
        write_tensors(tokens_file(folder, shard), raise_error(tensors))


def write_features(
    tower: VisionTower,
    batches: PictureBatches,
    folder: Path,
    shards: Mapping[int, Sequence[str]],
    batch_size: int,
    num_workers: int,
    is_shown: bool,
) -> None:
    """Encode the pictures of each shard and write them. No batch goes beyond its shard: files depend on nothing else.

    Raises: ValueError for a picture that cannot be read; OSError.
    """
    device = tower.class_embedding.device
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=[names[i : i + batch_size] for names in shards.values() for i in range(0, len(names), batch_size)],
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    loaded = iter(loader)
    writing: Future[None] | None = None
    bar = tqdm(total=sum(map(len, shards.values())), unit="picture", disable=not is_shown)
    with bar, ThreadPoolExecutor(1) as writer:  # a file is written while the next one's pictures are encoded
        for shard, names in shards.items():
            sizes = (len(names), tower.config.num_patches, tower.config.hidden_size)
            features, digests = torch.empty(sizes, dtype=torch.bfloat16), torch.empty(len(names), 32, dtype=torch.uint8)
            for start in range(0, len(names), batch_size):
                pixels, digest = raise_error(next(loaded))
                with torch.inference_mode():
                    features[start : start + batch_size] = tower(pixels.to(device, non_blocking=True))
                digests[start : start + batch_size] = digest
                bar.update(len(digest))
            if writing is not None:
                writing.result()
            tensors = {"features": features, "sha256": digests, "names": arrange_names(names)}
            writing = writer.submit(write_tensors, features_file(folder, shard), tensors)
        if writing is not None:
            writing.result()


def raise_error(result: Any) -> Any:
    """Return what a loader's worker made, unless that is why it could not."""
    if isinstance(result, ValueError):
        raise result
    return result


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises: OSError where the disk has no room for a store of `num_bytes`, of which a part may be there."""
    missing = num_bytes - sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise OSError(
            f"{folder} will take {num_bytes / 1e9:.1f} GB, {missing / 1e9:.1f} GB more than now, and its disk has "
            f"{free / 1e9:.1f} GB free: choose another --out, or fewer rows"
        )


def encode_ahead(arguments: argparse.Namespace) -> None:
    """Make this rank's files; the rank that is ready last ends the store.

    Raises: FileNotFoundError, ValueError or OSError for what is missing, does not go together or cannot be read.
    """
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    out, num_workers, dtype = arguments.out, arguments.workers, getattr(torch, arguments.dtype)
    # The projector takes no part: any will do where stage 1 is yet to train it.
    checkpoint = open_checkpoint(arguments.model_path, arguments.model_base, arguments.vision_tower, projector_seed=0)
    vision = checkpoint.config.vision
    options = RenderOptions(
        tokens_per_image=vision.num_patches,
        image_size=vision.image_size,
        template=arguments.template,
        aspect=arguments.aspect,
        branched=arguments.branched,
        max_tokens=arguments.max_tokens,
    )
    tokenizer = Tokenizer(find_tokenizer(*checkpoint.folders))
    dataset = ConversationDataset(arguments.file, arguments.images, tokenizer, options, arguments.bad_list)
    key = {
        **asdict(feature_key(checkpoint.tensors, vision, options.aspect)),
        **asdict(token_key(arguments.file, tokenizer, options)),
        "dtype": arguments.dtype,
        "bad_list": arguments.bad_list and hash_file(arguments.bad_list),
    }
    start_store(out, key)
    images = [image for image in map(dataset.image, range(len(dataset))) if image is not None]
    names = sorted(set(images))
    shards = [names[first : first + PICTURES_PER_SHARD] for first in range(0, len(names), PICTURES_PER_SHARD)]
    picture_bytes = vision.num_patches * vision.hidden_size * torch.bfloat16.itemsize
    placeholder_bytes = vision.num_patches * len(TOKEN_COLUMNS) * torch.int32.itemsize
    check_space(out, len(names) * picture_bytes + len(images) * placeholder_bytes)

    rows = range(rank, count_shards(len(dataset.rows), ROWS_PER_SHARD), num_ranks)
    unwritten = [shard for shard in rows if not tokens_file(out, shard).is_file()]
    write_tokens(dataset, out, unwritten, num_workers, is_shown=rank == 0)
    todo = {shard: shards[shard] for shard in range(rank, len(shards), num_ranks)}
    for shard in [shard for shard in todo if features_file(out, shard).is_file()]:
        read_digests(features_file(out, shard), todo.pop(shard))
    tower = load_tower(checkpoint.tensors, vision, dtype, arguments.device)
    batches = PictureBatches(dataset.pictures, options.image_size, options.aspect, dtype)
    start = time.perf_counter()
    write_features(tower, batches, out, todo, arguments.batch_size, num_workers, is_shown=rank == 0)
    rate = sum(map(len, todo.values())) / (time.perf_counter() - start)
    manifest = finish_store(
        out, key, shards, num_rows=len(dataset.rows), num_patches=vision.num_patches, hidden_size=vision.hidden_size
    )
    if manifest is not None:
        print_store(out, manifest, rate, num_ranks)


def print_store(folder: Path, manifest: Mapping[str, Any], rate: float, num_ranks: int) -> None:
    """Print what was made. `rate` is what this rank did, in pictures a second."""
    sizes = manifest["bytes"]
    of_pictures = sum(size for name, size in sizes.items() if name.startswith("features-"))
    lines = [
        ("pictures", f"{manifest['num_pictures']:,}"),
        ("rows", f"{manifest['num_rows']:,}"),
        ("bytes a picture", f"{of_pictures / max(1, manifest['num_pictures']):,.0f}"),
        ("GB in all", f"{sum(sizes.values()) / 1e9:,.3f}"),
        ("pictures/s" if num_ranks == 1 else f"pictures/s, 1 of {num_ranks} ranks", f"{rate:,.1f}"),
    ]
    for name, value in lines:
        print(f"{name:<30}{value:>16}")
    print(f"{folder} is finished")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data.features", description="Encode a data set ahead of training.")
    parser.add_argument("file", type=Path, metavar="FILE", help="LLaVA's JSON, or JSONL")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures, or their tar shards")
    parser.add_argument("--model-path", required=True, metavar="MODEL", help="folder or repository, as in training")
    parser.add_argument("--model-base", metavar="BASE", help="what a projector or an adapter belongs to")
    parser.add_argument("--vision-tower", metavar="CLIP", help="take the tower from there, not from the model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--template", choices=TEMPLATES, default="vicuna_v1", help="of rows that name none")
    parser.add_argument("--max-tokens", type=int, default=2048, help="longer rows lose text from their end")
    parser.add_argument("--branched", action="store_true", help="turns are independent questions about one picture")
    parser.add_argument("--aspect", choices=ASPECTS, default="pad")
    parser.add_argument("--bad-list", type=Path, metavar="FILE", help="bad.jsonl of data.check: leave those rows out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of computing; bfloat16 on cards")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures the tower sees at once")
    parser.add_argument("--workers", type=int, help="processes that decode; all cores for cards, 1 without")
    arguments = parser.parse_args()
    arguments.device = torch.device(arguments.device)
    if arguments.device.type == "cuda" and arguments.device.index is None:
        arguments.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.type == "cuda" else "float32")
    if arguments.workers is None:
        num_cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        arguments.workers = max(1, num_cores) if arguments.device.type == "cuda" else 1
    return arguments


def main() -> None:
    arguments = parse_arguments()
    try:
        encode_ahead(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
