"""Keep the dialogues that are fit for training: `python -m data.zh.clean --work DIR`.

Reads `records.jsonl` and `replies.jsonl`; writes `dialogues.jsonl` (kept, sorted by picture and kind), `dropped.jsonl`
(a reply a line, with `reason` and `detail`) and `clean.report.json`: the same bytes for the same work. A dialogue is
dropped for the first of these:
    it was not written, as its kind does not fit the picture; or it was written twice
    its record or picture is missing, or unreadable
    the picture looks like one of an evaluation, or like another of the set, whose text is longer
    one of `data.zh.filters`, in their order
    its question is one of an evaluation
    its text is another's, or its answers are nearly another's
    a model that takes a second look does not find it supported (`data.zh.second_look`, off by default)

Traditional characters become simplified ones first, except in what a dialogue of the kind "text" reads out in quotes;
marks of Markdown and invisible characters go: such dialogues are counted as mended.
COCO's ids, which keep evaluation pictures out of other sources, say nothing about these pictures: only looks do.
"""

import dataclasses
import itertools
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.prepare.leaks import LookAlikes
from data.prepare.report import Report
from data.rows import RowWriter
from data.similar import hash_pictures
from data.tokenizer import Tokenizer
from data.zh.filters import QUOTED, Dialogue, Limits, find_fault, make_filters, squeeze
from data.zh.kinds import load_kinds
from data.zh.near import Fault, find_like_pictures, find_text_faults, load_questions
from data.zh.options import run_command, setting
from data.zh.record import DIALOGUES, Record, Reply, as_row, read_records, read_replies
from data.zh.second_look import Judge, Verdict, choose_share, look_again
from data.zh.text import clean_text, to_simplified

DROPPED = "dropped.jsonl"
REPORT = "clean.report.json"
TOKENS_PER_CHARACTER = 2  # LLaMA's vocabulary takes 1.4 to 1.7 for Chinese texts
MARKDOWN = re.compile(r"\*\*|^#{1,6} +|`+", re.MULTILINE)
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class CleanSettings:
    tokenizer: str = setting("", "file of the tokenizer that counts; without one a character counts as 2 tokens")
    max_question: int = setting(160, "tokens of a question")
    max_answer: int = setting(1024, "tokens of an answer")
    max_dialogue: int = setting(1400, "tokens of a dialogue: 2048 less a picture's 576 and the system prompt")
    min_han: float = setting(0.6, "share of Han characters among letters, marks and digits")
    min_jaccard: float = setting(0.7, "answers that share so much of their 5-character grams are nearly the same")
    max_same: int = setting(20, "how often the same short dialogue may stand, about different pictures")
    exclude_pictures: tuple[str, ...] = setting((), "folder of evaluation pictures, whose look-alikes are dropped")
    exclude_questions: tuple[str, ...] = setting((), "file of evaluation questions, one a line or conversation rows")
    workers: int = setting(0, "processes that read pictures; 0 takes all cores")
    second_look_share: float = setting(0.0, "share of the dialogues that a model judges; 0 asks none, 1 about all")
    model: str = setting("", "second look: model that judges, better not the one that wrote")
    base_url: str = setting("", "second look: address of the endpoint (default: OPENAI_BASE_URL, or OpenAI)")
    price_input: float = setting(0.0, "second look: price of a million input tokens; 0 is unknown")
    price_output: float = setting(0.0, "second look: price of a million output tokens")
    max_cost: float = setting(0.0, "second look: stop before all runs in this folder cost more; 0 is no limit")
    concurrency: int = setting(8, "second look: requests at a time")
    max_tokens: int = setting(500, "second look: the longest verdict, in tokens")
    token_limit: str = setting(
        "max_completion_tokens", "second look: the endpoint's name for that", ("max_completion_tokens", "max_tokens")
    )
    reply_format: str = setting("json_schema", "second look: structured output", ("json_schema", "json_object"))
    timeout_s: float = setting(120.0, "second look: seconds without a byte before a request is sent again")

    def __post_init__(self) -> None:
        for name in ("min_han", "min_jaccard", "second_look_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}, expected a number from 0 to 1")
        for name in ("max_question", "max_answer", "max_dialogue", "max_same", "concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least 1")
        for name in ("workers", "price_input", "price_output", "max_cost"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)}, expected 0 or more")
        if self.min_jaccard == 0 or self.timeout_s <= 0:
            raise ValueError(f"min_jaccard = {self.min_jaccard}, timeout_s = {self.timeout_s}: expected more than 0")
        if self.second_look_share and not self.model:
            raise ValueError(f"second_look_share = {self.second_look_share} needs model, the one that judges")
        if self.max_cost and not (self.price_input and self.price_output):
            raise ValueError(f"max_cost = {self.max_cost:g} needs price_input and price_output: look them up")


