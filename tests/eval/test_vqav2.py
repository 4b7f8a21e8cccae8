"""VQA-v2 from files as its owner writes them: what is asked, how it is counted, what is uploaded, what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval import vqav2
from eval.task import Task
from eval.vqav2 import VQAV2, VQAV2_TEST_DEV, VQAV2_TEST_STD, check_submission, main

SUFFIX = "\nAnswer the question using a single word or phrase."
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANSWERS = "v2_mscoco_val2014_annotations.json"
TEST_DEV = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
TEST = "v2_OpenEnded_mscoco_test2015_questions.json"
ASKED = {  # number: (picture, question, answer type, question type, ten people's answers); pictures take turns
    9001: (9, "Is it a dog?", "yes/no", "is it", ["yes"] * 10),
    42000: (42, "How many?", "number", "how many", ["2"] * 3 + ["two"] + ["3"] * 6),
    9000: (9, "What color?", "other", "what color", ["red"] * 2 + ["dark red"] * 8),
    42001: (42, "Is it wet?", "yes/no", "is it", ["no"] * 6 + ["yes"] * 4),
}
TEST_ASKED = {1000: 1, 2000: 2, 1001: 1, 3000: 3, 2001: 2}  # number: picture
Change = Callable[[Any], object]


def dump(content: object, file: Path) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def draw(folder: Path, template: str, image_ids: set[int]) -> None:
    for image_id in image_ids:
        file = folder / template.format(image_id)
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 3), (image_id, 0, 0)).save(file)


def write_val(root: Path, folder: str = "val2014/COCO_val2014_{:012d}.jpg") -> Path:
    head = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_subtype": "val2014"}
    questions = [
        {"image_id": image_id, "question": text, "question_id": number}
        for number, (image_id, text, *_) in ASKED.items()
    ]
    annotations = [
        {
            "question_type": question_type,
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": person}
                for person, answer in enumerate(answers, start=1)
            ],
            "image_id": image_id,
            "answer_type": answer_type,
            "question_id": number,
        }
        for number, (image_id, _, answer_type, question_type, answers) in sorted(ASKED.items())
    ]
    dump(head | {"questions": questions}, root / VAL_QUESTIONS)
    dump({"info": {}, "annotations": annotations, "data_subtype": "val2014"}, root / VAL_ANSWERS)
    draw(root, folder, {9, 42})
    return root


def write_test(root: Path) -> Path:
    questions = [
        {"image_id": image_id, "question": f"What is {number}?", "question_id": number}
        for number, image_id in TEST_ASKED.items()
    ]
    dump({"data_subtype": "test2015", "questions": questions}, root / TEST)
    dump({"data_subtype": "test-dev2015", "questions": [questions[0], questions[4]]}, root / TEST_DEV)
    draw(root, "test2015/COCO_test2015_{:012d}.jpg", {1, 2, 3})
    return root


def change(file: Path, edit: Change) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    dump(content, file)


def open_val(root: Path, rule: str = "official", image_folder: Path | None = None) -> Task:
    return VQAV2.open(root, rule, image_folder)


def test_what_is_asked(tmp_path: Path) -> None:
    task = open_val(write_val(tmp_path))
    assert [question.question_id for question in task.questions] == ["9001", "9000", "42000", "42001"]
    first = task.questions[0]
    assert (first.text, first.turns) == ("Is it a dog?", (f"Is it a dog?{SUFFIX}",))
    assert first.image == "val2014/COCO_val2014_000000000009.jpg"
    assert first.answers == ("yes",) * 10
    assert first.kinds == {"answer type": "yes/no", "question type": "is it"}
    assert task.questions[2].answers == (*["2"] * 3, "two", *["3"] * 6)
    assert (task.template, task.prompt) == ("vicuna_v1", "{question}" + SUFFIX)
    assert [open_val(tmp_path, rule).max_new_tokens for rule in VQAV2.rules] == [128, 16]
    assert [file.name for file in task.files] == [VAL_QUESTIONS, VAL_ANSWERS]
    assert task.open_picture(first.image).size == (4, 3)
    assert VQAV2.write_submission is None


@pytest.mark.parametrize(
    ("folder", "image_folder"),
    [
        ("COCO_val2014_{:012d}.jpg", ""),
        ("val2014/COCO_val2014_{:012d}.jpg", "val2014"),
        ("train2017/{:012d}.jpg", ""),
        ("val2017/{:012d}.jpg", None),
    ],
)
def test_pictures_are_found_and_have_one_name(tmp_path: Path, folder: str, image_folder: str | None) -> None:
    """What results of two machines are compared by."""
    write_val(tmp_path, folder)
    task = open_val(tmp_path, image_folder=None if image_folder is None else tmp_path / image_folder)
    names = list(dict.fromkeys(question.image for question in task.questions))
    assert names == ["val2014/COCO_val2014_000000000009.jpg", "val2014/COCO_val2014_000000000042.jpg"]
    assert [task.open_picture(name).size for name in names] == [(4, 3)] * 2


def test_counted_by_hand(tmp_path: Path) -> None:
    task = open_val(write_val(tmp_path))
    scored = VQAV2.count(task.questions, ["Yes", "red", "two", "\n"], "official")
    # Ten of ten; two of ten; four of ten, as "two" is "2"; none.
    assert scored.credits == [1, 0.6, 1, 0]
    assert list(scored.parts) == ["all", "answer type", "question type"]
    figures = {
        name: (part.num_questions, part.score) for parts in scored.parts.values() for name, part in parts.items()
    }
    assert figures == {
        "all": (4, pytest.approx((1 + 0.6 + 1 + 0) / 4)),
        "number": (1, 1),
        "other": (1, 0.6),
        "yes/no": (2, 0.5),
        "how many": (1, 1),
        "is it": (2, 0.5),
        "what color": (1, 0.6),
    }
    assert set(scored.parts["all"]["all"].clusters) == {question.image for question in task.questions}
    assert VQAV2.count(task.questions[:1], ["yes"], "official").parts["answer type"].keys() == {"yes/no"}
    with pytest.raises(ValueError, match="zip"):
        VQAV2.count(task.questions, ["yes"], "official")


def test_the_other_rule_counts_as_lmms_eval_does(tmp_path: Path) -> None:
    write_val(tmp_path)
    change(tmp_path / VAL_ANSWERS, lambda content: rename(content, 0, ["man's"] * 9 + ["his"]))
    questions = open_val(tmp_path).questions
    assert questions[1].answers[0] == "man's"
    assert VQAV2.count(questions[1:2], ["The man's"], "official").credits == [1]
    assert VQAV2.count(questions[1:2], ["The man's"], "lmms-eval").credits == [0]


def rename(content: Any, place: int, answers: list[str]) -> None:
    for entry, answer in zip(content["annotations"][place]["answers"], answers, strict=True):
        entry["answer"] = answer


def test_test_dev_asks_its_own_and_uploads_all(tmp_path: Path) -> None:
    write_test(tmp_path)
    task = VQAV2_TEST_DEV.open(tmp_path, "official", None)
    assert [question.question_id for question in task.questions] == ["1000", "2001"]
    assert [question.image for question in task.questions] == [
        f"test2015/COCO_test2015_{image_id:012d}.jpg" for image_id in (1, 2)
    ]
    assert [file.name for file in task.files] == [TEST_DEV, TEST]
    scored = VQAV2_TEST_DEV.count(task.questions, ["a", "b"], "official")
    assert (scored.credits, scored.parts) == ([None, None], {})
    with pytest.raises(ValueError, match="1 predictions for 2 questions"):
        VQAV2_TEST_DEV.count(task.questions, ["a"], "official")
    assert VQAV2_TEST_DEV.write_submission is not None
    file = VQAV2_TEST_DEV.write_submission(task, ["The man's hat, no?\n", ""], tmp_path)
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"question_id": 1000, "answer": "man 's hat no"},
        {"question_id": 2000, "answer": ""},
        {"question_id": 1001, "answer": ""},
        {"question_id": 3000, "answer": ""},
        {"question_id": 2001, "answer": ""},
    ]
    assert check_submission(file, tmp_path / TEST) == ([], 5, 5 - 1)
    with pytest.raises(ValueError, match="zip"):
        VQAV2_TEST_DEV.write_submission(task, ["yes"], tmp_path)


def test_test_std_answers_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = VQAV2_TEST_STD.open(write_test(tmp_path), "official", None)
    assert [question.question_id for question in task.questions] == ["1000", "1001", "2000", "2001", "3000"]
    assert VQAV2_TEST_STD.write_submission is not None
    file = VQAV2_TEST_STD.write_submission(task, ["Yes", "a\tb", "ten", "猫", "x\ny"], tmp_path)
    answers = {entry["question_id"]: entry["answer"] for entry in json.loads(file.read_text(encoding="utf-8"))}
    assert answers == {1000: "yes", 1001: "b", 2000: "10", 2001: "猫", 3000: "x y"}
    assert list(answers) == list(TEST_ASKED)  # in the owner's order
    main(["--validate", str(file), "--questions", str(tmp_path / TEST)])
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: 5 entries, 0 of them with an empty answer",
        f"note: the owner's server expects 447,793 entries, those of {TEST}",
        "valid: every question once, none unknown",
    ]


def test_a_test_questions_file_of_another_version(tmp_path: Path) -> None:
    write_test(tmp_path)
    change(tmp_path / TEST_DEV, lambda content: content["questions"][1].update(question_id=2009))
    message = f"{tmp_path / TEST} lacks 1 question (2009) of {tmp_path / TEST_DEV}"
    with pytest.raises(ValueError, match=re.escape(message)):
        VQAV2_TEST_DEV.open(tmp_path, "official", None)


GOOD = [{"question_id": number, "answer": "yes"} for number in TEST_ASKED]


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        (GOOD[1:], ["missing: 1 question (1000)"]),
        ([], ["missing: 5 questions (1000, 1001, 2000, 2001, 3000)"]),
        ([*GOOD, GOOD[2]], ["listed more than once: 1 question (1001)"]),
        ([*GOOD, {"question_id": 7, "answer": "a"}], [f"not in {TEST}: 1 question (7)"]),
        (
            [{"question_id": "1000", "answer": "yes"}, *GOOD[1:]],
            ["entry 0: question_id '1000' is no whole number", "missing: 1 question (1000)"],
        ),
        ([{"question_id": 1000, "answer": 2}, *GOOD[1:]], ["entry 0: answer 2 is no text"]),
        ([{"question_id": 1000, "answer": None}, *GOOD[1:]], ["entry 0: answer None is no text"]),
        (
            [{"question_id": 1000, "text": "a"}, *GOOD[1:]],
            [
                "entry 0 is {'question_id': 1000, 'text': 'a'}, expected question_id and answer, nothing else",
                "missing: 1 question (1000)",
            ],
        ),
        (
            [*GOOD, *[3] * 7],
            [
                *[f"entry {place} is 3, expected question_id and answer, nothing else" for place in range(5, 10)],
                "2 more entries like these",
            ],
        ),
    ],
)
def test_a_wrong_submission(
    tmp_path: Path, content: object, faults: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_test(tmp_path)
    dump(content, tmp_path / "upload.json")
    assert check_submission(tmp_path / "upload.json", tmp_path / TEST)[0] == faults
    with pytest.raises(SystemExit) as stopped:
        main(["--validate", str(tmp_path / "upload.json"), "--questions", str(tmp_path / TEST)])
    assert stopped.value.code == "\n".join(f"error: {fault}" for fault in faults)  # a text is status 1
    assert "valid" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            "\n".join(json.dumps(entry) for entry in GOOD),
            "holds an object, or one a line (JSON lines), but the server takes one JSON list",
        ),
        (json.dumps(GOOD)[:-9], "is not JSON: "),
        ("", "is not JSON: "),
        ('"yes"', "holds a str, expected a list"),
    ],
)
def test_a_submission_that_is_no_list(tmp_path: Path, content: str, problem: str) -> None:
    write_test(tmp_path)
    file = tmp_path / "upload.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{file} {problem}")):
        check_submission(file, tmp_path / TEST)
    with pytest.raises(SystemExit, match=re.escape(f"error: {tmp_path / 'none.json'} is missing")):
        main(["--validate", str(tmp_path / "none.json"), "--questions", str(tmp_path / TEST)])


def repeat(key: str) -> Change:
    return lambda content: content[key].append(content[key][0])


def edit_answers(edit: Callable[[list], object]) -> Change:
    return lambda content: edit(content["annotations"][0]["answers"])


@pytest.mark.parametrize(
    ("name", "edit", "problem"),
    [
        (VAL_QUESTIONS, repeat("questions"), f"{VAL_QUESTIONS} has question 9001 twice"),
        (VAL_ANSWERS, repeat("annotations"), f"{VAL_ANSWERS} has answers to question 9000 twice"),
        (
            VAL_QUESTIONS,
            lambda content: content["questions"].pop(),
            f"{VAL_QUESTIONS} lacks 1 question (42001) of ",
        ),
        (VAL_ANSWERS, lambda content: content["annotations"].pop(0), f"{VAL_ANSWERS} lacks 1 question (9000) of "),
        (
            VAL_ANSWERS,
            edit_answers(list.pop),
            f"{VAL_ANSWERS}: question 9000 has 9 answers of 9 people, expected 10 of 10",
        ),
        (
            VAL_ANSWERS,
            edit_answers(lambda answers: answers[3].update(answer_id=1)),
            f"{VAL_ANSWERS}: question 9000 has 10 answers of 9 people, expected 10 of 10",
        ),
        (
            VAL_ANSWERS,
            edit_answers(lambda answers: answers[3].update(answer=2)),
            f"{VAL_ANSWERS}: an answer to question 9000 is no object with answer_id and answer (str)",
        ),
        (
            VAL_ANSWERS,
            edit_answers(lambda answers: answers.append("red")),
            f"{VAL_ANSWERS}: an answer to question 9000 is no object with answer_id and answer (str)",
        ),
        (
            VAL_ANSWERS,
            lambda content: content["annotations"][0].update(image_id=42),
            "question 9000 is about picture 9 in ",
        ),
        (
            VAL_ANSWERS,
            lambda content: content["annotations"][1].pop("answer_type"),
            f"{VAL_ANSWERS}: item 1 of 'annotations' is ",
        ),
        (VAL_QUESTIONS, lambda content: content.update(questions=[]), f"{VAL_QUESTIONS} has no questions"),
        (VAL_QUESTIONS, lambda content: content.pop("questions"), f"{VAL_QUESTIONS} has no list 'questions'"),
        (
            VAL_QUESTIONS,
            lambda content: content.update(data_subtype="train2014"),
            f"{VAL_QUESTIONS} has data_subtype train2014, expected val2014",
        ),
    ],
)
def test_broken_files(tmp_path: Path, name: str, edit: Change, problem: str) -> None:
    write_val(tmp_path)
    change(tmp_path / name, edit)
    with pytest.raises(ValueError, match=re.escape(problem)):
        open_val(tmp_path)


@pytest.mark.parametrize("name", [VAL_QUESTIONS, VAL_ANSWERS])
def test_missing_and_truncated_files(tmp_path: Path, name: str) -> None:
    file = write_val(tmp_path) / name
    text = file.read_text(encoding="utf-8")
    file.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{file} is not JSON: ")):
        open_val(tmp_path)
    file.unlink()
    message = f"{file} is missing: VQA-v2's own file, from https://visualqa.org/download.html"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        open_val(tmp_path)


def test_missing_pictures(tmp_path: Path) -> None:
    (write_val(tmp_path) / "val2014/COCO_val2014_000000000042.jpg").unlink()
    message = (
        f"{tmp_path}: 1 picture (val2014/COCO_val2014_000000000042.jpg) of 2 missing: "
        "unpack val2014.zip of https://cocodataset.org there"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        open_val(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000009.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=re.escape("2 pictures (val2014/COCO_val2014_000000000009.jpg, val2014/")
    ):
        open_val(tmp_path)


def test_many_faults_are_counted_and_some_named() -> None:
    assert vqav2._name_some(range(9), "question") == "9 questions (0, 1, 2, 3, 4, ...)"
