"""A results folder, `<run>/eval/<task>/`: answers that survive being killed, and what was decided by what.

    settings.json      what decides an answer: task, rule, prompt, hashes of data and weights, precision; sessions
    answers/           while it is going on: a journal for each rank (`rank-0-of-8.jsonl`)
    predictions.jsonl  in the task's order, when every question has its answer
    scores.json        the task's figures with their intervals, and the settings again

Each rank answers its own share of the pictures and writes its own journal. A session that was stopped goes on with the
questions that no journal has an answer to, on any number of ranks. The first rank merges: it waits until every question
is answered, once, and only then writes predictions and scores.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from data.journal import Journal, read_journal
from eval.benchmarks import BENCHMARKS
from eval.task import Benchmark, Question, Scored, Task
from model.files import StoredTensor, read_json, write_json

SETTINGS, ANSWERS, PREDICTIONS, SCORES = "settings.json", "answers", "predictions.jsonl", "scores.json"
# What answers of one folder must agree in; the other settings are for people, or may change from session to session.
DECISIVE = (
    "task", "rule", "data_hash", "model_hash", "adapter_hash", "template", "max_new_tokens", "dtype", "bits", "limit",
    "seed", "num_questions",
)  # fmt: skip
LOOK_EVERY_S = 1.0
GIVE_UP_AFTER_S = 1800.0  # without a word from the other ranks; a slow disk may take that long to load a model


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, as torchrun says."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Self:
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def share(self, questions: Sequence[Question]) -> list[int]:
        """Return the numbers of this rank's questions: every size-th picture's, whatever is answered already."""
        order = {name: place for place, name in enumerate(dict.fromkeys(one.cluster for one in questions))}
        return [number for number, one in enumerate(questions) if order[one.cluster] % self.size == self.rank]


class ResultsFolder:
    """Answers of one model to one task, as they come in."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], questions: Sequence[Question], ranks: Ranks) -> None:
        """Find what has been answered already.

        Raises: ValueError for answers that other settings gave, that are no answers to these questions, or twice there.
        """
        self.folder, self.settings, self.questions, self.ranks = folder, dict(settings), questions, ranks
        self.numbers = {question.question_id: number for number, question in enumerate(questions)}
        self.mark = _mark(settings)
        if (folder / SETTINGS).is_file():
            self._check_settings(read_json(folder / SETTINGS))
        elif (folder / PREDICTIONS).is_file():
            raise ValueError(
                f"{folder} has {PREDICTIONS} but no {SETTINGS}, so nobody knows what gave these answers: "
                "move the folder aside"
            )
        self.rows = self._read()
        self.journal: Journal | None = None

    @property
    def remaining(self) -> list[int]:
        """This rank's questions without an answer, by number."""
        return [number for number in self.ranks.share(self.questions) if number not in self.rows]

    @property
    def is_complete(self) -> bool:
        return len(self.rows) == len(self.questions)

    @property
    def predictions(self) -> list[str]:
        """The answers, in the task's order."""
        return [self.rows[number]["prediction"] for number in range(len(self.questions))]

    def start(self, session: Mapping[str, Any]) -> None:
        """Open this rank's journal, and note what this session runs on."""
        (self.folder / ANSWERS).mkdir(parents=True, exist_ok=True)
        if self.ranks.rank == 0:
            file = self.folder / SETTINGS
            earlier = read_json(file)["sessions"] if file.is_file() else []
            _replace_json(file, self.settings | {"sessions": [*earlier, dict(session)]})
        self.journal = Journal(self.folder / ANSWERS / f"rank-{self.ranks.rank}-of-{self.ranks.size}.jsonl")
        self.journal.append({"settings": self.mark})

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Note answers: {"question_id", "prediction", "num_prompt_tokens", "num_tokens", "seconds"}."""
        assert self.journal is not None, "start() comes first"
        self.journal.append(*rows)
        self.rows |= {self.numbers[row["question_id"]]: row for row in rows}

    def close(self) -> None:
        """Let go of this rank's journal."""
        assert self.journal is not None, "start() comes first"
        self.journal.close()

    def wait_for_others(self) -> None:
        """Return when every question has an answer.

        Raises: ValueError when the other ranks' answers stopped coming.
        """
        last_seen, last_count = time.monotonic(), len(self.rows)
        while not self.is_complete:
            time.sleep(LOOK_EVERY_S)
            self.rows = self._read()
            if len(self.rows) > last_count:
                last_seen, last_count = time.monotonic(), len(self.rows)
            if time.monotonic() - last_seen > GIVE_UP_AFTER_S:
                shares = [Ranks(rank, self.ranks.size).share(self.questions) for rank in range(self.ranks.size)]
                missing = [str(rank) for rank, share in enumerate(shares) if not self.rows.keys() >= set(share)]
                raise ValueError(
                    f"{self.folder}: {len(self.questions) - len(self.rows)} of {len(self.questions)} questions have no "
                    f"answer, those of rank {', '.join(missing)} of {self.ranks.size}, and none came for "
                    f"{GIVE_UP_AFTER_S / 60:g} minutes: run the same line again to go on"
                )

    def finish(self, scored: Scored, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Write predictions and scores, and remove the journals they were made of; return the scores as written."""
        assert self.is_complete, "a score of some of the questions is not the task's"
        partial = self.folder / (PREDICTIONS + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            for number, (question, credit) in enumerate(zip(self.questions, scored.credits, strict=True)):
                row = dataclasses.asdict(question) | self.rows[number] | {"credit": credit}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.replace(self.folder / PREDICTIONS)
        written = {**scores, "settings": read_json(self.folder / SETTINGS)}
        _replace_json(self.folder / SCORES, written)
        shutil.rmtree(self.folder / ANSWERS, ignore_errors=True)
        return written

    def _check_settings(self, stored: Mapping[str, Any]) -> None:
        changed = [name for name in DECISIVE if stored.get(name) != self.settings[name]]
        if changed:
            old, new = (
                ", ".join(f"{name} = {values.get(name)}" for name in changed) for values in (stored, self.settings)
            )
            raise ValueError(
                f"{self.folder} holds answers that were given with {old}, now it is {new}: move the folder aside, or "
                "choose another with --out"
            )

    def _read(self) -> dict[int, dict[str, Any]]:
        if (self.folder / PREDICTIONS).is_file():
            return self._collect(self.folder / PREDICTIONS, read_journal(self.folder / PREDICTIONS))
        rows: dict[int, dict[str, Any]] = {}
        for file in sorted((self.folder / ANSWERS).glob("rank-*.jsonl")):
            read = self._collect(file, read_journal(file))
            if twice := rows.keys() & read.keys():
                name = self.questions[min(twice)].question_id
                raise ValueError(f"{file}: question {name} is answered in another rank's file, too")
            rows |= read
        return rows

    def _collect(self, file: Path, lines: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        for line, row in enumerate(lines, start=1):
            if "settings" in row:
                if row["settings"] != self.mark:
                    raise ValueError(
                        f"{file}, line {line}: answers from here on are of other settings: remove the file"
                    )
                continue
            name = row.get("question_id")
            if name not in self.numbers or not isinstance(row.get("prediction"), str):
                raise ValueError(f"{file}, line {line}: {name!r} with no answer, or no question of this task")
            if self.numbers[name] in rows:
                raise ValueError(f"{file}, line {line}: question {name} is answered twice")
            rows[self.numbers[name]] = {
                key: row.get(key) for key in ("question_id", "prediction", "num_prompt_tokens", "num_tokens")
            }
        return rows


@dataclass(frozen=True)
class Result:
    """A finished results folder, read back."""

    folder: Path
    questions: list[Question]
    predictions: list[str]
    credits: list[float | None]
    settings: dict[str, Any]
    scores: dict[str, Any]

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.settings["task"]]

    def count(self) -> Scored:
        """Judge the answers again, by the rule that they were judged by."""
        return self.benchmark.count(self.questions, self.predictions, self.settings["rule"])


def load_result(folder: Path) -> Result:
    """Read a results folder.

    Raises: FileNotFoundError or ValueError for one that is not finished, damaged, or does not fit its own scores.
    """
    if not (folder / SCORES).is_file() or not (folder / PREDICTIONS).is_file():
        raise FileNotFoundError(f"{folder} has no {SCORES} and {PREDICTIONS}: eval/main.py writes them at its end")
    settings, scores = read_json(folder / SETTINGS), read_json(folder / SCORES)
    if settings.get("task") not in BENCHMARKS:
        raise ValueError(f"{folder / SETTINGS}: task {settings.get('task')!r} is none of {', '.join(BENCHMARKS)}")
    if missing := [name for name in ("rule", "data", "image_folder", "data_hash") if name not in settings]:
        raise ValueError(f"{folder / SETTINGS} lacks {', '.join(missing)}")
    questions, predictions, credits = [], [], []
    for number, row in enumerate(read_journal(folder / PREDICTIONS), start=1):
        try:
            values = {field.name: row[field.name] for field in dataclasses.fields(Question)}
            values |= {"turns": tuple(row["turns"]), "answers": tuple(row["answers"])}
            questions.append(Question(**values))
            predictions.append(str(row["prediction"]))
            credits.append(row["credit"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / PREDICTIONS}, row {number}: {error} is missing or of another kind") from error
    ids = [question.question_id for question in questions]
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"{folder / PREDICTIONS}: question {twice} is answered twice")
    if len(ids) != scores.get("n"):
        raise ValueError(f"{folder}: {PREDICTIONS} has {len(ids)} rows, {SCORES} is about {scores.get('n')} questions")
    return Result(folder, questions, predictions, credits, settings, scores)


def find_results(run: Path) -> dict[str, Result]:
    """Return a run's finished results by their folders' names. Raises: FileNotFoundError without the run folder."""
    if not run.is_dir():
        raise FileNotFoundError(f"run folder {run} is missing")
    folders = sorted(file.parent for file in (run / "eval").glob(f"*/{SCORES}"))
    return {folder.name: load_result(folder) for folder in folders}


def reopen_task(result: Result, data: Path | None = None) -> Task | None:
    """Open the benchmark's files again, to show its pictures; None where they are not here.

    Raises: ValueError where they are not those that the answers were given to.
    """
    settings = result.settings
    pictures = settings["image_folder"]
    folder = data or Path(settings["data"])
    try:
        task = result.benchmark.open(folder, settings["rule"], None if pictures is None or data else Path(pictures))
    except FileNotFoundError:
        return None
    if (found := hash_files(task.files)) != settings["data_hash"]:
        raise ValueError(
            f"{folder} is another version of the data than {result.folder} was made from: "
            f"hash {found} instead of {settings['data_hash']}"
        )
    return task


def describe_scores(scored: Scored) -> dict[str, Any]:
    """Return scores as they stand in `scores.json`; the headline, the first of them, also by itself."""
    parts = {
        breakdown: {
            name: {"n": part.num_questions, "score": part.score, "interval": part.interval(), "best": part.best}
            for name, part in named.items()
        }
        for breakdown, named in scored.parts.items()
    }
    headline = next(({"headline": name} | figures for named in parts.values() for name, figures in named.items()), {})
    return headline | {"n": len(scored.credits), "parts": parts}


def hash_files(files: Iterable[Path]) -> str:
    """Return a hash of files' content, in their order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def hash_tensors(tensors: Mapping[str, StoredTensor], about: str) -> str:
    """Return a hash of weights, whatever files they are spread over, and of a text about them."""

    def hash_one(name: str) -> bytes:
        content = tensors[name].load().contiguous().view(-1).view(torch.uint8).numpy()
        return hashlib.sha256(name.encode() + b"\0" + hashlib.sha256(content.data).digest()).digest()

    with ThreadPoolExecutor() as threads:
        digests = threads.map(hash_one, sorted(tensors))
        return hashlib.sha256(about.encode() + b"".join(digests)).hexdigest()[:16]


def _mark(settings: Mapping[str, Any]) -> str:
    """Return a short name for all that decides an answer."""
    values = json.dumps({name: settings[name] for name in DECISIVE}, sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:16]


def _replace_json(file: Path, values: dict[str, Any]) -> None:
    partial = file.with_name(file.name + ".partial")
    write_json(partial, values)
    partial.replace(file)
