"""What page and API share: the voices, the line before them, and what may be asked."""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image

from data.conversation import Turn
from demo.line import Line, Ticket
from demo.voice import Answer, Settings, Voice, look_into, speak
from model.inside import Inside

MAX_LOOK_NUMBERS = 20_000_000  # a byte each before they are compressed: 33 tokens of a 7B's answer, 21 of a 13B's
MAX_CHARACTERS = 20_000  # of a conversation; tokens are counted when its turn comes


class OutOfMemoryError(RuntimeError):
    """The device has no room for this conversation beside the weights."""


@dataclass(frozen=True)
class Look:
    """An answer with what happened inside the model, and the tokens of the whole conversation."""

    voice: Voice
    question: str
    input_ids: list[int]
    num_answer_tokens: int
    inside: Inside


@dataclass(frozen=True)
class Service:
    voices: Sequence[Voice]
    line: Line
    max_new_tokens: int  # the most anybody may ask for

    def find(self, name: str) -> Voice:
        """Raises: ValueError for a voice there is not."""
        for voice in self.voices:
            if voice.name == name:
                return voice
        raise ValueError(f"no model {name!r}: there are {', '.join(voice.name for voice in self.voices)}")

    def ask(
        self, voices: Sequence[Voice], turns: Sequence[Turn], picture: Image | None, settings: Settings
    ) -> Ticket[list[Answer]]:
        """Stand in line with a question. Raises: ValueError for what may not be asked, LineFullError."""
        check_length(turns)
        if not 1 <= settings.max_new_tokens <= self.max_new_tokens:
            raise ValueError(f"{settings.max_new_tokens} new tokens, expected 1 to {self.max_new_tokens}")
        return self.line.join(lambda: keep_memory(speak(voices, turns, picture, settings)))

    def look(self, voice: Voice, turns: Sequence[Turn], picture: Image | None) -> Ticket[Look]:
        """Stand in line to look inside the last answer of `turns`. Raises: ValueError, LineFullError."""
        check_length(turns)

        def job() -> Generator[Look, None, None]:
            input_ids = voice.render(turns).input_ids
            num_answer = len(input_ids) - len(voice.render(turns[:-1]).input_ids)
            inside = look_into(voice, input_ids, picture, num_answer, count_words_to_show(voice))
            yield Look(voice, turns[-2].text, input_ids, num_answer, inside)

        return self.line.join(lambda: keep_memory(job()))


def count_words_to_show(voice: Voice) -> int:
    """Return how many tokens of an answer are looked into: what a browser has to load has a limit."""
    config = voice.model.config
    per_token = config.text.num_hidden_layers * config.text.num_attention_heads * config.vision.num_patches
    return min(64, MAX_LOOK_NUMBERS // per_token)


def check_length(turns: Sequence[Turn]) -> None:
    """Raises: ValueError for a conversation that is too long to be tokenised for a stranger."""
    num_characters = sum(len(turn.text) for turn in turns)
    if num_characters > MAX_CHARACTERS:
        raise ValueError(
            f"the conversation has {num_characters} characters, the limit is {MAX_CHARACTERS}: start a new one"
        )


def keep_memory(steps: Generator) -> Generator:
    """Pass on what comes; where memory ends, free it before somebody is told.

    Raises: OutOfMemoryError.
    """
    try:
        with contextlib.closing(steps):
            yield from steps
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():  # as CPUs and GPUs put it
            raise
        error.__traceback__ = None  # its frames hold the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemoryError("out of memory") from None
