"""What `--suite data` loads with: `StepDataset`, and the way of official LLaVA to the same ids, labels and pixels."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.conversation import IGNORE_INDEX, IMAGE_MARKER, IMAGE_TOKEN_ID, SYSTEM
from data.dataset import ConversationDataset, RenderOptions
from data.feature_store import (
    FeatureKey,
    FeatureStore,
    TokenStore,
)
from data.features import token_key
from data.packing import StepDataset
from data.rows import load_rows
from data.tokenizer import Tokenizer

SEED = 0
NUM_RANKS = 8
ROWS_PER_RANK = 16
MICRO_BATCH_TOKENS = 16_384
IMAGE_SIZE = 336
NUM_PATCHES, HIDDEN_SIZE = 576, 1024  # P and D of ViT-L/14 at 336 pixels
OPTIONS = RenderOptions(NUM_PATCHES, IMAGE_SIZE, max_tokens=2048)
FEATURE_KEY = FeatureKey(tower="of nobody", image_size=IMAGE_SIZE, aspect=OPTIONS.aspect)
NUM_COMPARED = 16  # rows
OURS, OURS_ALONE, OFFICIAL = "ours, 1 of 8 ranks", "ours, the only rank", "official way"
OURS_SHARDS, OURS_FEATURES = "ours, tar shards", "ours, features made ahead"
LOADERS = (OURS, OURS_ALONE, OFFICIAL, OURS_SHARDS, OURS_FEATURES)


def open_steps(name: str, folder: Path, rows: str = "rows.json") -> StepDataset:
    """Open the rows as a stage of training does."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    file = folder / rows
    stores: dict[str, Any] = {}
    if name == OURS_FEATURES:
        stores["features"] = FeatureStore(folder / "features", FEATURE_KEY)
        stores["tokens"] = TokenStore(folder / "features", token_key(file, tokenizer, OPTIONS))
    images = folder / ("shards" if name == OURS_SHARDS else "images")
    dataset = ConversationDataset(file, images, tokenizer, OPTIONS, **stores)
    num_ranks = 1 if name == OURS_ALONE else NUM_RANKS
    return StepDataset(dataset, num_ranks * ROWS_PER_RANK, MICRO_BATCH_TOKENS, SEED, rank=0, num_ranks=num_ranks)


def our_loader(name: str, folder: Path) -> Callable[[int], tuple[int, int]]:
    """Return what makes a step and counts its samples and tokens."""
    steps = open_steps(name, folder)

    def make_share(step: int) -> tuple[int, int]:
        batches = steps[step].micro_batches
        return sum(len(batch.rows) for batch in batches), sum(batch.cu_seqlens[-1] for batch in batches)

    return make_share


class OfficialLoader:
    """Rows as official LLaVA reads them for training: `pad` pictures, template vicuna_v1.

    Note: of transformers' tokenizers the fast one is taken. The official code asks for the slow one, which later
    versions no longer have.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPImageProcessorPil, LlamaTokenizer

        self.tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=False, add_bos_token=True)
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        )
        self.ground = tuple(int(255 * mean) for mean in self.processor.image_mean)
        # "USER" takes more tokens at the start of a text than behind "</s>": one more in LLaMA's vocabulary.
        self.surplus = len(self.tokenize("USER")) - len(self.tokenize("</s>USER")) + 1
        self.images = folder / "images"
        self.rows = load_rows(folder / "rows.json")

    def load_batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ids, labels and a mask, each padded to the longest row, and pixels, zeros where there is no picture.

        An image is one token: the model puts its patches there.
        """
        rows = [self.rows[number] for number in numbers]
        texts = [self.render(row) for row in rows]
        input_ids, labels = (
            pad_sequence([torch.tensor(text[kind]) for text in texts], batch_first=True, padding_value=padding)
            for kind, padding in ((0, self.tokenizer.unk_token_id), (1, IGNORE_INDEX))
        )
        pixels = [
            self.load_pixels(row["image"]) if "image" in row else torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE) for row in rows
        ]
        return input_ids, labels, input_ids.ne(self.tokenizer.unk_token_id), torch.stack(pixels)

    def load_pixels(self, name: str) -> Tensor:
        """Return a picture on a square ground, as the processor makes it."""
        picture = Image.open(self.images / name).convert("RGB")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), self.ground)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return torch.as_tensor(np.asarray(self.processor(square)["pixel_values"][0]))

    def render(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return ids and labels: the whole text is tokenised, then every round of it for the labels' places."""
        texts = [turn["value"] for turn in row["conversations"]]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        text = f"{SYSTEM} " + "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in pairs)
        input_ids = self.tokenize(text)
        labels = [IGNORE_INDEX] * len(input_ids)
        place = 1
        for number, part in enumerate(text.split("</s>")[:-1]):
            question, separator, _ = part.partition(" ASSISTANT: ")
            surplus = self.surplus if number else 0
            answer = place + len(self.tokenize(question + separator)) - 2 - surplus
            place += len(self.tokenize(part)) - surplus
            labels[answer:place] = input_ids[answer:place]
        return input_ids, labels

    def tokenize(self, text: str) -> list[int]:
        """Return BOS and the ids of the text, its parts around images tokenised each on its own."""
        first, *others = (self.tokenizer(part)["input_ids"] for part in text.split(IMAGE_MARKER))
        return first + [token for part in others for token in (IMAGE_TOKEN_ID, *part[1:])]


def official_loader(folder: Path) -> Callable[[int], tuple[int, int]]:
    """Return what makes a padded batch of the rows that the only rank packs, and counts its samples and tokens."""
    loader = OfficialLoader(folder)
    order = np.random.default_rng((SEED, 0)).permutation(len(loader.rows))

    def make_share(step: int) -> tuple[int, int]:
        places = np.arange(step * ROWS_PER_RANK, (step + 1) * ROWS_PER_RANK) % len(order)
        input_ids, _, mask, _ = loader.load_batch(order[places].tolist())
        return len(places), int(mask.sum() + (input_ids == IMAGE_TOKEN_ID).sum() * (NUM_PATCHES - 1))

    return make_share


def compare_rows(folder: Path) -> None:
    """Assert that both ways give the same ids, labels and pixels."""
    dataset, official = open_steps(OURS_ALONE, folder).dataset, OfficialLoader(folder)
    whole = (number for number in range(len(dataset)) if not dataset.render(number).num_cut)
    for number in itertools.islice(whole, NUM_COMPARED):
        ours, (input_ids, labels) = dataset.render(number), official.render(official.rows[number])
        repeats = [NUM_PATCHES if token == IMAGE_TOKEN_ID else 1 for token in input_ids]
        assert np.array_equal(ours.input_ids, np.repeat(input_ids, repeats)), f"row {number}: other ids"
        expected = np.repeat(np.where(np.equal(input_ids, IMAGE_TOKEN_ID), IGNORE_INDEX, labels), repeats)
        assert np.array_equal(ours.labels, expected), f"row {number}: other labels"
        pixels, image = dataset.load_picture(number), dataset.image(number)
        if pixels is not None and image is not None:
            assert torch.equal(pixels, official.load_pixels(image)), f"row {number}: other pixels"
