"""POPE: is there a dog in the image? Six questions about each of 500 COCO pictures, three times over.

The objects that are not there are drawn at random, from the most popular, or from those that go with what is there: the
splits `random`, `popular` and `adversarial`. DATA holds the owner's `coco_pope_{split}.json`, at its top, in `coco/` or
in `output/coco/`, and COCO's pictures in `val2014/`. (Of `random` two versions are about: 3,000 questions, and the
2,910 of before October 2023 that LLaVA's figures are for.)

    official    as LLaVA asks, read by the owner's rule: "no" where the first sentence has the word No, no or not,
                else "yes", whatever it says; the headline is the mean of the three splits' F1
    lmms-eval   the answer has to be yes or no, but for case; another one counts against accuracy, not against recall;
                the headline is the F1 of all splits together. Not reproduced: its yes ratio, which is the labels'
    vlmevalkit  the owner's question as it is, "a curious human", 2048 new tokens; "yes" or "no" as a word anywhere, but
                not both; anything else counts as no "yes"; F1 of all splits together. Not reproduced: blanks around the
                picture and at the prompt's end, a judge for the rest, and what its own copy of the questions may add

Source: Li et al. 2023, arXiv 2305.10355. Shapes: C pictures, S splits, K = 5 outcomes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.pictures import PictureFolder
from data.prepare.prompts import SHORT_ANSWER_SUFFIX
from eval.mme import find_word
from eval.tally import Part, divide
from eval.task import OFFICIAL, Benchmark, Question, Scored, Task

NUM_QUESTIONS = {"adversarial": (3000,), "popular": (3000,), "random": (3000, 2910)}
SUFFIX = SHORT_ANSWER_SUFFIX["en"]
PLACES = ("", "coco", "output/coco")
TP, FP, TN, FN, OTHER = np.eye(5)


def read_by_default_yes(prediction: str) -> str:
    words = prediction.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return "yes" if {"No", "no", "not"}.isdisjoint(words) else "no"


def read_exactly(prediction: str) -> str:
    answer = prediction.lower().strip()
    return answer if answer in ("yes", "no") else "other"


@dataclass(frozen=True)
class Rule:
    template: str
    max_new_tokens: int
    suffix: str
    read: Callable[[str], str]  # "yes", "no" or "other"
    other_is_miss: bool = False  # "other" where the answer is yes counts as a wrong no


RULES = {
    OFFICIAL: Rule("vicuna_v1", 128, SUFFIX, read_by_default_yes),
    "lmms-eval": Rule("vicuna_v1", 128, SUFFIX, read_exactly),
    "vlmevalkit": Rule("llava_v1", 2048, "", find_word, other_is_miss=True),
}


def open_task(data: Path, rule: str, image_folder: Path | None) -> Task:
    """Read the three splits; questions about one picture, of whichever split, are neighbours.

    Raises: FileNotFoundError for a missing file or picture; ValueError saying which line is wrong.
    """
    files = [_find_file(data, split) for split in NUM_QUESTIONS]
    suffix = RULES[rule].suffix
    questions = [
        Question(
            f"{split}/{row['question_id']}",
            row["image"],
            row["text"],
            (row["text"] + suffix,),
            (row["label"],),
            {"split": split},
        )
        for split, file in zip(NUM_QUESTIONS, files, strict=True)
        for row in _load_split(file, split)
    ]
    pictures = PictureFolder(image_folder or data / "val2014")
    images = {row.image: None for row in questions}
    if missing := [image for image in images if pictures.find(image) is None]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(images)} pictures are missing in {pictures.folder}, the first {missing[:3]}: "
            "they are COCO's val2014"
        )
    place = {image: number for number, image in enumerate(images)}
    questions.sort(key=lambda row: place[row.image])
    return Task(
        questions,
        pictures.open,
        files,
        RULES[rule].template,
        RULES[rule].max_new_tokens,
        "{question}" + suffix,
        {"always yes": ["Yes"] * len(questions)},
    )


def _find_file(data: Path, split: str) -> Path:
    name = f"coco_pope_{split}.json"
    for place in PLACES:
        if (data / place / name).is_file():
            return data / place / name
    raise FileNotFoundError(
        f"{name} is missing in {data}, its coco/ and its output/coco/: it comes from output/coco of "
        "github.com/AoiDragon/POPE"
    )


def _load_split(file: Path, split: str) -> list[dict]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    rows: dict[int, dict] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON, is the file whole? {error}") from error
        if flaw := _find_flaw(row):
            raise ValueError(f"{file}, line {number}: {flaw}")
        if row["question_id"] in rows:
            raise ValueError(f"{file}, line {number}: question_id {row['question_id']} is there twice")
        rows[row["question_id"]] = row
    if len(rows) not in NUM_QUESTIONS[split]:
        expected = " or ".join(map(str, NUM_QUESTIONS[split]))
        raise ValueError(f"{file} has {len(rows)} questions, expected {expected}: is the file whole?")
    return list(rows.values())


def _find_flaw(row: object) -> str | None:
    if not isinstance(row, dict) or {"question_id", "image", "text", "label"} - row.keys():
        return "expected an object with question_id, image, text and label"
    if type(row["question_id"]) is not int:
        return f"question_id is {row['question_id']!r}, expected a whole number"
    for key in ("image", "text"):
        if not isinstance(row[key], str) or not row[key]:
            return f"{key} is {row[key]!r}, expected text"
    return None if row["label"] in ("yes", "no") else f"label is {row['label']!r}, expected yes or no"


def count(questions: Sequence[Question], predictions: Sequence[str], rule: str) -> Scored:
    """Count right and wrong, yes and no, by picture and split."""
    read = [RULES[rule].read(prediction) for prediction in predictions]
    credits = [float(row.answers[0] == answer) for row, answer in zip(questions, read, strict=True)]
    splits = [split for split in NUM_QUESTIONS if any(row.kinds["split"] == split for row in questions)]
    clusters = {image: number for number, image in enumerate(dict.fromkeys(row.image for row in questions))}
    sums = np.zeros((len(clusters), len(splits), 5))
    for row, answer in zip(questions, read, strict=True):
        outcome = _judge(row.answers[0], answer, RULES[rule].other_is_miss)
        sums[clusters[row.image], splits.index(row.kinds["split"])] += outcome
    groups = {split: sums[:, number] for number, split in enumerate(splits)}
    headline = _mean_f1
    if rule != OFFICIAL:
        groups, headline = {"all": sums.sum(axis=1), **groups}, _pooled_f1
    whole = Part(len(questions), tuple(clusters), sums.reshape(len(clusters), -1), headline)
    parts = {"all": {"all": whole}}
    for name, measure in MEASURES.items():
        parts[name] = {group: _make_part(tuple(clusters), counts, measure) for group, counts in groups.items()}
    return Scored([*credits], parts)


def _judge(label: str, answer: str, other_is_miss: bool) -> np.ndarray:
    if answer == "other":
        return FN if other_is_miss and label == "yes" else OTHER
    if answer == "yes":
        return TP if label == "yes" else FP
    return FN if label == "yes" else TN


def _make_part(clusters: tuple[str, ...], sums: np.ndarray, measure: Callable[[np.ndarray], np.ndarray]) -> Part:
    """Make the part of one split, which has not every picture where questions are a sample."""
    asked = sums.sum(axis=1) > 0
    names = tuple(name for name, is_asked in zip(clusters, asked, strict=True) if is_asked)
    return Part(int(sums.sum()), names, sums[asked], measure)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return divide(np.stack([part, whole], axis=-1))


def accuracy(sums: np.ndarray) -> np.ndarray:
    """(..., K) -> (...), as all of these."""
    return _share(sums @ (TP + TN), sums.sum(axis=-1))


def precision(sums: np.ndarray) -> np.ndarray:
    return _share(sums @ TP, sums @ (TP + FP))


def recall(sums: np.ndarray) -> np.ndarray:
    return _share(sums @ TP, sums @ (TP + FN))


def f1(sums: np.ndarray) -> np.ndarray:
    return _share(sums @ (2 * TP), sums @ (2 * TP + FP + FN))


def yes_ratio(sums: np.ndarray) -> np.ndarray:
    return _share(sums @ (TP + FP), sums.sum(axis=-1))


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    """(..., S K) -> (...)."""
    return f1(sums.reshape(*sums.shape[:-1], -1, 5)).mean(axis=-1)


def _pooled_f1(sums: np.ndarray) -> np.ndarray:
    """(..., S K) -> (...)."""
    return f1(sums.reshape(*sums.shape[:-1], -1, 5).sum(axis=-2))


MEASURES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "F1": f1,
    "accuracy": accuracy,
    "precision": precision,
    "recall": recall,
    "yes ratio": yes_ratio,
}

POPE = Benchmark("POPE F1", open_task, count, tuple(RULES))
