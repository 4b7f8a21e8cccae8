"""Have a model judge finished dialogues: is each answer supported, and does each question need the picture?

Asked are dialogues that all other filters of `clean` let pass, or a share of them that their names decide. Verdicts are
appended to `second_look.jsonl` as they come, by dialogue, its text, the prompts' version and the model: killing this
loses at most those that are on their way, and nothing is paid for twice. `second_look.toml` has every word sent.
The model that wrote a dialogue tends to find it right: let another one judge.
"""

import asyncio
import hashlib
import json
import math
import sys
import tomllib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from data.journal import Journal, read_journal
from data.zh.answer import TOKENS, Answer
from data.zh.generate import IMAGE_TOKENS
from data.zh.kinds import FENCE, QUOTED_CHARACTERS, BadReplyError
from data.zh.ledger import Usage
from data.zh.prompt import FRAME_BYTES, MARKERS, MAX_TEXT_CHARACTERS, encode_picture
from data.zh.record import Record, Reply

if TYPE_CHECKING:
    from data.zh.endpoint import Endpoint

LOOKS = "second_look.jsonl"
PROMPTS = Path(__file__).with_suffix(".toml")
DETAIL = "low"  # how closely the model looks at a picture
MAX_ERRORS = 10  # requests without an answer, in a row
LINE_EVERY = 100  # verdicts, where there is no terminal
SCHEMA = {
    "type": "object",
    "properties": {
        "supported": {"type": "boolean"},
        "needs_picture": {"type": "boolean"},
        "reason": {"type": "string"},
    },
    "required": ["supported", "needs_picture", "reason"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Judge:
    """A model and how it is asked. Prices are per million tokens; a `max_cost` of 0 is no limit."""

    model: str
    base_url: str
    price_input: float
    price_output: float
    max_cost: float
    concurrency: int
    max_tokens: int
    token_limit: str
    reply_format: str
    timeout_s: float


@dataclass(frozen=True)
class Verdict:
    """What a model says of a dialogue; `problem` instead, where it says nothing that can be used."""

    supported: bool = True
    needs_picture: bool = True
    reason: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Look:
    """A request for a verdict."""

    name: str
    key: str  # of the dialogue
    picture: Path
    text: str


def choose_share(replies: Sequence[Reply], share: float) -> list[Reply]:
    """Return a share of the dialogues; a larger one has those of a smaller one, too."""

    def draw(reply: Reply) -> float:
        return int(hashlib.sha256(f"second look:{reply.key}".encode()).hexdigest()[:12], 16) / 16**12

    return [reply for reply in replies if draw(reply) < share]


def look_again(
    replies: Sequence[Reply], records: dict[str, Record], judge: Judge, work: Path
) -> tuple[dict[str, Verdict], dict[str, Any]]:
    """Return the verdicts on dialogues, by their keys, and counts for a report.

    Raises: ValueError, when all that could be asked is asked, where requests stay without an answer.
    """
    looks = [make_look(reply, records[reply.sha256], judge.model, work) for reply in replies]
    with Journal(work / LOOKS) as journal:
        known = _read_verdicts(work / LOOKS)
        pending = [look for look in looks if look.name not in known]
        error = _ask_endpoint(pending, judge, journal, work) if pending else ""
    known = _read_verdicts(work / LOOKS)
    num_left = sum(look.name not in known for look in looks)
    if error:
        raise ValueError(f"{error}. {num_left} of {len(looks)} second looks are left: the same command goes on")
    verdicts = {look.key: known[look.name] for look in looks if look.name in known}
    usages = [row["usage"] for row in read_journal(work / LOOKS)]
    counts = {
        "model": judge.model,
        "prompt_version": load_prompts()["version"],
        "asked": len(looks),
        "judged": sum(not verdict.problem for verdict in verdicts.values()),
        "no_verdict": dict(sorted(Counter(one.problem for one in verdicts.values() if one.problem).items())),
        "left_by_max_cost": num_left,
        "input_tokens": sum(usage["input_tokens"] for usage in usages),
        "output_tokens": sum(usage["output_tokens"] for usage in usages),
        "cost": math.fsum(usage["cost"] for usage in usages),
    }
    return verdicts, counts


@cache
def load_prompts() -> dict[str, str]:
    """Return what `second_look.toml` says."""
    return tomllib.loads(PROMPTS.read_text(encoding="utf-8"))


def make_look(reply: Reply, record: Record, model: str, work: Path) -> Look:
    """Return the request for a dialogue, named by what its verdict depends on."""
    prompts = load_prompts()
    lines = []
    for number, turn in enumerate(reply.turns, start=1):
        for name, text in zip(("question", "answer"), turn, strict=True):
            lines.append(prompts[name].format(number=number, text=text))
    material = {"title": record.title, "text": record.text[:MAX_TEXT_CHARACTERS], "dialogue": "\n".join(lines)}
    shown = {name: text.translate(MARKERS) for name, text in material.items()}
    content = json.dumps([reply.key, reply.turns, prompts["version"], model], ensure_ascii=False)
    name = hashlib.sha256(content.encode()).hexdigest()
    return Look(name, reply.key, work / record.image, prompts["request"].strip().format(**shown))


def make_body(look: Look, judge: Judge, image_url: str) -> dict[str, Any]:
    """Return a request's JSON."""
    formats: dict[str, dict[str, Any]] = {
        "json_schema": {
            "type": "json_schema",
            "json_schema": {"name": "second_look", "strict": True, "schema": SCHEMA},
        },
        "json_object": {"type": "json_object"},
    }
    image = {"type": "image_url", "image_url": {"url": image_url, "detail": DETAIL}}
    messages = [
        {"role": "system", "content": load_prompts()["system"].strip()},
        {"role": "user", "content": [image, {"type": "text", "text": look.text}]},
    ]
    body = {"model": judge.model, "messages": messages, "response_format": formats[judge.reply_format]}
    return {**body, judge.token_limit: judge.max_tokens}


def bound_cost(looks: Sequence[Look], judge: Judge) -> float:
    """Return the most that a request can cost: a token has one byte of text at least."""
    fixed = len((load_prompts()["system"] + json.dumps(SCHEMA)).encode()) + FRAME_BYTES + IMAGE_TOKENS[DETAIL]
    num_input = fixed + max(len(look.text.encode()) for look in looks)
    return (num_input * judge.price_input + judge.max_tokens * judge.price_output) / TOKENS


def read_verdict(answer: Answer) -> Verdict:
    """Return what a model says, or what is wrong with that."""
    if answer.refusal or answer.finish_reason == "content_filter":
        return Verdict(problem="refused")
    if answer.finish_reason == "length":
        return Verdict(problem="cut off")
    fenced = FENCE.fullmatch(answer.content)
    try:
        found = json.loads(fenced[1] if fenced else answer.content)
    except (ValueError, RecursionError):
        return Verdict(problem="not JSON")
    names = {"supported": bool, "needs_picture": bool, "reason": str}
    if not isinstance(found, dict) or any(type(found.get(name)) is not kind for name, kind in names.items()):
        return Verdict(problem="not the JSON that was asked for")
    reason = found["reason"][:QUOTED_CHARACTERS].encode(errors="replace").decode()
    return Verdict(found["supported"], found["needs_picture"], reason)


def _read_verdicts(file: Path) -> dict[str, Verdict]:
    """Return the verdicts of a journal by their looks' names. Raises: ValueError naming the file and the row."""
    verdicts = {}
    for number, row in enumerate(read_journal(file), start=1):
        try:
            if row["look"]:  # else it only tells of a cost
                verdicts[row["look"]] = Verdict(**row["verdict"])
            Usage(**row["usage"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}, row {number}: no verdict of this program ({error})") from error
    return verdicts


def _ask_endpoint(looks: list[Look], judge: Judge, journal: Journal, work: Path) -> str:
    """Ask for verdicts; return why some got none, "" where all did or the budget is spent.

    Raises: ValueError without the client or a key.
    """
    try:
        from data.zh.endpoint import Budget, Endpoint
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install -r data/requirements.txt") from error
    spent = math.fsum(row["usage"]["cost"] for row in read_journal(work / LOOKS))
    budget = Budget(bound_cost(looks, judge), judge.max_cost, spent)

    def note_loss(reason: str) -> None:
        _note(journal, "", "", Verdict(problem=f"lost: {reason}"), Usage(cost=budget.bound))

    async def ask_all() -> str:
        endpoint = Endpoint(judge.base_url, judge.price_input, judge.price_output, budget, note_loss, judge.timeout_s)
        try:
            return await _ask_all(deque(looks), judge, endpoint, journal)
        finally:
            await endpoint.client.close()

    return asyncio.run(ask_all())


async def _ask_all(looks: deque[Look], judge: Judge, endpoint: "Endpoint", journal: Journal) -> str:
    """Work off the requests, several at a time; return why some got no answer."""
    from data.zh.endpoint import BudgetSpentError, EndpointError, NoAnswerError

    unanswered: list[str] = []
    num_in_a_row = 0
    bar = tqdm(total=len(looks), desc="second look", unit="", file=sys.stderr, disable=None)

    async def work_off() -> None:
        nonlocal num_in_a_row
        while looks:
            look = looks.popleft()
            try:
                verdict, usage = await _ask(look, judge, endpoint)
            except BudgetSpentError:
                looks.appendleft(look)  # for those whose request is on its way, and may turn out cheap
                return
            except (EndpointError, NoAnswerError) as error:
                unanswered.append(str(error))
                num_in_a_row += 1
                if isinstance(error, EndpointError) or num_in_a_row == MAX_ERRORS:
                    looks.clear()
            else:
                num_in_a_row = 0
                _note(journal, look.name, look.key, verdict, usage)
                if judge.max_cost and endpoint.budget.largest > endpoint.budget.bound:
                    unanswered.append(
                        f"a verdict cost {endpoint.budget.largest:.4f}, more than the bound of "
                        f"{endpoint.budget.bound:.4f} that --max-cost relies on"
                    )
                    looks.clear()
                bar.update()
                if bar.disable and bar.n % LINE_EVERY == 0:
                    print(f"second look: {bar.n} of {bar.total} done", file=sys.stderr, flush=True)

    with bar:
        await asyncio.gather(*(work_off() for _ in range(min(judge.concurrency, len(looks)))))
    return unanswered[-1] if unanswered else ""


async def _ask(look: Look, judge: Judge, endpoint: "Endpoint") -> tuple[Verdict, Usage]:
    """Return a verdict and its cost. Raises: as `Endpoint.ask`, but for contents that are refused."""
    try:
        image_url = encode_picture(look.picture)
    except (ValueError, OSError):
        return Verdict(problem="the picture cannot be sent"), Usage()
    try:
        answer = await endpoint.ask(make_body(look, judge, image_url))
    except BadReplyError:
        return Verdict(problem="refused"), Usage()
    return read_verdict(answer), answer.usage or Usage()


def _note(journal: Journal, name: str, key: str, verdict: Verdict, usage: Usage) -> None:
    journal.append({"look": name, "key": key, "verdict": asdict(verdict), "usage": asdict(usage)})
