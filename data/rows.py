"""Files of rows: LLaVA's conversation files and the annotation files they are made of, read without holding them.

A JSON list is read item by item, in memory that one item and a buffer take. Training wants rows in any order: an index
beside the file (`my.json.index`) says where each row lies and what is known of it, so that 665 thousand rows are
opened in a moment, and no process keeps more of them than it is looking at. The index is made, and every row checked,
when a file is first opened or has changed.
"""

import codecs
import contextlib
import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data.conversation import TEMPLATES, parse_turns

CHUNK_BYTES = 2**22
MAX_ITEM_CHARACTERS = 2**26  # an error in the file's middle is an item without end: it must not be read to the file's
INDEX_VERSION = "1"
NO_IMAGE = -1

JSON = json.JSONDecoder()


def stream_items(file: Path, key: str | None = None) -> Iterator[Any]:
    """Yield the items of a JSON list: the file itself, or what `key` names in its object.

    Raises: FileNotFoundError, or ValueError naming file and line for what is broken or not there.
    """
    for _, _, item in _scan_list(file, key):
        yield item


def stream_rows(file: Path) -> Iterator[Any]:
    """Yield the rows of a conversation file, a JSON list or JSON objects line by line (`.jsonl`).

    Raises: FileNotFoundError, or ValueError naming file and line for what is broken; ValueError for no rows.
    """
    for _, _, row in _scan_rows(file):
        yield row


def load_rows(file: Path) -> list[Any]:
    """Return all rows of a small file. Raises: as `stream_rows`."""
    return list(stream_rows(file))


class RowFile:
    """Any row of a conversation file by its number, and what the index knows of all rows.

    Attributes:
        image_turns: the turn that has the picture, NO_IMAGE where none has.
        flaws: what is wrong with rows that are no conversations, by number.
        images: the rows' pictures, None for text.
    """

    def __init__(self, file: Path) -> None:
        """Raises: FileNotFoundError or ValueError naming the file and the place."""
        if not file.is_file():
            raise FileNotFoundError(f"data file {file} is missing")
        self.file = file
        self.stamp = _stamp(os.stat(file))
        columns, flaws = _load_index(file, self.stamp) or _make_index(file, self.stamp)
        self.starts, self.ends = columns["starts"], columns["ends"]
        self.image_turns = columns["image_turns"]
        self.images = ImageNames(columns["names"], columns["name_ends"])
        self.flaws: dict[int, str] = {int(number): flaw for number, flaw in flaws.items()}

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Any:
        """Read one row. Raises: ValueError when the file is no longer the one that was opened."""
        start, end = int(self.starts[number]), int(self.ends[number])
        # Opened each time: no handle has to be shared with, or sent to, other processes.
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            if _stamp(os.fstat(descriptor)) != self.stamp:
                raise ValueError(f"{self.file} has changed since it was opened: start again")
            return json.loads(os.pread(descriptor, end - start, start))
        finally:
            os.close(descriptor)


class ImageNames(Sequence[str | None]):
    """Many names in one array: half a million Python strings would be copied into every loader process."""

    def __init__(self, names: np.ndarray, ends: np.ndarray) -> None:
        self.names = names  # UTF-8 of all names, one behind the other
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        start = self.ends[number - 1] if number else 0
        return self.names[start : self.ends[number]].tobytes().decode() or None


def find_bad_rows(rows: RowFile, bad_list: Path) -> np.ndarray:
    """Tell of each row whether a list of `data.check` names it or its picture.

    Raises: FileNotFoundError or ValueError for a list that is missing, or of another file.
    """
    names, is_bad = set(), np.zeros(len(rows), dtype=bool)
    if not bad_list.is_file():
        raise FileNotFoundError(f"bad list {bad_list} is missing: `python -m data.check {rows.file}` writes it")
    for _, _, bad in _scan_lines(bad_list):
        if isinstance(bad.get("image"), str):
            names.add(bad["image"])
        elif isinstance(bad.get("row"), int) and 0 <= bad["row"] < len(rows):
            is_bad[bad["row"]] = True
        else:
            raise ValueError(
                f"{bad_list} names {bad}, expected an 'image', or a 'row' of the {len(rows)} in {rows.file}"
            )
    return is_bad | np.fromiter((image in names for image in rows.images), bool, len(rows))


