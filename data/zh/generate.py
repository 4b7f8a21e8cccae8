"""Have a model write dialogues about the pictures: `python -m data.zh.generate --work DIR --model NAME`.

A request is a picture, the text beside it, and one kind of dialogue; which kinds a picture gets is drawn by weight.
The key comes from OPENAI_API_KEY alone; `--base-url` names any endpoint that speaks as OpenAI's does. A bad reply is
asked for once more, with what was wrong; a second bad one goes to failed.jsonl. Replies are kept as they arrive:
killing this loses at most those that are on their way, and the same command goes on, paying for nothing twice.

`--max-cost` holds for all runs in a work folder. A request is sent only where its upper bound is left: one input
token for each byte of the longest text, what pictures take at most (`IMAGE_TOKENS`), and --max-tokens of output. It
relies on the endpoint to keep to --max-tokens; a reply that cost more than the bound stops the run.
"""

import asyncio
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.zh.answer import TOKENS
from data.zh.batch_results import import_results
from data.zh.kinds import Prompts, load_prompts
from data.zh.ledger import LOST, Job, Ledger, Usage, make_jobs
from data.zh.options import run_command, setting
from data.zh.prompt import bound_bytes, encode_picture, make_body, make_messages
from data.zh.record import read_records

REPORT = "generate.report.json"
# The most that models are known to count for a picture of 512 pixels: gpt-4o-mini's 2,833 for one tile of `low`, and
# for eight tiles where it sees more.
IMAGE_TOKENS = {"low": 4_000, "high": 50_000, "auto": 50_000}
SHOWN_IMAGE_CHARACTERS = 48
NO_PRICES = "no price_input and price_output were given: costs are unknown, and count as 0"


@dataclass(frozen=True)
class GenerateSettings:
    """What is asked of which model."""

    model: str = setting("", "model that writes; required")
    base_url: str = setting("", "address of the endpoint, with its /v1 (default: OPENAI_BASE_URL, or OpenAI)")
    kinds_per_picture: int = setting(3, "kinds of dialogue about a picture, drawn by weight")
    max_pictures: int = setting(0, "a sample of so many pictures; 0 is all")
    concurrency: int = setting(8, "requests at a time")
    price_input: float = setting(0.0, "price of a million input tokens, in any currency; 0 is unknown")
    price_output: float = setting(0.0, "price of a million output tokens")
    max_cost: float = setting(0.0, "stop before all runs in this folder cost more; 0 is no limit")
    batch_price_factor: float = setting(0.5, "price of a batch's tokens, to those of single requests")
    pilot: int = setting(0, "ask about so many pictures, tell what all would cost, and stop")
    dry_run: bool = setting(False, "print the requests, send nothing")
    retry_failed: bool = setting(False, "ask again for what is in failed.jsonl")
    detail: str = setting("low", "how closely the model looks at a picture", ("low", "high", "auto"))
    max_tokens: int = setting(2000, "the longest reply, in tokens")
    token_limit: str = setting(
        "max_completion_tokens", "what the endpoint calls it", ("max_completion_tokens", "max_tokens")
    )
    reply_format: str = setting(
        "json_schema", "structured output; json_object where there are no schemas", ("json_schema", "json_object")
    )
    timeout_s: float = setting(120.0, "seconds without a byte before a request is sent again; twice as long in all")
    batch_results: tuple[str, ...] = setting((), "file of a batch's results to import, instead of asking an endpoint")

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError('model is missing: name the one that writes, as --model NAME or model = "NAME"')
        for name in ("kinds_per_picture", "concurrency", "max_tokens", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}, expected more than 0")
        for name in ("max_pictures", "pilot", "price_input", "price_output", "max_cost", "batch_price_factor"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)}, expected 0 or more")
        if self.max_cost and not (self.price_input and self.price_output):
            raise ValueError(f"max_cost = {self.max_cost:g} needs price_input and price_output: look them up")


def main() -> None:
    run_command("generate", str(__doc__), GenerateSettings, run)


def run(settings: GenerateSettings, work: Path) -> dict[str, Any]:
    """Write replies.jsonl, failed.jsonl and a report; return the report, or {} of a dry run.

    Raises: ValueError or OSError for what cannot be done, and where requests stay without an answer.
    """
    records, prompts = read_records(work), load_prompts()
    with Ledger(work) as ledger:
        if settings.batch_results:
            prices = [price * settings.batch_price_factor for price in (settings.price_input, settings.price_output)]
            jobs = make_jobs(records, prompts, settings.model, len(prompts.kinds))
            counts = import_results([Path(file) for file in settings.batch_results], jobs, ledger, *prices)
            return report(ledger, settings, prompts, work, counts)
        every = select(make_jobs(records, prompts, settings.model, settings.kinds_per_picture), settings.max_pictures)
        jobs = select(every, settings.pilot)
        pending = [job for job in jobs if ledger.is_open(job, settings.retry_failed)]
        if settings.dry_run:
            print_requests(pending, settings, prompts, work)
            return {}
        error = ask_endpoint(pending, settings, prompts, ledger, work) if pending else ""
        num_left = sum(ledger.is_open(job, retry_failed=False) for job in jobs)
        is_spent = num_left > 0 and not error
        counts = {"wanted": len(jobs), "left": num_left, "stopped_by_max_cost": is_spent}
        content = report(ledger, settings, prompts, work, counts)
        if error:
            raise ValueError(f"{error}. {num_left} of {len(jobs)} dialogues are left: the same command goes on")
        if is_spent:
            print(f"  stopped: --max-cost {settings.max_cost:g} leaves less than a request can cost")
        if settings.pilot:
            print_extrapolation(jobs, every, ledger)
        return content


