"""POPE's figures by hand, by brute force and as published, how each rule asks, and everything that can be wrong."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import pope
from eval.pope import NUM_QUESTIONS, POPE, count
from eval.task import Question, Scored


@pytest.mark.parametrize(
    ("prediction", "official", "lmms_eval", "vlmevalkit"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("no", "no", "no", "no"),
        ("No.", "no", "other", "no"),
        ("No, there is a dog", "no", "other", "no"),
        ("Yes, but not here", "no", "other", "yes"),
        ("Yes. No.", "yes", "other", "other"),  # the first sentence
        (".No", "yes", "other", "no"),  # an empty first sentence
        ("NO", "yes", "no", "no"),  # only No, no and not are words of denial
        ("Not", "yes", "other", "other"),
        ("None", "yes", "other", "other"),
        ("n,o", "no", "other", "other"),  # commas go before words are made
        ("no\tdog", "yes", "other", "no"),  # words end at blanks alone
        ("no\ndog", "yes", "other", "no"),
        ("there is no dog", "no", "other", "no"),
        ("", "yes", "other", "other"),
        ("是", "yes", "other", "other"),
        ("yesterday", "yes", "other", "other"),
    ],
)
def test_how_answers_are_read(prediction: str, official: str, lmms_eval: str, vlmevalkit: str) -> None:
    read = [pope.RULES[rule].read(prediction) for rule in ("official", "lmms-eval", "vlmevalkit")]
    assert read == [official, lmms_eval, vlmevalkit]


def make_questions(rows: Sequence[tuple[str, str, str]]) -> list[Question]:
    """Make questions of (split, picture, label)."""
    return [
        Question(f"{split}/{number}", image, "?", ("?",), (label,), {"split": split})
        for number, (split, image, label) in enumerate(rows)
    ]


def make_counted(counts: dict[str, tuple[int, int, int, int]]) -> tuple[list[Question], list[str]]:
    """Make questions and answers with that many TP, FP, TN and FN, spread over pictures."""
    rows, predictions = [], []
    for split, numbers in counts.items():
        for number, label, answer in zip(numbers, ("yes", "no", "no", "yes"), ("Yes", "Yes", "No", "No"), strict=True):
            rows += [(split, f"{place % 500}.jpg", label) for place in range(number)]
            predictions += [answer] * number
    return make_questions(rows), predictions


def get_scores(scored: Scored) -> dict[str, dict[str, float]]:
    return {name: {key: part.score for key, part in parts.items()} for name, parts in scored.parts.items()}


def test_published_figures() -> None:
    """What the official script printed for these counts: 42Shawn/LLaVA-PruMerge, issue 15."""
    questions, predictions = make_counted(
        {"popular": (778, 21, 1479, 722), "adversarial": (778, 76, 1424, 722), "random": (778, 23, 1387, 722)}
    )
    scores = get_scores(count(questions, predictions, "official"))
    expected = {
        "popular": [0.6768160069595477, 0.7523333333333333, 0.9737171464330413, 0.5186666666666667, 0.2663333333333333],
        "adversarial": [0.6610025488530162, 0.734, 0.9110070257611241, 0.5186666666666667, 0.2846666666666667],
        "random": [0.6762277270751847, 0.7439862542955327, 0.9712858926342073, 0.5186666666666667, 0.2752577319587629],
    }
    for split, figures in expected.items():
        printed = [scores[name][split] for name in ("F1", "accuracy", "precision", "recall", "yes ratio")]
        assert printed == pytest.approx(figures, abs=1e-15)
    assert scores["all"]["all"] == pytest.approx(sum(figures[0] for figures in expected.values()) / 3)


def test_published_figures_of_llava() -> None:
    """LLaVA-1.5 on the 2,910 questions: haotian-liu/LLaVA, issue 626."""
    questions, predictions = make_counted({"random": (1183, 31, 1379, 317)})
    scores = get_scores(count(questions, predictions, "official"))
    figures = [scores[name]["random"] for name in ("accuracy", "precision", "recall", "F1")]
    assert figures == pytest.approx([0.8804123711340206, 0.9744645799011532, 0.7886666666666666, 0.8717759764185703])


ANSWERS = ["Yes", "no", "maybe", "No.", "yes", "Yes."]


def make_small() -> list[Question]:
    labels = ["yes", "yes", "yes", "no", "no", "no"]
    splits = ["popular"] * 3 + ["random", "random", "popular"]
    return make_questions(list(zip(splits, "aabbcc", labels, strict=True)))


def test_official_by_hand() -> None:
    """Read yes no yes no yes yes. Popular: TP 2, FN 1, FP 1, F1 4/6. Random: TN 1, FP 1, F1 0."""
    scored = count(make_small(), ANSWERS, "official")
    assert scored.credits == [1, 0, 1, 1, 0, 0]
    assert get_scores(scored) == {
        "all": {"all": pytest.approx((4 / 6 + 0) / 2)},
        "F1": {"popular": pytest.approx(4 / 6), "random": 0},
        "accuracy": {"popular": 2 / 4, "random": 1 / 2},
        "precision": {"popular": pytest.approx(2 / 3), "random": 0},
        "recall": {"popular": pytest.approx(2 / 3), "random": 0},
        "yes ratio": {"popular": 3 / 4, "random": 1 / 2},
    }
    assert scored.parts["F1"]["random"].clusters == ("b", "c")
    assert [part.num_questions for part in scored.parts["F1"].values()] == [4, 2]
    assert scored.parts["all"]["all"].num_questions == 6


def test_lmms_eval_by_hand() -> None:
    """Read yes no other other yes other: TP 1, FN 1, FP 1, other 3. Recall leaves the others out, accuracy does not."""
    scored = count(make_small(), ANSWERS, "lmms-eval")
    assert scored.credits == [1, 0, 0, 0, 0, 0]
    scores = get_scores(scored)
    assert scores["all"]["all"] == scores["F1"]["all"] == pytest.approx(2 / (2 + 1 + 1))
    assert (scores["recall"]["all"], scores["precision"]["all"]) == (1 / 2, 1 / 2)
    assert scores["accuracy"]["all"] == pytest.approx(1 / 6)
    assert list(scores["F1"]) == ["all", "popular", "random"]


def test_vlmevalkit_by_hand() -> None:
    """Read yes no other no yes yes: TP 1, FN 1 + 1 for what is no "yes", FP 2, TN 1."""
    scored = count(make_small(), ANSWERS, "vlmevalkit")
    assert scored.credits == [1, 0, 0, 1, 0, 0]
    scores = get_scores(scored)
    assert scores["all"]["all"] == pytest.approx(2 / (2 + 2 + 2))
    assert (scores["recall"]["all"], scores["precision"]["all"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert scores["accuracy"]["all"] == pytest.approx(2 / 6)


def test_an_unread_answer_to_a_no_is_wrong_but_no_false_yes() -> None:
    scores = get_scores(count(make_questions([("random", "a", "no")] * 2), ["dunno", "No"], "vlmevalkit"))
    assert (scores["accuracy"]["all"], scores["yes ratio"]["all"]) == (1 / 2, 0)


def test_always_yes_has_two_thirds() -> None:
    """Precision 1/2, recall 1: F1 2/3."""
    questions = make_questions([(split, "a", label) for split in NUM_QUESTIONS for label in ("yes", "no")])
    scores = get_scores(count(questions, ["Yes"] * len(questions), "official"))
    assert scores["all"]["all"] == pytest.approx(2 / 3)
    assert set(scores["recall"].values()) == {1.0}


def measure_by_brute_force(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """F1, accuracy, precision, recall and yes ratio of (label, answer)."""
    said = [label for label, answer in pairs if answer == "yes"]
    meant = [answer for label, answer in pairs if label == "yes"]
    precision = said.count("yes") / len(said) if said else 0.0
    recall = meant.count("yes") / len(meant) if meant else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    accuracy = sum(label == answer for label, answer in pairs) / len(pairs)
    return [f1, accuracy, precision, recall, len(said) / len(pairs)]


def test_figures_are_those_of_brute_force_in_any_order() -> None:
    generator = random.Random(0)
    for _ in range(30):
        questions = make_questions(
            [
                (split, f"{generator.randrange(4)}", generator.choice(["yes", "no"]))
                for split in NUM_QUESTIONS
                for _ in range(generator.randint(1, 12))
            ]
        )
        predictions = [generator.choice(["Yes", "No", "no, not at all", "yes it is"]) for _ in questions]
        scores = get_scores(count(questions, predictions, "official"))
        for split in NUM_QUESTIONS:
            pairs = [
                (row.answers[0], "yes" if text.lower().startswith("yes") else "no")
                for row, text in zip(questions, predictions, strict=True)
                if row.kinds["split"] == split
            ]
            measured = [scores[name][split] for name in ("F1", "accuracy", "precision", "recall", "yes ratio")]
            assert measured == pytest.approx(measure_by_brute_force(pairs))
        assert scores["all"]["all"] == pytest.approx(np.mean(list(scores["F1"].values())))
        both = list(zip(questions, predictions, strict=True))
        generator.shuffle(both)
        shuffled = get_scores(count([row for row, _ in both], [text for _, text in both], "official"))
        for name, parts in shuffled.items():
            assert parts == pytest.approx(scores[name])


def test_swapping_the_sides_keeps_accuracy() -> None:
    generator = random.Random(1)
    swap = {"yes": "no", "no": "yes"}
    for rule in POPE.rules:
        rows = [("random", f"{number % 5}", generator.choice(["yes", "no"])) for number in range(40)]
        predictions = [generator.choice(["yes", "no"]) for _ in rows]
        scores = get_scores(count(make_questions(rows), predictions, rule))
        turned = make_questions([(split, image, swap[label]) for split, image, label in rows])
        scores_turned = get_scores(count(turned, [swap[text] for text in predictions], rule))
        assert scores["accuracy"] == scores_turned["accuracy"]
        assert scores["yes ratio"]["random"] == pytest.approx(1 - scores_turned["yes ratio"]["random"])


def test_an_interval_holds_the_score() -> None:
    questions, predictions = make_counted({"popular": (30, 6, 24, 10), "random": (30, 3, 27, 10)})
    part = count(questions, predictions, "official").parts["all"]["all"]
    low, high = part.interval()
    assert 0.5 < low < part.score < high < 1


def write_splits(folder: Path, change: Callable[[list[str]], list[str]] = list) -> Path:
    """Write two pictures with two questions each, in all splits; the second picture first in one of them."""
    folder.mkdir(parents=True)
    for split in NUM_QUESTIONS:
        names = ["COCO_val2014_2.jpg", "COCO_val2014_1.jpg"]
        rows = [
            {"question_id": 2 * place + number + 1, "image": name, "text": f"Is there a {thing}?", "label": label}
            for place, name in enumerate(names if split == "popular" else names[::-1])
            for number, (thing, label) in enumerate([("dog", "yes"), (f"{split} cat", "no")])
        ]
        lines = change([json.dumps(row) for row in rows])
        (folder / f"coco_pope_{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pictures, where four questions a split are expected."""
    for split in NUM_QUESTIONS:
        monkeypatch.setitem(NUM_QUESTIONS, split, (4, 3) if split == "random" else (4,))
    (tmp_path / "val2014").mkdir()
    for number in (1, 2):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"val2014/COCO_val2014_{number}.jpg")
    return tmp_path


