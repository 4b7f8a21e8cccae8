"""A conversation file becomes questions with references, and three measures are what one counts by hand."""

import json
import random
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.prepare.prompts import make_conversation
from data.zh.publish import make_row
from data.zh.record import Record, Reply
from eval.conversations import CONVERSATIONS, character_f1, match_exactly, normalise, score_characters
from eval.task import Question, Scored, Task

COLOURS = [("What is it?", "A cat."), ("Which colour?", "Black and white."), ("Sure?", "Yes.")]


def row_of(pairs: Sequence[tuple[str, str]], image: str | None = "a.png", **more: Any) -> dict[str, Any]:
    if image is None:
        turns = [
            {"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        return {"conversations": turns, **more}
    return {"image": image, "conversations": make_conversation(pairs), **more}


def write_rows(folder: Path, rows: Sequence[object], name: str = "test.json") -> Path:
    folder.mkdir(exist_ok=True)
    for image in ("a.png", "b.png"):
        Image.new("RGB", (6, 4), "red").save(folder / image)
    content = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows, ensure_ascii=False)
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def open_rows(folder: Path, rows: Sequence[object], name: str = "test.json") -> Task:
    return CONVERSATIONS.open(write_rows(folder, rows, name), "official", None)


def list_scores(scored: Scored) -> dict[str, dict[str, float]]:
    return {kind: {name: part.score for name, part in parts.items()} for kind, parts in scored.parts.items()}


def make_question(answers: Sequence[str], number: int = 1, **kinds: str) -> Question:
    return Question(f"{number}/1", f"{number}.png", "?", ("?",), tuple(answers), {"turn": "first", **kinds})


@pytest.mark.parametrize("name", ["test.json", "test.jsonl"])
def test_every_answer_makes_a_question_behind_the_turns_before_it(tmp_path: Path, name: str) -> None:
    rows = [
        row_of(COLOURS, id="x", kind="detail", source="wikipedia", topic="animals", type=3),
        row_of([("Hello?", "Hi.")], None, id=7),
        row_of([("How many?", "two")], "b.png"),
        row_of([("Is it a dog?", "no")], answers=["no", "no, a cat"]),
    ]
    task = open_rows(tmp_path, rows, name)
    by_id = {question.question_id: question for question in task.questions}
    assert list(by_id) == ["x/1", "x/2", "x/3", "3/1", "7/1", "2/1"]
    assert by_id["x/1"].turns == ("What is it?",)
    assert by_id["x/3"].turns == ("What is it?", "A cat.", "Which colour?", "Black and white.", "Sure?")
    assert (by_id["x/3"].text, by_id["x/3"].answers) == ("Sure?", ("Yes.",))
    assert by_id["x/1"].kinds == {"kind": "detail", "source": "wikipedia", "turn": "first"}
    assert by_id["x/2"].kinds["turn"] == by_id["x/3"].kinds["turn"] == "later"
    assert by_id["3/1"].answers == ("no", "no, a cat")
    assert [question.image for question in task.questions] == ["a.png"] * 4 + ["", "b.png"]
    assert task.open_picture("b.png").size == (6, 4)
    assert (task.files, task.template) == ([tmp_path / name], "vicuna_v1")


def test_pictures_may_lie_elsewhere(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pictures", [row_of(COLOURS)]).rename(tmp_path / "test.json")
    assert len(CONVERSATIONS.open(file, "official", tmp_path / "pictures").questions) == 3
    with pytest.raises(FileNotFoundError) as raised:
        CONVERSATIONS.open(file, "official", None)
    assert str(raised.value) == (f"{file} names 1 pictures that are not in {tmp_path}: a.png (say --image-folder)")


def test_rows_as_the_chinese_data_set_is_published(tmp_path: Path) -> None:
    """Its kinds are what scores are broken down by."""
    record = Record(
        sha256="0" * 64, image="a.png", source="folder", title="砖", section="", text="", topic="建筑", page_url="",
        revision=0, image_url="", author="", license="CC0", license_url="",
    )  # fmt: skip
    reply = Reply("0" * 64, "short", "1", "model", (("这是什么？", "砖"), ("什么颜色？", "红色")))
    task = open_rows(tmp_path, [make_row(reply, record)])
    assert [question.question_id for question in task.questions] == [
        "0000000000000000-short/1",
        "0000000000000000-short/2",
    ]
    assert task.questions[0].turns == ("这是什么？\n请用一个词或短语回答问题。",)
    scored = CONVERSATIONS.count(task.questions, ["砖。", "深红"], "official")
    assert list(scored.parts["all"]) == ["character F1", "exact match", "VQA accuracy"]
    # 深红 and 红色 share one of four characters in all: 2 x 1 / 4.
    assert list_scores(scored) == {
        "all": {"character F1": 0.75, "exact match": 0.5, "VQA accuracy": 0.0},
        "kind": {"short": 0.75}, "source": {"folder": 0.75}, "turn": {"first": 1.0, "later": 0.5},
    }  # fmt: skip
    assert scored.credits == [1.0, 0.5]


def test_english_by_hand() -> None:
    questions = [
        make_question(["A cat."], 1, kind="name"),
        make_question(["two"], 2, kind="count"),
        make_question(["Yes"], 3, kind="count"),
        make_question(["猫"], 4),
    ]
    scored = CONVERSATIONS.count(questions, ["a cat", "2", "no", "猫！"], "official")
    assert list(scored.parts) == ["all", "kind", "turn"]
    assert list(scored.parts["all"]) == ["exact match", "character F1", "VQA accuracy"]
    scores = list_scores(scored)
    assert scores["all"]["exact match"] == 0.5
    # Articles go and "two" is 2 there, but the mark stays with the Chinese word.
    assert scores["all"]["VQA accuracy"] == 0.5
    assert scores["all"]["character F1"] == 0.5
    assert scores["kind"] == {"name": 1.0, "count": 0.0}
    assert scored.credits == [1.0, 0.0, 0.0, 1.0]
    assert scored.parts["all"]["exact match"].clusters == ("1.png", "2.png", "3.png", "4.png")


EQUAL = [
    ("Yes", " yes. "), ("YES!!", "yes"), ("是。", "是"), ("是！？", "是"), ("ＡＢＣ", "abc"), ("３.５", "3.5"),
    ("Straße", "STRASSE"), ("é", "e\u0301"), ("yes . ", "yes"), ("好\u3000", "好"), ("", "?"), ("好｡", "好"),
]  # fmt: skip
DIFFERENT = [("a cat", "cat"), ("two", "2"), ("是，", "是"), ("貓", "猫"), (".5", "5"), ("yes no", "yesno"), ("", "no")]


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_exact_match_forgives(first: str, second: str) -> None:
    assert match_exactly(first, [second, "something else"]) == match_exactly(second, [first]) == 1


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_exact_match_does_not_forgive(first: str, second: str) -> None:
    assert match_exactly(first, [second]) == match_exactly(second, [first]) == 0


F1 = [
    ("红色的圆", "红色的圆", 1.0),
    ("圆的红色", "红色，的圆。", 1.0),  # a bag: no order, no punctuation
    ("红色", "红色的圆", 2 * 2 / 6),
    ("红红", "红", 2 * 1 / 3),
    ("蓝", "红", 0.0),
    ("", "红", 0.0),
    ("。 ！", "", 1.0),
    ("ＡＢ c", "abC", 1.0),
    ("a+b", "a-b", 2 * 2 / 5),  # + is a sign of mathematics, - punctuation
]


@pytest.mark.parametrize(("first", "second", "expected"), F1)
def test_character_f1_by_hand(first: str, second: str, expected: float) -> None:
    assert character_f1(first, second) == pytest.approx(expected)
    assert score_characters(first, ["zzz", second]) == pytest.approx(expected)


def test_properties_of_character_f1() -> None:
    """Symmetric, between 0 and 1, 1 for the same characters in any order and for no others."""
    random.seed(1)
    for _ in range(3000):
        first, second = ("".join(random.choices("红蓝ab A，。 ", k=random.randrange(6))) for _ in range(2))
        value = character_f1(first, second)
        assert value == character_f1(second, first)
        assert 0 <= value <= 1
        bags = [sorted(c for c in text.lower() if c not in "，。 ") for text in (first, second)]
        assert (value == 1) == (bags[0] == bags[1])
        assert (value == 0) == (bags[0] != bags[1] and not set(bags[0]) & set(bags[1]))
        assert value >= match_exactly(first, [second])
        assert character_f1("".join(random.sample(first, len(first))), first) == 1


def test_normalising_twice_is_normalising_once() -> None:
    random.seed(2)
    for _ in range(3000):
        text = "".join(
            chr(random.choice([random.randrange(32, 0x3100), random.randrange(0xFF00, 0xFFEF)])) for _ in "12345"
        )
        assert normalise(normalise(text)) == normalise(text)
        assert normalise(unicodedata.normalize("NFD", text)) == normalise(text)


def test_more_answers_are_alternatives() -> None:
    questions = [make_question(["sofa", "couch", "couch", "a couch"])]
    scores = list_scores(CONVERSATIONS.count(questions, ["Couch"], "official"))
    assert scores["all"]["exact match"] == scores["all"]["character F1"] == 1.0
    # Three of four say couch: each of these left out leaves 2 others, sofa left out leaves 3; (3 x 2/3 + 1) / 4.
    assert scores["all"]["VQA accuracy"] == pytest.approx(0.75)


def test_questions_without_a_picture_are_drawn_one_by_one(tmp_path: Path) -> None:
    task = open_rows(tmp_path, [row_of([("?", "yes")], None), row_of([("?", "yes")], None)])
    scored = CONVERSATIONS.count(task.questions, ["yes", "no"], "official")
    assert len(scored.parts["all"]["exact match"].clusters) == 2


GOOD = row_of([("What?", "This.")], id="1")
BAD_ROWS: Mapping[str, tuple[list[object], str]] = {
    "no conversation": ([GOOD, {"id": "2"}], "row 1: expected an object with a list 'conversations'"),
    "a question at the end": (
        [{"conversations": [{"from": "human", "value": "?"}]}],
        "row 0: a conversation needs a question (human) and an answer (gpt)",
    ),
    "an id twice": ([GOOD, row_of(COLOURS, id=1)], "row 1: the id '1' is there twice, first in row 0"),
    "a row's number as id": ([row_of(COLOURS, id=1), row_of(COLOURS)], "row 1: the id '1' is there twice"),
    "a list as id": ([row_of(COLOURS, id=[1])], "row 0: 'id' is [1], expected a text or a number"),
    "a late picture": (
        [{"image": "a.png", "conversations": [
            {"from": who, "value": text}
            for who, text in (("human", "Hi"), ("gpt", "Hi"), ("human", "<image>?"), ("gpt", "A cat"))
        ]}],
        "row 0: the picture comes with a later question, expected it with the first",
    ),
    "another template": (
        [row_of(COLOURS, template="plain")], "row 0: 'template' is 'plain', but all rows are asked with vicuna_v1",
    ),
    "one answer as a text": ([GOOD | {"answers": "This"}], "row 0: 'answers' is 'This', expected a list of texts"),
    "no answers": ([GOOD | {"answers": []}], "row 0: 'answers' is [], expected a list of texts"),
    "answers to which question": (
        [row_of(COLOURS, answers=["yes"])], "row 0: the row has 'answers' and several questions: make a row of each",
    ),
    "a path that leads out": (
        [row_of(COLOURS, "../a.png")], "question 0/1: image '../a.png' leads out of the image folder",
    ),
    "no rows": ([], "holds no rows, expected a list of conversations"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path: Path, name: str) -> None:
    rows, message = BAD_ROWS[name]
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        open_rows(tmp_path, rows)
    assert message in str(raised.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data file .*none\.json is missing"):
        CONVERSATIONS.open(tmp_path / "none.json", "official", None)
    with pytest.raises(ValueError, match=r"is a folder, expected a conversation file: name one, like .*test\.json"):
        CONVERSATIONS.open(tmp_path, "official", None)
    file = write_rows(tmp_path, [GOOD, GOOD])
    file.write_text(file.read_text()[:-30])
    with pytest.raises(ValueError, match=r"test\.json is not JSON"):
        CONVERSATIONS.open(file, "official", None)


def test_missing_pictures_are_counted_and_named(tmp_path: Path) -> None:
    rows = [row_of(COLOURS, f"{number}.png", id=number) for number in range(5)]
    with pytest.raises(
        FileNotFoundError, match=r"names 5 pictures that are not in .*: 0\.png, 1\.png, 2\.png, \.\.\. \("
    ):
        open_rows(tmp_path, rows)
