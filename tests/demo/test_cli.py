"""The terminal chat answers once or many times, in any language, and says what is wrong."""

import functools
import http.server
import io
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.tokenizer import Tokenizer
from model.llava import Llava
from model.weights import save_llava
from tests.conftest import TINY_TOKENIZER
from tests.launch import ROOT, environment, run_script
from tests.model.checkpoints import CONFIG, write_official_lora
from tests.model.small_llava import randomize_weights


@pytest.fixture(scope="module")
def clip_free_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the tower inside, of the sizes that the adapter below has."""
    config = replace(CONFIG, text=replace(CONFIG.text, vocab_size=Tokenizer(TINY_TOKENIZER).vocab_size))
    model = Llava(config)
    randomize_weights(model, seed=5)
    folder = tmp_path_factory.mktemp("model") / "final"
    save_llava(folder, config, model.state_dict(), TINY_TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    with torch.device("meta"):
        shapes = Llava(CONFIG)
    write_official_lora(folder, shapes, "unused")
    return folder


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


def test_stats_and_prompt_are_shown_when_asked_for(tiny_model_folder: Path, picture: Path, tmp_path: Path) -> None:
    arguments = ("--image-file", str(picture), "--prompt", "red?", "--max-new-tokens", "6")
    plain = ask(tmp_path, tiny_model_folder, *arguments)
    shown = ask(tmp_path, tiny_model_folder, *arguments, "--stats", "--debug", "--conv-mode", "llava_v1")
    assert plain.stderr == ""
    prompt, stats = shown.stderr.splitlines()
    assert prompt.startswith("prompt: <s>▁A▁chat▁between▁a▁curious▁h")
    assert "<image x 64>▁<0x0A>red?▁ASSISTANT:" in prompt
    number = r"\d+\.\d+"
    pattern = rf"\[(\d+) prompt tokens, first token after {number} s, (\d) tokens at {number} tokens/s, {number} GiB of"
    assert (match := re.match(pattern, stats))
    assert int(match[1]) > 64
    assert 1 <= int(match[2]) <= 6


def test_picture_from_the_web(tiny_model_folder: Path, picture: Path, tmp_path: Path) -> None:
    """The same picture by its address gives the same answer."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(picture.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/{picture.name}"
    arguments = ("--prompt", "what color is the shape?", "--max-new-tokens", "9")
    by_file = ask(tmp_path, tiny_model_folder, "--image-file", str(picture), *arguments)
    by_address = ask(tmp_path, tiny_model_folder, "--image-file", address, *arguments)
    missing = ask(tmp_path, tiny_model_folder, "--image-file", f"{address}x", *arguments)
    server.shutdown()
    assert by_address.stdout == by_file.stdout
    assert missing.returncode == 1
    assert "404" in missing.stderr


@pytest.mark.parametrize("bits", ["--load-8bit", "--load-4bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_models_talk(tiny_model_folder: Path, tmp_path: Path, bits: str, dtype: str) -> None:
    arguments = ("--prompt", "what color is the shape?", "--max-new-tokens", "9", "--dtype", dtype)
    answered = ask(tmp_path, tiny_model_folder, *arguments, bits)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()


def test_an_answer_ends_before_a_stop_text(tiny_model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--prompt", "what color is the shape?", "--max-new-tokens", "30")
    whole = ask(tmp_path, tiny_model_folder, *arguments).stdout.removesuffix("\n")
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopped = ask(tmp_path, tiny_model_folder, *arguments, "--stop", stop).stdout.removesuffix("\n")
    assert stopped == whole[: whole.index(stop)]


def test_an_adapter_changes_the_answer(tmp_path: Path, clip_free_model: Path, adapter: Path) -> None:
    arguments = ("--prompt", "ab", "--max-new-tokens", "12")
    plain = ask(tmp_path, clip_free_model, *arguments)
    adapted = ask(tmp_path, clip_free_model, *arguments, "--adapter", str(adapter))
    as_model = ask(tmp_path, adapter, *arguments, "--model-base", str(clip_free_model))
    without_base = ask(tmp_path, adapter, *arguments)
    assert plain.returncode == adapted.returncode == as_model.returncode == 0, adapted.stderr
    assert adapted.stdout == as_model.stdout != plain.stdout
    assert "is an adapter: say with --model-base" in without_base.stderr


def test_ctrl_c_stops_the_answer_and_not_the_program(tiny_model_folder: Path, tmp_path: Path) -> None:
    """At a terminal: the first answer is stopped as soon as it begins, the second question is still answered."""
    command = [
        sys.executable, str(ROOT / "demo/cli.py"), "--model-path", str(tiny_model_folder), "--max-new-tokens", "900",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        # Tests that a shell runs in the background inherit that Ctrl-C is ignored; a terminal's program does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (there are no threads here)
    )  # fmt: skip
    assert process.stdin is not None
    assert isinstance(process.stdout, io.BufferedReader)
    process.stdin.write(b"what color is the shape?\n")
    process.stdin.flush()
    heard = b""
    while b"ASSISTANT: " not in heard:
        heard += process.stdout.read1(100)
    process.stdout.read1(100)  # its first words
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(b"again?\n\n", timeout=120)
    assert process.returncode == 0, errors
    assert b" [stopped]\n" in rest
    assert rest.count(b"ASSISTANT: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-file", "none.png", "--prompt", "a"), "error: image none.png is missing"),
        (("--image-file", "text.png", "--prompt", "a"), "error: cannot read text.png"),
        (("--prompt", "a", "--temperature", "-1"), "error: temperature = -1.0, expected 0"),
        (("--prompt", "a", "--image-file", "file:///etc/passwd"), "error: cannot fetch file:///etc/passwd"),
        (("--prompt", "a", "--adapter", "nowhere/"), "error: 'nowhere/' does not exist"),
        (("--prompt", "a", "--load-4bit", "--load-8bit"), "not allowed with argument"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens 0: at least 1"),
        (("--prompt", "red " * 2000), "no room is left for an answer: start a new one"),
    ],
)
def test_mistakes(tiny_model_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    ended = ask(tmp_path, tiny_model_folder, *arguments)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
