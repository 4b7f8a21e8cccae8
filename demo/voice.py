"""A model that answers: its weights, its words, and everything that decides what it says next.

Several voices may share weights: a base and what an adapter makes of it are two rows of one batch.

Shapes: B rows, one for each voice.
"""

import argparse
import contextlib
import itertools
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image

from data.conversation import CHAT_TEMPLATES, Rendered, Turn, render_conversation
from data.image import preprocess_image
from data.tokenizer import StreamDecoder, Tokenizer, cut_at_stop, find_tokenizer
from model.adapter_files import load_adapter
from model.generate import generate_stream
from model.hub import resolve_folder
from model.inside import Inside, look_inside
from model.llava import Llava
from model.lora import DEFAULT, attach_adapter, has_adapters, use_adapters
from model.quantize import pack_for_decoding
from model.sampling import GREEDY, Sampling
from model.weights import build_llava, choose_dtype, open_checkpoint

TUNED = "tuned"  # what an adapter beside a base is called among the model's adapters
FEWER_BITS = {"8bit": 8, "4bit": 4}
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Voice:
    """One that can be asked."""

    name: str
    model: Llava
    tokenizer: Tokenizer
    template: str
    adapter: str | None = None  # which of the model's adapters it speaks through; None is none

    @property
    def device(self) -> torch.device:
        return self.model.language_model.lm_head.weight.device

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Return the turns as the model gets them; without a last answer they ask for one."""
        return render_conversation(turns, self.tokenizer, self.model.config.vision.num_patches, self.template)

    def see(self, picture: Image | None) -> torch.Tensor | None:
        """Return the pixels the model gets, (1, 3, S, S)."""
        return None if picture is None else preprocess_image(picture, self.model.config.vision.image_size)[None]


@dataclass(frozen=True)
class Settings:
    """How to answer."""

    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # an answer ends before the first of these texts
    compile: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer as far as it is known, and what it cost."""

    text: str = ""
    is_over: bool = False
    is_cut: bool = False  # over because there was no room for more
    prompt_tokens: int = 0
    num_tokens: int = 0  # the end among them
    first_s: float = 0.0  # to the first token; of the model's own: others that take turns with it do not count
    total_s: float = 0.0  # to the last one

    @property
    def tokens_per_s(self) -> float:
        """Return the speed of decoding: the first token has the prompt and the picture in it."""
        return (self.num_tokens - 1) / (self.total_s - self.first_s) if self.num_tokens > 1 else 0.0


@dataclass
class _Speech:
    """What has been said of an answer, and the place in it."""

    decoder: StreamDecoder
    eos_token_id: int
    stop: tuple[str, ...]
    said: str = ""
    num_tokens: int = 0
    total_s: float = 0.0
    visible: str = ""  # of it: what may be the beginning of a stop text is held back
    is_over: bool = False
    is_cut: bool = False

    def push(self, token_id: int, is_last: bool, total_s: float) -> None:
        if self.is_over:
            return
        self.num_tokens += 1
        self.total_s = total_s
        has_ended = token_id == self.eos_token_id
        self.said += "" if has_ended else self.decoder.push(token_id)
        self.is_over, self.is_cut = has_ended or is_last, is_last and not has_ended
        if self.is_over:
            self.said += self.decoder.finish()
        self.visible, found = cut_at_stop(self.said, self.stop, self.is_over)
        self.is_over |= found


def speak(
    voices: Sequence[Voice], turns: Sequence[Turn], picture: Image | None, settings: Settings = Settings()
) -> Generator[list[Answer], None, None]:
    """Yield the answers of all voices to the last of `turns`, as far as they are known, after every token.

    Voices of one model are rows of one batch, each through its adapter; models take turns token by token.
    Raises: ValueError when the conversation does not fit a model's positions.
    """
    groups = [list(group) for _, group in itertools.groupby(voices, key=lambda voice: id(voice.model))]
    streams = [_speak_together(group, turns, picture, settings) for group in groups]
    said = [[Answer()] * len(group) for group in groups]
    try:
        for steps in itertools.zip_longest(*streams):
            said = [before if now is None else now for before, now in zip(said, steps, strict=True)]
            yield list(itertools.chain.from_iterable(said))
    finally:
        for stream in streams:
            stream.close()


def _speak_together(
    voices: Sequence[Voice], turns: Sequence[Turn], picture: Image | None, settings: Settings
) -> Generator[list[Answer], None, None]:
    started, model = time.perf_counter(), voices[0].model
    prompts = [voice.render(turns).input_ids for voice in voices]
    longest = max(map(len, prompts))
    room = model.config.text.max_position_embeddings - longest
    if room < 1:
        raise ValueError(f"the conversation has {longest} tokens, no room is left for an answer: start a new one")
    limit = min(settings.max_new_tokens, room)
    pixel_values = voices[0].see(picture)
    speeches = [
        _Speech(StreamDecoder(voice.tokenizer), voice.tokenizer.eos_token_id, settings.stop) for voice in voices
    ]
    first_s = total_s = 0.0
    tokens = generate_stream(
        model, [torch.tensor(prompt) for prompt in prompts],
        None if pixel_values is None else pixel_values.expand(len(voices), -1, -1, -1),
        voices[0].tokenizer.eos_token_id, limit, settings.sampling, settings.compile,
    )  # fmt: skip
    for number in range(1, limit + 1):
        # The choice of adapters is the model's: between two steps it is left as it was, since others may run then.
        with choose_adapters(voices):
            token_ids = next(tokens).tolist()
        total_s += time.perf_counter() - started
        first_s = first_s or total_s
        for speech, token_id in zip(speeches, token_ids, strict=True):
            speech.push(token_id, number == limit, total_s)
        yield [
            Answer(
                speech.visible, speech.is_over, speech.is_cut, len(prompt), speech.num_tokens, first_s, speech.total_s
            )
            for speech, prompt in zip(speeches, prompts, strict=True)
        ]  # fmt: skip
        started = time.perf_counter()
        if all(speech.is_over for speech in speeches):
            return


