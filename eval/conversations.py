"""Any conversation file with reference answers: LLaVA's rows, the answers of gpt being the references.

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}

`--data` is the file (a JSON list, or JSONL); pictures are relative to its folder, or to `--image-folder`, and rows
without one are asked without. Every answer of gpt makes a question, called `row's id/number of the turn`; the turns
before it are given to the model with their reference answers, whatever it said itself. Nothing is added to the file's
words; the template is vicuna_v1, and an answer ends at 512 tokens, as in official LLaVA's demo: some 350 Chinese
characters (`--max-new-tokens` for more). A row with one question may list all right answers, `"answers": ["cat", "a
cat"]`: they count then, and that of gpt only if it is among them.

What is counted, each time with the reference that fits best:
- exact match: both in Unicode's NFKC form (full width to half width) and folded case, without blanks around and without
  any of . ! ? 。 at the end. Nothing else is forgiven: no articles, no traditional for simplified characters.
- character F1: both in NFKC form and folded case, without blanks and punctuation (Unicode's P), as bags of characters:
  2 x shared / (theirs + ours), 1 where both are empty, 0 where one is. It is SQuAD's F1 with characters for words.
- VQA accuracy: see `eval/vqa_accuracy.py`; one reference alone counts 0 or 1.

The headline, and what the breakdowns show, is character F1 where more than half of the questions have a Chinese
reference, exact match else. Broken down by whichever of kind, type, category and source a row names as text
(`data.zh.publish` writes kind and source), and by whether it is a conversation's first question or a later one.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.conversation import parse_turns
from data.pictures import PictureFolder
from data.rows import stream_rows
from data.zh.text import HAN
from eval.tally import Part, mean_part
from eval.task import OFFICIAL, Benchmark, Question, Scored, Task
from eval.vqa_accuracy import vqa_accuracy

TEMPLATE = "vicuna_v1"
MAX_NEW_TOKENS = 512
KINDS = ("kind", "type", "category", "source")
FIRST, LATER = "first", "later"
FINAL_MARKS = ".!?。"  # after NFKC, which makes . ! ? of their wide forms and 。 of its narrow one
NUM_SHOWN = 3  # missing pictures


def open_task(data: Path, rule: str, image_folder: Path | None) -> Task:
    """Read the file and look for every picture.

    Raises: FileNotFoundError or ValueError saying what is missing or wrong, in which row.
    """
    assert rule == OFFICIAL
    if data.is_dir():
        raise ValueError(f"{data} is a folder, expected a conversation file: name one, like {data / 'test.json'}")
    questions: list[Question] = []
    first_row: dict[str, int] = {}
    for number, row in enumerate(stream_rows(data)):
        try:
            of_row = read_row(row, number)
            name = of_row[0].question_id.rpartition("/")[0]
            if name in first_row:
                raise ValueError(f"the id {name!r} is there twice, first in row {first_row[name]}")
        except ValueError as error:
            raise ValueError(f"{data}, row {number}: {error}") from error
        first_row[name] = number
        questions += of_row
    pictures = PictureFolder(image_folder or data.parent)
    missing = sorted({question.image for question in questions if question.image and not _is_there(pictures, question)})
    if missing:
        shown = ", ".join(missing[:NUM_SHOWN]) + (", ..." if len(missing) > NUM_SHOWN else "")
        raise FileNotFoundError(
            f"{data} names {len(missing)} pictures that are not in {pictures.folder}: {shown} (say --image-folder)"
        )
    order: dict[str, int] = {}
    for question in questions:
        order.setdefault(question.image, len(order))
    return Task(
        questions=sorted(questions, key=lambda question: order[question.image]),
        open_picture=pictures.open,
        files=[data],
        template=TEMPLATE,
        max_new_tokens=MAX_NEW_TOKENS,
        prompt="{question}",
    )


def _is_there(pictures: PictureFolder, question: Question) -> bool:
    try:
        return pictures.find(question.image) is not None
    except ValueError as error:
        raise ValueError(f"question {question.question_id}: {error}") from error


def read_row(row: Any, number: int) -> list[Question]:
    """Return a row's questions. Raises: ValueError saying what is wrong with it."""
    turns = parse_turns(row)
    name = row.get("id", number)
    if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
        raise ValueError(f"'id' is {name!r}, expected a text or a number")
    if any(turn.has_image for turn in turns[1:]):
        raise ValueError("the picture comes with a later question, expected it with the first")
    if row.get("template", TEMPLATE) != TEMPLATE:
        raise ValueError(f"'template' is {row['template']!r}, but all rows are asked with {TEMPLATE}")
    texts = [turn.text for turn in turns]
    kinds = {kind: row[kind] for kind in KINDS if isinstance(row.get(kind), str) and row[kind]}
    return [
        Question(
            question_id=f"{name}/{place // 2 + 1}",
            image=row.get("image") or "",
            text=texts[place - 1],
            turns=tuple(texts[:place]),
            answers=_read_answers(row, texts[place], is_only=len(turns) <= 3),
            kinds=kinds | {"turn": LATER if place > 1 else FIRST},
        )
        for place in range(1, len(turns), 2)
    ]


