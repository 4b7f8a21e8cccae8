"""MME: two yes/no questions about each of 1,187 pictures, in 14 subtasks that add up to perception and cognition.

DATA is the owner's release, `MME_Benchmark_release_version`, or the folder that holds it. A subtask gets 100 points for
the share of right answers and 100 for the share of pictures with both answers right; ten subtasks are perception (the
headline, 2000 at most), four cognition (800).

    official    as LLaVA asks: "Please answer yes or no." makes way for the short-answer line (with the blanks before
                it: the release has one or two); read by the owner's tool, from an answer's first four characters
    lmms-eval   as LLaVA asks, but of two blanks one stays; 16 new tokens; full stops do not count, "y" and "n" do
    vlmevalkit  the owner's question as it is, "a curious human", 2048 new tokens; "yes" or "no" as a word anywhere, but
                not both; not reproduced: blanks around the picture and at the prompt's end, and a judge for the rest

Source: Fu et al. 2023, arXiv 2306.13394, and the tool of its authors (Awesome-Multimodal-Large-Language-Models).
Shapes: C pictures, S subtasks.

`python -m eval.mme --results FOLDER` scores a folder of `{subtask}.txt` in the format of the owner's tool.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.pictures import PictureFolder
from data.prepare.prompts import SHORT_ANSWER_SUFFIX
from eval.tally import Part, divide, mean_part
from eval.task import OFFICIAL, Benchmark, Question, Scored, Task

RELEASE = "MME_Benchmark_release_version"
NUM_QUESTIONS = {
    "existence": 60,
    "count": 60,
    "position": 60,
    "color": 60,
    "posters": 294,
    "celebrity": 340,
    "scene": 400,
    "landmark": 400,
    "artwork": 400,
    "OCR": 40,
    "commonsense_reasoning": 140,
    "numerical_calculation": 40,
    "text_translation": 40,
    "code_reasoning": 40,
}
GROUPS = {"perception": tuple(NUM_QUESTIONS)[:10], "cognition": tuple(NUM_QUESTIONS)[10:]}
BEST = 200  # points of a subtask
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png")
ENDING = "Please answer yes or no."
SUFFIX = SHORT_ANSWER_SUFFIX["en"]
MARKS = ';/[]"{}()=+\\_-><@`,?!'  # VLMEvalKit's; a colon is part of its word


def ask_officially(question: str) -> str:
    return question.removesuffix(ENDING).rstrip() + SUFFIX


def ask_as_lmms_eval(question: str) -> str:
    return question.replace(" " + ENDING, "") + SUFFIX


def read_start(prediction: str) -> str:
    """Return "yes", "no" or "other" by the first four characters: "None" is no, "I know" is other."""
    start = prediction.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def read_as_lmms_eval(prediction: str) -> str:
    answer = prediction.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(answer) or read_start(answer)


def find_word(prediction: str) -> str:
    """Return which of "yes" and "no" is among the words, "other" for both or neither, as VLMEvalKit does."""
    text = prediction.lower()
    has_thousands = re.search(r"\d,\d", text)
    words = text
    for mark in MARKS:
        is_beside_blank = mark + " " in text or " " + mark in text
        words = words.replace(mark, "" if is_beside_blank or has_thousands else " ")
    found = {"yes", "no"} & set(re.sub(r"(?<!\d)\.(?!\d)", "", words).split())
    return found.pop() if len(found) == 1 else "other"


@dataclass(frozen=True)
class Rule:
    template: str
    max_new_tokens: int
    ask: Callable[[str], str]
    read: Callable[[str], str]


RULES = {
    OFFICIAL: Rule("vicuna_v1", 128, ask_officially, read_start),
    "lmms-eval": Rule("vicuna_v1", 16, ask_as_lmms_eval, read_as_lmms_eval),
    "vlmevalkit": Rule("llava_v1", 2048, str, find_word),
}


def open_task(data: Path, rule: str, image_folder: Path | None) -> Task:
    """Read the release, in either of its layouts: texts beside the pictures, or `questions_answers_YN` and `images`.

    Raises: FileNotFoundError that lists what is missing; ValueError for a text that is not two questions and answers.
    """
    root = data / RELEASE if (data / RELEASE).is_dir() else data
    if not root.is_dir():
        raise FileNotFoundError(f"{data} is missing: the folder with MME's release, {RELEASE}")
    pictures = PictureFolder(image_folder or root)
    ask = RULES[rule].ask
    questions: list[Question] = []
    files: list[Path] = []
    flaws: list[str] = []
    for subtask, expected in NUM_QUESTIONS.items():
        texts = _list_texts(root / subtask)
        if 2 * len(texts) != expected:
            flaws.append(f"{subtask} has {2 * len(texts)} of {expected} questions")
        flaws += [f"{name} has no text" for name in _find_lone_pictures(root, subtask, texts)]
        for text in texts:
            image = _find_picture(pictures, subtask, text.stem)
            if image is None:
                flaws.append(f"{subtask}/{text.name} has no picture")
                continue
            for number, (question, answer) in enumerate(_load_text(text), start=1):
                name, kinds = f"{subtask}/{text.stem}/{number}", {"subtask": subtask}
                questions.append(Question(name, image, question, (ask(question),), (answer,), kinds))
        files += texts
    if flaws:
        more = f"; and {len(flaws) - 10} more" if len(flaws) > 10 else ""
        raise FileNotFoundError(f"{root} is not the whole of {RELEASE}: {'; '.join(flaws[:10])}{more}")
    return Task(
        questions,
        pictures.open,
        files,
        RULES[rule].template,
        RULES[rule].max_new_tokens,
        ask("{question} " + ENDING),
        {"always yes": ["Yes"] * len(questions)},
    )


def _list_texts(folder: Path) -> list[Path]:
    apart = folder / "questions_answers_YN"
    texts = (apart if apart.is_dir() else folder).glob("*.txt")
    return sorted(text for text in texts if not text.name.startswith("."))  # a Mac leaves "._name.txt"


def _find_lone_pictures(root: Path, subtask: str, texts: Sequence[Path]) -> list[str]:
    stems = {text.stem for text in texts}
    files = [*(root / subtask).glob("*"), *(root / subtask / "images").glob("*")]
    pictures = [file for file in files if file.suffix.lower() in PICTURE_ENDINGS and not file.name.startswith(".")]
    return sorted(str(picture.relative_to(root)) for picture in pictures if picture.stem not in stems)


def _find_picture(pictures: PictureFolder, subtask: str, stem: str) -> str | None:
    names = [f"{subtask}/{place}{stem}{ending}" for place in ("images/", "") for ending in PICTURE_ENDINGS]
    found = sorted({stored for name in names if (stored := pictures.find(name)) is not None})
    if len(found) > 1:
        raise ValueError(f"{pictures.folder} has two pictures for one text, {' and '.join(found)}: delete one")
    return found[0] if found else None


def _load_text(file: Path) -> list[tuple[str, str]]:
    """Return two questions with their answers, Yes or No."""
    lines = [line for line in _load_lines(file) if line.strip()]
    if len(lines) != 2:
        raise ValueError(f"{file} has {len(lines)} lines, expected 2: each a question, a tab, and Yes or No")
    pairs = []
    for number, line in enumerate(lines, start=1):
        question, answer = _split(file, number, line, 2)
        _check_answer(file, number, answer.strip())
        pairs.append((question.strip(), answer.strip()))
    return pairs


def _load_lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    lines = lines if lines[-1] else lines[:-1]
    if not lines:
        raise ValueError(f"{file} is empty")
    return lines


def _split(file: Path, number: int, line: str, num_fields: int) -> list[str]:
    fields = line.split("\t")
    if len(fields) != num_fields:
        raise ValueError(f"{file}, line {number}: {len(fields) - 1} tabs, expected {num_fields - 1}: {line[:80]!r}")
    return fields


def _check_answer(file: Path, number: int, answer: str) -> None:
    if answer.lower() not in ("yes", "no"):
        raise ValueError(f"{file}, line {number}: the right answer is {answer!r}, expected Yes or No")


def count(questions: Sequence[Question], predictions: Sequence[str], rule: str) -> Scored:
    """Count points by subtask, and what they add up to.

    Raises: ValueError for a picture without its two questions.
    """
    labels = [RULES[rule].read(prediction) for prediction in predictions]
    credits = [float(label == row.answers[0].lower()) for row, label in zip(questions, labels, strict=True)]
    by_subtask: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row, credit in zip(questions, credits, strict=True):
        by_subtask[row.kinds["subtask"]][row.image].append(credit)
    subtasks = [subtask for subtask in NUM_QUESTIONS if subtask in by_subtask]
    tables = {subtask: _make_table(by_subtask[subtask]) for subtask in subtasks}
    images = [row.image for row in questions]
    others = [float(label == "other") for label in labels]
    # An answer in Chinese is wrong under every rule; how many there are shows a language bleeding into the other.
    chinese = [
        float(label == "other" and not {"是", "否"}.isdisjoint(text[:4]))
        for label, text in zip(labels, predictions, strict=True)
    ]
    parts = {
        "all": {
            group: _add_up({subtask: tables[subtask] for subtask in members if subtask in tables})
            for group, members in GROUPS.items()
            if not tables.keys().isdisjoint(members)
        },
        "subtask": {subtask: _add_up({subtask: tables[subtask]}) for subtask in subtasks},
        "accuracy": {subtask: _take_columns(tables[subtask], slice(0, 2)) for subtask in subtasks},
        "accuracy+": {subtask: _take_columns(tables[subtask], slice(2, 4)) for subtask in subtasks},
        "answers": {"neither yes nor no": mean_part(images, others), "是 or 否": mean_part(images, chinese)},
    }
    return Scored([*credits], parts)


Table = tuple[tuple[str, ...], np.ndarray]  # pictures; (C, 4): right answers, answers, whether both are right, 1


def _make_table(credits: dict[str, list[float]]) -> Table:
    for image, pair in credits.items():
        if len(pair) != 2:
            raise ValueError(f"{image} has {len(pair)} questions, expected 2: MME is scored by whole pictures")
    return tuple(credits), np.array([[sum(pair), 2, sum(pair) == 2, 1] for pair in credits.values()], dtype=float)


def _add_up(tables: dict[str, Table]) -> Part:
    clusters = tuple(image for images, _ in tables.values() for image in images)
    sums = np.zeros((len(clusters), len(tables), 4))
    start = 0
    for place, (images, table) in enumerate(tables.values()):
        sums[start : start + len(images), place] = table
        start += len(images)
    return Part(2 * len(clusters), clusters, sums.reshape(len(clusters), -1), _add_points, float(BEST * len(tables)))


def _add_points(sums: np.ndarray) -> np.ndarray:
    """(..., 4 S) -> (...)."""
    by_subtask = sums.reshape(*sums.shape[:-1], -1, 4)
    return (100 * (divide(by_subtask[..., :2]) + divide(by_subtask[..., 2:]))).sum(axis=-1)


def _take_columns(table: Table, columns: slice) -> Part:
    images, sums = table
    return Part(2 * len(images), images, sums[:, columns], divide)


def write_submission(task: Task, predictions: Sequence[str], folder: Path) -> Path:
    """Write what the owner's tool reads, `submission/{subtask}.txt`; tabs and line ends in answers become blanks."""
    lines: dict[str, list[str]] = defaultdict(list)
    for row, prediction in zip(task.questions, predictions, strict=True):
        fields = (Path(row.image).name, row.text, row.answers[0], re.sub(r"[\t\r\n]", " ", prediction))
        lines[row.kinds["subtask"]].append("\t".join(fields) + "\n")
    out = folder / "submission"
    out.mkdir(parents=True, exist_ok=True)
    for subtask, rows in lines.items():
        (out / f"{subtask}.txt").write_text("".join(rows), encoding="utf-8", newline="\n")
    return out


