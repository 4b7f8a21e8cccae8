"""Voices: together they say what each says alone, whatever they share, and an answer's numbers are what they say."""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from data.conversation import Turn
from data.tokenizer import Tokenizer
from demo import voice as voice_module
from demo.voice import Answer, Settings, Voice, add_model_arguments, load_voice, load_voices, speak
from model.llava import Llava
from model.weights import save_llava
from tests.conftest import TINY_TOKENIZER
from tests.model.checkpoints import CONFIG, write_official_lora
from tests.model.small_llava import randomize_weights

QUESTION = [Turn("human", "图中是什么形状？ ab", has_image=True)]
PICTURE = Image.linear_gradient("L").convert("RGB").rotate(30)
SETTINGS = Settings(max_new_tokens=14)


def write_model(folder: Path, seed: int, template: str = "vicuna_v1") -> Path:
    """Write a model whose tower is inside, of the sizes that the adapter below has."""
    text = replace(CONFIG.text, vocab_size=Tokenizer(TINY_TOKENIZER).vocab_size)
    config = replace(CONFIG, text=text, chat_template=template)
    model = Llava(config)
    randomize_weights(model, seed)
    save_llava(folder, config, model.state_dict(), TINY_TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("runs") / "red" / "final", seed=5)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("runs") / "blue" / "final", seed=6)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "tuned-on-red"
    with torch.device("meta"):
        shapes = Llava(CONFIG)
    write_official_lora(folder, shapes, "unused")  # with a projector of its own
    return folder


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--dtype", "float32", *map(str, arguments)])


def listen(voices: Sequence[Voice], settings: Settings = SETTINGS) -> list[list[tuple[str, bool, int]]]:
    """Return what each voice says, token by token, up to its end."""
    heard: list[list[tuple[str, bool, int]]] = [[] for _ in voices]
    for answers in speak(voices, QUESTION, PICTURE, settings):
        for steps, answer in zip(heard, answers, strict=True):
            if not steps or not steps[-1][1]:
                steps.append((answer.text, answer.is_over, answer.num_tokens))
    return heard


def test_base_and_adapter_share_a_batch_and_its_weights(base: Path, adapter: Path) -> None:
    """Rows of one batch: each says what it says alone, and what it says when nothing else was ever loaded."""
    voices = load_voices(parse("--model-path", base, "--adapter", adapter), None)
    assert [voice.name for voice in voices] == ["red", "tuned-on-red"]
    assert voices[0].model is voices[1].model
    together = listen([*voices, voices[0]])
    assert together[:2] == [listen([voice])[0] for voice in voices]
    assert together[2] == together[0] != together[1]
    alone = [load_voice(parse("--model-path", base)), load_voice(parse("--model-path", base, "--adapter", adapter))]
    assert [voice.adapter for voice in alone] == [None, None]  # merged
    assert [listen([voice])[0] for voice in alone] == together[:2]


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_take_turns_with_all_of_them(base: Path, adapter: Path, bits: int, with_adapter: bool) -> None:
    """Two models, token by token; between their steps, the adapters of each stay chosen."""
    arguments = ("--model-path", base, *(("--adapter", adapter) if with_adapter else ()))
    voices = load_voices(parse(*arguments), f"{bits}bit")
    fewer = voices[-1]
    assert fewer.name == f"{voices[-2].name}, {bits} bit"
    assert fewer.model is not voices[0].model
    together = listen([voices[-2], fewer])
    assert together == [listen([voice])[0] for voice in (voices[-2], fewer)]
    assert [together[1]] == listen([load_voice(parse(*arguments, f"--load-{bits}bit"))])
    if with_adapter:  # rounding changes little, an adapter much: it is in both
        assert together[1] != listen([voices[0]])[0]


def test_two_folders(base: Path, other: Path) -> None:
    voices = load_voices(parse("--model-path", base), str(other))
    assert [voice.name for voice in voices] == ["red", "blue"]
    together = listen(voices)
    assert together == [listen([load_voice(parse("--model-path", folder))])[0] for folder in (base, other)]
    assert together[0] != together[1]


