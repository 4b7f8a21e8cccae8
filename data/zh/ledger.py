"""What a work folder holds of replies and of failures, and what they cost: a dialogue is paid for once."""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data.journal import Journal, read_journal
from data.zh.kinds import Prompts
from data.zh.prompt import choose_kinds, make_key
from data.zh.record import REPLIES, Record, Reply, as_row, parse_row

FAILED = "failed.jsonl"
# Rows of failed.jsonl that hold a cost but settle nothing: the next run asks again.
NO_ANSWER = "no_answer"  # to the second request, after a bad reply to the first
LOST = "lost"  # a request that was sent, and whose reply did not arrive: it may have been billed


@dataclass(frozen=True)
class Job:
    """A dialogue that is wanted."""

    record: Record
    kind: str
    key: str


@dataclass(frozen=True)
class Usage:
    """What requests took."""

    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        num_input, num_output = self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens
        return Usage(num_input, num_output, self.cost + other.cost)


def make_jobs(records: list[Record], prompts: Prompts, model: str, num_kinds: int) -> list[Job]:
    """Return the dialogues that are wanted, ordered by the pictures' hashes: the first are a sample of all."""
    return [
        Job(record, kind, make_key(record.sha256, kind, prompts.version, model))
        for record in sorted(records, key=lambda record: record.sha256)
        for kind in choose_kinds(record.sha256, prompts.kinds, num_kinds)
    ]


class Ledger:
    """The journals of replies and failures, open for what comes."""

    def __init__(self, work: Path) -> None:
        """Raises: ValueError for journals that are broken, or that another process writes."""
        self.replies = Journal(work / REPLIES)
        self.failures = Journal(work / FAILED)
        self.written: dict[str, Reply] = {}
        self.reasons: dict[str, str] = {}  # of keys that failed, and not only for want of an answer
        self.responses: set[tuple[str, str]] = set()  # keys and the endpoint's names of failed replies
        self.usages: list[tuple[str, Usage]] = []  # with the key, or "" of what was lost
        self.total = Usage()
        for row in read_journal(work / REPLIES):
            self._note_reply(parse_row(row, Reply))
        for row in read_journal(work / FAILED):
            self._note_failure(row)

    def is_open(self, job: Job, retry_failed: bool) -> bool:
        """Tell whether a dialogue is still to be asked for."""
        return job.key not in self.written and (retry_failed or job.key not in self.reasons)

    def add_reply(self, job: Job, turns: tuple[tuple[str, str], ...], usage: Usage, snapshot: str) -> None:
        """Append a dialogue."""
        sha256, version, model = job.record.sha256, *job.key.split(":", 3)[2:]
        reply = Reply(sha256, job.kind, version, model, turns, snapshot, **dataclasses.asdict(usage))
        self.replies.append(as_row(reply))
        self._note_reply(reply)

    def add_failure(self, key: str, reason: str, detail: str, usage: Usage, response: str = "") -> None:
        """Append why there is no dialogue, and what finding that out cost."""
        row = {"key": key, "reason": reason, "detail": detail, "response": response, **dataclasses.asdict(usage)}
        self.failures.append(row)
        self._note_failure(row)

    def sum_usage(self, keys: set[str] | None = None) -> Usage:
        """Return what all requests took, or those for some dialogues, lost ones included."""
        usages = [usage for key, usage in self.usages if keys is None or key in keys]
        num_input, num_output = sum(one.input_tokens for one in usages), sum(one.output_tokens for one in usages)
        return Usage(num_input, num_output, math.fsum(one.cost for one in usages))

    def count_lost(self) -> int:
        return sum(key == "" for key, _ in self.usages)

    def summarise(self, model: str, prompt_version: str) -> dict[str, Any]:
        """Return counts of a model's dialogues by kind and of failures by reason, and what all runs cost."""
        replies = [
            reply for reply in self.written.values() if (reply.model, reply.prompt_version) == (model, prompt_version)
        ]
        usage, ending = self.sum_usage(), f":{prompt_version}:{model}"
        reasons = [why for key, why in self.reasons.items() if key.endswith(ending) and key not in self.written]
        return {
            "model": model,
            "prompt_version": prompt_version,
            "written": dict(sorted(Counter(reply.kind for reply in replies if reply.turns).items())),
            "not_applicable": dict(sorted(Counter(reply.kind for reply in replies if not reply.turns).items())),
            "failed": dict(sorted(Counter(reasons).items())),
            "replies_lost": self.count_lost(),
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cost": round(usage.cost, 6),
        }

    def _note_reply(self, reply: Reply) -> None:
        self.written[reply.key] = reply
        self._note_usage(reply.key, Usage(reply.input_tokens, reply.output_tokens, reply.cost))

    def _note_failure(self, row: dict[str, Any]) -> None:
        key = row["key"]
        self._note_usage(key, Usage(row["input_tokens"], row["output_tokens"], row["cost"]))
        self.responses.add((key, row["response"]))
        if row["reason"] not in (NO_ANSWER, LOST):
            self.reasons[key] = row["reason"]

    def _note_usage(self, key: str, usage: Usage) -> None:
        self.usages.append((key, usage))
        self.total += usage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.replies.opened.close()
        self.failures.opened.close()
