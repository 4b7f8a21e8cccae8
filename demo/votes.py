"""Votes on pairs of answers, in a folder: `votes.jsonl`, one line each, and the pictures they are about, each once.

What is voted on is what the server said: it keeps the latest comparisons, and whoever votes names one of them.
"""

import hashlib
import io
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL.Image import Image

CHOICES = ("left", "right", "both_good", "both_bad")
MAX_FOLDER_BYTES = 1_000_000_000
MAX_OPEN_BYTES = 64_000_000  # of pictures whose answers nobody has voted on yet: about 100 large ones
MAX_OPEN = 1000  # comparisons nobody has voted on yet
JPEG_QUALITY = 95


class VoteError(RuntimeError):
    """This vote does not count."""


class VoteFolderFullError(VoteError):
    """There is no room for more."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the folder for votes has reached its limit of {max_bytes} bytes")
        self.max_bytes = max_bytes


class VoteFile:
    """Many threads may use one; a folder belongs to one process."""

    def __init__(self, folder: Path, max_bytes: int = MAX_FOLDER_BYTES) -> None:
        """Raises: OSError where nothing can be written."""
        self.file, self.pictures, self.max_bytes = folder / "votes.jsonl", folder / "pictures", max_bytes
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        self.num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self.open: OrderedDict[str, tuple[Mapping[str, Any], bytes]] = OrderedDict()  # the oldest first
        self.open_bytes = 0
        self.lock = threading.Lock()

    def offer(self, comparison: Mapping[str, Any], picture: Image) -> str:
        """Keep a comparison for a while; return the name to vote on it with."""
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=JPEG_QUALITY)
        ballot = secrets.token_urlsafe(16)
        with self.lock:
            self.open[ballot] = comparison, content.getvalue()
            self.open_bytes += len(content.getvalue())
            while self.open_bytes > MAX_OPEN_BYTES or len(self.open) > MAX_OPEN:
                _, (_, oldest) = self.open.popitem(last=False)
                self.open_bytes -= len(oldest)
        return ballot

    def vote(self, ballot: str, choice: str) -> None:
        """Write down which answer was better: one of CHOICES. It counts once.

        Raises: VoteError for a comparison that was voted on, is too old or never was; VoteFolderFullError; OSError.
        """
        assert choice in CHOICES, choice
        with self.lock:
            if ballot not in self.open:
                raise VoteError("these answers are no longer kept, or were voted on already")
            if self.num_bytes >= self.max_bytes:
                raise VoteFolderFullError(self.max_bytes)
            comparison, picture = self.open.pop(ballot)
            self.open_bytes -= len(picture)
            digest = hashlib.sha256(picture).hexdigest()
            file = self.pictures / f"{digest[:16]}.jpg"
            line = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                **comparison,
                "vote": choice,
                "picture": f"pictures/{file.name}",
                "picture_sha256": digest,
            }
            self._write(line, file, picture)

    def _write(self, line: Mapping[str, Any], file: Path, picture: bytes) -> None:
        if not file.exists():
            begun = file.with_suffix(".part")  # a picture whose name is there is whole
            begun.write_bytes(picture)
            begun.replace(file)
            self.num_bytes += len(picture)
        # A browser may send half a character; as an escape it is the JSON it came from.
        content = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self.file.open("ab") as stream:
            stream.write(content)
        self.num_bytes += len(content)
