"""easy-VQA's test set: 9,673 questions about 1,000 pictures, exact match by question type.

Questions of a kind that the training files of the first model lack, and `tiny_zh`, the same in Chinese with drawings
of things besides, are tasks of their own. `python -m data.prepare` writes their files.

Two bars tell what a score means: always the commonest answer, and for each question its commonest answer in the
training file, which is the best one can do without looking at the picture.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.image import open_image
from data.rows import load_rows
from eval.tally import mean_part
from eval.task import OFFICIAL, Benchmark, Question, Scored, Task

MAX_NEW_TOKENS = 12
TYPES = ("shape", "color", "yes/no", "choice", "thing", "thing yes/no")
KEYS = {"question_id", "image", "question", "answer", "type"}


def open_task(data: Path, rule: str, image_folder: Path | None, questions: str, training: str, images: str) -> Task:
    """Read the test questions and, for the bars, the training files.

    Args:
        questions, training, images: where they lie below `data`; the training files of every split.
    Raises: FileNotFoundError or ValueError when `data` does not hold what `data.prepare` writes.
    """
    assert rule == OFFICIAL
    file, pictures = data / questions, image_folder or data / images
    rows = load_rows(file)
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or KEYS - row.keys():
            raise ValueError(f"{file}, row {number}: expected the keys {', '.join(sorted(KEYS))}")
    order = {image: place for place, image in enumerate(dict.fromkeys(row["image"] for row in rows))}
    rows.sort(key=lambda row: order[row["image"]])
    if missing := [name for name in order if not (pictures / name).is_file()]:
        raise FileNotFoundError(f"{len(missing)} pictures are missing in {pictures}, {missing[0]} is the first")
    asked = [
        Question(
            str(row["question_id"]), row["image"], row["question"], (row["question"],), (row["answer"],),
            {"type": row["type"]},
        )
        for row in rows
    ]  # fmt: skip
    splits = [data / training.format(split) for split in ("train", "held_out")]
    return Task(
        asked,
        lambda name: open_image(pictures / name),
        [file, *splits],
        "vicuna_v1",
        MAX_NEW_TOKENS,
        "{question}",
        _answer_blindly(asked, splits),
    )


def count(questions: Sequence[Question], predictions: Sequence[str], rule: str) -> Scored:
    """Count exact matches, overall and by type; case does not count."""
    assert rule == OFFICIAL
    credits = [
        float(prediction.lower() == question.answers[0].lower())
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    by_type: dict[str, list[int]] = {kind: [] for kind in TYPES}
    for number, question in enumerate(questions):
        by_type.setdefault(question.kinds["type"], []).append(number)
    pictures = [question.cluster for question in questions]
    types = {
        kind: mean_part([pictures[number] for number in numbers], [credits[number] for number in numbers])
        for kind, numbers in by_type.items()
        if numbers
    }
    return Scored(list(credits), {"all": {"all": mean_part(pictures, credits)}, "type": types})


def _answer_blindly(questions: Sequence[Question], training: Sequence[Path]) -> dict[str, list[str]]:
    """Return the answers of the two bars, learned from the training files; what those ask besides does not count."""
    asked = {question.text for question in questions}
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for file in training:
        for row in load_rows(file):
            texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
            for question, answer in zip(texts[::2], texts[1::2], strict=True):
                if question in asked:
                    by_question[question][answer] += 1
    if not by_question:
        return {}
    overall = sum(by_question.values(), Counter())
    commonest = overall.most_common(1)[0][0]
    blind = {question: counts.most_common(1)[0][0] for question, counts in by_question.items()}
    return {
        "always the commonest answer": [commonest] * len(questions),
        "best without looking at the picture": [blind.get(question.text, commonest) for question in questions],
    }


BENCHMARKS = {
    name: Benchmark("exact match", partial(open_task, questions=questions, training=training, images=images), count)
    for name, questions, training, images in (
        ("easy_vqa", "easy_vqa/test.jsonl", "easy_vqa/vqa_{}.json", "easy_vqa/images"),
        ("easy_vqa_choice", "easy_vqa/choice_test.jsonl", "easy_vqa/choice_{}.json", "easy_vqa/images"),
        ("tiny_zh", "tiny_zh/test.jsonl", "tiny_zh/{}.json", ""),
    )
}
