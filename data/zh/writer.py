"""Ask an endpoint for dialogues, several at a time, and keep what comes as it comes."""

import asyncio
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.zh.endpoint import BudgetSpentError, Endpoint, EndpointError, NoAnswerError, RejectedError
from data.zh.kinds import BadReplyError, Prompts
from data.zh.ledger import NO_ANSWER, Job, Ledger, Usage
from data.zh.prompt import ask_again, encode_picture, make_messages

MAX_ERRORS_IN_A_ROW = 10  # requests without an answer, each of them tried again by the client
SECONDS_BETWEEN_LINES = 30  # where there is no terminal


class Writer:
    """Workers on a queue of jobs.

    Attributes:
        error: why this stopped before the end of the queue, "" where it did not.
        unanswered: how often there was no answer, by what the endpoint said.
    """

    def __init__(
        self,
        jobs: list[Job],
        make_body: Callable[[list[dict[str, Any]]], dict[str, Any]],
        detail: str,
        prompts: Prompts,
        ledger: Ledger,
        endpoint: Endpoint,
        work: Path,
    ) -> None:
        self.jobs = deque(jobs)
        self.make_body = make_body
        self.detail = detail
        self.prompts = prompts
        self.ledger = ledger
        self.endpoint = endpoint
        self.work = work
        self.error = ""
        self.unanswered: Counter[str] = Counter()
        self.rejected: list[tuple[Job, str]] = []
        self.num_in_a_row = 0
        self.num_written = self.num_failed = 0
        self.bar = tqdm(total=len(jobs), desc="generate", unit="", file=sys.stderr, disable=None)
        self.shown = time.monotonic()

    async def write_all(self, concurrency: int) -> None:
        """Work off the queue."""
        try:
            await asyncio.gather(*(self._work() for _ in range(min(concurrency, len(self.jobs)))))
            self._judge_rejected()
        finally:
            self._show(is_last=True)
            self.bar.close()
            await self.endpoint.client.close()

    async def _work(self) -> None:
        """Take jobs until there are none, or something stops all workers, or the rest of the budget is for others."""
        budget = self.endpoint.budget
        while self.jobs and not self.error:
            job = self.jobs.popleft()
            try:
                await self._write(job)
            except BudgetSpentError:
                self.jobs.appendleft(job)  # for those whose request is on its way, and may turn out cheap
                return
            except EndpointError as error:
                self.error = self.error or str(error)
            except NoAnswerError as error:
                if isinstance(error, RejectedError):
                    self.rejected.append((job, str(error)))
                else:
                    self.unanswered[str(error)] += 1
                self.num_in_a_row += 1
                if self.num_in_a_row >= MAX_ERRORS_IN_A_ROW:
                    self.error = self.error or f"{self.num_in_a_row} requests in a row got no answer; the last: {error}"
            else:
                self.num_in_a_row = 0
            if budget.limit and budget.largest > budget.bound:
                self.error = (
                    f"a reply cost {budget.largest:.4f}, more than the bound of {budget.bound:.4f} that --max-cost "
                    "relies on: the endpoint does not keep to --max-tokens, or counts pictures otherwise"
                )
            self._show()

    def _judge_rejected(self) -> None:
        """Blame the requests for being rejected where others got answers, else the endpoint."""
        for job, message in self.rejected:
            if self.num_written and not self.error:
                self._fail(job, "rejected", message, Usage(), "")
            else:
                self.unanswered[message] += 1

    async def _write(self, job: Job) -> None:
        """Ask for a dialogue, once more where the reply is bad, and keep what came. Raises: as `Endpoint.ask`."""
        try:
            image = encode_picture(self.work / job.record.image)
        except (ValueError, OSError) as error:
            self._fail(job, "picture", str(error), Usage(), "")
            return
        messages = make_messages(job.record, self.prompts.kinds[job.kind], self.prompts, image, self.detail)
        asked, usage, name = messages, Usage(), ""
        for _ in range(2):
            try:
                answer = await self.endpoint.ask(self.make_body(asked))
                usage, name = usage + (answer.usage or Usage()), answer.response
                turns = answer.read_turns(job.kind)
            except BadReplyError as error:
                bad, asked = error, ask_again(messages, self.prompts, error.reason)
            except (NoAnswerError, EndpointError, BudgetSpentError) as error:
                if usage != Usage():
                    self.ledger.add_failure(job.key, NO_ANSWER, f"to the second request: {error}", usage, name)
                raise
            else:
                self.ledger.add_reply(job, turns, usage, answer.model)
                self.num_written += 1
                return
        self._fail(job, bad.reason, bad.detail, usage, name)

    def _fail(self, job: Job, reason: str, detail: str, usage: Usage, name: str) -> None:
        self.ledger.add_failure(job.key, reason, detail, usage, name)
        self.num_failed += 1

    def _show(self, is_last: bool = False) -> None:
        """Show where this is: in place on a terminal, else by a line now and then."""
        total = self.ledger.total
        cost = f"{total.cost:.4f}" if self.endpoint.budget.bound else "unknown"
        text = f"{self.num_failed} failed, {total.input_tokens + total.output_tokens:,} tokens, cost {cost}"
        self.bar.n = self.num_written + self.num_failed
        self.bar.set_postfix_str(text)
        if self.bar.disable and (is_last or time.monotonic() - self.shown > SECONDS_BETWEEN_LINES):
            self.shown = time.monotonic()
            print(f"generate: {self.num_written} of {self.bar.total} done, {text} so far", file=sys.stderr, flush=True)
