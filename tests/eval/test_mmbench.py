"""MMBench's files as they are distributed, its answers as three harnesses read them, and damage of every kind."""

import base64
import csv
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.mmbench import MMBENCH, MMBENCH_CN, RULES
from eval.mmbench_choice import read_choice
from eval.task import Question, Scored, Task

HEADER = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
    "split",
)  # fmt: skip
ANIMALS = {"A": "cat", "B": "dog", "C": "horse", "D": "cow"}
YES_NO = {"A": "Yes", "B": "No"}


def make_picture(seed: int) -> str:
    """A PNG of noise as base64."""
    pixels = np.random.default_rng(seed).integers(256, size=(5, 7, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def make_row(index: int, options: Mapping[str, str] = ANIMALS, answer: str = "B", **cells: str) -> dict[str, str]:
    row = dict.fromkeys(HEADER, "") | {"index": str(index), "question": "Which?", "answer": answer}
    return row | {"category": "naming", "l2-category": "perception", "image": make_picture(index % 1_000_000)} | {
        **options, **cells
    }  # fmt: skip


def make_passes(row: dict[str, str], picture: str | None = None) -> list[dict[str, str]]:
    """A question and its copies, turned by hand: what was in B comes to A, and so on."""
    letters = [letter for letter in "ABCD" if row[letter] != ""]
    rows = [row]
    for number in range(1, len(letters)):
        last = rows[-1]
        turned = {letter: last[letters[(place + 1) % len(letters)]] for place, letter in enumerate(letters)}
        answer = letters[letters.index(last["answer"]) - 1]
        index = str(int(row["index"]) + 1_000_000 * number)
        rows.append(last | turned | {"answer": answer, "index": index, "image": picture or row["image"]})
    return rows


def write_tsv(file: Path, rows: Sequence[Mapping[str, str]], header: Sequence[str] = HEADER) -> Path:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, header, dialect="excel-tab", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture
def three_questions() -> list[dict[str, str]]:
    """First passes in front, then the copies, as in the owner's file."""
    noun = make_row(241, hint='A "hint"\twith marks\nand lines.')
    yes_no = make_row(17, YES_NO, "A", category="judging", image=make_picture(241))
    last = make_row(5, {"A": "red", "B": "Blue", "C": "green"}, "C", hint="nan", D="nan", category="colour")
    by_question = [make_passes(noun), make_passes(yes_no, picture="241"), make_passes(last | {"D": ""})]
    for row in by_question[2]:
        row["D"] = "nan"
    rows = [row for rows in by_question for row in rows]
    return sorted(rows, key=lambda row: int(row["index"]) // 1_000_000)


def open_rows(folder: Path, rows: Sequence[Mapping[str, str]], rule: str = "official") -> Task:
    return MMBENCH.open(write_tsv(folder / "mmbench_dev.tsv", rows), rule, None)


def score(task: Task, predictions: Sequence[str]) -> tuple[Scored, dict[str, dict[str, float]]]:
    scored = MMBENCH.count(task.questions, predictions, "official")
    return scored, {kind: {name: part.score for name, part in parts.items()} for kind, parts in scored.parts.items()}


def test_the_file_is_read_and_asked_as_llava_asks(tmp_path: Path, three_questions: list[dict[str, str]]) -> None:
    task = open_rows(tmp_path, three_questions)
    asked = {question.question_id: question for question in task.questions}
    assert list(asked) == ["17", "1000017", "241", "1000241", "2000241", "3000241", "5", "1000005", "2000005"]
    assert asked["1000241"].turns == (
        'A "hint"\twith marks\nand lines.\nWhich?\nA. dog\nB. horse\nC. cow\nD. cat\n'
        "Answer with the option's letter from the given choices directly.",
    )
    assert asked["1000241"].answers == ("A",)
    assert asked["5"].text == "Which?\nA. red\nB. Blue\nC. green"
    assert asked["5"].turns[0].startswith("Which?\nA. red\n")
    assert asked["5"].kinds == {"category": "colour", "l2-category": "perception"}
    assert (task.template, task.max_new_tokens) == ("vicuna_v1", 1024)
    assert task.files == [tmp_path / "mmbench_dev.tsv"]
    json.dumps([[question.kinds, question.details] for question in task.questions])


def test_pictures_are_kept_once_and_opened_when_asked_for(
    tmp_path: Path, three_questions: list[dict[str, str]]
) -> None:
    """Copies that repeat a picture, and those that name a row, are about one picture; so is another question's."""
    task = open_rows(tmp_path, three_questions)
    assert [question.image for question in task.questions] == ["241"] * 6 + ["5"] * 3
    expected = Image.open(io.BytesIO(base64.b64decode(make_picture(5))))
    assert task.open_picture("5").tobytes() == expected.convert("RGB").tobytes()


def test_a_copy_may_name_a_row_whose_picture_another_one_had_first(tmp_path: Path) -> None:
    first, second = make_passes(make_row(1)), make_passes(make_row(2, image=make_picture(1)), picture="2")
    task = open_rows(tmp_path, [*first, *second])
    assert {question.image for question in task.questions} == {"1"}


def test_circular_and_vanilla_by_hand(tmp_path: Path, three_questions: list[dict[str, str]]) -> None:
    """One question right in all passes, one in all but the last, one in none but the first: 1/3 and 3/3."""
    task = open_rows(tmp_path, three_questions)
    predictions = [question.answers[0] for question in task.questions]
    wrong = [place for place, one in enumerate(task.questions) if one.question_id in ("3000241", "1000005", "2000005")]
    for place in wrong:
        predictions[place] = "none of them"
    scored, scores = score(task, predictions)
    assert scores["all"] == {"circular": pytest.approx(1 / 3), "vanilla": 1.0}
    assert list(scored.parts["all"]) == ["circular", "vanilla"]
    assert scores["category"] == {"colour": 0.0, "judging": 1.0, "naming": 0.0}
    assert scores["l2-category"] == {"perception": pytest.approx(1 / 3)}
    assert [credit == 0 for credit in scored.credits] == [place in wrong for place in range(9)]
    assert scored.parts["all"]["circular"].num_questions == 3
    assert scored.parts["all"]["circular"].clusters == ("241", "5")


def test_always_the_same_letter_is_never_right_all_around(
    tmp_path: Path, three_questions: list[dict[str, str]]
) -> None:
    task = open_rows(tmp_path, three_questions)
    _, scores = score(task, task.bars["always A"])
    assert scores["all"] == {"circular": 0.0, "vanilla": pytest.approx(1 / 3)}


def test_a_question_not_asked_in_full_is_not_counted_circular(
    tmp_path: Path, three_questions: list[dict[str, str]]
) -> None:
    task = open_rows(tmp_path, three_questions)
    some = replace(task, questions=[question for question in task.questions if question.question_id != "3000241"])
    scored, scores = score(some, [question.answers[0] for question in some.questions])
    assert scores["all"] == {"circular": 1.0, "vanilla": 1.0}
    assert [part.num_questions for part in scored.parts["all"].values()] == [2, 3]
    copy = [question for question in task.questions if question.question_id == "3000241"]
    with pytest.raises(ValueError, match=r"none of the 1 questions is asked as it is: ask more of them"):
        MMBENCH.count(copy, ["A"], "official")


def test_a_file_without_copies_gets_those_that_the_owner_makes(
    tmp_path: Path, three_questions: list[dict[str, str]]
) -> None:
    """Turned here, the first passes are what the file with copies holds."""
    whole = open_rows(tmp_path, three_questions)
    first = [row for row in three_questions if int(row["index"]) < 1_000_000]
    first[1]["image"] = first[0]["image"]
    made = open_rows(tmp_path, first)
    assert sorted(made.questions, key=str) == sorted(whole.questions, key=str)


def test_a_test_file_has_no_answers_and_is_written_for_the_server(
    tmp_path: Path, three_questions: list[dict[str, str]]
) -> None:
    header = [column for column in HEADER if column != "answer"]
    task = MMBENCH.open(write_tsv(tmp_path / "test.tsv", three_questions, header), "official", None)
    predictions = ["A", 'tab\tand "marks"', "two\nlines", "\r", "", "=1+1", "B", "C", "图"]
    scored = MMBENCH.count(task.questions, predictions, "official")
    assert scored == Scored([None] * 9, {})
    assert task.bars == {}
    assert MMBENCH.write_submission is not None
    file = MMBENCH.write_submission(task, predictions, tmp_path)
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened, dialect="excel-tab"))
    assert [row["prediction"] for row in rows] == predictions
    by_index = {row["index"]: row for row in rows}
    assert by_index["2000005"] | {"prediction": ""} == {
        "index": "2000005", "question": "Which?", "A": "green", "B": "red", "C": "Blue", "D": "", "prediction": "",
    }  # fmt: skip
    assert len(by_index) == 9


def test_chinese(tmp_path: Path) -> None:
    rows = make_passes(make_row(3, {"A": "猫", "B": "狗"}, "A", question="图中是什么？", hint="看图。"))
    file = write_tsv(tmp_path / "mmbench_dev_cn.tsv", rows)
    asked = {rule: MMBENCH_CN.open(file, rule, None) for rule in RULES}
    prompts = {rule: task.questions[0].turns[0] for rule, task in asked.items()}
    assert prompts["official"] == "看图。\n图中是什么？\nA. 猫\nB. 狗\n请直接回答选项字母。"
    assert prompts["vlmevalkit"] == prompts["official"]
    assert prompts["lmms-eval"] == (
        "看图。 图中是什么？ 有如下几个选项：\nA. 猫\nB. 狗\n\n请直接使用所提供的选项字母作为答案回答。"
    )
    assert {rule: task.max_new_tokens for rule, task in asked.items()} == {
        "official": 1024, "lmms-eval": 256, "vlmevalkit": 2048,
    }  # fmt: skip
    assert [asked[rule].template for rule in RULES] == ["vicuna_v1", "vicuna_v1", "llava_v1"]
    with pytest.raises(ValueError, match=r"mmbench_dev_cn.tsv asks in Chinese: that is the task mmbench_cn"):
        MMBENCH.open(file, "official", None)


def test_english_as_lmms_eval_asks(tmp_path: Path) -> None:
    task = open_rows(tmp_path, make_passes(make_row(3, YES_NO, hint="NA")), "lmms-eval")
    assert task.questions[0].turns == (
        "Which? There are several options:\nA. Yes\nB. No\n\n"
        "Answer with the option's letter from the given choices directly.",
    )
    assert task.prompt == (
        "{hint} {question} There are several options:\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\n"
        "Answer with the option's letter from the given choices directly."
    )


# What each rule makes of an answer: official, lmms-eval, vlmevalkit; the options are ANIMALS.
CHOICES = {
    "B": "BBB",
    "B.": "BBB",
    "(B) dog": "BBB",
    "b": ("", "", ""),  # letters are capitals
    "the dog": "BBB",
    "A DOG": "AAA",  # "A" is a letter before it is an article
    "A dog is in the picture": ("A", "B", "B"),  # lmms-eval sees an article; vlmevalkit wants the letter at the end
    "A or B": ("", "", ""),
    "A or B, a dog": "BBB",  # no single letter, but one text
    "a dog and a cat": ("", "", ""),
    "B: because this animal barks at night": ("B", "B", ""),
    "The answer is **C** for reasons I could go on about": ("C", "", "C"),
    "**C** for reasons I could go on about": ("C", "", ""),
    "Not the cat, as it has no tail like that": ("A", "A", ""),  # longer than twice all options together
    "the answer is C as ever seen before": ("C", "C", "C"),
    "B!": ("B", "", "B"),  # lmms-eval knows no such wrapping
    "E": ("", "E", ""),  # which is no option
    "Z, not the dog": ("", "B", ""),
    "Cannot determine the answer, B": ("", "B", ""),
    "": ("", "", ""),
    "horses": "CCC",
    "A: B:": ("", "", ""),
    "A. B:": ("", "A", ""),  # "A." comes before "B:"
    "cow\n": "DDD",
    "选B": ("", "", ""),  # no word of its own
    "选 B": "BBB",
}


@pytest.mark.parametrize("answer", CHOICES)
def test_what_is_chosen(answer: str) -> None:
    chosen = [read_choice(answer, ANIMALS, rule) for rule in RULES]
    assert chosen == list(CHOICES[answer])


def test_letters_of_options_that_are_not_there_are_words() -> None:
    assert read_choice("C", YES_NO, "official") == ""
    assert read_choice("C: yes", YES_NO, "official") == "A"


def test_an_answer_is_read_the_same_whatever_stands_around_a_letter() -> None:
    random.seed(4)
    for _ in range(300):
        letter = random.choice("ABCD")
        marks = "".join(random.choices(".()[],:;!*#{} \n\t", k=6))
        place = random.randrange(7)
        assert read_choice(marks[:place] + letter + marks[place:], ANIMALS, "official") == letter


def test_the_right_file_of_a_folder(tmp_path: Path, three_questions: list[dict[str, str]]) -> None:
    for name in ("mmbench_dev_20230712.tsv", "mmbench_dev_cn_20231003.tsv", "ccbench.tsv"):
        write_tsv(tmp_path / name, three_questions)
    assert MMBENCH.open(tmp_path, "official", None).files == [tmp_path / "mmbench_dev_20230712.tsv"]
    (tmp_path / "MMBench_DEV_EN.tsv").touch()
    with pytest.raises(FileNotFoundError) as raised:
        MMBENCH.open(tmp_path, "official", None)
    assert str(raised.value) == (
        f"{tmp_path} holds 2 files mmbench_*.tsv without _cn, expected one: name it (TSVs: MMBench_DEV_EN.tsv, "
        "ccbench.tsv, mmbench_dev_20230712.tsv, mmbench_dev_cn_20231003.tsv)"
    )
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing: expected MMBench's TSV file"):
        MMBENCH.open(tmp_path / "nowhere", "official", None)
    with pytest.raises(ValueError, match=r"MMBench's pictures are in its TSV file, leave it out"):
        MMBENCH.open(tmp_path / "mmbench_dev_20230712.tsv", "official", tmp_path)


def test_none_is_an_option_where_it_is_the_answer_or_another_follows(tmp_path: Path) -> None:
    rows = [
        make_row(1, {"A": "One", "B": "None"}, "B"),
        make_row(2, {"A": "None", "B": "Two"}, "B"),
        make_row(3, {"A": "One", "B": "Two", "C": "None"}, "A"),
    ]
    task = open_rows(tmp_path, rows)
    options = {one.question_id: one.details["options"] for one in task.questions if len(one.question_id) == 1}
    assert options == {"1": {"A": "One", "B": "None"}, "2": {"A": "None", "B": "Two"}, "3": {"A": "One", "B": "Two"}}


LONG = make_picture(1)
BAD_ROWS = {
    "index 7 is there twice, first in line 2": [make_row(7), make_row(7)],
    "line 2: index -1 is negative": [make_row(-1)],
    "line 2: invalid literal for int() with base 10: 'x'": [make_row(1) | {"index": "x"}],
    "line 2: index 7 has the answer 'E', expected one of A, B, C, D": [make_row(7, answer="E")],
    "line 2: index 7 has the answer 'C', expected one of A, B": [make_row(7, YES_NO, "C")],
    "line 2: index 7 has the answer '', expected one of A, B, C, D": [make_row(7, answer="")],
    "line 2: index 7 has the options A 'cat', B '', C 'horse', D 'cow'": [make_row(7, B="", answer="A")],
    "line 2: index 7 has the options A 'cat'": [make_row(7, {"A": "cat"}, "A")],
    "line 2: index 7 has no question": [make_row(7, question="")],
    ": index 1000007 is a copy of index 7, which is not there": [*make_passes(make_row(3)), make_row(1_000_007)],
    ": question 7 has 3 rows, expected one for each of its 4 options": make_passes(make_row(7))[:3],
    "line 2: the picture is no base64: ": [make_row(7, image=LONG[:-5])],
    "line 3: the picture is no base64: ": [make_row(6), make_row(7, image="?" + LONG[1:])],
    "line 3: the picture is neither base64 nor another row's index": [make_row(6), make_row(7, image="8")],
    "line 2: the picture is neither base64 nor another row's index": [make_row(7, image="")],
    " holds no questions": [],
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_rows(tmp_path: Path, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        open_rows(tmp_path, BAD_ROWS[message])
    assert str(raised.value).startswith(str(tmp_path / "mmbench_dev.tsv"))
    assert message in str(raised.value)


def test_a_file_cut_off_anywhere_is_an_error(tmp_path: Path, three_questions: list[dict[str, str]]) -> None:
    """Wherever a download stopped: in a picture, in quoted text, in a character, between copies."""
    three_questions[-1]["comment"] = "“quoted\ttext”"
    file = write_tsv(tmp_path / "mmbench.tsv", three_questions)
    whole = file.read_bytes()
    assert len(MMBENCH.open(file, "official", None).questions) == 9
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    sizes = {*range(0, len(whole), 17), *ends, *(end + 1 for end in ends)} - {len(whole)}
    unnoticed = []
    for size in sorted(sizes):
        file.write_bytes(whole[:size])
        try:
            MMBENCH.open(file, "official", None)
            unnoticed.append(size)
        except ValueError as error:
            assert str(file) in str(error)  # noqa: PT017
    # Behind each of the three first passes, and before the file's last newline; the last cell of a row is empty here.
    first = ends[2:5]  # behind the header and the hint's own line
    assert unnoticed == [*sorted(size for end in first for size in (end, end + 1)), len(whole) - 1]


@pytest.mark.parametrize("column", ["index", "question", "C", "image"])
def test_a_missing_column(tmp_path: Path, column: str) -> None:
    file = write_tsv(tmp_path / "mmbench.tsv", [make_row(1)], [name for name in HEADER if name != column])
    with pytest.raises(ValueError, match=rf"mmbench\.tsv has no column {column}: is it MMBench's TSV\?"):
        MMBENCH.open(file, "official", None)


def test_what_is_no_picture_is_an_error_when_it_is_opened(tmp_path: Path) -> None:
    task = open_rows(tmp_path, [make_row(9, image=base64.b64encode(b"no picture" * 9).decode())])
    with pytest.raises(ValueError, match=r"mmbench_dev\.tsv, picture of index 9: cannot read the picture: it is none"):
        task.open_picture("9")


def test_cells_larger_than_the_csv_modules_limit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(300, 400, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    picture = base64.b64encode(content.getvalue()).decode()
    assert len(picture) > 131_072
    task = open_rows(tmp_path, [make_row(9, image=picture)])
    assert task.open_picture("9").size == (400, 300)


def test_predictions_must_be_as_many_as_questions(tmp_path: Path) -> None:
    task = open_rows(tmp_path, [make_row(9)])
    questions: Sequence[Question] = task.questions
    with pytest.raises(ValueError, match="zip"):
        MMBENCH.count(questions, ["A"], "official")
