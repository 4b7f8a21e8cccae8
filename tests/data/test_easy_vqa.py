"""easy-VQA: the rule that derives captions from answers, checked against all answers and against the pictures."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import easy_vqa as package
import numpy as np
import pytest
from PIL import Image, ImageColor

from data.conversation import parse_turns
from data.prepare.easy_vqa import (
    CAPTION_REQUESTS,
    COLOURS,
    NUM_HELD_OUT,
    SHAPES,
    answer_question,
    find_concept,
    prepare,
    question_type,
)
from data.rows import load_rows
from tests.conftest import ROOT

SOURCE = Path(package.__file__).parent / "data"
SPLITS = ("train", "test")
COUNTS = {  # rows of each file, in the order in which they are reported
    "text_train.json": 8000,
    "captions_train.json": 3217,
    "vqa_train.json": 3600,
    "text_held_out.json": 200,
    "captions_held_out.json": 361,
    "vqa_held_out.json": 400,
    "test.jsonl": 9673,
    "choice_train.json": 4182,
    "choice_held_out.json": 361,
    "choice_test.jsonl": 3552,
}

Pairs = list[tuple[str, str]]


@pytest.fixture(scope="module")
def questions() -> dict[str, dict[int, Pairs]]:
    """The package's own questions and answers, by split and picture."""
    loaded: dict[str, dict[int, Pairs]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for question, answer, image in json.loads((SOURCE / split / "questions.json").read_text(encoding="utf-8")):
            loaded[split].setdefault(image, []).append((question, answer))
    return loaded


def fit(pairs: Pairs) -> list[tuple[str, str]]:
    """Return the concepts under which the rule gives every answer."""
    return [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if all(answer_question(question, colour, shape) == answer for question, answer in pairs)
    ]


def load_split(folder: Path, kind: str, split: str) -> dict[str, dict]:
    """Return the rows of a file by their picture, those from `vqa_train.json` in another's left out."""
    rows = [row for row in load_rows(folder / f"{kind}_{split}.json") if kind == "vqa" or "vqa" not in row["id"]]
    assert len({row["image"] for row in rows}) == len(rows)
    return {row["image"]: row for row in rows}


def list_pairs(row: dict) -> Pairs:
    """Return the questions, without marker, and answers of a row."""
    values = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


@pytest.mark.parametrize(("split", "num_images", "num_pinned"), [("train", 4000, 3578), ("test", 1000, 888)])
def test_rule_agrees_with_every_answer(
    questions: Mapping[str, dict[int, Pairs]], split: str, num_images: int, num_pinned: int
) -> None:
    """No picture's answers contradict the rule, and for most only one colour and shape are left."""
    found = {image: fit(pairs) for image, pairs in questions[split].items()}
    assert len(found) == num_images
    assert all(found.values())
    pinned = {image: concepts[0] for image, concepts in found.items() if len(concepts) == 1}
    assert len(pinned) == num_pinned
    for image, pairs in list(questions[split].items())[::10]:
        assert find_concept(pairs) == pinned.get(image)


def test_concepts_are_what_the_pictures_show(questions: Mapping[str, dict[int, Pairs]]) -> None:
    """The captions are derived from text alone; the pixels know nothing of that."""
    green = (0, 255, 0)  # the package's green is not the web's
    checked: Counter[str] = Counter()
    for image, pairs in list(questions["test"].items())[::3]:
        concept = find_concept(pairs)
        if concept is None:
            continue
        pixels = np.asarray(Image.open(SOURCE / f"test/images/{image}.png").convert("RGB")).astype(int)
        distances = [
            np.abs(pixels - np.array(green if colour == "green" else ImageColor.getrgb(colour))).sum(axis=-1)
            for colour in COLOURS
        ]
        masks = [distance < 12 for distance in distances]
        largest = max(range(len(COLOURS)), key=lambda number: int(masks[number].sum()))
        area = int(masks[largest].sum())
        if area < 60:  # too small for its corners to tell
            continue
        assert COLOURS[largest] == concept[0], image
        rows, columns = np.nonzero(masks[largest])
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert (area == box) == (concept[1] == "rectangle"), image
        checked[concept[1]] += 1
    assert min(checked[shape] for shape in SHAPES) > 30


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what shape is in the image?", "circle"),
        ("what color is the shape?", "red"),
        ("what is the color of the circle?", "red"),
        ("what is the red shape?", "circle"),
        ("what is the color of the triangle?", None),
        ("what is the blue shape?", None),
        ("is there a circle?", "yes"),
        ("is there a red shape?", "yes"),
        ("is there a triangle in the image?", "no"),
        ("is there not a circle?", "no"),
        ("is no blue shape present?", "yes"),
        ("does the image not contain a rectangle?", "yes"),
        ("is there not a red shape in the image?", "no"),
    ],
)
def test_answers_by_rule(question: str, answer: str | None) -> None:
    """Of a red circle; a question whose premise is false has no answer."""
    assert answer_question(question, "red", "circle") == answer


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what color is the shape?", "color"),
        ("what is the color of the circle?", "color"),
        ("what is the red shape?", "shape"),
        ("is there a circle?", "yes/no"),
        ("does the image contain a red shape?", "yes/no"),
    ],
)
def test_question_types(question: str, kind: str) -> None:
    """Scores are listed by these."""
    assert question_type(question) == kind


