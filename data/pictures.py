"""Where a data set's pictures lie: in a folder of files, or in tar shards.

What a folder is, is read from its content: with `*.tar` at its top it is a folder of shards, and pictures are looked up
in these alone, by the members' names. Nothing is unpacked: an index beside the shards (`index.safetensors`) says in
which shard and at which byte each picture lies. `data/shards.py` writes shards; those of others are read as well, as
long as they are not compressed (WebDataset's convention: a sample's picture, text and so on are members side by side).

A name is found as it is written, or else in the other Unicode form or letter case: files that went through a Mac or
Windows, or through somebody's zip, come back as `.JPG` or with their accents as separate characters.
"""

import contextlib
import io
import json
import os
import sys
import tarfile
import unicodedata
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from data.image import open_image

INDEX_NAME = "index.safetensors"
INDEX_VERSION = 1
TAR_BLOCK = 512  # bytes; a tar ends with blocks of zeros
COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
MAX_OPEN_SHARDS = 128


class PictureFolder:
    """The pictures of a data set, by the names that its rows give them.

    Every sub-folder is listed once, when a name in it is first asked for; later changes are not seen. The object can be
    sent to other processes, which read on their own.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: FileNotFoundError without the folder; ValueError for shards that cannot be read, saying which."""
        if not folder.is_dir():
            raise FileNotFoundError(f"image folder {folder} is missing")
        self.folder = folder
        self.shards: Shards | None = None
        names = _list_folder(folder)
        tars = sorted(name for name in names if name.endswith(".tar"))
        if tars:
            self.shards = Shards(folder, tars)
            if others := len(set(names) - {*tars, INDEX_NAME}):
                print(
                    f"{folder}: pictures are read from its {len(tars)} tars, not from {others} others", file=sys.stderr
                )
        elif names and all(name.endswith(COMPRESSED_ENDINGS) for name in names):
            raise ValueError(f"{folder} holds compressed tars, which cannot be read in place: unpack them to .tar")
        # By the sub-folder's name with its slash, as asked for: that name as stored, and what lies there.
        self.listings = {"": ("", Names.of(names))}

    def find(self, name: str) -> str | None:
        """Return the stored name for `name`, or None where it is missing.

        Raises: ValueError for a name that leads out of the folder.
        """
        name = clean_name(name)
        if self.shards is not None:
            place = self.shards.names.find(name)
            return None if place is None else self.shards.names[place]
        parent, slash, base = name.rpartition("/")
        listing = self._list(parent + slash)
        if listing is None or not base:
            return None
        stored, names = listing
        place = names.find(base)
        return None if place is None else stored + names[place]

    def read(self, name: str) -> bytes:
        """Return the file's bytes.

        Raises: FileNotFoundError; ValueError for a name that leads out of the folder, or a shard that has changed.
        """
        if self.shards is not None:
            return self.shards.read(self._locate(name))
        return self._path(name).read_bytes()

    def measure(self, name: str) -> int:
        """Return the file's size in bytes. Raises: as `read`."""
        if self.shards is not None:
            return int(self.shards.sizes[self._locate(name)])
        return self._path(name).stat().st_size

    def open(self, name: str) -> Image.Image:
        """Return the picture as RGB, upright. Raises: as `read` and `open_image`."""
        try:
            return open_image(io.BytesIO(self.read(name)))
        except ValueError as error:
            raise ValueError(f"{self.folder / name}: {error}") from error

    def locate(self, names: Iterable[str | None]) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the number of each picture's shard (int32) and its byte there (int64), or None without shards.

        Both are -1 for None (a row without picture) and for what is missing.
        """
        if self.shards is None:
            return None
        found = (None if name is None else self.shards.names.find(clean_name(name)) for name in names)
        places = np.array([-1 if place is None else place for place in found], dtype=np.int64)
        # One more at the end of each column, for -1.
        return np.append(self.shards.shard_of, np.int32(-1))[places], np.append(self.shards.offsets, -1)[places]

    def _locate(self, name: str) -> int:
        assert self.shards is not None
        place = self.shards.names.find(clean_name(name))
        if place is None:
            raise FileNotFoundError(f"image {name} is missing in the shards of {self.folder}")
        return place

    def _path(self, name: str) -> Path:
        stored = self.find(name)
        if stored is None:
            raise FileNotFoundError(f"image {self.folder / name} is missing")
        return self.folder / stored

    def _list(self, asked: str) -> "tuple[str, Names] | None":
        """Return a sub-folder's stored name and what lies there; None where there is no such folder."""
        if asked in self.listings:
            return self.listings[asked]
        stored, names = self.listings[""]
        for part in asked.split("/")[:-1]:
            place = names.find(part + "/")
            if place is None:
                return None
            stored += names[place]
            if stored not in self.listings:
                self.listings[stored] = (stored, Names.of(_list_folder(self.folder / stored)))
            names = self.listings[stored][1]
        self.listings[asked] = (stored, names)
        return stored, names


