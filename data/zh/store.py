"""What `collect` keeps: pictures under their content's name, and a journal of all that was asked and answered.

A source runs from its beginning each time; what the journal knows is neither asked nor fetched again. A picture is on
the disk under a temporary name before the journal has it, and gets its own name after: killed at any byte in between,
it is there.
"""

import hashlib
import io
import itertools
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image, ImageSequence

from data.image import FORMATS, open_image
from data.journal import Journal, read_journal
from data.zh.record import Record

JOURNAL = "collect.journal.jsonl"
MIN_SIDE = 100  # pixels; smaller are icons, flags and buttons
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}  # others are kept as PNG
ANIMATIONS = ("GIF", "PNG", "WEBP")


@dataclass(frozen=True)
class Found:
    """A picture and its page as a source has them: the text is raw, the picture not read yet."""

    record: Record  # without image and sha256
    picture: str  # what names the picture in the journal
    read: Callable[[], bytes]  # Raises: ValueError if there is none


class Store:
    """The pictures and the journal of a work folder. Raises: ValueError while another process has it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.journal = Journal(work / JOURNAL)
        self.answers: dict[str, str] = {}  # JSON, of questions in JSON
        self.pictures: dict[str, dict[str, Any]] = {}
        for row in read_journal(work / JOURNAL):
            if "picture" in row:
                self.pictures[row["picture"]] = row
            else:
                self.answers[row["question"]] = row["answer"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.journal.__exit__(kind, error, at)

    def ask(self, question: Any, answer: Callable[[], Any]) -> Any:
        """Return the answer to a question (of JSON), calling for it once in the life of the work folder."""
        name = json.dumps(question, sort_keys=True)
        if name not in self.answers:
            text = json.dumps(answer())
            self.journal.append({"question": name, "answer": text})
            self.answers[name] = text
        return json.loads(self.answers[name])

    def keep(self, found: Found) -> dict[str, Any]:
        """Return the journal's row about a picture, read once: `image` and `sha256`, or the `problem` with it."""
        row = self.pictures.get(found.picture)
        if row is None or not self._complete(row):
            row = {"picture": found.picture} | self._read(found.read)
            self.pictures[found.picture] = row
            self.journal.append(row)
            self._complete(row)
        return row

    def _read(self, read: Callable[[], bytes]) -> dict[str, Any]:
        try:
            content = read()
        except ValueError as error:
            return {"problem": "cannot be fetched", "detail": str(error)}
        try:
            content, ending, mended = inspect_picture(content)
        except ValueError as error:
            problem, _, detail = str(error).partition(": ")
            return {"problem": problem, "detail": detail}
        sha256 = hashlib.sha256(content).hexdigest()
        image = f"images/{sha256[:2]}/{sha256}.{ending}"
        partial = self._name_partial(image)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        return {"image": image, "sha256": sha256, "mended": mended}

    def _complete(self, row: dict[str, Any]) -> bool:
        """Give a picture its name, and tell whether all that a row names is there."""
        if "problem" in row:
            return True
        partial = self._name_partial(row["image"])
        if partial.is_file():
            partial.replace(self.work / row["image"])
        return (self.work / row["image"]).is_file()

    def _name_partial(self, image: str) -> Path:
        return self.work / f"{image}.partial"


def inspect_picture(content: bytes) -> tuple[bytes, str, str]:
    """Return a picture's content, the ending of its name, and what was mended in it.

    Raises: ValueError ("problem: detail") for what does not decode, moves, or is too small.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures, which have a limit, and of odd metadata
        try:
            picture = open_image(io.BytesIO(content))
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                kind, num_frames = str(image.format), sum(1 for _ in itertools.islice(ImageSequence.Iterator(image), 2))
        except Exception as error:  # as in `open_image`
            raise ValueError(f"cannot be decoded: {error}") from error
    if kind in ANIMATIONS and num_frames > 1:
        raise ValueError(f"an animation: {kind}")
    if min(picture.size) < MIN_SIDE:
        raise ValueError(f"smaller than {MIN_SIDE} pixels: {picture.width} x {picture.height}")
    if kind in ENDINGS:
        return content, ENDINGS[kind], ""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue(), "png", f"{kind} saved as PNG"
