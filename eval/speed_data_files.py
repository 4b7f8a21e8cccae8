"""What `--suite data` reads: pictures, rows and annotations of published formats and sizes, made up."""

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.conversation import IMAGE_MARKER
from data.feature_store import (
    PICTURES_PER_SHARD,
    arrange_names,
    features_file,
    finish_store,
    start_store,
    write_tensors,
)
from data.features import hash_file, token_key, write_tokens
from data.pictures import PictureFolder
from data.rows import RowWriter
from data.shards import write_shards
from eval.speed_data_loading import FEATURE_KEY, HIDDEN_SIZE, NUM_PATCHES, OPTIONS, OURS, SEED, open_steps
from eval.speed_padding import MEAN_TEXT_TOKENS, TOKENS_PER_WORD, draw_lengths

PICTURE_SIZES = ((640, 480), (480, 640))  # pixels; COCO's
# Random fields: the side of their cells in pixels, and their part in the picture. As JPEG 150 KB, as photos are.
FIELDS = ((160, 0.7), (32, 0.4), (8, 0.25), (2, 0.2), (1, 0.13))
TEXT = """
a the this that of in on with behind beside two three several many small large young old wooden red green blue white
black colorful man woman child people dog cat horse elephant zebra giraffe bird train bus bicycle motorcycle airplane
truck boat street corner kitchen refrigerator microwave sandwich broccoli pizza table umbrella suitcase skateboard
surfboard snowboard tennis baseball frisbee laptop keyboard clock mountain beach building window sitting standing
walking holding wearing looking riding parked covered surrounded appears suggests atmosphere background enjoying
activity various positioned scene while near there are is and
"""
WORDS = np.array(TEXT.split())
NEW_WORDS = 1 / 30  # share of a text's words that are nowhere else, so that remembering words does not help with them
NEW_WORD_LETTERS = 7
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
PROMPT_TOKENS = 60  # of a row: the system prompt, roles and ends
MAX_QUESTIONS = 5  # of a row
MIN_WORDS = 5 * MAX_QUESTIONS


@dataclass(frozen=True)
class Sizes:
    """How much of everything is made and measured."""

    pictures: int
    conversations: int
    steps: int  # in a round of loading
    training_steps: int
    coco_pictures: int  # with five captions each
    genome_pictures: int  # with 16 questions each
    rows: int  # of the file that is opened


FULL = Sizes(PICTURES_PER_SHARD, 2048, 12, 24, 20_000, 5000, rows=665_298)  # the rows of LLaVA's mixture, published
TINY = Sizes(10, 160, 1, 3, 50, 20, rows=300)


