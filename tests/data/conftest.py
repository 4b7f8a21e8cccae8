"""What the tests of this room share: two vocabularies, in two kinds of file, and a small data set of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from data.dataset import ConversationDataset, RenderOptions
from data.tokenizer import Tokenizer
from tests.conftest import ROOT, TINY_TOKENIZER
from tests.data.tokenizer_json import write_tokenizer_json

LLAMA_TOKENIZER = ROOT.parent / "shared/data/llama_tokenizer/tokenizer.model"
PICTURE_SIZES = ((30, 20), (20, 30), (24, 24), (9, 41), (40, 13))

MakeDataset = Callable[..., ConversationDataset]


@pytest.fixture(scope="session")
def tiny_processor() -> sentencepiece.SentencePieceProcessor:
    """SentencePiece itself, the oracle, with the committed vocabulary of 768 pieces."""
    return sentencepiece.SentencePieceProcessor(model_file=str(TINY_TOKENIZER))


@pytest.fixture(scope="session")
def llama_processor() -> sentencepiece.SentencePieceProcessor:
    """The same with LLaMA's own vocabulary; its licence keeps it out of the repository."""
    if not LLAMA_TOKENIZER.is_file():
        pytest.skip(f"LLaMA's tokenizer is not at {LLAMA_TOKENIZER}")
    return sentencepiece.SentencePieceProcessor(model_file=str(LLAMA_TOKENIZER))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(TINY_TOKENIZER)


@pytest.fixture(scope="session")
def llama_tokenizer(llama_processor: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    return Tokenizer(LLAMA_TOKENIZER)


@pytest.fixture(scope="session")
def tiny_json_tokenizer(
    tiny_processor: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """The vocabulary as llava-hf writes it, with <image> and <pad> behind its pieces."""
    return Tokenizer(write_tokenizer_json(tiny_processor, "llava_hf", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def llama_json_tokenizer(
    llama_processor: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer(write_tokenizer_json(llama_processor, "llava_hf", tmp_path_factory.mktemp("llama")))


@pytest.fixture(params=["tiny", "llama", "tiny_json", "llama_json"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Both vocabularies, from both kinds of file, one after the other."""
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def processor(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece with the vocabulary of `tokenizer`."""
    return request.getfixturevalue(f"{'tiny' if tokenizer.vocab_size == 768 else 'llama'}_processor")


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, so that no two pictures, shifts or mirrorings look alike."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate(PICTURE_SIZES):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def make_dataset(tmp_path: Path, picture_folder: Path, tiny_tokenizer: Tokenizer) -> MakeDataset:
    """Write rows to a file and open it: `make_dataset(rows, "x.jsonl", max_tokens=9)`."""

    def make(rows: list[dict], name: str = "rows.json", **options: Any) -> ConversationDataset:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\n".join(lines) + "\n" if name.endswith(".jsonl") else "[" + ",\n".join(lines) + "]"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        chosen: dict[str, Any] = {"tokens_per_image": 3, "image_size": 14, **options}
        return ConversationDataset(tmp_path / name, picture_folder, tiny_tokenizer, RenderOptions(**chosen))

    return make


@pytest.fixture(scope="session")
def eleven_rows() -> list[dict]:
    """Rows of many lengths, with a picture and without, one answer and several."""
    rows: list[dict] = []
    for number in range(11):
        turns = []
        for question in range(1 + number % 3):
            text = f"question {number} {question} " + "is there a circle? " * ((number * 5) % 7)
            turns += [{"from": "human", "value": text}, {"from": "gpt", "value": f"answer {number} {question}"}]
        row: dict = {"id": f"row-{number}", "conversations": turns}
        if number % 4:
            row["image"] = f"{number % len(PICTURE_SIZES)}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append(row)
    return rows