@pytest.mark.parametrize("place", ["", "coco", "output/coco"])
def test_opening(data: Path, place: str) -> None:
    folder = write_splits(data / "set" / place)
    task = POPE.open(data / "set", "official", data / "val2014")
    assert [row.question_id for row in task.questions] == [
        *("adversarial/1", "adversarial/2", "popular/3", "popular/4", "random/1", "random/2"),
        *("adversarial/3", "adversarial/4", "popular/1", "popular/2", "random/3", "random/4"),
    ]
    assert [row.image for row in task.questions] == ["COCO_val2014_1.jpg"] * 6 + ["COCO_val2014_2.jpg"] * 6
    short = "\nAnswer the question using a single word or phrase."
    assert task.questions[1] == Question(
        "adversarial/2",
        "COCO_val2014_1.jpg",
        "Is there a adversarial cat?",
        ("Is there a adversarial cat?" + short,),
        ("no",),
        {"split": "adversarial"},
    )
    assert task.files == [folder / f"coco_pope_{split}.json" for split in NUM_QUESTIONS]
    assert (task.template, task.max_new_tokens) == ("vicuna_v1", 128)
    assert task.prompt == "{question}\nAnswer the question using a single word or phrase."
    assert task.open_picture("COCO_val2014_1.jpg").size == (4, 4)
    assert get_scores(count(task.questions, task.bars["always yes"], "official"))["all"]["all"] == pytest.approx(2 / 3)


