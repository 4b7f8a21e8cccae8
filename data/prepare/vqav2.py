"""VQA-v2's training questions: one conversation per picture, short answers, questions in a seeded order.

    root/v2_OpenEnded_mscoco_train2014_questions.json      443,757 questions about 82,783 pictures
    root/v2_mscoco_train2014_annotations.json              ten people's answers to each; the commonest is learned
    root/train2014/COCO_train2014_%012d.jpg                the pictures; or root/train2017/%012d.jpg, where the same lie

`random.Random(f"{seed}:vqav2:{image_id}")` shuffles the questions of a picture. The first of them asks for a single
word or phrase, as in the official mixture, which has the same 82,783 conversations. Questions and answers are CC BY
4.0; the pictures have Flickr's licences.
"""

import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from data.prepare.fields import stream_fields
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.prompts import ask_briefly, make_conversation
from data.prepare.report import Report

QUESTIONS_FILE = "v2_OpenEnded_mscoco_train2014_questions.json"
ANSWERS_FILE = "v2_mscoco_train2014_annotations.json"
LICENSE = "CC BY 4.0"
MAX_QUESTIONS = 40  # of one picture: with their answers and the picture they fit into 2,048 tokens
HEADER_BYTES = 2**16  # what the file is stands before its long list, or after it

Asked = list[tuple[int, str, str]]  # number of the question, question, answer


def read(root: Path, options: Options, leaks: Leaks, report: Report) -> Iterator[dict]:
    """Yield the rows in the order in which the file first asks about each picture.

    Raises: FileNotFoundError for a missing file; ValueError for a broken one, or another split's.
    """
    has_2017_only = (root / "train2017").is_dir() and not (root / "train2014").is_dir()
    path = "train2017/{:012d}.jpg" if has_2017_only else "train2014/COCO_train2014_{:012d}.jpg"
    report.note(f"pictures are named as in {Path(path).parent}/")
    for image_id, asked in _join(root, report).items():
        image = path.format(image_id)
        if reason := leaks.find(image, coco_id=image_id):
            report.drop(reason)
        elif pairs := _select_questions(asked, random.Random(f"{options.seed}:vqav2:{image_id}"), report):
            yield {
                "id": f"vqav2-{image_id}",
                "image": image,
                "conversations": make_conversation(ask_briefly(pairs, options.language)),
                "source": "vqav2",
                "lang": options.language,
                "license": LICENSE,
            }
        else:
            report.drop("picture: no question with an answer")


def _join(root: Path, report: Report) -> Mapping[int, Asked]:
    """Return the answered questions of every picture that is asked about."""
    answers = {
        number: sys.intern(answer.strip())
        for number, answer in stream_fields(
            _open(root / ANSWERS_FILE, report), "annotations", question_id=int, multiple_choice_answer=str
        )
    }
    questions: dict[int, Asked] = {}
    for number, image_id, question in stream_fields(
        _open(root / QUESTIONS_FILE, report), "questions", question_id=int, image_id=int, question=str
    ):
        asked = questions.setdefault(image_id, [])
        answer = answers.pop(number, None)
        if answer is None:
            report.drop("question: no answer to it is listed")
        elif not answer:
            report.drop("question: its answer is empty")
        else:
            asked.append((number, " ".join(question.split()), answer))
    if answers:
        report.drop("answer: no question to it is listed", len(answers))
    report.read = len(questions)
    return questions


def _open(file: Path, report: Report) -> Path:
    """Record a file, once it is known to be of the training split."""
    report.add_input(file)
    with file.open("rb") as opened:
        header = opened.read(HEADER_BYTES)
        opened.seek(max(file.stat().st_size - HEADER_BYTES, 0))
        header += opened.read()
    subtypes = set(re.findall(rb'"data_subtype":\s*"([\w-]+)"', header))
    if subtypes != {b"train2014"}:
        named = b", ".join(subtypes).decode() or "none"
        raise ValueError(f"{file} has data_subtype {named}, expected train2014: other splits are for testing")
    return file


def _select_questions(
    asked: Iterable[tuple[int, str, str]], random_order: random.Random, report: Report
) -> list[tuple[str, str]]:
    pairs: dict[str, str] = {}
    for _, question, answer in sorted(asked):
        if question in pairs:
            report.drop("question: asked twice")
        else:
            pairs[question] = answer
    selected = list(pairs.items())
    random_order.shuffle(selected)
    if len(selected) > MAX_QUESTIONS:
        report.drop(f"question: beyond {MAX_QUESTIONS} of one picture", len(selected) - MAX_QUESTIONS)
    return selected[:MAX_QUESTIONS]
