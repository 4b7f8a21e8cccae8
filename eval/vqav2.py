"""VQA-v2: 214,354 questions of its validation split, scored here; 447,793 of its test split, scored by its owner.

    data/v2_OpenEnded_mscoco_val2014_questions.json          vqav2: the questions,
    data/v2_mscoco_val2014_annotations.json                  and ten people's answers to each
    data/v2_OpenEnded_mscoco_test-dev2015_questions.json     vqav2_test_dev: the 107,394 that are asked
    data/v2_OpenEnded_mscoco_test2015_questions.json         vqav2_test_std, and what every upload must list
    data/val2014/COCO_val2014_%012d.jpg                      the pictures; also found directly in the image folder,
    data/test2015/COCO_test2015_%012d.jpg                    and those of val2014 in train2017/ and val2017/

All from https://visualqa.org and https://cocodataset.org. Rules decide how answers are counted (`eval.vqa_accuracy`)
and how long they may be: 128 tokens officially, 16 in lmms-eval. VLMEvalKit does not have this benchmark.

What the test splits' owner takes is one JSON list of all 447,793 questions, whichever of them were asked. This file,
run by itself, tells whether a file is that:

    python -m eval.vqav2 --validate submission.json --questions data/v2_OpenEnded_mscoco_test2015_questions.json

Source: Goyal et al. 2017; the upload as LLaVA's `convert_vqav2_for_submission.py` makes it.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data.pictures import PictureFolder
from data.prepare.fields import stream_fields
from data.prepare.prompts import SHORT_ANSWER_SUFFIX
from data.rows import RowWriter
from eval.tally import mean_part
from eval.task import OFFICIAL, Benchmark, Question, Scored, Task
from eval.vqa_accuracy import NUM_PEOPLE, process_for_submission, vqa_accuracy

QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
SUFFIX = SHORT_ANSWER_SUFFIX["en"]
MAX_NEW_TOKENS = {OFFICIAL: 128, "lmms-eval": 16}
NUM_TEST_QUESTIONS = 447_793
HEADER_BYTES = 2**16  # what the file is stands before its long list, or after it
SOME = 5  # of many faults, so many are shown

NO_KINDS: Mapping[str, str] = {}

Answered = tuple[int, tuple[str, ...], dict[str, str]]  # picture, ten answers, kinds


def open_val(data: Path, rule: str, image_folder: Path | None) -> Task:
    """Open the questions that have answers. Raises: as `OpenTask`."""
    files = [_find_file(data, QUESTIONS, "val2014"), _find_file(data, ANNOTATIONS, "val2014")]
    answers = dict(_read_answers(files[1]))
    asked: list[Question] = []
    without_answer = []
    for number, image_id, text in _read_questions(files[0]):
        if number not in answers:
            without_answer.append(number)
            continue
        image_of_answer, people, kinds = answers.pop(number)
        if image_of_answer != image_id:
            raise ValueError(
                f"question {number} is about picture {image_id} in {files[0]}, but {image_of_answer} in {files[1]}: "
                "the files are not of one version"
            )
        asked.append(_make_question(number, image_id, "val2014", text, people, kinds))
    if without_answer:
        raise ValueError(f"{files[1]} lacks {_name_some(without_answer, 'question')} of {files[0]}")
    if answers:
        raise ValueError(f"{files[0]} lacks {_name_some(list(answers), 'question')} of {files[1]}")
    return _make_task(asked, "val2014", files, rule, image_folder or data)


def open_test(split: str, data: Path, rule: str, image_folder: Path | None) -> Task:
    """Open the questions of `split`, test-dev2015 or test2015, whose answers the owner keeps. Raises: as `OpenTask`."""
    everything = _find_file(data, QUESTIONS, "test2015")
    files = [everything] if split == "test2015" else [_find_file(data, QUESTIONS, split), everything]
    asked = [_make_question(number, image_id, "test2015", text) for number, image_id, text in _read_questions(files[0])]
    if len(files) > 1:
        known = {number for number, _, _ in _read_questions(everything)}
        if unknown := [question.question_id for question in asked if int(question.question_id) not in known]:
            raise ValueError(f"{everything} lacks {_name_some(unknown, 'question')} of {files[0]}")
    return _make_task(asked, "test2015", files, rule, image_folder or data)


def _make_question(
    number: int, image_id: int, split: str, text: str, people: tuple[str, ...] = (), kinds: Mapping[str, str] = NO_KINDS
) -> Question:
    image = sys.intern(f"{split}/COCO_{split}_{image_id:012d}.jpg")
    return Question(str(number), image, text, (text + SUFFIX,), people, kinds)


def _make_task(asked: list[Question], split: str, files: list[Path], rule: str, image_folder: Path) -> Task:
    """Put the questions about one picture next to each other, and check that the pictures are there."""
    by_image: dict[str, list[Question]] = {}
    for question in asked:
        by_image.setdefault(question.image, []).append(question)
    pictures = PictureFolder(image_folder)
    if missing := [name for name in by_image if _find_picture(pictures, name) is None]:
        raise FileNotFoundError(
            f"{image_folder}: {_name_some(missing, 'picture')} of {len(by_image)} missing: "
            f"unpack {split}.zip of https://cocodataset.org there"
        )
    return Task(
        questions=[question for questions in by_image.values() for question in questions],
        open_picture=partial(_open_picture, pictures),
        files=files,
        template="vicuna_v1",
        max_new_tokens=MAX_NEW_TOKENS[rule],
        prompt="{question}" + SUFFIX,
    )


def _find_picture(pictures: PictureFolder, name: str) -> str | None:
    """Return where the picture lies; COCO of 2017 has those of val2014 under their bare numbers in other folders."""
    base, number = name.rpartition("/")[2], name[-len("000000000009.jpg") :]
    others = [f"train2017/{number}", f"val2017/{number}"] if name.startswith("val2014/") else []
    return next((place for place in (name, base, *others) if pictures.find(place) is not None), None)


def _open_picture(pictures: PictureFolder, name: str) -> Image.Image:
    return pictures.open(_find_picture(pictures, name) or name)


def _find_file(data: Path, pattern: str, split: str) -> Path:
    """Return the owner's file, once it is known to be of that split."""
    file = data / pattern.format(split)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: VQA-v2's own file, from https://visualqa.org/download.html")
    with file.open("rb") as opened:
        header = opened.read(HEADER_BYTES)
        opened.seek(max(file.stat().st_size - HEADER_BYTES, 0))
        header += opened.read()
    subtypes = {name.decode() for name in re.findall(rb'"data_subtype":\s*"([\w-]+)"', header)}
    if wrong := subtypes - {split, split.replace("test-dev", "test")}:
        raise ValueError(f"{file} has data_subtype {', '.join(sorted(wrong))}, expected {split}")
    return file


