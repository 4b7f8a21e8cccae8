"""Scores are the plain counts, and the bars are the known ones."""

import json
from pathlib import Path

import pytest

from eval.benchmarks import BENCHMARKS
from eval.task import Question


def test_score_by_hand() -> None:
    answers = [("shape", "circle"), ("shape", "circle"), ("color", "red"), ("yes/no", "yes")]
    questions = [
        Question(str(number), f"{number}.png", "?", ("?",), (answer,), {"type": kind})
        for number, (kind, answer) in enumerate(answers)
    ]
    scored = BENCHMARKS["easy_vqa"].count(questions, ["circle", "a circle", "Red", "no"], "official")
    assert scored.credits == [1, 0, 1, 0]
    assert list(scored.parts) == ["all", "type"]
    assert scored.parts["all"]["all"].score == 0.5
    by_type = {kind: (part.num_questions, part.score) for kind, part in scored.parts["type"].items()}
    assert by_type == {"shape": (2, 0.5), "color": (1, 1.0), "yes/no": (1, 0.0)}


@pytest.mark.parametrize(
    ("name", "num_questions", "percentages"),
    [("easy_vqa", 9673, [37.3, 67.0]), ("easy_vqa_choice", 3552, [17.6, 50.8]), ("tiny_zh", 11113, [24.0, 63.1])],
)
def test_the_two_bars(tiny_zh_folder: Path, name: str, num_questions: int, percentages: list[float]) -> None:
    """What a score has to be held against."""
    benchmark = BENCHMARKS[name]
    task = benchmark.open(tiny_zh_folder.parent, "official", None)
    assert len({question.question_id for question in task.questions}) == len(task.questions) == num_questions
    assert task.open_picture(task.questions[0].image).size > (8, 8)
    scores = [
        benchmark.count(task.questions, answers, "official").parts["all"]["all"].score for answers in task.bars.values()
    ]
    assert [round(100 * value, 1) for value in scores] == percentages


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "easy_vqa").mkdir()
    open_task = BENCHMARKS["easy_vqa"].open
    with pytest.raises(FileNotFoundError, match=r"easy_vqa/test.jsonl is missing"):
        open_task(tmp_path, "official", None)
    row = {"question_id": 1, "image": "test/0.png", "question": "?", "answer": "red", "type": "color"}
    (tmp_path / "easy_vqa/test.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(
        FileNotFoundError, match=r"1 pictures are missing in .*easy_vqa/images, test/0.png is the first"
    ):
        open_task(tmp_path, "official", None)
    (tmp_path / "easy_vqa/test.jsonl").write_text('{"question_id": 1}', encoding="utf-8")
    with pytest.raises(ValueError, match="row 0: expected the keys answer, image, question, question_id, type"):
        open_task(tmp_path, "official", None)
