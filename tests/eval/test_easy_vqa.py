"""Scores are the plain counts, the bars are the known ones, and batched answers equal one at a time."""

import json
from pathlib import Path

import pytest
import torch

from data.conversation import Turn, render_conversation
from data.image import open_image, preprocess_image
from data.tokenizer import Tokenizer
from eval import easy_vqa
from eval.predict import answer_questions
from model.generate import generate
from model.weights import load_llava
from tests.launch import run_script


def test_score_by_hand() -> None:
    questions = [
        {"type": "shape", "answer": "circle"},
        {"type": "shape", "answer": "circle"},
        {"type": "color", "answer": "red"},
        {"type": "yes/no", "answer": "yes"},
    ]
    scores = easy_vqa.score(questions, ["circle", "a circle", "Red", "no"])
    assert (scores["n"], scores["score"]) == (4, 0.5)
    assert {kind: value["score"] for kind, value in scores["by_type"].items()} == {
        "shape": 0.5,
        "color": 1.0,
        "yes/no": 0.0,
    }


def test_the_two_bars(easy_vqa_folder: Path) -> None:
    """37.3 % and 67.0 %: what a score has to be held against."""
    questions = easy_vqa.load_questions(easy_vqa_folder)
    assert len(questions) == 9673
    bars = easy_vqa.baselines(questions, easy_vqa_folder)
    scores = [easy_vqa.score(questions, predictions)["score"] for predictions in bars.values()]
    assert [round(100 * value, 1) for value in scores] == [37.3, 67.0]


def test_shared_trunks_answer_like_one_question_at_a_time(easy_vqa_folder: Path, tiny_model_folder: Path) -> None:
    model = load_llava(tiny_model_folder)
    tokenizer = Tokenizer(tiny_model_folder / "tokenizer.model")
    paths = [easy_vqa_folder / f"images/test/{number}.png" for number in range(3)]
    asked = [["is it red?"], ["what color is the shape?", "is there a circle in the image?"], ["what do you see?"]]
    groups = list(zip(paths, asked, strict=True))
    batched = list(answer_questions(model, tokenizer, groups, max_new_tokens=8, images_per_batch=2))
    for (path, texts), answers in zip(groups, batched, strict=True):
        pixels = preprocess_image(open_image(path), model.config.vision.image_size)[None]
        for text, answer in zip(texts, answers, strict=True):
            prompt = render_conversation([Turn("human", text, True)], tokenizer, model.config.vision.num_patches)
            (ids,) = generate(model, [torch.tensor(prompt.input_ids)], pixels, tokenizer.eos_token_id, 8)
            assert tokenizer.decode(ids).strip() == answer


def test_command_writes_every_prediction(easy_vqa_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run/final"
    folder.mkdir(parents=True)
    for file in tiny_model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rows = (easy_vqa_folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(easy_vqa_folder / "images")
    for split in ("train", "held_out"):
        (data / f"vqa_{split}.json").symlink_to(easy_vqa_folder / f"vqa_{split}.json")
    (data / "test.jsonl").write_text("\n".join(rows), encoding="utf-8")
    arguments = ("--task", "easy_vqa", "--model-path", str(folder), "--data", str(data))
    ended = run_script(tmp_path, "eval/main.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "best without looking at the picture" in ended.stdout
    out = folder.parent / "eval/easy_vqa"
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in predictions] == [json.loads(row)["question_id"] for row in rows]
    scores = json.loads((out / "scores.json").read_text())
    right = sum(row["prediction"] == row["answer"] for row in predictions)
    assert (scores["n"], scores["score"]) == (40, right / 40)

    picture = run_script(tmp_path, "eval/gallery.py", str(out), "--data", str(data), "--out", "answers.png")
    assert picture.returncode == 0, picture.stderr
    assert open_image(tmp_path / "answers.png").width > 800


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-path", "nowhere"), "error: 'nowhere' does not exist: give a model's folder"),
        (("--model-path", "nowhere", "--data", "none"), "error: data file none/test.jsonl is missing"),
    ],
)
def test_mistakes(easy_vqa_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    ended = run_script(tmp_path, "eval/main.py", "--task", "easy_vqa", "--data", str(easy_vqa_folder), *arguments)
    assert ended.returncode != 0
    assert ended.stderr.startswith(message)