def _read_questions(file: Path) -> Iterator[tuple[int, int, str]]:
    """Yield number, picture and text of each question; there must be some, each once."""
    seen: set[int] = set()
    for number, image_id, text in stream_fields(file, "questions", question_id=int, image_id=int, question=str):
        if number in seen:
            raise ValueError(f"{file} has question {number} twice")
        seen.add(number)
        yield number, image_id, text
    if not seen:
        raise ValueError(f"{file} has no questions")


def _read_answers(file: Path) -> Iterator[tuple[int, Answered]]:
    """Yield by question what ten people answered; what many questions share is one object."""
    seen: set[int] = set()
    shared_kinds: dict[tuple[str, str], dict[str, str]] = {}
    for number, image_id, answer_type, question_type, listed in stream_fields(
        file, "annotations", question_id=int, image_id=int, answer_type=str, question_type=str, answers=list
    ):
        if number in seen:
            raise ValueError(f"{file} has answers to question {number} twice")
        seen.add(number)
        try:
            answers = {answer["answer_id"]: sys.intern(answer["answer"]) for answer in listed}
        except (TypeError, KeyError):
            raise ValueError(
                f"{file}: an answer to question {number} is no object with answer_id and answer (str)"
            ) from None
        if not len(listed) == len(answers) == NUM_PEOPLE:
            raise ValueError(
                f"{file}: question {number} has {len(listed)} answers of {len(answers)} people, "
                f"expected {NUM_PEOPLE} of {NUM_PEOPLE}"
            )
        kinds = {"answer type": answer_type, "question type": question_type}
        yield number, (image_id, tuple(answers.values()), shared_kinds.setdefault((answer_type, question_type), kinds))


def _name_some(items: Sequence[object], what: str) -> str:
    some = ", ".join(map(str, items[:SOME])) + (", ..." if len(items) > SOME else "")
    return f"{len(items)} {what}{'s' if len(items) > 1 else ''} ({some})"


