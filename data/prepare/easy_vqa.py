"""easy-VQA (Victor Zhou, MIT licence): 5,000 small pictures of one coloured shape each, 48 thousand questions.

The PyPI package `easy-vqa` carries pictures and questions. Five kinds of files are made of them:

    text_*      no pictures: a bag of words stands where a picture will stand, questions about it follow
    captions_*  one caption per picture ("a red circle."), derived from the answers
    vqa_*       all questions about a picture, and its caption, as one conversation
    test.jsonl  the test questions, one a line: question_id, image, question, answer, type
    images/     the pictures

`*` is `train` or `held_out`: 400 of the 4,000 training pictures are kept apart for choosing. The test pictures are
in `test.jsonl` alone.
"""

import importlib.util
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
NUM_HELD_OUT = 400  # training pictures kept for choosing
CAPTION_REQUESTS = ("describe the image.", "what do you see?", "write a caption.")

NUM_TEXTS = {"train": 8000, "held_out": 200}
TURNS_PER_TEXT = 8
FILLERS = ("paper", "light", "empty", "ground", "plain")  # what a bag of words holds besides colour and shape


def prepare(out: Path) -> dict[str, int]:
    """Write every file into `out`, the same bytes each time; return the number of rows of each.

    Raises: FileNotFoundError when the package `easy-vqa` is not installed.
    """
    source = _package_folder()
    random_order = random.Random(0)
    questions = _load_questions(source / "train/questions.json")
    images = sorted(questions)
    held_out = set(random_order.sample(images, NUM_HELD_OUT))
    splits = {
        "train": {image: questions[image] for image in images if image not in held_out},
        "held_out": {image: questions[image] for image in images if image in held_out},
    }
    files: dict[str, list[dict]] = {}
    wordings = sorted({question for pairs in questions.values() for question, _ in pairs})
    for split, pairs in splits.items():
        files[f"text_{split}.json"] = list(_text_rows(wordings, NUM_TEXTS[split], random_order))
        files[f"captions_{split}.json"] = list(_caption_rows(pairs))
        files[f"vqa_{split}.json"] = list(_vqa_rows(pairs, random_order))
    files["test.jsonl"] = list(_test_rows(_load_questions(source / "test/questions.json")))

    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        shutil.copytree(source / split / "images", out / "images" / split, dirs_exist_ok=True)
    for name, rows in files.items():
        if name.endswith(".jsonl"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            text = json.dumps(rows, indent=0)
        (out / name).write_text(text, encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def question_type(question: str) -> str:
    """Return `shape`, `color` or `yes/no`."""
    if not question.startswith("what"):
        return "yes/no"
    return "color" if "color" in question else "shape"


def answer_question(question: str, colour: str, shape: str) -> str | None:
    """Answer by rule; None for a question whose premise is false (the colour of a circle that is not there)."""
    words = set(question.rstrip("?").split())
    present = colour in words or shape in words
    if question_type(question) == "yes/no":
        return "yes" if present != bool(words & {"no", "not"}) else "no"
    named = words & {*COLOURS, *SHAPES}
    if named and not present:
        return None
    return colour if question_type(question) == "color" else shape


def find_concept(pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the one (colour, shape) that all answers about a picture allow, or None where several do."""
    pairs = list(pairs)
    fitting = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if all(answer_question(question, colour, shape) == answer for question, answer in pairs)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _package_folder() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package easy-vqa is not installed: pip install -r requirements.txt")
    return Path(spec.origin).parent / "data"


def _load_questions(file: Path) -> dict[int, list[tuple[str, str]]]:
    """Return the (question, answer) pairs of each picture."""
    questions = defaultdict(list)
    for question, answer, image in json.loads(file.read_text(encoding="utf-8")):
        questions[image].append((question, answer))
    return questions


def _text_rows(wordings: list[str], num_rows: int, random_order: random.Random) -> Iterable[dict]:
    """Questions about bags of words; every other row turns a bag into its caption, in the plain template."""
    for number in range(num_rows):
        turns: list[tuple[str, str]] = []
        plain = number % 2 == 0
        while len(turns) < (1 if plain else TURNS_PER_TEXT):
            request = random_order.choice(wordings)
            colour, shape = _draw_concept(request, random_order)
            bag = random_order.choices(FILLERS, k=random_order.randint(2, 6))
            bag += [colour] * random_order.randint(1, 3) + [shape] * random_order.randint(1, 3)
            random_order.shuffle(bag)
            answer = answer_question(request, colour, shape)
            if plain or random_order.random() < 0.1:
                request, answer = random_order.choice(CAPTION_REQUESTS), f"a {colour} {shape}."
            if answer is not None:
                turns.append((" ".join(bag) + ("" if plain else "\n" + request), answer))
        row = {"id": f"text-{number}", "conversations": _conversation(turns)}
        yield row | {"template": "plain"} if plain else row


def _draw_concept(question: str, random_order: random.Random) -> tuple[str, str]:
    """Draw a colour and a shape, half of the time those the question names.

    By chance alone most things asked about would be absent, "no" (or "yes" to "is no ...") would nearly always do,
    and the model would take several times as long to notice that the answer depends on both.
    """
    words = set(question.rstrip("?").split()) if random_order.random() < 0.5 else set()
    colours = [colour for colour in COLOURS if colour in words] or COLOURS
    shapes = [shape for shape in SHAPES if shape in words] or SHAPES
    return random_order.choice(colours), random_order.choice(shapes)


def _caption_rows(questions: Mapping[int, list[tuple[str, str]]]) -> Iterable[dict]:
    for image, pairs in questions.items():
        if concept := find_concept(pairs):
            turn = ("<image>\n" + CAPTION_REQUESTS[image % len(CAPTION_REQUESTS)], "a {} {}.".format(*concept))
            yield {"id": f"caption-{image}", "image": f"train/{image}.png", "conversations": _conversation([turn])}


def _vqa_rows(questions: Mapping[int, list[tuple[str, str]]], random_order: random.Random) -> Iterable[dict]:
    for image, pairs in questions.items():
        turns = list(pairs)
        if concept := find_concept(pairs):
            turns.append((random_order.choice(CAPTION_REQUESTS), "a {} {}.".format(*concept)))
        turns[0] = ("<image>\n" + turns[0][0], turns[0][1])
        yield {"id": f"vqa-{image}", "image": f"train/{image}.png", "conversations": _conversation(turns)}


def _test_rows(questions: Mapping[int, list[tuple[str, str]]]) -> Iterable[dict]:
    for image in sorted(questions):
        for number, (question, answer) in enumerate(questions[image]):
            yield {
                "question_id": f"{image}-{number}",
                "image": f"test/{image}.png",
                "question": question,
                "answer": answer,
                "type": question_type(question),
            }


def _conversation(turns: Iterable[tuple[str, str]]) -> list[dict]:
    return [
        {"from": speaker, "value": text}
        for question, answer in turns
        for speaker, text in (("human", question), ("gpt", answer))
    ]