@pytest.mark.parametrize(
    ("pairs", "concept"),
    [
        ([("what color is the shape?", "blue"), ("what shape is in the image?", "circle")], ("blue", "circle")),
        ([("what is the blue shape?", "circle")], ("blue", "circle")),
        ([("what is the color of the triangle?", "teal")], ("teal", "triangle")),
        ([("what color is the shape?", "blue")], None),
        ([("what color is the shape?", "blue"), ("is there a circle?", "no")], None),
        (
            [
                ("what color is the shape?", "blue"),
                ("is there a circle?", "no"),
                ("is there not a triangle?", "yes"),
            ],
            ("blue", "rectangle"),
        ),
        ([("what color is the shape?", "blue"), ("what color is the shape?", "red")], None),
        ([("what color is the shape?", "purple"), ("is there a circle?", "yes")], None),
        ([], None),
    ],
)
def test_concepts_by_hand(pairs: Pairs, concept: tuple[str, str] | None) -> None:
    """One concept if the answers leave one, none if they leave several or contradict each other."""
    assert find_concept(pairs) == concept
    assert find_concept(iter(pairs)) == concept


def test_counts(easy_vqa_folder: Path) -> None:
    """These numbers stand in the README, and every score is a fraction of 9,673."""
    files = [file for file in easy_vqa_folder.iterdir() if file.suffix in (".json", ".jsonl")]  # others made an index
    assert {file.name: len(load_rows(file)) for file in files} == COUNTS
    assert COUNTS["captions_train.json"] + COUNTS["captions_held_out.json"] == 3578
    assert COUNTS["vqa_train.json"] + NUM_HELD_OUT == 4000
    assert len(list((easy_vqa_folder / "images/train").iterdir())) == 4000
    assert len(list((easy_vqa_folder / "images/test").iterdir())) == 1000


def test_the_same_bytes_each_time(easy_vqa_folder: Path, tmp_path: Path) -> None:
    """Numbers measured in one place hold in another: the command in a process of its own, with other hashes."""
    (tmp_path / "vqa_train.json").write_text("an earlier result", encoding="utf-8")
    same = tmp_path / "test.jsonl"
    same.write_bytes((easy_vqa_folder / "test.jsonl").read_bytes())
    written = same.stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-m", "data.prepare", "easy_vqa", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout == "".join(f"{count:6d} rows  {tmp_path / name}\n" for name, count in COUNTS.items())
    for name in COUNTS:
        assert (tmp_path / name).read_bytes() == (easy_vqa_folder / name).read_bytes(), name
    assert same.stat().st_mtime_ns == written, "a run that reads it would stop, finding it changed"
    for split in SPLITS:
        for file in list((SOURCE / split / "images").iterdir())[::50]:
            assert (tmp_path / "images" / split / file.name).read_bytes() == file.read_bytes()


def test_splits_do_not_touch(easy_vqa_folder: Path, questions: Mapping[str, dict[int, Pairs]]) -> None:
    """A picture that is measured is never learned: neither the held-out ones nor the test's."""
    all_images = {f"train/{image}.png" for image in questions["train"]}
    train, held_out = load_split(easy_vqa_folder, "vqa", "train"), load_split(easy_vqa_folder, "vqa", "held_out")
    assert train.keys() | held_out.keys() == all_images
    assert not train.keys() & held_out.keys()
    for split, rows in (("train", train), ("held_out", held_out)):
        captions, choices = (load_split(easy_vqa_folder, kind, split).keys() for kind in ("captions", "choice"))
        assert choices == captions < rows.keys()
    for name in ("text_train.json", "text_held_out.json"):
        assert not any("image" in row for row in load_rows(easy_vqa_folder / name))
    for name in ("test.jsonl", "choice_test.jsonl"):
        assert all(row["image"].startswith("test/") for row in load_rows(easy_vqa_folder / name))
    contents = [{file.read_bytes() for file in (easy_vqa_folder / "images" / split).iterdir()} for split in SPLITS]
    assert not contents[0] & contents[1]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_rows_are_the_packages_answers(
    easy_vqa_folder: Path, questions: Mapping[str, dict[int, Pairs]], split: str
) -> None:
    """Every question with its own answer, and the caption that the answers allow."""
    captions = load_split(easy_vqa_folder, "captions", split)
    for image, row in load_split(easy_vqa_folder, "vqa", split).items():
        pairs = questions["train"][int(Path(image).stem)]
        concept = find_concept(pairs)
        expected = [] if concept is None else [f"a {concept[0]} {concept[1]}."]
        found = list_pairs(row)
        assert found[: len(pairs)] == pairs
        assert [answer for _, answer in found[len(pairs) :]] == expected
        assert (image in captions) == bool(expected)
        for request, answer in [*found[len(pairs) :], *(list_pairs(captions[image]) if expected else [])]:
            assert request in CAPTION_REQUESTS
            assert answer == expected[0]
        assert (easy_vqa_folder / "images" / image).is_file()
        parse_turns(row)