def make_files(folder: Path, sizes: Sizes, num_rows: int) -> None:
    """Write all that is read later on."""
    generator = np.random.default_rng(SEED)
    names = [f"coco/train2017/{number:012d}.jpg" for number in range(1, sizes.pictures + 1)]
    (folder / "images/coco/train2017").mkdir(parents=True)
    for name, size in zip(names, itertools.cycle(PICTURE_SIZES)):
        make_picture(*size, generator).save(folder / "images" / name, quality=90)
    write_rows(folder / "rows.json", names, sizes.conversations, sizes.conversations, generator)
    write_rows(folder / "many.json", names, sizes.conversations, num_rows, generator)
    write_annotations(folder, sizes, generator)
    pictures = PictureFolder(folder / "images")
    num_bytes = sum(map(pictures.measure, names))
    write_shards(names, pictures, folder / "shards", num_bytes // 4, SEED)
    encode_ahead(folder, names)


def make_picture(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """Return smooth shapes with finer and finer ones on them, and noise."""
    pixels = np.full((height, width, 3), 128, dtype=np.float32)
    for cell, part in FIELDS:
        cells = generator.integers(0, 256, (height // cell, width // cell, 3), dtype=np.uint8)
        field = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
        pixels += part * (np.asarray(field, dtype=np.float32) - 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_rows(
    file: Path, names: Sequence[str], num_conversations: int, num_rows: int, generator: np.random.Generator
) -> None:
    """Write rows with so many different conversations, in one order again and again."""
    lengths = draw_lengths(MEAN_TEXT_TOKENS[1], num_conversations, generator)
    texts = lengths.tokens - NUM_PATCHES * lengths.has_image  # what is left of those that were cut
    rows: list[dict[str, Any]] = []
    for number, (tokens, has_image) in enumerate(zip(texts.tolist(), lengths.has_image.tolist(), strict=True)):
        num_words = max(MIN_WORDS, round((tokens - PROMPT_TOKENS) / TOKENS_PER_WORD))
        conversation = make_conversation(num_words, has_image, generator)
        image = {"image": names[number % len(names)]} if has_image else {}
        rows.append({"id": "", **image, "conversations": conversation})
    with RowWriter(file) as writer:
        for number in range(num_rows):
            writer.write(rows[number % len(rows)] | {"id": f"{number:012d}"})


def make_conversation(num_words: int, has_image: bool, generator: np.random.Generator) -> list[dict[str, str]]:
    """Return questions, each a quarter as long as its answer."""
    num_questions = int(generator.integers(1, MAX_QUESTIONS + 1))
    share = num_words // num_questions
    turns = []
    for number in range(num_questions):
        marker = f"{IMAGE_MARKER}\n" if has_image and number == 0 else ""
        question, answer = write_text(share // 5, generator), write_text(share - share // 5, generator)
        turns += [{"from": "human", "value": f"{marker}{question}?"}, {"from": "gpt", "value": f"{answer}."}]
    return turns


def write_text(num_words: int, generator: np.random.Generator) -> str:
    words = WORDS[generator.integers(0, len(WORDS), num_words)].tolist()
    for place in np.flatnonzero(generator.random(num_words) < NEW_WORDS):
        words[place] = "".join(LETTERS[generator.integers(0, len(LETTERS), NEW_WORD_LETTERS)])
    return " ".join(words).capitalize()


def write_annotations(folder: Path, sizes: Sizes, generator: np.random.Generator) -> None:
    """Write the owners' files of COCO, a third of its ids excluded as val2014's are, and of Visual Genome."""
    text = functools.partial(write_text, generator=generator)
    ids = range(1, sizes.coco_pictures + 1)
    licenses = [{"id": 1, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}]
    images = [
        {"license": 1, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640, "flickr_url": "", "id": i}
        for i in ids
    ]
    captions = [{"image_id": i, "id": 5 * i + k, "caption": text(10)} for i in ids for k in range(5)]
    train = {"info": {}, "licenses": licenses, "images": images, "annotations": captions}
    for split, content in (
        ("train2017", train),
        ("val2014", {"images": images[::3]}),
        ("val2017", {"images": images[::24]}),
    ):
        _write_json(folder / f"coco/annotations/captions_{split}.json", content)
    pictures, questions = [], []
    for i in range(1, sizes.genome_pictures + 1):
        part = {"synsets": ["man.n.01"], "h": 75, "object_id": i, "names": ["man"], "w": 63, "y": 12, "x": 421}
        pairs = [
            {"a_objects": [part], "question": f"{text(6)}?", "image_id": i, "qa_id": i, "answer": f"{text(2)}.",
             "q_objects": [part, part]} for _ in range(16)
        ]  # fmt: skip
        url = f"https://cs.stanford.edu/people/rak248/VG_100K_2/{i}.jpg"
        pictures.append({"image_id": i, "url": url, "width": 800, "height": 600, "coco_id": None, "flickr_id": None})
        questions.append({"id": i, "qas": pairs})
    _write_json(folder / "visual_genome/image_data.json", pictures)
    _write_json(folder / "visual_genome/question_answers.json", questions)


def _write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def encode_ahead(folder: Path, names: Sequence[str]) -> None:
    """Write rows and features as `data.features` does, but for the tower: the features are zeros."""
    dataset = open_steps(OURS, folder).dataset
    out, pictures = folder / "features", PictureFolder(folder / "images")
    key = asdict(FEATURE_KEY) | asdict(token_key(dataset.file, dataset.tokenizer, OPTIONS))
    start_store(out, key)
    write_tokens(dataset, out, shards=[0], num_workers=0, is_shown=False)
    digests = [bytearray.fromhex(hash_file(pictures.folder / name)) for name in names]
    tensors = {
        "features": torch.zeros(len(names), NUM_PATCHES, HIDDEN_SIZE, dtype=torch.bfloat16),
        "sha256": torch.stack([torch.frombuffer(digest, dtype=torch.uint8) for digest in digests]),
        "names": arrange_names(names),
    }
    write_tensors(features_file(out, 0), tensors)
    finish_store(out, key, [names], len(dataset.rows), NUM_PATCHES, HIDDEN_SIZE)
