"""What a preparation did: how much it read, what it mended and dropped, and why. Printed, and written as JSON."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

COLUMN = 20  # characters


class Report:
    """Counts by reason. A reason is a few words that begin with what is counted: "question: asked twice"."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.options: dict[str, Any] = {}  # of the command
        self.inputs: list[dict[str, Any]] = []
        self.read = 0  # items of the source
        self.rows = 0  # written
        self.mended: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.notes: list[str] = []
        self.parts: list[dict[str, Any]] = []  # of a mixture

    def add_input(self, file: Path) -> Path:
        """Record a file that is read, by its content, and return it.

        Raises: FileNotFoundError.
        """
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self.inputs.append({"name": file.name, "bytes": file.stat().st_size, "sha256": digest})
        return file

    def mend(self, reason: str, count: int = 1) -> None:
        """Count what was kept after a correction."""
        self.mended[reason] += count

    def drop(self, reason: str, count: int = 1) -> None:
        """Count what is not in the output."""
        self.dropped[reason] += count

    def note(self, text: str) -> None:
        """Add a sentence."""
        self.notes.append(text)

    def print(self) -> None:
        """Print the counts as a table."""
        lines = [("read", self.read, ""), ("written", self.rows, "rows")]
        lines += [("mended", count, reason) for reason, count in sorted((+self.mended).items())]
        lines += [("dropped", count, reason) for reason, count in sorted((+self.dropped).items())]
        print(self.source)
        for kind, count, reason in lines:
            print(f"  {kind:8}{count:10d}  {reason}".rstrip())
        if self.parts:
            print("  " + " ".join(f"{name:>{COLUMN}}" for name in self.parts[0]))
        for part in self.parts:
            print("  " + " ".join(f"{value!s:>{COLUMN}}" for value in part.values()))
        for text in self.notes:
            print(f"  note: {text}")

    def write(self, file: Path) -> None:
        """Write everything as JSON, the same bytes for the same work."""
        content = {
            "source": self.source,
            "options": self.options,
            "inputs": self.inputs,
            "read": self.read,
            "rows": self.rows,
            "mended": dict(sorted((+self.mended).items())),
            "dropped": dict(sorted((+self.dropped).items())),
            "notes": self.notes,
        }
        if self.parts:
            content["parts"] = self.parts
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