def score_results_folder(folder: Path) -> Scored:
    """Score `{subtask}.txt`, lines of image, question, right answer and prediction, as the owner's tool does.

    Raises: FileNotFoundError naming the files that are missing; ValueError for lines that are not in pairs.
    """
    if missing := [f"{subtask}.txt" for subtask in NUM_QUESTIONS if not (folder / f"{subtask}.txt").is_file()]:
        raise FileNotFoundError(f"{folder} is not a whole folder of MME results, missing: {', '.join(missing)}")
    questions: list[Question] = []
    predictions: list[str] = []
    for subtask, expected in NUM_QUESTIONS.items():
        file = folder / f"{subtask}.txt"
        rows = [_split(file, number, line, 4) for number, line in enumerate(_load_lines(file), start=1)]
        for number, (_, _, answer, _) in enumerate(rows, start=1):
            _check_answer(file, number, answer)
        _check_pairs(file, [row[0] for row in rows])
        if len(rows) != expected:
            raise ValueError(f"{file} has {len(rows)} lines, expected {expected}")
        for number, (image, question, answer, prediction) in enumerate(rows, start=1):
            name, kinds = f"{subtask}/{image}", {"subtask": subtask}
            questions.append(Question(f"{name}/{number}", name, question, (question,), (answer,), kinds))
            predictions.append(prediction)
    return count(questions, predictions, OFFICIAL)


def _check_pairs(file: Path, images: Sequence[str]) -> None:
    for number, (first, second) in enumerate(zip(images[::2], images[1::2], strict=False)):
        if first != second:
            place = f"lines {2 * number + 1} and {2 * number + 2}"
            raise ValueError(f"{file}, {place}: two consecutive lines are one image, not {first} and {second}")
    if len(images) % 2:
        raise ValueError(f"{file} has {len(images)} lines: the last has no partner, two are one image")
    for image, times in Counter(images).items():
        if times > 2:
            raise ValueError(f"{file}: {image} is there {times} times, expected 2")


MME = Benchmark("MME perception", open_task, count, tuple(RULES), write_submission)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a folder of results in the format of MME's own tool.")
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="holds {subtask}.txt")
    arguments = parser.parse_args()
    try:
        parts = score_results_folder(arguments.results).parts
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, part in (parts["subtask"] | parts["all"]).items():
        print(f"{name:24s}{part.score:12.4f}  of {part.best:4.0f}")


if __name__ == "__main__":
    main()