def _read_answers(row: Mapping[str, Any], answer: str, is_only: bool) -> tuple[str, ...]:
    if "answers" not in row:
        return (answer,)
    answers = row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) for text in answers):
        raise ValueError(f"'answers' is {answers!r}, expected a list of texts")
    if not is_only:
        raise ValueError("the row has 'answers' and several questions: make a row of each question")
    return tuple(answers)


def count(questions: Sequence[Question], predictions: Sequence[str], rule: str) -> Scored:
    """Judge every answer by all three measures; the first part is the headline, and the credits are its."""
    pairs = list(zip(questions, predictions, strict=True))
    measures = {
        "exact match": [match_exactly(prediction, question.answers) for question, prediction in pairs],
        "character F1": [score_characters(prediction, question.answers) for question, prediction in pairs],
        "VQA accuracy": [vqa_accuracy(prediction, question.answers, rule) for question, prediction in pairs],
    }
    num_chinese = sum(any(HAN.search(answer) for answer in question.answers) for question in questions)
    headline = "character F1" if 2 * num_chinese > len(questions) else "exact match"
    credits = measures[headline]
    clusters = [question.cluster for question in questions]
    measures = {headline: credits} | measures  # the headline comes first
    parts: dict[str, dict[str, Part]] = {
        "all": {name: mean_part(clusters, values) for name, values in measures.items()}
    }
    for kind in (*KINDS, "turn"):
        places: dict[str, list[int]] = defaultdict(list)
        for place, question in enumerate(questions):
            if kind in question.kinds:
                places[question.kinds[kind]].append(place)
        if places:
            parts[kind] = {
                name: mean_part([clusters[place] for place in some], [credits[place] for place in some])
                for name, some in sorted(places.items())
            }
    return Scored(list(credits), parts)


def match_exactly(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where the answer is one of the references, else 0."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def normalise(text: str) -> str:
    """Return the text as exact match compares it."""
    text = _fold(text).strip()
    while text and text[-1] in FINAL_MARKS:
        text = text[:-1].rstrip()
    return text


def score_characters(prediction: str, answers: Sequence[str]) -> float:
    """Return the character F1 with the reference that fits best."""
    return max(character_f1(prediction, answer) for answer in answers)


def character_f1(first: str, second: str) -> float:
    """Return twice the characters that two texts share, by all that they have."""
    counts = [Counter(_list_characters(text)) for text in (first, second)]
    num_characters = sum(count.total() for count in counts)
    return 2 * (counts[0] & counts[1]).total() / num_characters if num_characters else 1.0


def _list_characters(text: str) -> list[str]:
    kept = [character for character in _fold(text) if not character.isspace()]
    return [character for character in kept if not unicodedata.category(character).startswith("P")]


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


CONVERSATIONS = Benchmark("exact match; character F1 for Chinese", open_task, count)
