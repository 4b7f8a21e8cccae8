"""Shared trunks, rows that make room and tokens laid end to end are shortcuts: every answer is that of asking alone."""

import copy
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import eval.predict
from data.conversation import Turn, render_conversation
from data.image import preprocess_image
from data.tokenizer import Tokenizer
from eval.predict import Answer, answer_questions, choose_num_branches
from eval.task import Question
from model.config import LlavaConfig
from model.generate import BRANCH_SLOTS, BranchedCache, extend_branches, generate
from model.llama import LlamaConfig
from model.llava import Llava
from model.vision import VisionConfig
from model.weights import load_llava
from tests.conftest import TINY_TOKENIZER
from tests.model.small_llava import randomize_weights

MAX_NEW_TOKENS = 9
WORDS = ["what", "which", "color", "shape", "is", "the", "circle", "red", "or", "a", "blue", "picture", "yes", "many"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY_TOKENIZER)


@pytest.fixture(scope="module")
def llava(tokenizer: Tokenizer) -> Llava:
    """Two heads share each key; with the head's row of EOS made longer, about one token in seven is an end."""
    model = Llava(
        LlavaConfig(
            vision=VisionConfig(
                image_size=16, patch_size=8, hidden_size=24, intermediate_size=40,
                num_hidden_layers=2, num_attention_heads=2, layer_norm_eps=1e-5, select_layer=-2,
            ),
            text=LlamaConfig(
                vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=400, rms_norm_eps=1e-5,
                rope_theta=1000.0,
            ),
        )
    ).eval()  # fmt: skip
    randomize_weights(model, seed=2)
    with torch.no_grad():
        model.language_model.lm_head.weight[tokenizer.eos_token_id] *= 2.5
    return model


def open_picture(name: str) -> Image.Image:
    """Make a picture of its name: noise, not square."""
    noise = np.random.default_rng(int(name)).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def make_questions(counts: Sequence[int], seed: int, num_texts: int = 0) -> list[Question]:
    """Make so many questions about each picture, some behind earlier turns, and some without a picture in between."""
    draw = random.Random(seed)
    names = [str(number) for number, count in enumerate(counts) for _ in range(count)]
    for _ in range(num_texts):
        names.insert(draw.choice([0, len(names), sum(counts[:1])]), "")
    return [
        Question(
            f"q{index}", name, "", tuple(" ".join(draw.choices(WORDS, k=draw.choice([1, 3, 8]))) for _ in range(n))
        )
        for index, (name, n) in enumerate(zip(names, draw.choices([1, 1, 1, 3], k=len(names)), strict=True))
    ]


def answer_alone(model: Llava, tokenizer: Tokenizer, question: Question) -> Answer:
    turns = [
        Turn(("human", "gpt")[number % 2], text, has_image=bool(question.image) and number == 0)
        for number, text in enumerate(question.turns)
    ]
    ids = render_conversation(turns, tokenizer, model.config.vision.num_patches).input_ids
    pixels = preprocess_image(open_picture(question.image), 16)[None] if question.image else None
    (answer,) = generate(model, [torch.tensor(ids)], pixels, tokenizer.eos_token_id, MAX_NEW_TOKENS)
    return Answer(tokenizer.decode(answer).strip(), len(ids), len(answer))


def answer_all(model: Llava, tokenizer: Tokenizer, questions: Sequence[Question], **options: Any) -> list[Answer]:
    """Return the answers in order; every question must have just one."""
    pairs = list(answer_questions(model, tokenizer, questions, open_picture, MAX_NEW_TOKENS, **options))
    assert sorted(index for index, _ in pairs) == list(range(len(questions)))
    return [answer for _, answer in sorted(pairs, key=lambda pair: pair[0])]


COUNTS = [(5, 5, 6, 5, 6), (1, 1, 13, 2, 1, 1, 1), (9,)]


@pytest.fixture(scope="module", params=range(len(COUNTS)))
def asked(request: pytest.FixtureRequest, llava: Llava, tokenizer: Tokenizer) -> tuple[list[Question], list[Answer]]:
    """Questions, and their answers one by one."""
    questions = make_questions(COUNTS[request.param], seed=request.param, num_texts=6)
    return questions, [answer_alone(llava, tokenizer, question) for question in questions]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 32])
