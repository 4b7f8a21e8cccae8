"""VQA-v2's training questions: from files in their owners' format to conversations."""

import json
import random
from pathlib import Path

import pytest

from data.conversation import parse_turns
from data.prepare import vqav2
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.prompts import SHORT_ANSWER_SUFFIX
from data.prepare.report import Report
from tests.data.prepare.owners_files import VQA_QUESTIONS, write_coco, write_vqa

ALL_ALLOWED = Leaks(is_allowed=True)
SUFFIX = SHORT_ANSWER_SUFFIX["en"]


def prepare(root: Path, options: Options | None = None, leaks: Leaks = ALL_ALLOWED) -> tuple[list[dict], Report]:
    report = Report("vqav2")
    return list(vqav2.read(root, options or Options(), leaks, report)), report


def list_pairs(row: dict) -> list[tuple[str, str]]:
    """Return the questions, without marker and request, and the answers of a row."""
    texts = [turn.text.removesuffix(SUFFIX) for turn in parse_turns(row)]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_the_questions_of_a_picture_become_one_conversation(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    rows, report = prepare(tmp_path)
    assert [row["id"] for row in rows] == ["vqav2-9", "vqav2-25", "vqav2-36"]
    assert rows[0]["image"] == "train2014/COCO_train2014_000000000009.jpg"
    assert sorted(list_pairs(rows[0])) == sorted(VQA_QUESTIONS[9])
    assert sorted(list_pairs(rows[2])) == sorted(VQA_QUESTIONS[36])
    assert {(row["source"], row["lang"], row["license"]) for row in rows} == {("vqav2", "en", "CC BY 4.0")}
    assert report.read == 4  # pictures
    assert [entry["name"] for entry in report.inputs] == [vqav2.ANSWERS_FILE, vqav2.QUESTIONS_FILE]
    assert report.dropped["picture: no question with an answer"] == 1


def test_the_first_question_asks_for_short_answers(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    for row in prepare(tmp_path)[0]:
        first, *others = [turn.text for turn in parse_turns(row)][::2]
        assert first.endswith("?" + SUFFIX)
        assert all(question.endswith("?") for question in others)
    zh = prepare(tmp_path, Options(language="zh"))[0][0]
    assert zh["conversations"][0]["value"].endswith("?" + SHORT_ANSWER_SUFFIX["zh"])
    assert zh["lang"] == "zh"


def test_the_order_is_the_stated_one(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    orders = []
    for seed in range(6):
        pairs = list(VQA_QUESTIONS[36])
        random.Random(f"{seed}:vqav2:36").shuffle(pairs)
        rows, _ = prepare(tmp_path, Options(seed))
        assert list_pairs(rows[-1]) == pairs
        orders.append(json.dumps(rows))
    assert len(set(orders)) > 3
    assert json.dumps(prepare(tmp_path, Options(0))[0]) == orders[0]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    write_vqa(tmp_path, without_answer=[9000, 36001], without_question=[9001])
    rows, report = prepare(tmp_path)
    assert report.dropped == {
        "answer: no question to it is listed": 1,
        "picture: no question with an answer": 1,
        "question: asked twice": 2,
        "question: its answer is empty": 1,
        "question: no answer to it is listed": 2,
    }
    num_questions = sum(map(len, VQA_QUESTIONS.values())) - 1
    left_out = sum(count for reason, count in report.dropped.items() if reason.startswith("question:"))
    assert sum(len(list_pairs(row)) for row in rows) == num_questions - left_out
    assert sorted(list_pairs(rows[1])) == [("How many giraffes are there?", "2"), ("Is it sunny?", "yes")]


def test_a_picture_asked_very_much_about_is_cut(tmp_path: Path) -> None:
    write_vqa(tmp_path, {9: [(f"Is it {number}?", "yes") for number in range(vqav2.MAX_QUESTIONS + 3)]})
    (row,), report = prepare(tmp_path)
    assert len(list_pairs(row)) == vqav2.MAX_QUESTIONS
    assert report.dropped == {f"question: beyond {vqav2.MAX_QUESTIONS} of one picture": 3}


def test_pictures_may_lie_in_train2017(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    (tmp_path / "train2017").mkdir()
    rows, report = prepare(tmp_path)
    assert rows[0]["image"] == "train2017/000000000009.jpg"
    assert report.notes == ["pictures are named as in train2017/"]
    (tmp_path / "train2014").mkdir()
    assert prepare(tmp_path)[0][0]["image"] == "train2014/COCO_train2014_000000000009.jpg"


def test_excluded_pictures_are_left_out(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    write_coco(tmp_path, "val2014", {42: []})
    write_coco(tmp_path, "val2017", {36: []})
    rows, report = prepare(tmp_path, leaks=Leaks([tmp_path]))
    assert [row["id"] for row in rows] == ["vqav2-9", "vqav2-25"]
    assert report.dropped["in COCO val2017"] == 1
    assert report.read == len(rows) + 2


@pytest.mark.parametrize("subtype", ["val2014", "test2015", "test-dev2015"])
def test_files_of_other_splits_are_refused(tmp_path: Path, subtype: str) -> None:
    write_vqa(tmp_path, subtype=subtype)
    with pytest.raises(ValueError, match=rf"annotations\.json has data_subtype {subtype}, expected train2014"):
        prepare(tmp_path)


def test_the_split_stands_before_or_after_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vqa(tmp_path)
    monkeypatch.setattr(vqav2, "HEADER_BYTES", 300)
    assert len(prepare(tmp_path)[0]) == 3
    monkeypatch.setattr(vqav2, "HEADER_BYTES", 20)
    with pytest.raises(ValueError, match=r"annotations\.json has data_subtype none"):
        prepare(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    (tmp_path / vqav2.QUESTIONS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=vqav2.QUESTIONS_FILE):
        prepare(tmp_path)
