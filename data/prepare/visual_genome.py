"""Visual Genome's questions: one conversation per picture, short answers.

    root/question_answers.json   about 800 MB: 1.4 or 1.7 million questions, by version, about 108,077 pictures
    root/image_data.json         where each picture lies, and which of COCO's pictures it is
    root/VG_100K/, VG_100K_2/    the pictures; the folder is the one that the picture's address names

`random.Random(f"{seed}:visual_genome:{image_id}")` shuffles the questions of a picture; the first MAX_QUESTIONS are
asked. Half of the pictures are COCO's, which is how those that benchmarks ask about are found. Licence: CC BY 4.0; the
pictures are Flickr's.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from data.prepare.fields import take_fields
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.prompts import ask_briefly, make_conversation
from data.prepare.report import Report
from data.rows import stream_items

MAX_QUESTIONS = 10  # of one picture, which has 16 on average
LICENSE = "CC BY 4.0"
STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"'})
FINAL_STOPS = re.compile(r"(?<!\.\w)\s*\.+$")  # not those of "p.m."


def read(root: Path, options: Options, leaks: Leaks, report: Report) -> Iterator[dict]:
    """Yield the rows in the order of the questions' file.

    Raises: FileNotFoundError for a missing file; ValueError for a broken one.
    """
    pictures = read_pictures(report.add_input(root / "image_data.json"))
    file = report.add_input(root / "question_answers.json")
    for number, item in enumerate(stream_items(file)):
        place = f"{file}: item {number}"
        image_id, asked = _take(item, place)
        report.read += 1
        if image_id not in pictures:
            report.drop("picture: not listed in image_data.json")
            continue
        image, coco_id = pictures[image_id]
        if reason := leaks.find(image, coco_id):
            report.drop(reason)
            continue
        pairs = [take_fields(pair, place, question=str, answer=str) for pair in asked]
        selected = _select(pairs, random.Random(f"{options.seed}:visual_genome:{image_id}"), report)
        if not selected:
            report.drop("picture: no question left")
            continue
        yield {
            "id": f"visual_genome-{image_id}",
            "image": image,
            "conversations": make_conversation(ask_briefly(selected, options.language)),
            "source": "visual_genome",
            "lang": options.language,
            "license": LICENSE,
        }


def read_pictures(file: Path) -> Mapping[int, tuple[str, int | None]]:
    """Return the path below VG's folder, and COCO's id or None, of every picture by its id.

    Raises: FileNotFoundError; ValueError naming the item that is not as expected.
    """
    pictures = {}
    for number, item in enumerate(stream_items(file)):
        image_id, url = _take(item, f"{file}: item {number}", url=str)
        coco_id = item.get("coco_id")
        pictures[image_id] = ("/".join(url.split("/")[-2:]), int(coco_id) if coco_id else None)
    return pictures


def _take(item: object, place: str, **fields: type) -> tuple:
    """Return the picture's id, which older versions call otherwise, and the named field (`qas` if none)."""
    id_name = "id" if isinstance(item, dict) and "image_id" not in item else "image_id"
    return take_fields(item, place, **{id_name: int, **(fields or {"qas": list})})


def _select(pairs: Iterable[tuple[str, str]], random_order: random.Random, report: Report) -> list[tuple[str, str]]:
    """Return the questions that are asked, and their answers, normalised."""
    asked: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)  # by question and answer, in any letter case
    for question, answer in pairs:
        pair = normalise(question), FINAL_STOPS.sub("", normalise(answer))
        if not all(pair):
            report.drop("question: it or its answer is empty")
            continue
        report.mend("question: spaces or curly quotes", pair[0] != question)
        report.mend("answer: final full stop, spaces or curly quotes", pair[1] != answer)
        answers = asked[pair[0].casefold()]
        if pair[1].casefold() in answers:
            report.drop("question: asked before, with the same answer")
        answers.setdefault(pair[1].casefold(), pair)
    selected: list[tuple[str, str]] = []
    for answers in asked.values():
        if len(answers) > 1:
            report.drop("question: asked more than once, with different answers", len(answers))
        else:
            selected += answers.values()
    random_order.shuffle(selected)
    report.drop(f"question: beyond {MAX_QUESTIONS} of one picture", max(0, len(selected) - MAX_QUESTIONS))
    return selected[:MAX_QUESTIONS]


def normalise(text: str) -> str:
    """Return the text with straight quotes and single blanks, none around it."""
    return " ".join(text.translate(STRAIGHT).split())
