"""What a benchmark is to the rest of this room: questions, pictures, and a rule by which answers are counted.

Every benchmark is one small file that makes these from its owner's files; `eval/benchmarks.py` lists them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from eval.tally import Part

OFFICIAL = "official"  # the benchmark's own rule, asked as official LLaVA asks: the default everywhere


@dataclass(frozen=True)
class Question:
    """What is asked, and what it takes to judge the answer."""

    question_id: str  # unique in its task
    image: str  # the picture's name, as `Task.open_picture` knows it; "" where there is none
    text: str  # the question in its owner's words, for people to read
    turns: tuple[str, ...]  # what the model reads: questions and given answers in turn, the last one a question
    answers: tuple[str, ...] = ()  # references; none where the owner keeps them
    kinds: Mapping[str, str] = field(default_factory=dict)  # what scores are broken down by: {"answer type": "number"}
    details: Mapping[str, Any] = field(default_factory=dict)  # what only the task's own rule reads; JSON

    @property
    def cluster(self) -> str:
        """Name what it shares with questions that are not independent of it: the picture; without one it is alone."""
        return self.image or f"question {self.question_id}"


@dataclass(frozen=True)
class Scored:
    """Answers judged one by one, and what that comes to."""

    credits: list[float | None]  # of each question between 0 and 1; None where it takes its owner to judge
    parts: dict[str, dict[str, Part]]  # breakdown -> name -> score; the first of all is the headline


@dataclass(frozen=True)
class Task:
    """A benchmark with its files open."""

    questions: Sequence[Question]
    open_picture: Callable[[str], Image.Image]
    files: Sequence[Path]  # their content decides what is asked and what is right
    template: str  # of `data.conversation`
    max_new_tokens: int
    prompt: str  # how a question is put, for people to read: "{question}\\nAnswer with one word."
    bars: Mapping[str, Sequence[str]] = field(default_factory=dict)  # answers of those who do not look at the picture


class OpenTask(Protocol):
    def __call__(self, data: Path, rule: str, image_folder: Path | None) -> Task:
        """Read the owner's files below `data` (a file where a task is one); pictures elsewhere if `image_folder` says.

        Raises: FileNotFoundError or ValueError saying what is missing or wrong, in which file and row.
        """
        ...


class CountAnswers(Protocol):
    def __call__(self, questions: Sequence[Question], predictions: Sequence[str], rule: str) -> Scored: ...


class WriteSubmission(Protocol):
    def __call__(self, task: Task, predictions: Sequence[str], folder: Path) -> Path:
        """Write what the owner's server takes; return the file."""
        ...


@dataclass(frozen=True)
class Benchmark:
    """How a task's files are opened and its answers counted."""

    metric: str  # what the headline is called: "VQA accuracy"
    open: OpenTask
    count: CountAnswers
    rules: tuple[str, ...] = (OFFICIAL,)  # the first is the default
    write_submission: WriteSubmission | None = None