def clean_name(name: str) -> str:
    """Return a picture's name without `./` and doubled slashes.

    Raises: ValueError for a name that leads out of the folder it is relative to.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"image {name!r} leads out of the image folder: names are relative to it, without '..'")
    return "/".join(part for part in parts if part not in ("", ".")) if "" in parts or "." in parts else name


def _list_folder(folder: Path) -> list[str]:
    """Return the names of files, and of sub-folders with a slash behind; links count as what they lead to."""
    with os.scandir(folder) as entries:
        return [entry.name + ("/" if entry.is_dir() else "") for entry in entries if entry.is_file() or entry.is_dir()]


def fold_name(name: str) -> str:
    """Return what a name has in common with its other Unicode forms and letter cases."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


@dataclass(frozen=True)
class Names:
    """Many names in a few arrays: as Python strings they would be copied, one by one, into every loader process."""

    keys: np.ndarray  # CRC of the folded names, ascending; names that share one lie side by side
    starts: np.ndarray  # of the names in `text`, in the order of `keys`
    ends: np.ndarray
    text: bytes  # UTF-8

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Arrange names."""
        return cls.arrange(names)[0]

    @classmethod
    def arrange(cls, names: Iterable[str]) -> "tuple[Names, np.ndarray]":
        """Arrange names; return too which of them lies at each place."""
        keys, ends, text = array("I"), array("q"), bytearray()
        for name in names:
            keys.append(_key(fold_name(name)))
            text += _encode(name)
            ends.append(len(text))
        order = np.argsort(np.array(keys, dtype=np.uint32), kind="stable")
        all_ends = np.array(ends, dtype=np.int64)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), all_ends])[:-1]
        return cls(np.array(keys, dtype=np.uint32)[order], starts[order], all_ends[order], bytes(text)), order

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: int) -> str:
        return self.text[self.starts[place] : self.ends[place]].decode("utf-8", "surrogatepass")

    def find(self, name: str) -> int | None:
        """Return the place of `name`, or of the only one that differs in no more than Unicode form and letter case."""
        folded = fold_name(name)
        key = np.uint32(_key(folded))
        place = int(self.keys.searchsorted(key))
        similar = []
        while place < len(self.keys) and self.keys[place] == key:
            stored = self[place]
            if stored == name:
                return place
            if fold_name(stored) == folded:
                similar.append(place)
            place += 1
        return similar[0] if len(similar) == 1 else None

    def find_repeated(self) -> dict[str, list[int]]:
        """Return the places of every name that is there more than once."""
        same = np.flatnonzero(self.keys[1:] == self.keys[:-1])
        places = defaultdict(list)
        for place in np.union1d(same, same + 1).tolist():
            places[self[place]].append(place)
        return {name: of_name for name, of_name in places.items() if len(of_name) > 1}


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")  # names that are not UTF-8 on disk come with surrogates


def _key(folded: str) -> int:
    return zlib.crc32(_encode(folded))


class Shards:
    """Tar files, and where in them each member lies."""

    def __init__(self, folder: Path, tars: Sequence[str]) -> None:
        """Raises: ValueError for a shard that cannot be read in place, is damaged or repeats a name."""
        self.files = [folder / tar for tar in tars]
        status = [file.stat() for file in self.files]
        self.times = [of_file.st_mtime_ns for of_file in status]
        stamp = json.dumps(
            [INDEX_VERSION, *([tar, of.st_size, of.st_mtime_ns] for tar, of in zip(tars, status, strict=True))]
        )
        index = _load_index(folder / INDEX_NAME, stamp) or _make_index(folder / INDEX_NAME, stamp, self.files)
        self.names = Names(index["keys"], index["starts"], index["ends"], index["text"].tobytes())
        self.shard_of, self.offsets, self.sizes = index["shard_of"], index["offsets"], index["sizes"]

    def read(self, place: int) -> bytes:
        """Return the bytes of the member at this place of the index."""
        number, size = int(self.shard_of[place]), int(self.sizes[place])
        shard = _open_shard(self.files[number], self.times[number])
        content = os.pread(shard.descriptor, size, int(self.offsets[place]))
        if len(content) != size or os.fstat(shard.descriptor).st_mtime_ns != self.times[number]:
            raise ValueError(f"{self.files[number]} has changed since it was opened: start again")
        return content


class _OpenShard:
    """A file that is closed when nobody holds it any more. `pread` has no place in it to share: forks may use it."""

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(file: Path, _time: int) -> _OpenShard:
    return _OpenShard(file)


def list_members(file: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and size of every file in a tar.

    Raises: ValueError for a tar that is compressed, damaged or cut off, naming the last good member.
    """
    size, last = file.stat().st_size, "its start"
    with file.open("rb") as opened:
        if opened.read(8).startswith(COMPRESSED_STARTS):
            raise ValueError(f"{file} is compressed, which cannot be read in place: unpack it to a plain tar")
        opened.seek(0)
        headers = _read_headers(opened)
        while True:
            try:
                member = next(headers, None)
            except Exception as error:  # damaged headers make tarfile stumble in all sorts of ways
                raise ValueError(f"{file} is no tar, or cut off or damaged behind {last}: {error}") from error
            if member is None:
                break
            if member.issparse():
                raise ValueError(f"{file}: {member.name} is stored with its holes left out: make it without --sparse")
            if member.size < 0 or (member.isreg() and member.offset_data + member.size > size):
                raise ValueError(f"{file} is cut off or damaged at {member.name}: it should have {member.size} bytes")
            if member.isreg():
                name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
                yield name, member.offset_data, member.size
            last = member.name


