"""An OpenAI-compatible endpoint, asked through its client, and never for more money than there is.

The limit holds for every HTTP request, those included that the client sends again by itself. Before one is sent, the
most that it can cost is set aside; when its reply is there, what it did cost is taken instead. A request that was
sent and lost its reply (cut, timed out) counts as the most: it may have been billed.
"""

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import openai

from data.zh.answer import Answer, is_filtered, read_answer
from data.zh.kinds import QUOTED_CHARACTERS, BadReplyError
from data.zh.ledger import Usage

MAX_RETRIES = 6  # of the client, after 0.5 s to 8 s or what Retry-After says
SECRET_LENGTH = 8  # characters; shorter keys (local servers take any) are no secrets
UNSENT = (
    "ConnectError",
    "ConnectTimeout",
    "PoolTimeout",
    "UnsupportedProtocol",
    "LocalProtocolError",
)  # named, since the client may sit on httpx or httpx2


class BudgetSpentError(openai.OpenAIError):
    """The next request might cost more than is left. The client hands its own errors on; it would retry others."""


class NoAnswerError(ValueError):
    """A request got no answer this time."""


class RejectedError(NoAnswerError):
    """The endpoint does not like a request: this one, or the way that all of them are made."""


class EndpointError(ValueError):
    """No request to this endpoint will get an answer."""


@dataclass
class Budget:
    """Money, in the currency of the prices.

    `bound` is the most that a request can cost; `limit` 0 is none.
    """

    bound: float
    limit: float
    spent: float
    reserved: float = 0.0
    largest: float = 0.0

    def reserve(self) -> None:
        """Set aside what a request can cost. Raises: BudgetSpentError."""
        if self.limit and self.spent + self.reserved + self.bound > self.limit:
            raise BudgetSpentError(f"{self.limit - self.spent:.4f} is left")
        self.reserved += self.bound

    def settle(self, cost: float) -> None:
        """Take what a request did cost."""
        self.reserved -= self.bound
        self.spent += cost
        self.largest = max(self.largest, cost)


class MeteredClient(openai.DefaultAsyncHttpxClient):
    """The client's HTTP client, with a budget."""

    def __init__(self, budget: Budget, on_lost: Callable[[str], None], timeout_s: float) -> None:
        super().__init__()
        self.budget = budget
        self.on_lost = on_lost
        self.timeout_s = timeout_s

    async def send(self, request: Any, **options: Any) -> Any:
        """Send a request; what a successful one costs is still set aside when it returns."""
        self.budget.reserve()
        try:
            async with asyncio.timeout(2 * self.timeout_s):  # a reply that drips has no end otherwise
                response = await super().send(request, **options)
        except BaseException as error:
            if type(error).__name__ in UNSENT:
                self.budget.settle(0)
            else:
                self.budget.settle(self.budget.bound)
                self.on_lost(type(error).__name__)
            raise
        if not response.is_success:
            self.budget.settle(0)
        return response


class Endpoint:
    """Where requests go."""

    def __init__(
        self,
        base_url: str,
        price_input: float,
        price_output: float,
        budget: Budget,
        on_lost: Callable[[str], None],
        timeout_s: float,
    ) -> None:
        """Raises: ValueError where the environment has no key, or one that cannot be sent."""
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self.key:
            raise ValueError(
                "the environment variable OPENAI_API_KEY is not set: set it to the endpoint's key (to any text for a "
                "server of your own)"
            )
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise ValueError("OPENAI_API_KEY holds blanks or characters that no key has: set it to the key alone")
        self.prices = price_input, price_output
        self.budget = budget
        self.on_lost = on_lost
        self.client = openai.AsyncOpenAI(
            api_key=self.key,
            base_url=base_url or None,
            max_retries=MAX_RETRIES,
            timeout=timeout_s,
            http_client=MeteredClient(budget, on_lost, timeout_s),
        )

    async def ask(self, body: dict[str, Any]) -> Answer:
        """Return an answer, with its cost; one that does not tell its usage counts as the most that it can cost.

        Raises:
            BadReplyError: the contents were refused, at no cost.
            NoAnswerError: the next request may get one.
            EndpointError: no request will.
            BudgetSpentError: it was not sent.
        """
        try:
            response = await self.client.chat.completions.with_raw_response.create(**body)
        except BudgetSpentError:
            raise
        except openai.APIStatusError as error:
            raise self._explain(error) from None  # its request holds the key
        except (openai.OpenAIError, TimeoutError) as error:
            cause = f": {error.__cause__}" if error.__cause__ else ""
            raise NoAnswerError(self._hide(f"{type(error).__name__}: {error}{cause}")) from None
        text = self._hide(response.text)
        try:
            answer = read_answer(json.loads(text), *self.prices)
        except (ValueError, RecursionError) as error:
            may_be_billed = text.lstrip().startswith("{")  # no page of a proxy or of a wrong address
            self.budget.settle(self.budget.bound if may_be_billed else 0)
            if may_be_billed:
                self.on_lost("no chat completion")
            raise NoAnswerError(
                f"the endpoint sent no chat completion but {text[:QUOTED_CHARACTERS]!r} ({error}): check --base-url"
            ) from None
        usage = answer.usage or Usage(cost=self.budget.bound)
        self.budget.settle(usage.cost)
        return replace(answer, usage=usage)

    def _explain(self, error: openai.APIStatusError) -> ValueError:
        """Return what an error status means for this request and for the next."""
        status, message = error.status_code, self._hide(str(error))[: 4 * QUOTED_CHARACTERS]
        if is_filtered(status, message):
            return BadReplyError("filtered", message)
        if status == 401:
            return EndpointError(f"the endpoint refuses the key in OPENAI_API_KEY ({message}): check both")
        if status == 403:
            return EndpointError(f"the endpoint forbids this ({message}): check the key's rights and your region")
        if status == 404:
            return EndpointError(f"the endpoint has no such model or address ({message}): check --model, --base-url")
        if error.code == "insufficient_quota":
            return EndpointError(f"the account has no quota left ({message}): top it up; the same command goes on")
        return RejectedError(message) if status in (400, 413, 422) else NoAnswerError(message)

    def _hide(self, text: str) -> str:
        """Remove the key from what an endpoint said: files and messages are shown to others."""
        text = text.encode(errors="replace").decode()
        return text.replace(self.key, "[key]") if len(self.key) >= SECRET_LENGTH else text
