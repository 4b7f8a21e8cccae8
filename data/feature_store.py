"""Pictures and text that were encoded ahead: what `python -m data.features` writes, read by memory map.

A folder holds
    key.json                      what all files depend on; written first, so that nothing else is mixed in later
    features-00000.safetensors    of 256 pictures: features, sha256 of the pictures' bytes, names
    tokens-00000.safetensors      of 4096 rows of the data file: the fields of `Rendered`, row behind row
    index.safetensors             names and sha256 of all pictures
    manifest.json                 the key, shapes, counts and the files' sizes; written last

Training opens it only if it was made by the same vision tower, preprocessing and so on: features of another tower would
be learned from without a sign that anything is wrong.
Shapes: P patches per picture, D hidden size of the vision tower.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.conversation import Rendered
from data.pictures import PictureFolder

# To be raised whenever data/image.py makes other pixels of a picture than before.
PROCESSING = 1

KEY_FILE = "key.json"
INDEX_FILE = "index.safetensors"
MANIFEST_FILE = "manifest.json"
PICTURES_PER_SHARD = 256  # 302 MB of ViT-L/14-336's features
ROWS_PER_SHARD = 4096
MAX_OPEN_SHARDS = 128

# Rendered's lists, as long as the document; its other fields are one number each.
TOKEN_COLUMNS = tuple(field.name for field in fields(Rendered) if field.type == list[int])
ROW_COLUMNS = tuple(field.name for field in fields(Rendered) if field.type is int)


@dataclass(frozen=True)
class FeatureKey:
    """What a picture's features depend on, besides its bytes."""

    tower: str  # sha256 of its weights up to the layer that is read
    image_size: int  # pixels
    aspect: str
    processing: int = PROCESSING


@dataclass(frozen=True)
class TokenKey:
    """What ids and labels depend on."""

    data: str  # sha256 of the data file
    tokenizer: str  # sha256 of its file
    tokens_per_image: int
    template: str
    branched: bool
    max_tokens: int


class FeatureStore:
    """The features of pictures, by the names that rows give them. It can be sent to other processes."""

    def __init__(self, folder: Path, key: FeatureKey) -> None:
        """Raises: FileNotFoundError without a store; ValueError for one made otherwise, unfinished or damaged."""
        manifest = open_manifest(folder, asdict(key))
        index = map_tensors(folder / INDEX_FILE)
        self.folder = folder
        self.pictures_per_shard = int(manifest["pictures_per_shard"])
        self.names = index["names"].numpy().view(f"S{index['names'].shape[1]}")[:, 0]  # ascending
        self.digests = index["sha256"].numpy()  # (number of pictures, 32)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def load(self, name: str, pictures: PictureFolder) -> Tensor:
        """Return a picture's features (P, D) in bf16. Pictures that are no longer there are not needed.

        Raises: ValueError for a picture that is not stored, or has changed since it was.
        """
        place = self._find(name)
        if place is None:
            raise ValueError(f"{self.folder} has no features of {name}: were they made from another data file?")
        shard, row = divmod(place, self.pictures_per_shard)
        file = features_file(self.folder, shard)
        is_there = pictures.find(name) is not None
        if is_there and hashlib.sha256(pictures.read(name)).digest() != self.digests[place].tobytes():
            raise ValueError(
                f"{pictures.folder / name} has changed since {self.folder} was made: delete {file.name} there and run "
                "the same `python -m data.features` again"
            )
        # A copy: a view sent to another process would take its whole shard along.
        return open_shard(file)["features"][row].clone()

    def _find(self, name: str) -> int | None:
        wanted = name.encode()
        if len(wanted) > self.names.itemsize:  # NumPy would widen, and so copy, all names to compare them
            return None
        place = int(self.names.searchsorted(wanted))
        return place if place < len(self.names) and self.names[place] == wanted else None


class TokenStore:
    """The rows of a data file as `render_conversation` returned them. It can be sent to other processes."""

    def __init__(self, folder: Path, key: TokenKey) -> None:
        """Raises: FileNotFoundError without a store; ValueError for one made otherwise, unfinished or damaged."""
        manifest = open_manifest(folder, asdict(key))
        self.folder = folder
        self.num_rows = int(manifest["num_rows"])
        self.rows_per_shard = int(manifest["rows_per_shard"])

    def __len__(self) -> int:
        """The number of rows in the data file, those that were left out included."""
        return self.num_rows

    def __getitem__(self, number: int) -> Rendered:
        """Return a row. Raises: ValueError for one that was left out."""
        if not 0 <= number < self.num_rows:
            raise IndexError(f"row {number} of {self.num_rows}")
        shard, row = divmod(number, self.rows_per_shard)
        columns = open_shard(tokens_file(self.folder, shard))
        ends = columns["ends"]
        start, end = int(ends[row - 1]) if row else 0, int(ends[row])
        if start == end:
            raise ValueError(f"{self.folder} was made without row {number}, which its --bad-list named")
        values: dict[str, Any] = {name: columns[name][start:end].tolist() for name in TOKEN_COLUMNS}
        values |= {name: int(columns[name][row]) for name in ROW_COLUMNS}
        return Rendered(**values)