class Sieve:
    """What was dropped and mended, and why."""

    def __init__(self) -> None:
        self.dropped: list[tuple[Reply, Fault]] = []
        self.mended: defaultdict[str, set[str]] = defaultdict(set)  # keys of replies, by what was mended

    def sift(self, replies: Iterable[Reply], find: Callable[[Reply], Fault | None]) -> list[Reply]:
        """Return the replies that `find` finds no fault with; the others are dropped."""
        kept = []
        for reply in replies:
            fault = find(reply)
            if fault is None:
                kept.append(reply)
            else:
                self.dropped.append((reply, fault))
        return kept

    def mend(self, replies: Iterable[Reply], what: str, change: Callable[[str, str], str]) -> list[Reply]:
        """Return the replies with each text as `change` makes it of the kind and the text."""
        mended = []
        for reply in replies:
            turns = tuple((change(reply.kind, one), change(reply.kind, other)) for one, other in reply.turns)
            if turns != reply.turns:
                self.mended[what].add(reply.key)
            mended.append(dataclasses.replace(reply, turns=turns))
        return mended


def run(settings: CleanSettings, work: Path) -> dict[str, Any]:
    """Write what is kept, what is dropped and a report, print a table and return the report.

    Raises: ValueError or OSError for what is missing or broken in the work folder or the settings.
    """
    records = {record.sha256: record for record in read_records(work)}
    written = read_replies(work)
    sieve, report = Sieve(), Report("clean")
    report.options = describe_options(settings)
    filters = make_filters(load_kinds(), make_limits(settings, report))
    questions = load_known_questions(settings.exclude_questions, report)

    kept = sieve.sift(sorted(written, key=order), make_finder_of_unwritten(records))
    shown = [records[sha256] for sha256 in sorted({reply.sha256 for reply in kept})]
    picture_faults = find_picture_faults(shown, settings, work, report)
    kept = sieve.sift(kept, lambda reply: picture_faults.get(reply.sha256))
    kept = sieve.mend(kept, "Markdown removed", lambda _, text: MARKDOWN.sub("", text))
    kept = sieve.mend(kept, "traditional characters made simplified", simplify)
    kept = sieve.sift(
        tqdm(kept, "clean", unit=" dialogues", file=sys.stderr, disable=None),
        lambda reply: find_fault(describe(reply, records[reply.sha256]), filters),
    )
    kept = sieve.sift(kept, lambda reply: find_known_question(reply, questions))
    text_faults = find_text_faults(kept, settings.min_jaccard, settings.max_same)
    kept = sieve.sift(kept, lambda reply: text_faults.get(reply.key))
    kept = sieve.mend(kept, "blanks and invisible characters tidied", lambda _, text: clean_text(text))
    looks: dict[str, Any] = {}
    if settings.second_look_share:
        judge = Judge(*(getattr(settings, one.name) for one in dataclasses.fields(Judge)))
        verdicts, looks = look_again(choose_share(kept, settings.second_look_share), records, judge, work)
        kept = sieve.sift(kept, lambda reply: find_objection(verdicts.get(reply.key)))

    write_rows(work / DIALOGUES, (as_row(reply) for reply in kept))
    write_rows(work / DROPPED, (make_dropped_row(*one) for one in sieve.dropped))
    return write_report(written, kept, sieve, looks, report, work / REPORT)


def order(reply: Reply) -> tuple[str, ...]:
    """Return what replies are sorted by."""
    return reply.sha256, reply.kind, reply.prompt_version, reply.model


def make_limits(settings: CleanSettings, report: Report) -> Limits:
    """Return the limits of length, and say in the report who counts. Raises: as `Tokenizer`."""
    if settings.tokenizer:
        tokenizer = Tokenizer(report.add_input(Path(settings.tokenizer)))
        report.note(f"tokens are those of {tokenizer.file.name}, which has {tokenizer.vocab_size} pieces")
    else:
        tokenizer = None
        report.note(f"no tokenizer was given: a character counts as {TOKENS_PER_CHARACTER} tokens")

    def count(text: str) -> int:
        return len(tokenizer.encode(text)) if tokenizer else TOKENS_PER_CHARACTER * len(text)

    return Limits(count, settings.max_question, settings.max_answer, settings.max_dialogue, settings.min_han)


def load_known_questions(files: Sequence[str], report: Report) -> dict[str, set[str]]:
    """Return the questions of evaluations, by the name of their file. Raises: as `load_questions`."""
    known = {}
    for file in map(Path, files):
        known[file.name] = load_questions(file)
        report.add_input(file)
        report.note(f"{file.name} has {len(known[file.name])} questions to exclude")
    if not files:
        report.note("no evaluation questions were given to exclude")
    return known


def make_finder_of_unwritten(records: Mapping[str, Record]) -> Callable[[Reply], Fault | None]:
    """Return the function that finds replies without a dialogue or a record, and all but the first of a key."""
    seen: set[str] = set()

    def find(reply: Reply) -> Fault | None:
        if not reply.turns:
            return "kind: does not fit the picture", "as the model said"
        if reply.sha256 not in records:
            return "picture: no record has it", reply.sha256
        if reply.key in seen:
            return "reply: written twice", reply.key
        seen.add(reply.key)
        return None

    return find