def select(jobs: list[Job], num_pictures: int) -> list[Job]:
    """Return the jobs about the first pictures by hash, which is a random sample; 0 is all of them."""
    names = sorted({job.record.sha256 for job in jobs})
    chosen = set(names[:num_pictures] if num_pictures else names)
    return [job for job in jobs if job.record.sha256 in chosen]


def bound_cost(settings: GenerateSettings, prompts: Prompts) -> float:
    """Return the most that a request can cost."""
    num_input = bound_bytes(prompts) + IMAGE_TOKENS[settings.detail]
    return (num_input * settings.price_input + settings.max_tokens * settings.price_output) / TOKENS


def sum_costs(ledger: Ledger, settings: GenerateSettings) -> float:
    """Return what all runs cost; what earlier ones did not know the price of, at this one's prices."""
    rates = settings.price_input / TOKENS, settings.price_output / TOKENS
    return math.fsum(
        usage.cost or usage.input_tokens * rates[0] + usage.output_tokens * rates[1] for _, usage in ledger.usages
    )


def bind_body(settings: GenerateSettings) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return the function that makes a request of messages."""
    return partial(
        make_body,
        model=settings.model,
        token_limit=settings.token_limit,
        max_tokens=settings.max_tokens,
        reply_format=settings.reply_format,
    )


def ask_endpoint(jobs: list[Job], settings: GenerateSettings, prompts: Prompts, ledger: Ledger, work: Path) -> str:
    """Ask for dialogues; return why some got no answer, "" where all did or the budget is spent.

    Raises: ValueError without the client or a key.
    """
    try:
        from data.zh.endpoint import Budget, Endpoint
        from data.zh.writer import Writer
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install -r data/requirements.txt") from error
    budget = Budget(bound_cost(settings, prompts), settings.max_cost, sum_costs(ledger, settings))

    def note_loss(reason: str) -> None:
        ledger.add_failure("", LOST, reason, Usage(cost=budget.bound))

    async def write() -> Writer:
        endpoint = Endpoint(
            settings.base_url, settings.price_input, settings.price_output, budget, note_loss, settings.timeout_s
        )
        writer = Writer(jobs, bind_body(settings), settings.detail, prompts, ledger, endpoint, work)
        await writer.write_all(settings.concurrency)
        return writer

    writer = asyncio.run(write())
    for message, count in writer.unanswered.most_common():
        print(f"  {count} times no answer: {message}")
    if writer.unanswered and not writer.error:
        (message, _), *_ = writer.unanswered.most_common(1)
        return f"{writer.unanswered.total()} requests got no answer, most often: {message}"
    return writer.error


def print_requests(jobs: list[Job], settings: GenerateSettings, prompts: Prompts, work: Path) -> None:
    """Print each request as JSON, the picture shortened."""
    make = bind_body(settings)
    for job in jobs:
        image = encode_picture(work / job.record.image)
        shown = f"{image[:SHOWN_IMAGE_CHARACTERS]}... ({len(image)} characters)"
        messages = make_messages(job.record, prompts.kinds[job.kind], prompts, shown, settings.detail)
        print(json.dumps({"key": job.key, "body": make(messages)}, ensure_ascii=False, indent=1))
    bound = bound_cost(settings, prompts)
    print(f"{len(jobs)} requests; {f'a request costs {bound:.6f} at most' if bound else NO_PRICES}", file=sys.stderr)


def print_extrapolation(jobs: list[Job], every: list[Job], ledger: Ledger) -> None:
    """Print what the pilot took, and what all would take, bad replies and second requests included."""
    keys = {job.key for job in jobs}
    num_settled = sum(not ledger.is_open(job, retry_failed=False) for job in jobs)
    if not num_settled:
        return
    usage, share = ledger.sum_usage(keys), len(every) / num_settled
    rows = (("pilot", num_settled, usage, 1.0), ("each", 1, usage, 1 / num_settled), ("all", len(every), usage, share))
    print(f"  {'':8}{'dialogues':>12}{'input tokens':>16}{'output tokens':>16}{'cost':>14}")
    for name, count, one, times in rows:
        tokens = f"{one.input_tokens * times:16,.0f}{one.output_tokens * times:16,.0f}"
        print(f"  {name:8}{count:12,}{tokens}{one.cost * times:14.4f}")


def report(
    ledger: Ledger, settings: GenerateSettings, prompts: Prompts, work: Path, counts: dict[str, Any]
) -> dict[str, Any]:
    """Print what the folder holds, write it as JSON, and return it."""
    content = {**ledger.summarise(settings.model, prompts.version), **counts}
    (work / REPORT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"generate: {settings.model}, prompts {prompts.version}")
    flat = {**content, **content.get("batch", {})}
    for name, value in flat.items():
        if isinstance(value, dict) and name != "batch":
            for one, count in value.items():
                print(f"  {name:20}{count:14d}  {one}")
        elif name not in ("model", "prompt_version", "batch"):
            print(f"  {name:20}{value!s:>14}")
    if not (settings.price_input or settings.price_output):
        print(f"  {NO_PRICES}")
    return content


if __name__ == "__main__":
    main()
