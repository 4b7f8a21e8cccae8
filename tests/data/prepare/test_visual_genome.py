"""Visual Genome's questions: from files in their owners' format, flaws included, to conversations."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from data.conversation import parse_turns
from data.prepare import visual_genome
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.prompts import SHORT_ANSWER_SUFFIX
from data.prepare.report import Report
from tests.data.prepare.owners_files import dump, write_coco

ALL_ALLOWED = Leaks(is_allowed=True)
URL = "https://cs.stanford.edu/people/rak248/{}/{}.jpg"
QUESTIONS: dict[int, list[tuple[str, str]]] = {
    1: [
        ("What color is the clock?", "Green."),
        ("Who is on the sidewalk?", "A  man\n."),
        ("What is the man\u2019s shirt like? ", " \u201cStriped\u201d."),
        ("When was this?", "At 5 p.m."),
        ("Where is it?", "On the sidewalk.."),
    ],
    2: [
        ("What color is it?", "Red."),
        ("what color is it?", "red"),  # the same again
        ("How many are there?", "Two."),
        ("How many are there?", "Three."),
        ("How many are there?", "Two"),  # they contradict each other, whichever repeats
        ("", "Nothing."),
        ("Why?", "."),
        ("Is it day?", "Yes."),
    ],
    3: [("Who?", "Me."), ("Who?", "You.")],
    4: [(f"What is number {number}?", f"Thing {number}.") for number in range(14)],
    5: [],
    61: [("Is it listed?", "No.")],
}
COCO_IDS = {1: None, 2: 42, 3: None, 4: 43, 5: None}
PAIRS = {
    1: {
        ("What color is the clock?", "Green"),
        ("Who is on the sidewalk?", "A man"),
        ("What is the man's shirt like?", '"Striped"'),
        ("When was this?", "At 5 p.m."),
        ("Where is it?", "On the sidewalk"),
    },
    2: {("What color is it?", "Red"), ("Is it day?", "Yes")},
}


def write(root: Path, questions: Mapping[int, list[tuple[str, str]]] = QUESTIONS, id_name: str = "id") -> None:
    """Write both files; older versions name the ids otherwise."""
    items = [
        {
            id_name: image_id,
            "qas": [
                {
                    "a_objects": [],
                    "question": question,
                    "image_id": image_id,
                    "qa_id": 1000 * image_id + number,
                    "answer": answer,
                    "q_objects": [],
                }
                for number, (question, answer) in enumerate(pairs)
            ],
        }
        for image_id, pairs in questions.items()
    ]
    dump(items, root / "question_answers.json")
    pictures = [
        {
            "width": 800,
            "url": URL.format("VG_100K_2" if image_id % 2 else "VG_100K", image_id),
            "height": 600,
            "image_id": image_id,
            "coco_id": coco_id,
            "flickr_id": None,
        }
        for image_id, coco_id in COCO_IDS.items()
    ]
    if id_name == "image_id":  # 1.0 is the other way round
        pictures = [{("id" if key == "image_id" else key): value for key, value in item.items()} for item in pictures]
    dump(pictures, root / "image_data.json")


def prepare(root: Path, options: Options | None = None, leaks: Leaks = ALL_ALLOWED) -> tuple[list[dict], Report]:
    report = Report("visual_genome")
    return list(visual_genome.read(root, options or Options(), leaks, report)), report


def list_pairs(row: dict, language: str = "en") -> list[tuple[str, str]]:
    """Return the questions, without marker and request, and the answers of a row."""
    texts = [turn.text.removesuffix(SHORT_ANSWER_SUFFIX[language]) for turn in parse_turns(row)]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_the_questions_of_a_picture_become_one_conversation(tmp_path: Path) -> None:
    write(tmp_path)
    rows, report = prepare(tmp_path)
    assert [(row["id"], row["image"]) for row in rows] == [
        ("visual_genome-1", "VG_100K_2/1.jpg"),
        ("visual_genome-2", "VG_100K/2.jpg"),
        ("visual_genome-4", "VG_100K/4.jpg"),
    ]
    assert {(row["source"], row["license"], row["lang"]) for row in rows} == {("visual_genome", "CC BY 4.0", "en")}
    for row, pairs in zip(rows, PAIRS.values(), strict=False):
        assert set(list_pairs(row)) == pairs
        assert len(list_pairs(row)) == len(pairs)
    assert [entry["name"] for entry in report.inputs] == ["image_data.json", "question_answers.json"]


def test_every_change_is_counted(tmp_path: Path) -> None:
    write(tmp_path)
    rows, report = prepare(tmp_path)
    assert report.dropped == {
        "picture: no question left": 2,
        "picture: not listed in image_data.json": 1,
        "question: asked before, with the same answer": 2,
        "question: asked more than once, with different answers": 4,
        "question: beyond 10 of one picture": 4,
        "question: it or its answer is empty": 2,
    }
    assert report.mended == {
        "answer: final full stop, spaces or curly quotes": 4 + 4 + 2 + 14,
        "question: spaces or curly quotes": 1,
    }
    assert report.read == len(QUESTIONS)
    read = sum(len(pairs) for image_id, pairs in QUESTIONS.items() if image_id in COCO_IDS)
    dropped = sum(count for reason, count in report.dropped.items() if reason.startswith("question:"))
    assert read == dropped + sum(len(list_pairs(row)) for row in rows)


def test_the_first_question_asks_for_short_answers(tmp_path: Path) -> None:
    write(tmp_path)
    for language in ("en", "zh"):
        for row in prepare(tmp_path, Options(language=language))[0]:
            first, *others = [turn.text for turn in parse_turns(row)][::2]
            assert first.endswith("?" + SHORT_ANSWER_SUFFIX[language])
            assert all(question.endswith("?") for question in others)
            assert row["lang"] == language


def test_the_order_is_seeded_picture_by_picture(tmp_path: Path) -> None:
    """And with it which questions are beyond the tenth; other pictures in the file change nothing."""
    write(tmp_path)
    expected = [(f"What is number {number}?", f"Thing {number}") for number in range(14)]
    random.Random("7:visual_genome:4").shuffle(expected)
    rows = prepare(tmp_path, Options(seed=7))[0]
    assert list_pairs(rows[2]) == expected[:10]
    write(tmp_path, {4: QUESTIONS[4]})
    assert prepare(tmp_path, Options(seed=7))[0] == rows[2:]
    assert prepare(tmp_path, Options(seed=8))[0] != rows[2:]


def test_old_versions_name_the_ids_otherwise(tmp_path: Path) -> None:
    write(tmp_path)
    rows = prepare(tmp_path)[0]
    write(tmp_path, id_name="image_id")
    assert prepare(tmp_path)[0] == rows


def test_pictures_of_cocos_are_left_out(tmp_path: Path) -> None:
    """Their names say nothing of it."""
    write(tmp_path)
    write_coco(tmp_path, "val2014", {42: []})
    write_coco(tmp_path, "val2017", {1: []})  # not the VG picture with this number
    rows, report = prepare(tmp_path, leaks=Leaks([tmp_path]))
    assert [row["id"] for row in rows] == ["visual_genome-1", "visual_genome-4"]
    assert report.dropped["in COCO val2014"] == 1
    assert "in COCO val2017" not in report.dropped


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image_data\.json is missing"):
        prepare(tmp_path)
    write(tmp_path)
    for change, message in (({"qas": None}, r"item 0 is .*qas \(list\)"), ({"id": "1"}, r"item 0 is .*id \(int\)")):
        items = json.loads((tmp_path / "question_answers.json").read_text(encoding="utf-8"))
        dump([items[0] | change], tmp_path / "broken/question_answers.json")
        dump([], tmp_path / "broken/image_data.json")
        with pytest.raises(ValueError, match=r"question_answers\.json: " + message):
            prepare(tmp_path / "broken")
