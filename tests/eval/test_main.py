"""`eval/main.py`: models beside each other, adapters, limits, several ranks, runs that are stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data.image import open_image
from data.rows import load_rows
from data.tokenizer import Tokenizer
from eval import main as command
from eval.answers import load_result
from eval.benchmarks import BENCHMARKS
from eval.predict import answer_questions
from eval.task import Question
from model.adapter_files import ADAPTER_FILES
from model.config import CONFIGS
from model.llava import Llava
from model.weights import load_llava
from tests.launch import ROOT, environment, run_script

NUM_QUESTIONS = 40


@pytest.fixture
def few_questions(easy_vqa_folder: Path, tmp_path: Path) -> Path:
    """The first forty questions of two tasks."""
    data = tmp_path / "data/easy_vqa"
    data.mkdir(parents=True)
    for name in ("images", "vqa_train.json", "vqa_held_out.json", "choice_train.json", "choice_held_out.json"):
        (data / name).symlink_to(easy_vqa_folder / name)
    for name in ("test.jsonl", "choice_test.jsonl"):
        rows = (easy_vqa_folder / name).read_text(encoding="utf-8").splitlines()
        (data / name).write_text("\n".join(rows[:NUM_QUESTIONS]), encoding="utf-8")
    return data.parent


@pytest.fixture
def run_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A run whose `final/` is the tiny model of random weights."""
    shutil.copytree(tiny_model_folder, tmp_path / "run/final")
    return tmp_path / "run"