def count_val(questions: Sequence[Question], predictions: Sequence[str], rule: str) -> Scored:
    """Return VQA accuracy over all questions and by answer and question type."""
    credits = [
        vqa_accuracy(prediction, question.answers, rule)
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    places: dict[str, dict[str, list[int]]] = {"all": {"all": list(range(len(questions)))}}
    for breakdown in ("answer type", "question type"):
        by_name: dict[str, list[int]] = defaultdict(list)
        for place, question in enumerate(questions):
            by_name[question.kinds[breakdown]].append(place)
        places[breakdown] = dict(sorted(by_name.items()))
    parts = {
        breakdown: {
            name: mean_part([questions[place].image for place in of_name], [credits[place] for place in of_name])
            for name, of_name in by_name.items()
        }
        for breakdown, by_name in places.items()
    }
    return Scored(list(credits), parts)


def count_test(questions: Sequence[Question], predictions: Sequence[str], rule: str) -> Scored:
    """Return no credits and no parts: only the owner's server can tell, which `write_submission` writes for."""
    if len(questions) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(questions)} questions")
    return Scored([None] * len(questions), {})


def write_submission(task: Task, predictions: Sequence[str], folder: Path) -> Path:
    """Write every question of test2015, with "" for those that were not asked."""
    answers = {
        int(question.question_id): process_for_submission(prediction)
        for question, prediction in zip(task.questions, predictions, strict=True)
    }
    file = folder / "submission.json"
    with RowWriter(file) as writer:
        for number, _, _ in _read_questions(task.files[-1]):
            writer.write({"question_id": number, "answer": answers.get(number, "")})
    return file


def check_submission(file: Path, questions: Path) -> tuple[list[str], int, int]:
    """Return what is wrong with a submission, how many entries it has, and how many of their answers are empty.

    Raises: FileNotFoundError or ValueError where one of the files cannot be read at all.
    """
    expected = {number for number, _, _ in _read_questions(questions)}
    entries = _load_list(file)
    malformed, unknown, repeated, seen, num_empty = [], [], [], set(), 0
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.keys() != {"question_id", "answer"}:
            malformed.append(f"entry {place} is {str(entry)[:100]}, expected question_id and answer, nothing else")
            continue
        number, answer = entry["question_id"], entry["answer"]
        if type(number) is not int:  # True is an int, too
            malformed.append(f"entry {place}: question_id {number!r} is no whole number")
            continue
        if not isinstance(answer, str):
            malformed.append(f"entry {place}: answer {answer!r} is no text")
        if number not in expected:
            unknown.append(number)
        elif number in seen:
            repeated.append(number)
        seen.add(number)
        num_empty += answer == ""
    faults = malformed[:SOME]
    if len(malformed) > SOME:
        faults.append(f"{len(malformed) - SOME} more entries like these")
    for problem, numbers in (
        (f"not in {questions.name}", unknown),
        ("listed more than once", repeated),
        ("missing", sorted(expected - seen)),
    ):
        if numbers:
            faults.append(f"{problem}: {_name_some(numbers, 'question')}")
    return faults, len(entries), num_empty


def _load_list(file: Path) -> list[Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            raise ValueError(f"{file} holds an object, or one a line (JSON lines), but the server takes one JSON list")
        entries = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file} holds a {type(entries).__name__}, expected a list")
    return entries


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a submission; end with status 1 where the server would refuse it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validate", type=Path, required=True, metavar="FILE", help="what is to be uploaded")
    parser.add_argument("--questions", type=Path, required=True, help=f"the owner's {QUESTIONS.format('test2015')}")
    options = parser.parse_args(arguments)
    try:
        faults, num_entries, num_empty = check_submission(options.validate, options.questions)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.validate}: {num_entries:,} entries, {num_empty:,} of them with an empty answer")
    if num_entries != NUM_TEST_QUESTIONS:
        print(
            f"note: the owner's server expects {NUM_TEST_QUESTIONS:,} entries, those of {QUESTIONS.format('test2015')}"
        )
    if faults:
        sys.exit("\n".join(f"error: {fault}" for fault in faults))
    print("valid: every question once, none unknown")


VQAV2 = Benchmark("VQA accuracy", open_val, count_val, tuple(MAX_NEW_TOKENS))
VQAV2_TEST_DEV = Benchmark(
    "VQA accuracy", partial(open_test, "test-dev2015"), count_test, tuple(MAX_NEW_TOKENS), write_submission
)
VQAV2_TEST_STD = Benchmark(
    "VQA accuracy", partial(open_test, "test2015"), count_test, tuple(MAX_NEW_TOKENS), write_submission
)

if __name__ == "__main__":
    main()
