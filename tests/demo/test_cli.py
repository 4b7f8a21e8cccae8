"""The terminal chat answers once or many times, in any language, and says what is wrong."""

import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.launch import run_script


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.new("RGB", (50, 30), "red").save(file)
    return file


def ask(folder: Path, model: Path, *arguments: str, text_in: str = "") -> subprocess.CompletedProcess:
    return run_script(folder, "demo/cli.py", "--model-path", str(model), *arguments, text_in=text_in)


def test_prompt_answers_once(tiny_model_folder: Path, picture: Path, tmp_path: Path) -> None:
    arguments = ("--image-file", str(picture), "--prompt", "what color is the shape?", "--max-new-tokens", "9")
    first, second = (ask(tmp_path, tiny_model_folder, *arguments) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert first.stdout == second.stdout
    assert "USER" not in first.stdout


def test_several_turns_and_chinese(tiny_model_folder: Path, picture: Path, tmp_path: Path) -> None:
    """Each turn sees those before; the same question again is asked of a longer conversation."""
    typed = "图中是什么形状?\nwhat shape is it?\n\n"
    ended = ask(tmp_path, tiny_model_folder, "--image-file", str(picture), "--max-new-tokens", "9", text_in=typed)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("ASSISTANT: ") == 2
    assert ended.stdout.count("USER: ") == 3


def test_sampling_depends_on_its_seed_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--prompt", "hello", "--temperature", "1", "--top-p", "0.9", "--max-new-tokens", "12")
    answers = [ask(tmp_path, tiny_model_folder, *arguments, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-file", "none.png", "--prompt", "a"), "error: image none.png is missing"),
        (("--image-file", "text.png", "--prompt", "a"), "error: cannot read text.png"),
        (("--prompt", "a", "--temperature", "-1"), "temperature is at least 0"),
        (("--prompt", "red " * 2000), "no room is left for an answer: start a new one"),
    ],
)
def test_mistakes(tiny_model_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    ended = ask(tmp_path, tiny_model_folder, *arguments)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
