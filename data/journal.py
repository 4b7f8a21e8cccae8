"""Files of JSON lines that survive being killed: a line is whole, or it is the last one and is left out."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Journal:
    """A file of JSON lines that one process appends to, each line on the disk before `append` returns.

    Opening it cuts off a torn last line. Raises: ValueError while another process has it.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        self.opened = file.open("a+b")
        try:
            fcntl.flock(self.opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.opened.close()
            raise ValueError(f"another process writes {file}: wait for it, or stop it") from error
        self.opened.seek(0)
        content = self.opened.read()
        self.opened.truncate(content.rfind(b"\n") + 1)

    def append(self, *rows: dict[str, Any]) -> None:
        self.opened.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.opened.flush()
        os.fsync(self.opened.fileno())

    def close(self) -> None:
        self.opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def read_journal(file: Path) -> Iterator[dict[str, Any]]:
    """Yield a journal's rows; none where it does not exist yet. A torn last line is left out.

    Raises: ValueError naming file and line for any other line that is no JSON object.
    """
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.endswith(b"\n"):
                return
            yield parse_line(line, file, number)


def parse_line(line: bytes, file: Path, number: int) -> dict[str, Any]:
    """Return a line's row. Raises: ValueError naming file and line for what is no JSON object."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {number} is no JSON object")
    return row
