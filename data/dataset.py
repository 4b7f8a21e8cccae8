"""LLaVA conversation files (JSON or JSONL) become examples: a rendered document and its picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.conversation import IMAGE_MARKER, Rendered, parse_turns, render_conversation
from data.feature_store import FeatureStore, TokenStore
from data.image import preprocess_image
from data.pictures import PictureFolder
from data.rows import NO_IMAGE, RowFile, find_bad_rows
from data.shards import order_by_shard
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
    """The rows of one file that can be learned from. All are checked when the file is opened; pictures when read."""

    def __init__(
        self,
        file: Path,
        image_folder: Path,
        tokenizer: Tokenizer,
        options: RenderOptions,
        bad_list: Path | None = None,
        features: FeatureStore | None = None,
        tokens: TokenStore | None = None,
    ) -> None:
        """Open a file.

        Args:
            bad_list: what `data.check` found unusable; those rows are left out.
            features: pictures that are encoded already; those in `image_folder` are only compared with them.
            tokens: the rows' text, rendered already.
        Raises: FileNotFoundError or ValueError naming the file and the row.
        """
        self.file = file
        self.tokenizer = tokenizer
        self.options = options
        self.features = features
        self.tokens = tokens
        self.rows = RowFile(file)
        self.pictures = PictureFolder(image_folder)
        self.row_numbers = np.arange(len(self.rows))  # of the rows that are used, in the file
        if bad_list is not None:
            self.row_numbers = self.row_numbers[~find_bad_rows(self.rows, bad_list)]
            if not len(self.row_numbers):
                raise ValueError(f"{file} has no row that {bad_list} does not name")
        self._check_rows()
        self._check_pictures()
        self.places = self.pictures.locate(map(self.image, range(len(self))))  # where shards have them

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def num_left_out(self) -> int:
        """How many rows of the file are not used."""
        return len(self.rows) - len(self)

    @property
    def has_pictures(self) -> bool:
        return bool((self.rows.image_turns[self.row_numbers] != NO_IMAGE).any())

    def image(self, index: int) -> str | None:
        """Return the path of row `index`'s picture, None where it has none."""
        return self.rows.images[self.row_numbers[index]]

    def render(self, index: int) -> Rendered:
        """Return the ids and labels of row `index`."""
        number = self.row_numbers[index]
        if self.tokens is not None:
            return self.tokens[number]
        row = self.rows[number]
        return render_conversation(
            parse_turns(row),
            self.tokenizer,
            self.options.tokens_per_image,
            # A row may name its own template, as rows of a text corpus do; official files never do.
            row.get("template", self.options.template),
            self.options.branched,
            self.options.max_tokens,
        )

    def load_picture(self, index: int, seed: Sequence[int] | None = None) -> Tensor | None:
        """Return the pixels (3, S, S) of row `index`, or its features (P, D) if they are kept; None without a picture.

        Args:
            seed: numbers that decide the augmentation; None for none.
        """
        image = self.image(index)
        if image is None:
            return None
        try:
            if self.features is not None:
                return self.features.load(image, self.pictures)
            picture = self.pictures.open(image)
            pixels = preprocess_image(picture, self.options.image_size, self.options.aspect)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.file}, row {self.row_numbers[index]}: {error}") from error
        if seed is not None and self.options.augment_pixels:
            pixels = _shift_and_mirror(pixels, self.options.augment_pixels, np.random.default_rng(seed))
        return pixels

    def permute(self, epoch: int, seed: int) -> np.ndarray:
        """Return the order of an epoch: any, or one in which tar shards are read from front to back."""
        if self.places is None:
            return np.random.default_rng((seed, epoch)).permutation(len(self))
        return order_by_shard(*self.places, epoch, seed)

    def _check_rows(self) -> None:
        used = set(self.row_numbers.tolist()) if self.num_left_out else range(len(self.rows))
        problems = {number: flaw for number, flaw in self.rows.flaws.items() if number in used}
        if self.options.branched and len(late := np.flatnonzero(self.rows.image_turns > 0)):
            problems[int(late[0])] = f"branched turns share one picture, but {IMAGE_MARKER} stands in a later turn"
        if problems:
            number = min(problems)
            raise ValueError(f"{self.file}, row {number}: {problems[number]}{_how_many(len(problems))}")

    def _check_pictures(self) -> None:
        missing: dict[str, int] = {}
        with_picture = self.row_numbers[self.rows.image_turns[self.row_numbers] != NO_IMAGE]
        for number in memoryview(with_picture):  # one by one: a list of ten million takes 400 MB
            image = self.rows.images[number]
            try:
                if image is not None and not self._has(image):
                    missing.setdefault(image, number)
            except ValueError as error:
                raise ValueError(f"{self.file}, row {number}: {error}") from error
        if missing:
            image, number = next(iter(missing.items()))
            raise FileNotFoundError(
                f"{self.file}, row {number}: image {self.pictures.folder / image} is missing{_how_many(len(missing))}"
            )

    def _has(self, image: str) -> bool:
        return image in self.features if self.features is not None else self.pictures.find(image) is not None


def _how_many(count: int) -> str:
    """End a message about the first of `count` problems: how to find and how to get around all of them."""
    others = f"; {count} in all" if count > 1 else ""
    return f"{others}: `python -m data.check` lists what cannot be used, and bad_list leaves it out"


def _shift_and_mirror(pixels: Tensor, reach: int, random: np.random.Generator) -> Tensor:
    """Move the picture by up to `reach` pixels, its border repeated, and mirror it half of the time. (3, S, S)"""
    size = pixels.shape[-1]
    rows, columns = (
        (torch.arange(size) + int(random.integers(-reach, reach + 1))).clamp(0, size - 1) for _ in range(2)
    )
    if random.random() < 0.5:
        columns = columns.flip(0)
    return pixels[:, rows][:, :, columns]