def open_manifest(folder: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a finished store.

    Raises: FileNotFoundError without one; ValueError for one with another key, without its end, or damaged.
    """
    if not (folder / KEY_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no features: make them with `python -m data.features --out {folder}`")
    check_key(folder, load_json(folder / KEY_FILE), key)
    if not (folder / MANIFEST_FILE).is_file():
        raise ValueError(f"{folder} is unfinished: run the same `python -m data.features` again, it goes on")
    manifest = load_json(folder / MANIFEST_FILE)
    for name, size in manifest["bytes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise ValueError(
                f"{folder / name} has {found} bytes, expected {size}: delete it and run the same "
                "`python -m data.features` again, which makes what is missing"
            )
    return manifest


def check_key(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises: ValueError that lists what a store was made with and what is asked of it."""
    differing = [
        f"{name} is {stored.get(name)!r} there, {value!r} here"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} was made otherwise: {'; '.join(differing)}. Use what it was made with, or make another: "
            f"`python -m data.features FILE --images DIR --model-path MODEL --out {folder}-2`"
        )


def load_json(file: Path) -> dict[str, Any]:
    """Raises: ValueError for what is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it and run `python -m data.features` again") from error


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file, mapped: what is not looked at is not read. Raises: ValueError if damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it and run `python -m data.features` again") from error


@functools.lru_cache(maxsize=MAX_OPEN_SHARDS)
def open_shard(file: Path) -> dict[str, Tensor]:
    """Do what `map_tensors` does, and remember it. Every process opens files of its own."""
    return map_tensors(file)


def features_file(folder: Path, shard: int) -> Path:
    return folder / f"features-{shard:05d}.safetensors"


def tokens_file(folder: Path, shard: int) -> Path:
    return folder / f"tokens-{shard:05d}.safetensors"


def arrange_names(names: Sequence[str]) -> Tensor:
    """Return names as rows of bytes, with zeros behind those that are not the longest."""
    return torch.from_numpy(np.array([name.encode() for name in names], dtype=bytes)[:, None].view(np.uint8))


def arrange_rows(rows: Iterable[Rendered | None]) -> dict[str, Tensor]:
    """Return rows as columns of numbers; None, for a row that is left out, is one without tokens."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in TOKEN_COLUMNS}
    numbers: dict[str, list[int]] = {name: [] for name in ROW_COLUMNS}
    lengths = []
    for row in rows:
        for name, column in columns.items():
            column.append(np.array(getattr(row, name) if row else [], dtype=np.int32))
        for name, values in numbers.items():
            values.append(getattr(row, name) if row else 0)
        lengths.append(len(row) if row else 0)
    tensors = {name: torch.from_numpy(np.concatenate(column)) for name, column in columns.items()}
    tensors |= {name: torch.tensor(values, dtype=torch.int32) for name, values in numbers.items()}
    return tensors | {"ends": torch.tensor(lengths).cumsum(0)}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], mark: str = "") -> None:
    """Write a file that has its name only when it is whole.

    Args:
        mark: tells apart the temporary names of ranks that may write the same file. Without it, whoever goes on with
            the work of a rank that was killed writes over what that left.
    Raises: OSError.
    """
    partial = file.with_suffix(f".partial{mark}")
    try:
        save_file(dict(tensors), partial)
    except SafetensorError as error:  # safetensors wraps the system's error, a full disk among them
        raise OSError(f"cannot write {partial}: {error}") from error
    shutil.copymode(file.with_name(KEY_FILE), partial)  # safetensors lets only the owner read its files
    os.replace(partial, file)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Do the same with JSON, which ranks may write at once."""
    partial = file.with_suffix(f".partial{_mark()}")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _mark() -> str:
    return f"-{os.environ.get('RANK', '0')}"


def read_digests(file: Path, names: Sequence[str]) -> Tensor:
    """Return the sha256 of a shard's pictures. Raises: ValueError when it is damaged, or holds other pictures."""
    tensors = map_tensors(file)
    if not torch.equal(tensors["names"], arrange_names(names)):
        raise ValueError(f"{file} holds other pictures than expected: delete it and run the same command again")
    return tensors["sha256"]


def start_store(folder: Path, key: dict[str, Any]) -> None:
    """Write down what the files will depend on. Raises: ValueError where files are that depend on something else."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / KEY_FILE).is_file():
        write_json(folder / KEY_FILE, key)
    check_key(folder, load_json(folder / KEY_FILE), key)


def finish_store(
    folder: Path,
    key: dict[str, Any],
    shards: Sequence[Sequence[str]],
    num_rows: int,
    num_patches: int,
    hidden_size: int,
) -> dict[str, Any] | None:
    """Write index and manifest once all files are there. Return the manifest; None where another rank is not ready."""
    of_pictures = [features_file(folder, shard) for shard in range(len(shards))]
    files = of_pictures + [tokens_file(folder, shard) for shard in range(count_shards(num_rows, ROWS_PER_SHARD))]
    if not all(file.is_file() for file in files):
        return None
    digests = [read_digests(file, names) for file, names in zip(of_pictures, shards, strict=True)]
    all_digests = torch.cat([torch.empty(0, 32, dtype=torch.uint8), *digests])
    all_names = arrange_names([name for names in shards for name in names])
    write_tensors(folder / INDEX_FILE, {"names": all_names, "sha256": all_digests}, _mark())
    manifest = {
        **key,
        "num_pictures": len(all_names),
        "num_patches": num_patches,
        "hidden_size": hidden_size,
        "num_rows": num_rows,
        "pictures_per_shard": PICTURES_PER_SHARD,
        "rows_per_shard": ROWS_PER_SHARD,
        "bytes": {file.name: file.stat().st_size for file in (*files, folder / INDEX_FILE)},
    }
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest


def count_shards(num_items: int, num_per_shard: int) -> int:
    return -(-num_items // num_per_shard)
