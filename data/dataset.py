"""LLaVA conversation files (JSON or JSONL) become examples: a rendered document and its picture's pixels."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.conversation import IMAGE_MARKER, TEMPLATES, Rendered, Turn, parse_turns, render_conversation
from data.image import open_image, preprocess_image
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class RenderOptions:
    """How rows become examples: what `ConversationDataset` needs to know besides the rows."""

    tokens_per_image: int  # P
    image_size: int  # S, pixels
    template: str = "vicuna_v1"
    aspect: str = "pad"
    branched: bool = False  # turns are independent questions about one picture
    max_tokens: int = 2048  # longer documents lose text from their end
    augment_pixels: int = 0  # shift by up to this many pixels and mirror at random; 0 is off


class ConversationDataset:
    """The rows of one file. Every row is checked when the file is opened, every picture when it is read."""

    def __init__(self, file: Path, image_folder: Path, tokenizer: Tokenizer, options: RenderOptions) -> None:
        """Raises: FileNotFoundError or ValueError naming the file and the row."""
        self.file = file
        self.image_folder = image_folder
        self.tokenizer = tokenizer
        self.options = options
        self.turns: list[list[Turn]] = []
        self.images: list[str | None] = []
        self.templates: list[str] = []
        for number, row in enumerate(load_rows(file)):
            try:
                turns = parse_turns(row)
                if options.branched and any(turn.has_image for turn in turns[1:]):
                    raise ValueError(f"branched turns share one picture, but {IMAGE_MARKER} stands in a later turn")
            except ValueError as error:
                raise ValueError(f"{file}, row {number}: {error}") from error
            self.turns.append(turns)
            # A row may name its own template, as rows of a text corpus do; official files never do.
            self.templates.append(row.get("template", options.template))
            if self.templates[-1] not in TEMPLATES:
                raise ValueError(f"{file}, row {number}: template {self.templates[-1]!r} is unknown")
            image = row.get("image")
            if image is not None and not (image_folder / image).is_file():
                raise FileNotFoundError(f"{file}, row {number}: image {image_folder / image} is missing")
            self.images.append(image)

    def __len__(self) -> int:
        return len(self.turns)

    def render(self, index: int) -> Rendered:
        """Return the ids and labels of row `index`."""
        return render_conversation(
            self.turns[index],
            self.tokenizer,
            self.options.tokens_per_image,
            self.templates[index],
            self.options.branched,
            self.options.max_tokens,
        )

    def load_pixels(self, index: int, seed: Sequence[int] | None = None) -> Tensor | None:
        """Return the pixels (3, S, S) of row `index`, or None where it has no picture.

        Args:
            seed: numbers that decide the augmentation; None for none.
        """
        image = self.images[index]
        if image is None:
            return None
        try:
            picture = open_image(self.image_folder / image)
            pixels = preprocess_image(picture, self.options.image_size, self.options.aspect)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.file}, row {index}: {error}") from error
        if seed is not None and self.options.augment_pixels:
            pixels = _shift_and_mirror(pixels, self.options.augment_pixels, np.random.default_rng(seed))
        return pixels


def load_rows(file: Path) -> list[dict]:
    """Read a JSON list, or JSON objects line by line (`.jsonl`).

    Raises: FileNotFoundError, or ValueError naming the line that is no JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(f"data file {file} is missing")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    if file.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
    else:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error} (one object a line needs the ending .jsonl)") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file} holds no rows, expected a list of conversations")
    return rows


def _shift_and_mirror(pixels: Tensor, reach: int, random: np.random.Generator) -> Tensor:
    """Move the picture by up to `reach` pixels, its border repeated, and mirror it half of the time. (3, S, S)"""
    size = pixels.shape[-1]
    rows, columns = (
        (torch.arange(size) + int(random.integers(-reach, reach + 1))).clamp(0, size - 1) for _ in range(2)
    )
    if random.random() < 0.5:
        columns = columns.flip(0)
    return pixels[:, rows][:, :, columns]