def test_names_tell_voices_apart(base: Path, adapter: Path) -> None:
    voices = load_voices(parse("--model-path", base, "--adapter", adapter), str(base))
    assert [voice.name for voice in voices] == ["red (1)", "tuned-on-red", "red (3)"]
    assert [voice.name for voice in load_voices(parse("--model-path", base, "--load-4bit"), None)] == ["red"]


def test_each_voice_has_the_template_it_was_trained_with(tmp_path: Path, base: Path, adapter: Path) -> None:
    plain, tuned = load_voices(parse("--model-path", base, "--adapter", adapter), None)
    assert (plain.template, tuned.template) == ("vicuna_v1", "llava_v1")
    assert plain.render(QUESTION).input_ids != tuned.render(QUESTION).input_ids
    chosen = parse("--model-path", base, "--adapter", adapter, "--conv-mode", "llava_llama_2")
    assert [voice.template for voice in load_voices(chosen, None)] == ["llava_llama_2"] * 2


@pytest.mark.parametrize(
    ("adapter_name", "compare", "message"),
    [
        ("nowhere/", None, "'nowhere/' does not exist"),
        ("tokenizer", None, "tokenizer"),
        (None, "nowhere/", "'nowhere/' does not exist"),
        (None, "5bit", "5bit"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter_name: str | None, compare: str | None,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ("--model-path", base, *(() if adapter_name is None else ("--adapter", adapter_name)))
    with pytest.raises((ValueError, OSError), match=message):
        load_voices(parse(*arguments), compare)


def test_an_adapter_that_does_not_fit_is_refused(tiny_model_folder: Path, adapter: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        load_voices(parse("--model-path", tiny_model_folder, "--adapter", adapter), None)


def test_a_conversation_without_room_for_an_answer_is_refused(base: Path) -> None:
    voices = [load_voice(parse("--model-path", base))]
    with pytest.raises(ValueError, match="no room is left for an answer: start a new one"):
        list(speak(voices, [Turn("human", "ab " * 3000)], None, SETTINGS))


class Script:
    """Says what it is told to, instead of a model: one list of tokens for each row, EOS from their ends on."""

    def __init__(self, *rows: list[int]) -> None:
        self.rows = rows

    def __call__(
        self, model: Llava, prompts: Any, pixels: Any, eos: int, limit: int, *_: Any
    ) -> Iterator[torch.Tensor]:
        assert len(prompts) == len(self.rows)
        for number in range(limit):
            yield torch.tensor([row[number] if number < len(row) else eos for row in self.rows])


@pytest.fixture(scope="module")
def voice(base: Path) -> Voice:
    return load_voice(parse("--model-path", base))


def say(
    voice: Voice, monkeypatch: pytest.MonkeyPatch, texts: Sequence[str], settings: Settings = SETTINGS
) -> list[list[Answer]]:
    """Return all steps of answers that say `texts`."""
    monkeypatch.setattr(voice_module, "generate_stream", Script(*(voice.tokenizer.encode(text) for text in texts)))
    return list(speak([voice] * len(texts), QUESTION, PICTURE, settings))


def test_an_answer_ends_before_a_stop_text_of_several_tokens(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning is never shown, and it ends only the answer that has it."""
    settings = replace(SETTINGS, max_new_tokens=50, stop=("USER:",))
    steps = say(voice, monkeypatch, ["red USER: blue", "USE this"], settings)
    assert [answer.text for answer in steps[-1]] == ["red ", "USE this"]
    assert all(answer.is_over and not answer.is_cut for answer in steps[-1])
    for earlier, later in itertools.pairwise(steps):
        assert all(after.text.startswith(before.text) for before, after in zip(earlier, later, strict=True))
    assert not any("U" in step[0].text for step in steps)
    assert any(step[0].is_over != step[1].is_over for step in steps)


@pytest.mark.parametrize(("limit", "is_cut"), [(-1, True), (0, True), (1, False)])
def test_an_answer_that_had_no_room_says_so(
    voice: Voice, monkeypatch: pytest.MonkeyPatch, limit: int, is_cut: bool
) -> None:
    """The end is a token, too: where there is no room for it, nobody knows that it was to come."""
    num_tokens = len(voice.tokenizer.encode("a red circle"))
    (answer,) = say(voice, monkeypatch, ["a red circle"], replace(SETTINGS, max_new_tokens=num_tokens + limit))[-1]
    assert (answer.is_over, answer.is_cut, answer.num_tokens) == (True, is_cut, num_tokens + limit)
    assert (answer.text == "a red circle") == (limit >= 0)


def test_characters_come_whole(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are three or four tokens."""
    text = "红色龘🙂的a"
    assert len(voice.tokenizer.encode(text)) > len(text)
    settings = replace(SETTINGS, max_new_tokens=60)
    texts = [step[0].text for step in say(voice, monkeypatch, [text], settings)]
    assert texts[-1] == text
    assert all(text.startswith(shown) for shown in texts)
    assert {len(shown) for shown in texts} >= set(range(1, len(text) + 1))


def test_an_answers_numbers(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = say(voice, monkeypatch, ["red", "a big red triangle"], replace(SETTINGS, max_new_tokens=40))
    lengths = [len(voice.tokenizer.encode(text)) + 1 for text in ("red", "a big red triangle")]
    assert [answer.num_tokens for answer in steps[-1]] == lengths
    assert len(steps) == max(lengths)
    for number, step in enumerate(steps, 1):
        for answer, length in zip(step, lengths, strict=True):
            assert answer.prompt_tokens == len(voice.render(QUESTION).input_ids)
            assert answer.num_tokens == min(number, length)
            assert answer.is_over == (number >= length)
            assert 0 < answer.first_s <= answer.total_s
    slow = Answer(num_tokens=11, first_s=2.0, total_s=4.0)
    assert slow.tokens_per_s == 5.0
    assert Answer(num_tokens=1, first_s=2.0, total_s=2.0).tokens_per_s == 0
    assert Answer().tokens_per_s == 0


@pytest.mark.parametrize("are_models_two", [False, True])
def test_times_are_the_models_own(
    base: Path, other: Path, monkeypatch: pytest.MonkeyPatch, are_models_two: bool
) -> None:
    """An answer that is over takes no more time while others go on, nor one whose model waits for another's step."""
    voices = [load_voice(parse("--model-path", folder)) for folder in (base, other if are_models_two else base)]
    if not are_models_two:
        voices = voices[:1] * 2
    seconds = {id(voices[0].model): 3.0, id(voices[1].model): 1.0}  # of a step
    clock = 100.0

    def script(model: Llava, prompts: list[torch.Tensor], _: Any, eos: int, limit: int, *__: Any) -> Iterator[Any]:
        nonlocal clock
        for number in range(limit):
            clock += seconds[id(model)]
            row = eos if number == 4 and model is voices[0].model else 5
            yield torch.tensor([row, 5][: len(prompts)])

    monkeypatch.setattr(voice_module, "generate_stream", script)
    monkeypatch.setattr(voice_module, "time", SimpleNamespace(perf_counter=lambda: clock))
    *_, answers = speak(voices, QUESTION, PICTURE, Settings(max_new_tokens=9))
    step_s = [seconds[id(voice.model)] for voice in voices]
    assert [answer.num_tokens for answer in answers] == [5, 9]
    assert [answer.first_s for answer in answers] == step_s
    assert [answer.total_s for answer in answers] == [5 * step_s[0], 9 * step_s[1]]
    assert [answer.tokens_per_s for answer in answers] == [1 / s for s in step_s]


def test_who_stops_listening_stops_the_models(base: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_steps, closed = 0, []

    def babble(model: Llava, *_: Any) -> Iterator[torch.Tensor]:
        nonlocal num_steps
        try:
            while True:
                num_steps += 1
                yield torch.tensor([5])
        finally:
            closed.append(model)

    monkeypatch.setattr(voice_module, "generate_stream", babble)
    voices = load_voices(parse("--model-path", base), str(other))
    steps = speak(voices, QUESTION, PICTURE, Settings(max_new_tokens=200))
    next(steps)
    next(steps)
    steps.close()
    assert num_steps == 4  # two of each model
    assert closed == [voice.model for voice in voices]
