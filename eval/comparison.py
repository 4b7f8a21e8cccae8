"""Two runs' answers to the same questions: what changed, and which of it chance could have made.

Only answers that were asked and judged the same way are compared; weights, precision and batches may differ.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from eval.answers import SCORES, Result
from eval.tally import Difference, Part, compare_parts, mcnemar

MUST_AGREE = ("task", "rule", "data_hash", "limit", "template", "prompt", "max_new_tokens")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Line:
    """One line of a table: a score of both."""

    name: str
    first: Part
    second: Part
    found: Difference
    adjusted_p: float  # Holm's, among the lines of the table
    changes: tuple[int, int, float] | None  # McNemar's; None where credits are not right or wrong

    @property
    def verdict(self) -> str:
        if self.adjusted_p < SIGNIFICANT:
            return "yes"
        return "alone" if self.found.p_value < SIGNIFICANT else "no"


@dataclass(frozen=True)
class Comparison:
    """Two results of the same questions, in the same order."""

    first: Result
    second: Result
    tables: dict[str, list[Line]]  # by breakdown
    differing: dict[str, tuple[str, str]]  # settings that may differ, and do

    @property
    def is_right_or_wrong(self) -> bool:
        return {*self.first.credits, *self.second.credits} <= {0, 1}

    @property
    def changed(self) -> list[int]:
        """The numbers of the questions with another answer."""
        pairs = zip(self.first.predictions, self.second.predictions, strict=True)
        return [number for number, (first, second) in enumerate(pairs) if first != second]

    def gain(self, number: int) -> float:
        """How much more the second answer is worth."""
        return (self.second.credits[number] or 0) - (self.first.credits[number] or 0)


def compare_results(first: Result, second: Result) -> Comparison:
    """Return all differences of two results.

    Raises: ValueError, saying what differs, for answers to other questions, or asked or judged another way.
    """
    settings = first.settings, second.settings
    if conflicts := [name for name in MUST_AGREE if settings[0].get(name) != settings[1].get(name)]:
        found = "; ".join(f"{name}: {settings[0].get(name)!r} and {settings[1].get(name)!r}" for name in conflicts)
        raise ValueError(f"{first.folder} and {second.folder} cannot be compared, they differ in {found}")
    ids = [[question.question_id for question in result.questions] for result in (first, second)]
    if differing := sorted(set(ids[0]) ^ set(ids[1])):
        raise ValueError(
            f"{first.folder} and {second.folder} cannot be compared, {len(differing)} questions are only in one of "
            f"them, {differing[0]} is the first: was it another --seed?"
        )
    place = {question_id: number for number, question_id in enumerate(ids[1])}
    order = [place[question_id] for question_id in ids[0]]
    first, first_parts = recount(first)
    second, second_parts = recount(
        dataclasses.replace(
            second,
            questions=[second.questions[number] for number in order],
            predictions=[second.predictions[number] for number in order],
        )
    )
    tables = {
        breakdown: _compare_lines(breakdown, named, second_parts[breakdown], first, second)
        for breakdown, named in first_parts.items()
    }
    return Comparison(first, second, tables, find_differing(*settings))


def recount(result: Result) -> tuple[Result, dict[str, dict[str, Part]]]:
    """Judge the answers again; return the result with these credits, and the scores.

    Raises: ValueError when that does not give the score that was written down, or takes the benchmark's owner.
    """
    scored = result.count()
    if not scored.parts or None in scored.credits:
        raise ValueError(f"{result.folder}: only the owner of {result.settings['task']} can judge these answers")
    headline = next(iter(next(iter(scored.parts.values())).values())).score
    stored = result.scores.get("score")
    if not isinstance(stored, int | float) or not math.isclose(headline, stored, rel_tol=1e-6, abs_tol=1e-9):
        raise ValueError(
            f"{result.folder}: the answers count to {headline:g}, {SCORES} says {stored}: they are of different "
            "versions, run eval/main.py again"
        )
    return dataclasses.replace(result, credits=scored.credits), scored.parts


def find_differing(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the settings that may differ, and do; of several sessions' values each one once."""
    flat = []
    for settings in (first, second):
        values = {name: [value] for name, value in settings.items() if name not in ("sessions", *MUST_AGREE)}
        for session in settings.get("sessions", []):
            for name, value in session.items():
                values.setdefault(name, []).append(value)
        values.pop("started", None)
        flat.append({name: ", ".join(dict.fromkeys(map(str, some))) for name, some in values.items()})
    pairs = {name: (flat[0].get(name, "None"), flat[1].get(name, "None")) for name in flat[0] | flat[1]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def adjust(p_values: Sequence[float]) -> list[float]:
    """Return p-values as they are among several (Holm 1979): below 0.05, hardly one in twenty tables errs at all."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, (len(p_values) - rank) * p_values[number])
        adjusted[number] = min(1.0, highest)
    return adjusted


def _compare_lines(
    breakdown: str, first_parts: dict[str, Part], second_parts: dict[str, Part], first: Result, second: Result
) -> list[Line]:
    numbers: dict[str, list[int]] = {}
    for number, question in enumerate(first.questions):
        name = "all" if breakdown == "all" else question.kinds.get(breakdown, "")
        numbers.setdefault(name, []).append(number)
    found = {name: compare_parts(part, second_parts[name]) for name, part in first_parts.items()}
    adjusted = adjust([one.p_value for one in found.values()])
    lines = []
    for (name, part), p_value in zip(first_parts.items(), adjusted, strict=True):
        about = numbers.get(name, [])
        credits = [[result.credits[number] or 0.0 for number in about] for result in (first, second)]
        is_test = len(about) == part.num_questions and {*credits[0], *credits[1]} <= {0, 1}
        changes = mcnemar(*credits) if is_test else None
        lines.append(Line(name, part, second_parts[name], found[name], p_value, changes))
    return lines


def split_changes(comparison: Comparison) -> tuple[list[int], list[int], list[int]]:
    """Return the numbers of the questions whose answers became worse, better, and other words worth the same."""
    changed = comparison.changed
    return (
        [number for number in changed if comparison.gain(number) < 0],
        [number for number in changed if comparison.gain(number) > 0],
        [number for number in changed if comparison.gain(number) == 0],
    )


def list_changes(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield every question whose answer changed, for programs."""
    for number in comparison.changed:
        question, gain = comparison.first.questions[number], comparison.gain(number)
        yield {
            "question_id": question.question_id,
            "change": "better" if gain > 0 else "worse" if gain < 0 else "worth the same",
            "image": question.image,
            "text": question.text,
            "answers": list(question.answers),
            "kinds": dict(question.kinds),
            "first": comparison.first.predictions[number],
            "second": comparison.second.predictions[number],
            "first_credit": comparison.first.credits[number],
            "second_credit": comparison.second.credits[number],
        }
