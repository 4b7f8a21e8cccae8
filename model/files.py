"""Tensor files: what lies in a checkpoint is listed at once and read when it is asked for.

Safetensors and `.bin` files are mapped into memory, so a tensor that is used as it lies on disk costs no memory of its
own, and reading some of its rows reads only those.
"""

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# The first of these that a folder has is read; an index names its shards.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "mm_projector.bin",
)
SHARD_BYTES = 5_000_000_000
PIECE_NUMBERS = 2**15  # 128 KB of fp32, and as much as PyTorch gives to one thread
ADVICE_BYTES = 2**17  # what Linux reads at once when it is asked to, at the least

LIBC = ctypes.CDLL(None)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose shape is known and whose numbers are read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str  # file and name in it, for messages
    read: Callable[[slice], Tensor]  # rows of the first axis

    @classmethod
    def wrap(cls, tensor: Tensor, source: str) -> "StoredTensor":
        """Let a tensor in memory pass for one on disk."""
        return cls(tuple(tensor.shape), tensor.dtype, source, lambda rows: tensor[rows] if tensor.dim() else tensor)

    @classmethod
    def map(cls, tensor: Tensor, source: str) -> "StoredTensor":
        """Stand for a tensor that lies in a mapped file."""

        def read(rows: slice) -> Tensor:
            part = tensor[rows] if tensor.dim() else tensor
            if part.nbytes < tensor.nbytes:
                _fetch_pages(part)
            return part

        return cls(tuple(tensor.shape), tensor.dtype, source, read)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def load(self) -> Tensor:
        """Return the whole tensor."""
        return self.read(slice(None))


def cast_tensor(tensor: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Do what `tensor.to(device, dtype)` does.

    Between fp16 and bf16 PyTorch has no vector code on CPUs. There numbers go by way of fp32, which holds both exactly,
    in pieces that stay in the cache. Larger ones would be shared between threads, which wait for each other at each.
    """
    both_short = {tensor.dtype, dtype} == {torch.float16, torch.bfloat16}
    if torch.device(device).type != "cpu" or not both_short:
        return tensor.to(device, dtype)
    result = torch.empty(tensor.shape, dtype=dtype)
    buffer = torch.empty(PIECE_NUMBERS, dtype=torch.float32)
    pieces = zip(tensor.contiguous().view(-1).split(PIECE_NUMBERS), result.view(-1).split(PIECE_NUMBERS), strict=True)
    for old, new in pieces:
        new.copy_(buffer[: len(old)].copy_(old))
    return result


def cast_stored(tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """Return the same tensor in another type, which it takes on when it is read."""
    return replace(tensor, dtype=dtype, read=lambda rows: cast_tensor(tensor.read(rows), dtype, "cpu"))


def hash_tensors(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the sha256 of names, shapes and numbers: the same for fp16 and for fp32 that holds the same numbers.

    One tensor is in memory at a time.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape}\n".encode())
        digest.update(_bytes_of(tensors[name].load().float()).numpy().data)
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: FileNotFoundError or ValueError naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, expected an object")
    return values


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """List the model weights of a folder, by the names in its files; none where it holds no weights.

    Raises: FileNotFoundError for a shard that is missing; ValueError for a file that is cut off or no checkpoint.
    """
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        return {}
    if file.suffix != ".json":
        return open_tensors(file)
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{file} has no object 'weight_map' from tensors to files")
    shards = sorted(set(weight_map.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ValueError(f"{file} names files outside its folder: {', '.join(outside)}")
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {file.name} names: download them again")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        tensors |= open_tensors(folder / shard)
    return tensors


def open_tensors(file: Path) -> dict[str, StoredTensor]:
    """List the tensors of one file, safetensors or what torch.save wrote.

    Raises: ValueError for a file that is cut off or no checkpoint.
    """
    with file.open("rb") as opened:
        head = opened.read(64)
    size = f"{file} ({file.stat().st_size} bytes)"
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{size} is a Git LFS pointer, not the file itself: run `git lfs pull` or download it")
    if file.suffix == ".safetensors":
        return _open_safetensors(file, size)
    return _open_pickle(file, size, head)


def _open_safetensors(file: Path, size: str) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt"):  # its checks: is the header sound, and the file as long as that says?
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{size} is cut off or no safetensors file ({error}): download or copy it again") from error
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(header_bytes))
    header.pop("__metadata__", None)
    mapped = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)

    def stored(name: str, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> StoredTensor:
        if dtype not in DTYPES:
            raise ValueError(f"{size}: {name} has the type {dtype}, expected one of {', '.join(DTYPES)}")
        start, stop = (8 + header_bytes + offset for offset in data_offsets)
        # safetensors' own way to a tensor, `torch.asarray`, looks at its first number, and so reads what is around it.
        numbers = torch.empty(0, dtype=DTYPES[dtype]).set_(mapped[start:stop])
        return StoredTensor.map(numbers.view(shape), f"{file}, {name}")

    return {name: stored(name, **about) for name, about in header.items()}


def _open_pickle(file: Path, size: str, head: bytes) -> dict[str, StoredTensor]:
    is_zip = zipfile.is_zipfile(file)
    if head.startswith(b"PK") and not is_zip:
        raise ValueError(
            f"{size} is cut off: its end, which lists what it holds, is missing; download or copy it again"
        )
    try:
        # Files of PyTorch before 1.6 are no zip archives and cannot be mapped.
        values = torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(
            f"{size} is damaged, or holds more than tensors ({first}): download or copy it again"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(tensor, Tensor) for tensor in values.values()):
        raise ValueError(f"{size} does not hold tensors by name")
    return {name: StoredTensor.map(tensor.detach(), f"{file}, {name}") for name, tensor in values.items()}


def _fetch_pages(tensor: Tensor) -> None:
    """Have the pages of a mapped tensor read from the disk, and no others.

    Where a page is missed, Linux reads what lies around it, too, megabytes on some machines: of a rank's rows that
    would be several times as much. It is advice: where it is not taken, pages are read when they are looked at.
    """
    end = tensor.data_ptr() + tensor.nbytes
    for start in range(tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, end, ADVICE_BYTES):
        length = ctypes.c_size_t(min(ADVICE_BYTES, end - start))
        LIBC.madvise(ctypes.c_void_p(start), length, mmap.MADV_WILLNEED)


def write_shards(folder: Path, tensors: Mapping[str, StoredTensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` with their index; then read all of it again.

    One shard is in memory at a time.
    Raises: OSError when it cannot be written, or reads back otherwise than it was written.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.num_bytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        shard = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / shard, {name: tensors[name].load() for name in names})
        weight_map |= dict.fromkeys(names, shard)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        write_json(folder / WEIGHT_FILES[0], {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file and compare what can be read from it.

    Raises: OSError.
    """
    try:
        file.touch()
        mode = file.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        file.chmod(mode)  # safetensors makes files that nobody else can read
    except SafetensorError as error:  # safetensors wraps the system's error, a full disk among them
        raise OSError(f"cannot write {file}: {error}") from error
    written = open_tensors(file)
    # Bytes are compared, not numbers: a NaN must come back as itself.
    for name, tensor in tensors.items():
        if not torch.equal(_bytes_of(written[name].load()), _bytes_of(tensor)):
            raise OSError(f"{file}: {name} reads back otherwise than it was written; is the disk sound?")


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place only if the block ends well."""
    folder = folder.resolve()
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