def find_picture_faults(
    shown: Sequence[Record], settings: CleanSettings, work: Path, report: Report
) -> dict[str, Fault]:
    """Return what is wrong with pictures, by their names: unreadable, or like an evaluation's or another of the set."""
    num_workers = settings.workers or len(os.sched_getaffinity(0))
    names = tqdm([record.image for record in shown], "pictures", file=sys.stderr, disable=None)
    hashes = list(hash_pictures(work, names, num_workers))
    likes = LookAlikes(map(Path, settings.exclude_pictures), num_workers, report)
    if settings.exclude_pictures:
        report.note("COCO's ids say nothing about these pictures: evaluation pictures are told by their looks alone")
    else:
        report.note("no evaluation pictures were given to exclude")
    faults: dict[str, Fault] = {}
    sound = []
    for record, found in zip(shown, hashes, strict=True):
        if found is None:
            faults[record.sha256] = "picture: missing or unreadable", record.image
        elif reason := next((reason for reason, known in likes.known if known.contains(found)), None):
            faults[record.sha256] = f"picture: {reason}", record.image
        else:
            sound.append((record, found))
    sound.sort(key=lambda one: (-len(one[0].text), one[0].sha256))
    for (record, _), place in zip(sound, find_like_pictures([found for _, found in sound]), strict=True):
        if place is not None:
            faults[record.sha256] = "picture: looks like another of the set", sound[place][0].image
    return faults


def simplify(kind: str, text: str) -> str:
    """Return a text in simplified characters, but for what is read out from the picture as it stands there."""
    if HALF_CHARACTER.search(text):  # which a filter finds, and OpenCC stumbles over
        return text
    if kind != "text":
        return to_simplified(text)
    quoted = QUOTED.findall(text)
    between = [to_simplified(piece) for piece in QUOTED.split(text)]
    return "".join(piece for pair in itertools.zip_longest(between, quoted, fillvalue="") for piece in pair)


def describe(reply: Reply, record: Record) -> Dialogue:
    return Dialogue(reply.kind, reply.turns, f"{record.title}\n{record.section}", record.text)


def find_known_question(reply: Reply, known: Mapping[str, set[str]]) -> Fault | None:
    """Find a question that an evaluation asks, about whatever picture."""
    for question, _ in reply.turns:
        for name, questions in known.items():
            if squeeze(question) in questions:
                return f"question: in {name}", question
    return None


def find_objection(verdict: Verdict | None) -> Fault | None:
    """Find what a second look says against a dialogue; one without a verdict is not judged."""
    if verdict is None or (verdict.supported and verdict.needs_picture):
        return None
    if not verdict.supported:
        return "second look: not supported by picture and text", verdict.reason
    return "second look: a question needs no picture", verdict.reason


def make_dropped_row(reply: Reply, fault: Fault) -> dict[str, Any]:
    """Return a line of dropped.jsonl, in which no text has half a character: it could not be written."""
    row = {**as_row(reply), "reason": fault[0], "detail": fault[1]}
    return json.loads(json.dumps(row, ensure_ascii=False).encode(errors="replace"))


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with RowWriter(file) as writer:
        for row in rows:
            writer.write(row)


def write_report(
    written: Sequence[Reply], kept: Sequence[Reply], sieve: Sieve, looks: dict[str, Any], report: Report, file: Path
) -> dict[str, Any]:
    """Print what was done, write it as JSON and return it."""
    report.read, report.rows = len(written), len(kept)
    keys = {reply.key for reply in kept}
    for what, mended in sieve.mended.items():
        report.mend(what, len(mended & keys))
    by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for reply, (reason, _) in sieve.dropped:
        report.drop(reason)
        by_kind[reason][reply.kind] += 1
    num_read, num_kept = (Counter(reply.kind for reply in replies) for replies in (written, kept))
    report.parts = [{"kind": kind, "read": num_read[kind], "kept": num_kept[kind]} for kind in sorted(num_read)]
    report.write(file)
    report.print()
    content = json.loads(file.read_text(encoding="utf-8"))
    content["pictures"] = len({reply.sha256 for reply in kept})
    content["dropped_by_kind"] = {reason: dict(sorted(by_kind[reason].items())) for reason in sorted(by_kind)}
    content["second_look"] = looks
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, value in looks.items():
        print(f"  second look, {name}: {value}")
    return content


def describe_options(settings: CleanSettings) -> dict[str, Any]:
    """Return what the result depends on, files and folders by name."""
    elsewhere = {"workers", "base_url", "concurrency", "timeout_s"}
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in elsewhere}
    for name in ("exclude_pictures", "exclude_questions"):
        values[name] = [Path(path).resolve().name for path in values[name]]
    return values | {"tokenizer": Path(settings.tokenizer).name}


def main() -> None:
    run_command("clean", str(__doc__), CleanSettings, run)


if __name__ == "__main__":
    main()