class RowWriter:
    """Write a conversation file, one row a line; it appears under its name when the block ends well."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.temporary = file.with_name(file.name + ".partial")
        self.num_rows = 0

    def __enter__(self) -> Self:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.opened = self.temporary.open("w", encoding="utf-8")
        return self

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False)
        if self.file.suffix == ".jsonl":
            self.opened.write(line + "\n")
        else:
            self.opened.write((",\n" if self.num_rows else "[\n") + line)
        self.num_rows += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None and self.file.suffix != ".jsonl":
                self.opened.write("\n]\n" if self.num_rows else "[]\n")
            self.opened.close()
            if kind is None:
                os.replace(self.temporary, self.file)
        finally:
            self.temporary.unlink(missing_ok=True)


def _scan_rows(file: Path) -> Iterator[tuple[int, int, Any]]:
    """Yield where each row starts and ends, in bytes, and the row."""
    if not file.is_file():
        raise FileNotFoundError(f"data file {file} is missing")
    is_empty = True
    for place in _scan_lines(file) if file.suffix == ".jsonl" else _scan_list(file, None):
        is_empty = False
        yield place
    if is_empty:
        raise ValueError(f"{file} holds no rows, expected a list of conversations")


def _scan_lines(file: Path) -> Iterator[tuple[int, int, Any]]:
    start = 0
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                try:
                    row = json.loads(text.decode())
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
                except UnicodeDecodeError as error:
                    raise ValueError(f"{file} is not UTF-8, line {number}: {error}") from error
                yield start + len(line) - len(text), start + len(line), row
            start += len(line)


def _scan_list(file: Path, key: str | None) -> Iterator[tuple[int, int, Any]]:
    """Yield where each item of a list starts and ends, in bytes, and the item."""
    with _JsonReader(file) as reader:
        if key is not None:
            _enter_value(reader, key)
        elif reader.peek() == "{":
            raise ValueError(f"{file} holds no rows, expected a list (one object a line needs the ending .jsonl)")
        yield from reader.read_list()
        if key is None and reader.peek():
            reader.fail("something follows the list")


def _enter_value(reader: "_JsonReader", key: str) -> None:
    """Go to the value of `key`, past those before it."""
    reader.expect("{")
    while reader.peek() != "}":
        _, _, name = reader.read_value()
        reader.expect(":")
        if name == key:
            return
        if reader.peek() == "[":
            for _ in reader.read_list():
                pass
        else:
            reader.read_value()
        if reader.peek() == ",":
            reader.expect(",")
    raise ValueError(f"{reader.file} has no list {key!r}: is it the file that its name says?")


class _JsonReader:
    """JSON read value by value; knows at which byte of the file it is."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.text = ""
        self.place = 0  # in text
        self.byte = 0  # of that place, in the file
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def __enter__(self) -> Self:
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is missing")
        self.opened = self.file.open("rb")
        if self.opened.peek(3).startswith(codecs.BOM_UTF8):
            self.byte = len(self.opened.read(3))
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()

    def peek(self) -> str:
        """Return the next character that is no blank; none at the end."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in " \t\r\n":
                    return self.text[self.place]
                self.place += 1
                self.byte += 1
            if not self._fill():
                return ""

    def expect(self, character: str) -> None:
        if self.peek() != character:
            self.fail(f"expected {character!r}")
        self.place += 1
        self.byte += 1

    def read_list(self) -> Iterator[tuple[int, int, Any]]:
        self.expect("[")
        while self.peek() != "]":
            yield self.read_value()
            if self.peek() != "]":
                self.expect(",")
                if self.peek() == "]":
                    self.fail("expected a value")
        self.expect("]")

    def read_value(self) -> tuple[int, int, Any]:
        """Return where the next value starts and ends, in bytes, and the value."""
        self.peek()
        while True:
            try:
                value, end = JSON.raw_decode(self.text, self.place)
                # At the buffer's end, 2, 2. and 2e+ may be the beginning of a number.
                if not isinstance(value, (int, float)) or end < len(self.text) - 2 or not self._fill():
                    break
            except json.JSONDecodeError as error:
                if len(self.text) - self.place > MAX_ITEM_CHARACTERS or not self._fill():
                    self._advance(error.pos)
                    self.fail(error.msg)
        start = self.byte
        self._advance(end)
        return start, self.byte, value

    def fail(self, problem: str) -> None:
        """Raise a ValueError that says where; lines and columns as an editor counts them."""
        with self.file.open("rb") as opened:
            before = opened.read(self.byte)
        line, column = before.count(b"\n") + 1, self.byte - before.rfind(b"\n")
        raise ValueError(f"{self.file} is not JSON: {problem}: line {line} column {column} (byte {self.byte})")

    def _advance(self, place: int) -> None:
        self.byte += len(self.text[self.place : place].encode("utf-8"))
        self.place = place

    def _fill(self) -> bool:
        """Read on, dropping what is done with; tell whether there was more."""
        chunk = self.opened.read(CHUNK_BYTES)
        try:
            more = self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file} is not UTF-8, near byte {self.byte}: {error}") from error
        if chunk:
            self.text, self.place = self.text[self.place :] + more, 0
        return bool(chunk)


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} bytes, changed {status.st_mtime_ns}"


def _index_file(file: Path) -> Path:
    return file.with_name(file.name + ".index")


def _load_index(file: Path, stamp: str) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """Return the index, or None where there is none of this very file."""
    try:
        # PyTorch's tensors lie in the file's own pages: opening takes no time, and all processes share the memory.
        with safe_open(_index_file(file), framework="pt") as opened:
            about = opened.metadata() or {}
            if about.get("version") != INDEX_VERSION or about.get("stamp") != stamp:
                return None
            columns = {name: opened.get_tensor(name).numpy() for name in opened.keys()}  # noqa: SIM118
            return columns, json.loads(about["flaws"])
    except (OSError, SafetensorError):  # not there, or not whole
        return None


def _make_index(file: Path, stamp: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read and check every row; write down what is found, if the folder can be written."""
    starts, ends, name_ends = array("q"), array("q"), array("q")
    image_turns = array("i")
    names = bytearray()
    flaws: dict[str, str] = {}
    for number, (start, end, row) in enumerate(_scan_rows(file)):
        image_turn = NO_IMAGE
        try:
            turns = parse_turns(row)
            if "template" in row and row["template"] not in TEMPLATES:
                raise ValueError(f"template {row['template']!r} is unknown, expected one of {', '.join(TEMPLATES)}")
            names += (row.get("image") or "").encode("utf-8")
            image_turn = next((place for place, turn in enumerate(turns) if turn.has_image), NO_IMAGE)
        except ValueError as error:
            flaws[str(number)] = str(error)
        starts.append(start)
        ends.append(end)
        name_ends.append(len(names))
        image_turns.append(image_turn)
    columns = {  # without copies
        "starts": np.asarray(starts),
        "ends": np.asarray(ends),
        "names": np.frombuffer(names, dtype=np.uint8),
        "name_ends": np.asarray(name_ends),
        "image_turns": np.asarray(image_turns),
    }
    temporary = _index_file(file).with_name(f"{file.name}.index.{os.getpid()}.partial")
    try:
        temporary.write_bytes(save(columns, {"version": INDEX_VERSION, "stamp": stamp, "flaws": json.dumps(flaws)}))
        os.replace(temporary, _index_file(file))
    except (OSError, SafetensorError) as error:
        print(f"{_index_file(file)} cannot be written ({error}): the file is read whole each time", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return columns, flaws