def score(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """Run the command in this process; return what it printed."""
    monkeypatch.setattr(sys, "argv", ["eval/main.py", *map(str, arguments)])
    command.main()
    return capsys.readouterr().out


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


def test_command_writes_every_prediction(few_questions: Path, run_folder: Path, tmp_path: Path) -> None:
    arguments = ("--task", "easy_vqa", "--model-path", str(run_folder / "final"), "--data", str(few_questions))
    ended = run_script(tmp_path, "eval/main.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "easy_vqa: exact match, rule official, template vicuna_v1\nasked as '{question}'" in ended.stdout
    assert re.search(rf"\nall +{NUM_QUESTIONS} +\d+\.\d +\d+\.\d +\d+\.\d   \d+\.\d to \d+\.\d\n", ended.stdout)
    assert "\n[2] best without looking at the picture\n" in ended.stdout
    result = load_result(run_folder / "eval/easy_vqa")
    asked = load_rows(few_questions / "easy_vqa/test.jsonl")
    assert [question.question_id for question in result.questions] == [str(row["question_id"]) for row in asked]
    right = sum(text == row["answer"] for text, row in zip(result.predictions, asked, strict=True))
    assert (result.scores["task"], result.scores["n"], result.scores["score"]) == ("easy_vqa", 40, right / 40)
    settings = result.settings
    assert (settings["bits"], settings["dtype"], settings["template"]) == (16, "float32", "vicuna_v1")
    assert all(len(settings[name]) == 16 for name in ("model_hash", "data_hash"))
    assert settings["adapter_hash"] is None
    (session,) = settings["sessions"]
    assert session["torch"] == torch.__version__

    drawing = ("eval/gallery.py", str(run_folder / "eval/easy_vqa"), "--out", "answers.png")
    picture = run_script(tmp_path, *drawing)
    assert picture.returncode == 0, picture.stderr
    assert open_image(tmp_path / "answers.png").width > 800


def test_a_model_and_its_adapter_side_by_side(
    few_questions: Path, run_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Only the adapter is put on the base; each gets its column of the table, and the task its folder in each run."""
    base, adapter = run_folder / "final", write_adapter(tmp_path / "lora/final")
    printed = score(
        capsys, monkeypatch, "--task", "easy_vqa_choice", "--model-path", base, adapter, "--model-base", base,
        "--data", few_questions,
    )  # fmt: skip
    assert printed.splitlines()[-2:] == [f"[3] {base}", f"[4] {adapter}"]
    before, after = (load_result(tmp_path / run / "eval/easy_vqa_choice") for run in ("run", "lora"))
    assert before.predictions != after.predictions
    assert before.settings["model_hash"] == after.settings["model_hash"]
    assert len(after.settings["adapter_hash"]) == 16
    model = load_llava(adapter, base)
    task = BENCHMARKS["easy_vqa_choice"].open(few_questions, "official", None)
    tokenizer = Tokenizer(base / "tokenizer.model")
    ((place, answer),) = answer_questions(model, tokenizer, task.questions[:1], task.open_picture, task.max_new_tokens)
    assert (place, answer.text) == (0, after.predictions[0])
    # The same adapter given the other way.
    arguments = ("--task", "easy_vqa_choice", "--model-path", base, "--adapter", adapter, "--data", few_questions)
    score(capsys, monkeypatch, *arguments, "--out", tmp_path / "other")
    other = load_result(tmp_path / "other/easy_vqa_choice")
    assert other.predictions == after.predictions
    assert other.settings["adapter_hash"] == after.settings["adapter_hash"]


def test_a_limit_takes_whole_pictures(
    few_questions: Path, run_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    task = BENCHMARKS["easy_vqa"].open(few_questions, "official", None)
    drawn = {seed: command.draw_questions(task, 23, seed) for seed in range(4)}
    for few in drawn.values():
        assert 12 < len(few.questions) <= 23
        images = {question.image for question in few.questions}
        assert [question for question in task.questions if question.image in images] == few.questions
        bar = dict(
            zip(
                [question.question_id for question in task.questions],
                task.bars["best without looking at the picture"],
                strict=True,
            )
        )
        assert few.bars["best without looking at the picture"] == [
            bar[question.question_id] for question in few.questions
        ]
    assert len({tuple(question.question_id for question in few.questions) for few in drawn.values()}) > 1
    with pytest.raises(ValueError, match="--limit 1: every picture has more questions"):
        command.draw_questions(task, 1, 0)
    arguments = ("--task", "easy_vqa", "--model-path", run_folder / "final", "--data", few_questions)
    score(capsys, monkeypatch, *arguments, "--limit", "23", "--seed", "2", "--out", tmp_path / "few")
    result = load_result(tmp_path / "few/easy_vqa")
    assert result.questions == list(drawn[2].questions)
    assert (result.settings["limit"], result.settings["seed"]) == (23, 2)


def test_answered_once(
    few_questions: Path, run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answered, it only counts; with another model, other data or another prompt it refuses."""
    arguments: list[str | Path] = ["--task", "easy_vqa", "--model-path", run_folder / "final", "--data", few_questions]
    printed = score(capsys, monkeypatch, *arguments)
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("nothing is left to answer"))
    assert score(capsys, monkeypatch, *arguments) == printed

    def refuse(*more: str | Path) -> str:
        with pytest.raises(SystemExit) as ended:
            score(capsys, monkeypatch, *arguments, *more)
        return str(ended.value)

    assert "given with template = vicuna_v1, now it is template = llava_v1" in refuse("--conv-mode", "llava_v1")
    assert "given with max_new_tokens = 12, now it is max_new_tokens = 3" in refuse("--max-new-tokens", "3")
    file = few_questions / "easy_vqa/test.jsonl"
    content = file.read_text(encoding="utf-8")
    file.write_text(content.replace("what color", "which color"), encoding="utf-8")
    assert re.search("given with data_hash = [0-9a-f]{16}, now it is data_hash = ", refuse())
    file.write_text(content, encoding="utf-8")
    adapter = write_adapter(run_folder / "lora")
    arguments[3:4] = [run_folder / "final", "--adapter", adapter]
    assert "adapter_hash = None" in refuse()


def test_killed_runs_and_ranks_give_the_answers_of_one_run(
    few_questions: Path, run_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = ["--task", "easy_vqa", "--model-path", str(run_folder / "final"), "--data", str(few_questions)]
    score(capsys, monkeypatch, *arguments)
    undisturbed = load_result(run_folder / "eval/easy_vqa")

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*torchrun, str(ROOT / "eval/main.py"), *arguments, "--out", str(tmp_path / "ranks"), "--batch-size", "3"]
    ended = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("easy_vqa: exact match") == 1  # the first rank's table
    together = load_result(tmp_path / "ranks/easy_vqa")
    assert together.questions == undisturbed.questions
    assert together.predictions == undisturbed.predictions
    assert together.scores["parts"] == undisturbed.scores["parts"]
    assert together.settings["sessions"][0]["world_size"] == 2


def test_a_killed_run_goes_on(
    few_questions: Path, run_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """SIGKILL as soon as a few answers are on the disk; what is there is not asked again."""
    arguments = ["--task", "easy_vqa", "--model-path", str(run_folder / "final"), "--data", str(few_questions)]
    slowly = (
        "import runpy, sys, time\n"
        f"sys.argv = ['eval/main.py', *{arguments!r}, '--batch-size', '1']; sys.path.insert(0, {str(ROOT)!r})\n"
        "from eval import main\n"
        "real, main.WRITE_EVERY_S = main.answer_questions, 0\n"
        "def slow(*arguments):\n"
        "    for answer in real(*arguments):\n"
        "        time.sleep(0.05)\n"
        "        yield answer\n"
        "main.answer_questions = slow\n"
        "main.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slowly], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    )
    journal = run_folder / "eval/easy_vqa/answers/rank-0-of-1.jsonl"
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 8:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    num_answered = journal.read_bytes().count(b"\n") - 1
    assert 7 <= num_answered < NUM_QUESTIONS
    asked: list[str] = []
    real = command.answer_questions

    def note_questions(model: Llava, tokenizer: Tokenizer, questions: Sequence[Question], *others: Any) -> Any:
        asked.extend(question.question_id for question in questions)
        return real(model, tokenizer, questions, *others)

    monkeypatch.setattr(command, "answer_questions", note_questions)
    score(capsys, monkeypatch, *arguments)
    assert len(asked) == NUM_QUESTIONS - num_answered
    result = load_result(run_folder / "eval/easy_vqa")
    assert len(result.settings["sessions"]) == 2
    score(capsys, monkeypatch, *arguments, "--out", tmp_path / "again")
    assert load_result(tmp_path / "again/easy_vqa").predictions == result.predictions


def test_a_broken_picture_stops_the_run_and_costs_no_answer(
    few_questions: Path, run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[str | Path] = ["--task", "easy_vqa", "--model-path", run_folder / "final", "--data", few_questions]
    pictures = few_questions / "easy_vqa/images"
    whole = pictures.resolve()
    pictures.unlink()
    shutil.copytree(whole, pictures)
    last = load_rows(few_questions / "easy_vqa/test.jsonl")[-1]["image"]
    (pictures / last).write_bytes((whole / last).read_bytes()[:60])
    with pytest.raises(SystemExit) as ended:
        score(capsys, monkeypatch, *arguments, "--batch-size", "2")
    assert str(ended.value).startswith(f"error: picture {last}: cannot read")
    journal = run_folder / "eval/easy_vqa/answers/rank-0-of-1.jsonl"
    kept = journal.read_bytes().count(b"\n") - 1
    assert 0 < kept < NUM_QUESTIONS
    (pictures / last).write_bytes((whole / last).read_bytes())
    score(capsys, monkeypatch, *arguments)
    assert load_result(run_folder / "eval/easy_vqa").scores["n"] == NUM_QUESTIONS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-path", "nowhere"), "error: 'nowhere' does not exist: give a model's folder"),
        (("--model-path", "nowhere", "--data", "none"), "error: data file none/easy_vqa/test.jsonl is missing"),
        (("--model-path", "adapter"), "error: adapter is an adapter: say with --model-base"),
        (("--model-path", "model", "--model-base", "model"), "error: model holds a language model of its own"),
        (
            ("--model-path", "model", "nowhere", "--model-base", "model"),
            "error: --model-base model: none of the models is an adapter",
        ),
        (("--model-path", "model", "--rule", "ours"), "error: --rule ours: easy_vqa knows official"),
    ],
)
def test_mistakes(
    easy_vqa_folder: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    (tmp_path / "model").symlink_to(tiny_model_folder)
    write_adapter(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    given = ["--task", "easy_vqa", "--data", str(easy_vqa_folder.parent), *arguments]
    monkeypatch.setattr(sys, "argv", ["eval/main.py", *given])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert str(ended.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "0"), "--limit 0: at least 1"),
        (("--batch-size", "-1"), "--batch-size -1: at least 1"),
        (("--out", "x", "--model-path", "a", "b"), "--out and --adapter go with one model"),
    ],
)
def test_impossible_options(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["eval/main.py", "--task", "easy_vqa", "--model-path", "model", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