def test_pictures_beside_the_questions_and_other_rules(data: Path) -> None:
    write_splits(data / "coco")
    assert POPE.rules == ("official", "lmms-eval", "vlmevalkit")
    tasks = [POPE.open(data, rule, None) for rule in POPE.rules]
    settings = [(task.template, task.max_new_tokens) for task in tasks]
    assert settings == [("vicuna_v1", 128), ("vicuna_v1", 128), ("llava_v1", 2048)]
    assert tasks[0].questions == tasks[1].questions
    assert (tasks[2].prompt, tasks[2].questions[0].turns) == ("{question}", ("Is there a dog?",))


def test_both_versions_of_the_random_split(data: Path) -> None:
    file = write_splits(data / "coco") / "coco_pope_random.json"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    assert len(POPE.open(data, "official", None).questions) == 11


def test_the_real_counts() -> None:
    assert NUM_QUESTIONS == {"adversarial": (3000,), "popular": (3000,), "random": (3000, 2910)}


def replace_line(number: int, line: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[:number], line, *lines[number + 1 :]]


def change_row(**values: object) -> Callable[[list[str]], list[str]]:
    return lambda lines: [lines[0], json.dumps(json.loads(lines[1]) | values), *lines[2:]]


KEYS = "expected an object with question_id, image, text and label"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_line(3, '{"question_id": 4, "im'), "{file}, line 4 is not JSON, is the file whole? "),
        (replace_line(1, "[]"), "{file}, line 2: " + KEYS),
        (replace_line(1, '{"question_id": 2, "image": "a", "text": "b"}'), "{file}, line 2: " + KEYS),
        (change_row(question_id="2"), "{file}, line 2: question_id is '2', expected a whole number"),
        (change_row(question_id=True), "{file}, line 2: question_id is True, expected a whole number"),
        (change_row(question_id=1), "{file}, line 2: question_id 1 is there twice"),
        (change_row(image=""), "{file}, line 2: image is '', expected text"),
        (change_row(text=None), "{file}, line 2: text is None, expected text"),
        (change_row(label="Yes"), "{file}, line 2: label is 'Yes', expected yes or no"),
        (lambda lines: lines[:3], "{file} has 3 questions, expected 4: is the file whole?"),
        (lambda _: [], "{file} has 0 questions, expected 4: is the file whole?"),
    ],
)
def test_files_that_cannot_be_right(data: Path, change: Callable[[list[str]], list[str]], message: str) -> None:
    file = write_splits(data / "coco", change) / "coco_pope_adversarial.json"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        POPE.open(data, "official", None)
    assert str(caught.value).startswith(message.replace("{file}", str(file)))