def test_test_rows_are_the_packages(easy_vqa_folder: Path, questions: Mapping[str, dict[int, Pairs]]) -> None:
    """All test questions, in order, each under an id of its own."""
    rows = load_rows(easy_vqa_folder / "test.jsonl")
    assert len({row["question_id"] for row in rows}) == len(rows) == 9673
    found: dict[int, Pairs] = {}
    for row in rows:
        found.setdefault(int(Path(row["image"]).stem), []).append((row["question"], row["answer"]))
        assert row["type"] == question_type(row["question"])
        assert (row["answer"] in ("yes", "no")) == (row["type"] == "yes/no")
        assert (row["answer"] in COLOURS) == (row["type"] == "color")
    assert found == questions["test"]


def test_what_teaches_something_new_replays_the_old(easy_vqa_folder: Path) -> None:
    """Three rows of the ordinary training file for each ten new ones, no row twice; when choosing, new ones only."""
    rows = load_rows(easy_vqa_folder / "choice_train.json")
    replayed = [row for row in rows if not row["id"].startswith("choice")]
    ordinary = load_split(easy_vqa_folder, "vqa", "train")
    assert len(replayed) == round(0.3 * (len(rows) - len(replayed)))
    assert len({row["id"] for row in replayed}) == len(replayed)
    assert all(row == ordinary[row["image"]] for row in replayed)
    assert all(row["id"].startswith("choice") for row in load_rows(easy_vqa_folder / "choice_held_out.json"))


def test_choices(easy_vqa_folder: Path, questions: Mapping[str, dict[int, Pairs]]) -> None:
    """The picture shows one of the two that are named, as often the first as the second; no other row asks such."""
    found: dict[str, Pairs] = {}
    for split in ("train", "held_out"):
        found |= {image: list_pairs(row) for image, row in load_split(easy_vqa_folder, "choice", split).items()}
    for row in load_rows(easy_vqa_folder / "choice_test.jsonl"):
        found.setdefault(row["image"], []).append((row["question"], row["answer"]))
        assert row["type"] == "choice"
    assert len(found) == 3578 + 888
    for image, pairs in found.items():
        concept = find_concept(questions[Path(image).parent.name][int(Path(image).stem)])
        assert concept is not None
        assert len({question for question, _ in pairs}) == len(pairs) == 4
        assert Counter(answer for _, answer in pairs) == dict.fromkeys(concept, 2)
        places: Counter[tuple[str, int]] = Counter()
        for question, answer in pairs:
            named = question.removeprefix("is the shape ").rstrip("?").replace("a ", "").split(" or ")
            assert len({*named}) == 2
            assert {*named} <= set(SHAPES if answer in SHAPES else COLOURS)
            places[answer, named.index(answer)] += 1
        assert set(places.values()) == {1}
    assert not any(
        " or " in question for split in SPLITS for pairs in questions[split].values() for question, _ in pairs
    )


def test_text_rows_answer_what_their_words_say(easy_vqa_folder: Path) -> None:
    """A bag of words stands where a picture will stand: its answer must follow from the words it holds."""
    for split in ("train", "held_out"):
        rows = load_rows(easy_vqa_folder / f"text_{split}.json")
        for number, row in enumerate(rows):
            assert len(parse_turns(row)) == (2 if number % 2 == 0 else 16)
            assert row.get("template") == ("plain" if number % 2 == 0 else None)
            for text, answer in list_pairs(row):
                bag, _, request = text.partition("\n")
                words = set(bag.split())
                (colour,), (shape,) = words & set(COLOURS), words & set(SHAPES)
                if not request or request in CAPTION_REQUESTS:
                    assert answer == f"a {colour} {shape}."
                else:
                    assert answer == answer_question(request, colour, shape)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message says how to get it, and nothing is written."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="easy-vqa is not installed: pip install"):
        prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()
