"""easy-VQA (Victor Zhou, MIT licence): 5,000 small pictures of one coloured shape each, 48 thousand questions.

The PyPI package `easy-vqa` carries pictures and questions. The tiny LLaVA is trained on these files made of them:

    text_*             no pictures: a bag of words stands where a picture will stand, questions about it follow
    captions_*         one caption per picture ("a red circle."), derived from the answers
    vqa_*              all questions about a picture, and its caption, as one conversation
    test.jsonl         the test questions, one a line: question_id, image, question, answer, type
    images/            the pictures

These teach a trained one something more; rows of `vqa_train.json` in `choice_train.json` keep it from forgetting:

    choice_*           a kind of question that the others lack: "is the shape red or blue?"
    choice_test.jsonl  the same about test pictures

`*` is `train` or `held_out`: 400 of the 4,000 training pictures are kept apart for choosing. The test pictures are
in the test files alone.
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
REPLAYED = 0.3  # rows of vqa_train.json for each row of something new
FILLERS = ("paper", "light", "empty", "ground", "plain")  # what a bag of words holds besides colour and shape


def prepare(out: Path) -> dict[str, int]:
    """Write every file into `out`, the same bytes each time; return the number of rows of each.

    Raises: FileNotFoundError when the package `easy-vqa` is not installed.
    """
    source = _package_folder()
    questions, test_questions = (_load_questions(source / split / "questions.json") for split in ("train", "test"))
    random_order = random.Random(0)
    images = sorted(questions)
    held_out = set(random_order.sample(images, NUM_HELD_OUT))
    splits = {
        "train": {image: questions[image] for image in images if image not in held_out},
        "held_out": {image: questions[image] for image in images if image in held_out},
    }
    concepts, test_concepts = (
        {image: concept for image, pairs in sorted(of_split.items()) if (concept := find_concept(pairs))}
        for of_split in (questions, test_questions)
    )
    files: dict[str, list[dict]] = {}
    wordings = sorted({question for pairs in questions.values() for question, _ in pairs})
    for split, pairs in splits.items():
        files[f"text_{split}.json"] = list(_text_rows(wordings, NUM_TEXTS[split], random_order))
        files[f"captions_{split}.json"] = list(_caption_rows(pairs, concepts))
        files[f"vqa_{split}.json"] = list(_vqa_rows(pairs, concepts, random_order))
    files["test.jsonl"] = list(_test_rows(test_questions))

    random_order = random.Random(1)  # another, so that neither kind of file changes with the other
    for split, pairs in splits.items():
        files[f"choice_{split}.json"] = list(_choice_rows(pairs, concepts, random_order))
    rows = files["choice_train.json"]
    rows += random_order.sample(files["vqa_train.json"], round(REPLAYED * len(rows)))
    choices = {image: _choice_turns(*concept, random_order) for image, concept in test_concepts.items()}
    files["choice_test.jsonl"] = [row | {"type": "choice"} for row in _test_rows(choices)]
    write_rows(files, out)
    for split in ("train", "test"):
        shutil.copytree(source / split / "images", out / "images" / split, dirs_exist_ok=True)
    return {name: len(rows) for name, rows in files.items()}


def write_rows(files: Mapping[str, list[dict]], out: Path) -> None:
    """Write files of rows into a folder, `.json` or `.jsonl`; one that is the same already stays untouched."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        if name.endswith(".jsonl"):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            text = json.dumps(rows, indent=0, ensure_ascii=False)
        file = out / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:  # another run may be reading it
            file.write_text(text, encoding="utf-8")


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


def _caption_rows(images: Iterable[int], concepts: Mapping[int, tuple[str, str]]) -> Iterable[dict]:
    for image in images:
        if concept := concepts.get(image):
            request = CAPTION_REQUESTS[image % len(CAPTION_REQUESTS)]
            yield _picture_row("caption", image, [(request, "a {} {}.".format(*concept))])


def _vqa_rows(
    questions: Mapping[int, list[tuple[str, str]]],
    concepts: Mapping[int, tuple[str, str]],
    random_order: random.Random,
) -> Iterable[dict]:
    for image, pairs in questions.items():
        turns = list(pairs)
        if concept := concepts.get(image):
            turns.append((random_order.choice(CAPTION_REQUESTS), "a {} {}.".format(*concept)))
        yield _picture_row("vqa", image, turns)


def _choice_rows(
    images: Iterable[int], concepts: Mapping[int, tuple[str, str]], random_order: random.Random
) -> Iterable[dict]:
    for image in images:
        if concept := concepts.get(image):
            yield _picture_row("choice", image, _choice_turns(*concept, random_order))


def _choice_turns(colour: str, shape: str, random_order: random.Random) -> list[tuple[str, str]]:
    """Two questions about the colour and two about the shape; of each two, one names the right answer first."""
    turns = []
    for right, words, wording in (
        (colour, COLOURS, "is the shape {} or {}?"),
        (shape, SHAPES, "is the shape a {} or a {}?"),
    ):
        first_wrong, second_wrong = random_order.sample([word for word in words if word != right], 2)
        turns += [(wording.format(right, second_wrong), right), (wording.format(first_wrong, right), right)]
    random_order.shuffle(turns)
    return turns


def _picture_row(kind: str, image: int, turns: Iterable[tuple[str, str]]) -> dict:
    return {"id": f"{kind}-{image}", "image": f"train/{image}.png", "conversations": ask_about_picture(turns)}


def ask_about_picture(turns: Iterable[tuple[str, str]]) -> list[dict]:
    """Return the turns of questions and answers about one picture, which the first question shows."""
    (question, answer), *others = turns
    return _conversation([("<image>\n" + question, answer), *others])


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