def _read_headers(opened: BinaryIO) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=opened, mode="r:") as tar:
        while member := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            yield member
        opened.seek(tar.offset)
        if opened.read(TAR_BLOCK) != bytes(TAR_BLOCK):  # tarfile takes damage for the end
            raise ValueError("the closing blocks are missing")


def _load_index(file: Path, stamp: str) -> dict[str, np.ndarray] | None:
    """Return the index, or None where there is none of these very shards."""
    try:
        with safe_open(file, framework="np") as opened:
            if opened.metadata() != {"of": stamp}:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _make_index(index_file: Path, stamp: str, files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Read every header; write down what is found, if the folder can be written."""
    shard_of, offsets, sizes = array("i"), array("q"), array("q")

    def list_names() -> Iterator[str]:
        for number, file in enumerate(tqdm(files, "reading the shards' headers", unit="shard", leave=False)):
            for name, offset, size in list_members(file):
                shard_of.append(number)
                offsets.append(offset)
                sizes.append(size)
                yield name

    names, order = Names.arrange(list_names())
    index = {
        "keys": names.keys,
        "starts": names.starts,
        "ends": names.ends,
        "text": np.frombuffer(names.text, dtype=np.uint8),
        "shard_of": np.array(shard_of, dtype=np.int32)[order],
        "offsets": np.array(offsets, dtype=np.int64)[order],
        "sizes": np.array(sizes, dtype=np.int64)[order],
    }
    for name, places in names.find_repeated().items():
        tars = " and ".join(files[index["shard_of"][place]].name for place in places)
        raise ValueError(f"{index_file.parent}: {name} is in {tars}: a name must be there once")
    temporary = index_file.with_name(f"{INDEX_NAME}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(save(index, {"of": stamp}))
        os.replace(temporary, index_file)
    except (OSError, SafetensorError) as error:
        print(f"{index_file} cannot be written ({error}): the tars' headers are read each time", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return index