def test_answers_are_those_of_asking_one_by_one(
    llava: Llava, tokenizer: Tokenizer, asked: tuple[list[Question], list[Answer]], batch_size: int
) -> None:
    questions, expected = asked
    assert answer_all(llava, tokenizer, questions, batch_size=batch_size) == expected
    lengths = {answer.num_tokens for answer in expected}
    assert MAX_NEW_TOKENS in lengths  # some do not end by themselves,
    assert len(lengths) > 3  # and the others end at different times


def test_long_prompts_run_by_themselves(
    llava: Llava, tokenizer: Tokenizer, asked: tuple[list[Question], list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for 40 tokens in a pass, one or few questions at a time, and one picture."""
    questions, expected = asked
    monkeypatch.setattr(eval.predict, "MAX_TOKENS_AT_ONCE", 40)
    assert answer_all(llava, tokenizer, questions, batch_size=12) == expected


def test_template_is_the_given_one(llava: Llava, tokenizer: Tokenizer) -> None:
    questions = make_questions([2], seed=1)
    first, second = (
        [answer.num_prompt_tokens for answer in answer_all(llava, tokenizer, questions, template=template)]
        for template in ("vicuna_v1", "llava_v1")
    )
    for question, number in zip(questions, second, strict=True):
        turns = [
            Turn(("human", "gpt")[index % 2], text, has_image=index == 0) for index, text in enumerate(question.turns)
        ]
        assert number == len(render_conversation(turns, tokenizer, 4, "llava_v1"))
    assert first != second


class Script:
    """Stands in for the model's passes through branches: answers are as long as is said, and passes are noted."""

    def __init__(self, end: int, num_tokens: Callable[[Sequence[int]], int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.end, self.num_tokens = end, num_tokens
        self.left: dict[int, int] = {}  # tokens that each row's answer still has to come
        self.passes: list[int] = []  # how many rows each had
        self.caches: set[BranchedCache] = set()
        monkeypatch.setattr(eval.predict, "extend_branches", self)

    def __call__(self, model: Llava, cache: BranchedCache, rows: Sequence[int], tokens: Sequence[list[int]]) -> Tensor:
        self.passes.append(len(rows))
        self.caches.add(cache)
        self.left |= {row: self.num_tokens(tokens[i]) for i, row in enumerate(rows) if cache.lengths[row] == 0}
        logits = torch.zeros_like(extend_branches(model, cache, rows, tokens))
        for place, row in enumerate(rows):
            logits[place, 7 if self.left[row] else self.end] = 1
            self.left[row] -= 1
        return logits


def test_rows_that_end_make_room(llava: Llava, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 answers in 8 rows (4 pictures, 2 questions about each) one has 29 tokens, the others 1; an end follows.

    The long one, fourth about its picture, begins in the third pass and ends in pass 2 + 30. Meanwhile 7 rows or more
    go on; 8 after 8 in lockstep, the passes would be 30 + 4 * 2.
    """
    texts = ["what " * (20 if index == 3 else 1) for index in range(40)]
    questions = [Question(str(index), str(index // 5), "", (text,)) for index, text in enumerate(texts)]
    script = Script(tokenizer.eos_token_id, lambda prompt: 29 if len(prompt) > 25 else 1, monkeypatch)
    answers = list(answer_questions(llava, tokenizer, questions, open_picture, 50, batch_size=8))
    assert len(script.passes) == 2 + 30
    assert sum(script.passes) == 39 * 2 + 30
    assert answers[-1][0] == 3
    assert [answer.num_tokens for _, answer in answers] == [1] * 39 + [29]


def test_trunk_is_stored_once(llava: Llava, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """15 questions about each of 9 pictures, 60 at a time: 4 trunks in work, each read by 15 branches."""
    questions = make_questions([15] * 9, seed=3)
    script = Script(tokenizer.eos_token_id, lambda prompt: 2, monkeypatch)
    answer_all(llava, tokenizer, questions, batch_size=60)
    (cache,) = script.caches
    length = _trunk_length(tokenizer)
    for trunk, branches in zip((*cache.trunk_keys, *cache.trunk_values), (*cache.keys, *cache.values), strict=True):
        assert trunk.shape == (4, 2, length, 8)
        assert branches.shape[:3] == (4, 15, 2)
        assert branches.shape[3] <= BRANCH_SLOTS * 2  # the longest prompt behind a picture, and what its answer takes


def _trunk_length(tokenizer: Tokenizer) -> int:
    ids = render_conversation([Turn("human", "", has_image=True)], tokenizer, 4).input_ids
    return ids.index(-200) + 4


@pytest.mark.parametrize(
    ("counts", "batch_size", "expected"),
    [
        ([5, 5, 6, 5, 6], 32, 6),  # 5 trunks; 5 of each would make 2 of the 5 pictures come to a second turn
        ([1] * 100, 32, 1),
        ([31] * 100, 32, 8),  # 4 pictures in work
        ([31], 32, 31),  # there is but one
        ([100], 32, 25),
        ([1, 1, 1, 1, 1, 1, 20], 32, 2),  # of 4 the 6 others would leave 18 rows idle
        ([6, 6], 1, 1),
    ],
)
def test_number_of_branches(counts: list[int], batch_size: int, expected: int) -> None:
    assert choose_num_branches(counts, batch_size) == expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("image a/2 is missing"), "^picture 2: image a/2 is missing$"),
        (ValueError("cannot read it"), "^picture 2: cannot read it$"),
    ],
)
def test_picture_that_cannot_be_read_is_named(
    llava: Llava, tokenizer: Tokenizer, error: Exception, message: str
) -> None:
    """What is asked about the pictures before it has its answers by then, as far as they were not in work with it."""

    def fail(name: str) -> Image.Image:
        if name == "2":
            raise error
        return open_picture(name)

    questions = make_questions([1, 1, 1, 1], seed=4)
    answered: list[int] = []
    with pytest.raises(ValueError, match=message):
        answered += (
            index for index, _ in answer_questions(llava, tokenizer, questions, fail, MAX_NEW_TOKENS, batch_size=1)
        )
    assert answered == [0, 1]


def test_reader_may_stop(llava: Llava, tokenizer: Tokenizer) -> None:
    """Then no more pictures are read, and the thread that reads them ends."""
    read: list[str] = []

    def note(name: str) -> Image.Image:
        read.append(name)
        return open_picture(name)

    before = threading.active_count()
    answers = answer_questions(llava, tokenizer, make_questions([1] * 50, seed=5), note, 2, batch_size=2)
    next(answers)
    assert threading.active_count() == before + 1
    del answers
    for _ in range(200):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before
    assert len(read) < 10


def test_question_that_is_too_long_is_named_before_anything_is_answered(llava: Llava, tokenizer: Tokenizer) -> None:
    questions = make_questions([2], seed=6)
    long = Question("q7", "0", "", ("what " * 400,))
    length = len(render_conversation([Turn("human", long.turns[0], True)], tokenizer, 4))
    message = (
        f"question q7 has {length} tokens, and an answer of 9 more would exceed the model's 400 positions: "
        "shorten the question or max_new_tokens"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        next(answer_questions(llava, tokenizer, [*questions, long], open_picture, MAX_NEW_TOKENS))


def test_answer_may_fill_the_model_to_its_last_position(llava: Llava, tokenizer: Tokenizer) -> None:
    (question,) = make_questions([1], seed=7)
    length = len(render_conversation([Turn("human", question.turns[0], True)], tokenizer, 4))
    room = 400 - length
    with torch.no_grad():
        model = copy.deepcopy(llava)
        model.language_model.lm_head.weight[tokenizer.eos_token_id] = 0
    ((_, answer),) = answer_questions(model, tokenizer, [question], open_picture, room)
    assert answer.num_tokens <= room
    with pytest.raises(ValueError, match="would exceed the model's 400 positions"):
        next(answer_questions(model, tokenizer, [question], open_picture, room + 1))


def test_nothing_to_ask_is_nothing_to_answer(llava: Llava, tokenizer: Tokenizer) -> None:
    assert list(answer_questions(llava, tokenizer, [], open_picture, MAX_NEW_TOKENS)) == []
    with pytest.raises(ValueError, match="max_new_tokens = 0 and batch_size = 32, expected at least 1 of each"):
        list(answer_questions(llava, tokenizer, [], open_picture, 0))


def test_bf16_and_quantised_weights_answer_alike(tiny_model_folder: Path) -> None:
    """The first token at least is mostly that of asking alone: they round differently."""
    tokenizer, questions = Tokenizer(TINY_TOKENIZER), make_questions([3, 2], seed=8)
    for bits in (16, 8, 4):
        model = load_llava(tiny_model_folder, dtype=torch.bfloat16, bits=bits)
        answers = answer_all(model, tokenizer, questions)
        assert all(0 < answer.num_tokens <= MAX_NEW_TOKENS for answer in answers)
