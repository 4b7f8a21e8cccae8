"""Scores are the plain counts, the bars are the known ones, and batched answers equal one at a time."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.conversation import Turn, render_conversation
from data.image import open_image, preprocess_image
from data.rows import load_rows
from data.tokenizer import Tokenizer
from eval import easy_vqa
from eval.predict import answer_questions
from model.adapter_files import ADAPTER_FILES
from model.config import CONFIGS
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


@pytest.mark.parametrize(
    ("task", "num_questions", "percentages"),
    [("easy_vqa", 9673, [37.3, 67.0]), ("easy_vqa_choice", 3552, [17.6, 50.8]), ("tiny_zh", 11113, [24.0, 63.1])],
)
def test_the_two_bars(tiny_zh_folder: Path, task: str, num_questions: int, percentages: list[float]) -> None:
    """What a score has to be held against."""
    questions = easy_vqa.load_questions(tiny_zh_folder.parent, task)
    assert len(questions) == num_questions
    bars = easy_vqa.baselines(questions, tiny_zh_folder.parent, task)
    scores = [easy_vqa.score(questions, predictions)["score"] for predictions in bars.values()]
    assert [round(100 * value, 1) for value in scores] == percentages


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


@pytest.fixture
def few_questions(easy_vqa_folder: Path, tmp_path: Path) -> Path:
    """The first forty questions of two tasks."""
    data = tmp_path / "data/easy_vqa"
    data.mkdir(parents=True)
    for name in ("images", "vqa_train.json", "vqa_held_out.json", "choice_train.json", "choice_held_out.json"):
        (data / name).symlink_to(easy_vqa_folder / name)
    for name in ("test.jsonl", "choice_test.jsonl"):
        rows = (easy_vqa_folder / name).read_text(encoding="utf-8").splitlines()
        (data / name).write_text("\n".join(rows[:40]), encoding="utf-8")
    return data.parent


@pytest.fixture
def run_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A run whose `final/` is the tiny model of random weights."""
    shutil.copytree(tiny_model_folder, tmp_path / "run/final")
    return tmp_path / "run"


def test_command_writes_every_prediction(few_questions: Path, run_folder: Path, tmp_path: Path) -> None:
    arguments = ("--task", "easy_vqa", "--model-path", str(run_folder / "final"), "--data", str(few_questions))
    ended = run_script(tmp_path, "eval/main.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "best without looking at the picture" in ended.stdout
    assert re.search(r"easy_vqa: exact match, % +all +shape +color +yes/no\n", ended.stdout)
    out = run_folder / "eval/easy_vqa"
    predictions = load_rows(out / "predictions.jsonl")
    asked = load_rows(few_questions / "easy_vqa/test.jsonl")
    assert [row["question_id"] for row in predictions] == [row["question_id"] for row in asked]
    scores = json.loads((out / "scores.json").read_text())
    right = sum(row["prediction"] == row["answer"] for row in predictions)
    assert (scores["task"], scores["n"], scores["score"]) == ("easy_vqa", 40, right / 40)

    drawing = ("eval/gallery.py", str(out), "--data", str(few_questions), "--out", "answers.png")
    picture = run_script(tmp_path, *drawing)
    assert picture.returncode == 0, picture.stderr
    assert open_image(tmp_path / "answers.png").width > 800


def test_a_model_and_its_adapter_side_by_side(few_questions: Path, run_folder: Path, tmp_path: Path) -> None:
    """Only the adapter is put on the base; each gets its row of the table, and the task its folder in each run."""
    base, adapter = str(run_folder / "final"), str(write_adapter(tmp_path / "lora/final"))
    arguments = ("--task", "easy_vqa_choice", "--model-path", base, adapter, "--model-base", base)
    ended = run_script(tmp_path, "eval/main.py", *arguments, "--data", str(few_questions))
    assert ended.returncode == 0, ended.stderr
    table = ended.stdout.splitlines()
    assert [line.split("  ")[0] for line in table[-3:]] == [base, adapter, "questions"]
    assert re.fullmatch(r"easy_vqa_choice: exact match, % +all +choice", table[1])
    before, after = (
        [row["prediction"] for row in load_rows(tmp_path / run / "eval/easy_vqa_choice/predictions.jsonl")]
        for run in ("run", "lora")
    )
    assert len(before) == len(after) == 40
    assert before != after
    model = load_llava(adapter, base)
    row = load_rows(few_questions / "easy_vqa/choice_test.jsonl")[0]
    groups = [(few_questions / "easy_vqa/images" / row["image"], [row["question"]])]
    tokenizer = Tokenizer(run_folder / "final/tokenizer.model")
    assert list(answer_questions(model, tokenizer, groups, easy_vqa.MAX_NEW_TOKENS)) == [after[:1]]


def write_adapter(folder: Path) -> Path:
    """Write a LoRA on one of the tiny model's layers, large enough to change every answer."""
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "lora_alpha": 8, "r": 2, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    text = CONFIGS["tiny"].text
    layer = "base_model.model.model.language_model.layers.0.mlp.down_proj"
    factors = {"lora_A": torch.ones(2, text.intermediate_size), "lora_B": torch.ones(text.hidden_size, 2)}
    save_file({f"{layer}.{side}.weight": factor for side, factor in factors.items()}, folder / ADAPTER_FILES[0])
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-path", "nowhere"), "error: 'nowhere' does not exist: give a model's folder"),
        (("--model-path", "nowhere", "--data", "none"), "error: data file none/easy_vqa/test.jsonl is missing"),
        (("--model-path", "adapter"), "error: adapter is an adapter: say with --model-base"),
        (
            ("--model-path", "model", "--model-base", "model"),
            "error: --model-base model: no model folder is an adapter",
        ),
    ],
)
def test_mistakes(
    easy_vqa_folder: Path, tiny_model_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "model").symlink_to(tiny_model_folder)
    write_adapter(tmp_path / "adapter")
    ended = run_script(
        tmp_path, "eval/main.py", "--task", "easy_vqa", "--data", str(easy_vqa_folder.parent), *arguments
    )
    assert ended.returncode != 0
    assert ended.stderr.startswith(message)