def test_a_short_random_split_names_both_counts(data: Path) -> None:
    file = write_splits(data / "coco") / "coco_pope_random.json"
    file.write_text(file.read_text().splitlines()[0])
    with pytest.raises(
        ValueError, match=r"coco_pope_random\.json has 1 questions, expected 4 or 3: is the file whole\?$"
    ):
        POPE.open(data, "official", None)


def test_not_utf_8(data: Path) -> None:
    file = write_splits(data / "coco") / "coco_pope_popular.json"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"coco_pope_popular\.json is not UTF-8: "):
        POPE.open(data, "official", None)


def test_a_missing_file(data: Path) -> None:
    (write_splits(data / "coco") / "coco_pope_popular.json").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        POPE.open(data, "official", None)
    assert str(caught.value) == (
        f"coco_pope_popular.json is missing in {data}, its coco/ and its output/coco/: it comes from output/coco of "
        "github.com/AoiDragon/POPE"
    )


def test_missing_pictures(data: Path) -> None:
    write_splits(data / "coco")
    (data / "val2014/COCO_val2014_2.jpg").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        POPE.open(data, "official", None)
    assert str(caught.value) == (
        f"1 of 2 pictures are missing in {data / 'val2014'}, the first ['COCO_val2014_2.jpg']: they are COCO's val2014"
    )
    with pytest.raises(FileNotFoundError, match=r"^image folder .*none is missing$"):
        POPE.open(data, "official", data / "none")
