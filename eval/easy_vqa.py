"""easy-VQA's test set: 9,673 questions about 1,000 pictures, exact match by question type.

Questions of a kind that the training files of the first model lack, and `tiny_zh`, the same in Chinese with drawings
of things besides, are tasks of their own.

Two bars tell what a score means: always the commonest answer, and for each question its commonest answer in the
training file, which is the best one can do without looking at the picture.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.rows import load_rows

MAX_NEW_TOKENS = 12
TYPES = ("shape", "color", "yes/no", "choice", "thing", "thing yes/no")


@dataclass(frozen=True)
class Task:
    """Where a task's files lie, below the folder that holds the prepared sets."""

    questions: str
    training: str  # what it is learned from, by split
    images: str


TASKS = {
    "easy_vqa": Task("easy_vqa/test.jsonl", "easy_vqa/vqa_{}.json", "easy_vqa/images"),
    "easy_vqa_choice": Task("easy_vqa/choice_test.jsonl", "easy_vqa/choice_{}.json", "easy_vqa/images"),
    "tiny_zh": Task("tiny_zh/test.jsonl", "tiny_zh/{}.json", ""),
}


def load_questions(folder: Path, task: str) -> list[dict]:
    """Return the test questions, those about one picture next to each other, pictures named from `folder`.

    Raises: FileNotFoundError or ValueError when `folder` does not hold what `data.prepare` writes.
    """
    file = folder / TASKS[task].questions
    questions = load_rows(file)
    wanted = {"question_id", "image", "question", "answer", "type"}
    for number, row in enumerate(questions):
        if not isinstance(row, dict) or wanted - row.keys():
            raise ValueError(f"{file}, row {number}: expected the keys {', '.join(sorted(wanted))}")
        row["image"] = str(Path(TASKS[task].images) / row["image"])
    return questions


def score(questions: Sequence[dict], predictions: Sequence[str]) -> dict:
    """Return exact match, overall and by type; case does not count."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, prediction in zip(questions, predictions, strict=True):
        right[question["type"]].append(prediction.lower() == question["answer"].lower())
    everything = [value for values in right.values() for value in values]
    return {
        "n": len(everything),
        "score": sum(everything) / len(everything),
        "by_type": {kind: {"n": len(right[kind]), "score": sum(right[kind]) / len(right[kind])} for kind in right},
    }


def baselines(questions: Sequence[dict], folder: Path, task: str) -> dict[str, list[str]]:
    """Return the predictions of the two bars, learned from the training file; what it asks besides does not count."""
    asked = {row["question"] for row in questions}
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for split in ("train", "held_out"):
        for row in load_rows(folder / TASKS[task].training.format(split)):
            texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
            for question, answer in zip(texts[::2], texts[1::2], strict=True):
                if question in asked:
                    by_question[question][answer] += 1
    overall = sum(by_question.values(), Counter())
    commonest = overall.most_common(1)[0][0]
    blind = {question: counts.most_common(1)[0][0] for question, counts in by_question.items()}
    return {
        "always the commonest answer": [commonest] * len(questions),
        "best without looking at the picture": [blind.get(row["question"], commonest) for row in questions],
    }