def choose_adapters(voices: Sequence[Voice]) -> contextlib.AbstractContextManager[None]:
    """Run what the block runs through each voice's adapter, one row for each; all are of one model."""
    model = voices[0].model
    if not has_adapters(model):
        return contextlib.nullcontext()
    return use_adapters(model, [voice.adapter for voice in voices])


def look_into(
    voice: Voice, input_ids: list[int], picture: Image | None, num_answer_tokens: int, max_tokens: int
) -> Inside:
    """Run prompt and answer once more through the voice's adapter, and keep what the answer's tokens looked at."""
    with choose_adapters([voice]):
        return look_inside(voice.model, torch.tensor(input_ids), voice.see(picture), num_answer_tokens, max_tokens)


def add_model_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the options that say which model it is, and how it is loaded."""
    parser.add_argument(
        "--model-path", required=default is None, default=default,
        help="model, adapter or projector: a folder, or owner/name[@rev]",
    )  # fmt: skip
    parser.add_argument("--model-base", help="what an adapter or projector given as the model belongs to")
    parser.add_argument("--adapter", help="LoRA on top of the model")
    parser.add_argument("--vision-tower", help="CLIP to use instead of the one the model names")
    parser.add_argument("--conv-mode", choices=CHAT_TEMPLATES, help="prompt template, instead of the model's own")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", dest="bits", action="store_const", const=8, default=16)
    bits.add_argument("--load-4bit", dest="bits", action="store_const", const=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: as stored, but on CPUs bfloat16 for float16"
    )


def load_voice(arguments: argparse.Namespace) -> Voice:
    """Read the model that `add_model_arguments`'s options name: one voice, an adapter merged where that is possible.

    Raises: FileNotFoundError or ValueError for a model that is not whole.
    """
    path, base, tower, adapter = (
        arguments.model_path, arguments.model_base, arguments.vision_tower, arguments.adapter
    )  # fmt: skip
    return _load(path, base, tower, adapter, arguments.bits, arguments)


def load_voices(arguments: argparse.Namespace, compare: str | None) -> list[Voice]:
    """Read the voices of the page: the model, and what it is compared with.

    An adapter stays beside the weights, so that the base can be heard, too. `compare` names another model, or "8bit"
    or "4bit", the same one with fewer bits: either has weights of its own.
    Raises: FileNotFoundError or ValueError for a model that is not whole, or an adapter that does not fit.
    """
    path, base, tower, adapter = (
        arguments.model_path, arguments.model_base, arguments.vision_tower, arguments.adapter
    )  # fmt: skip
    # What is wrong with an adapter should not be heard after the minutes that its base takes.
    adapted = None if adapter is None else open_checkpoint(path, base, tower, adapter)
    voice = _load(path, base, tower, None, arguments.bits, arguments)
    voices = [voice]
    if adapted is not None:
        dtype = voice.model.language_model.lm_head.weight.dtype
        attach_adapter(voice.model, load_adapter(resolve_folder(adapter)), dtype, arguments.device, TUNED)
        template = arguments.conv_mode or adapted.config.chat_template
        voices.append(replace(voice, name=name_model(adapter), template=template, adapter=TUNED))
    if compare in FEWER_BITS:
        fewer = _load(path, base, tower, adapter, FEWER_BITS[compare], arguments)
        voices.append(replace(fewer, name=f"{voices[-1].name}, {FEWER_BITS[compare]} bit"))
    elif compare is not None:
        voices.append(_load(compare, base, tower, None, arguments.bits, arguments))
    names = [voice.name for voice in voices]
    return [
        voice if names.count(voice.name) == 1 else replace(voice, name=f"{voice.name} ({number})")
        for number, voice in enumerate(voices, 1)
    ]


def _load(
    path: str, base: str | None, tower: str | None, adapter: str | None, bits: int, arguments: argparse.Namespace
) -> Voice:
    checkpoint = open_checkpoint(path, base, tower, adapter)
    tokenizer = Tokenizer(find_tokenizer(*checkpoint.folders))
    dtype = DTYPES[arguments.dtype] or choose_dtype(checkpoint.dtype, arguments.device)
    model = build_llava(checkpoint, dtype, arguments.device, bits)
    if bits == 4 and arguments.device == "cpu" and dtype == torch.bfloat16:
        pack_for_decoding(model)
    is_beside = checkpoint.adapter is not None and bits != 16  # in 16 bits it is part of the weights
    template = arguments.conv_mode or checkpoint.config.chat_template
    return Voice(name_model(path), model, tokenizer, template, DEFAULT if is_beside else None)


def name_model(path: str) -> str:
    """Return what a model is called: its repository, its folder, or its run for `runs/<name>/final`."""
    folder = Path(path)
    if not folder.exists():
        return path.partition("@")[0].rpartition("/")[2]
    folder = folder.resolve()
    return folder.parent.name if folder.name == "final" else folder.name
