"""What an OpenAI-compatible endpoint sends back: a chat completion, an error, or something else."""

from dataclasses import dataclass
from typing import Any

from data.zh.kinds import QUOTED_CHARACTERS, BadReplyError, parse_reply
from data.zh.ledger import Usage

# What the message or the code of an error 400 holds when it is the contents that an endpoint objects to.
FILTERS = (
    "content_policy",
    "content policy",
    "content_filter",
    "content management",
    "inspection",
    "safety",
    "exists risk",
    "敏感",
)
TOKENS = 1_000_000


@dataclass(frozen=True)
class Answer:
    """A chat completion. `usage` is None where the endpoint does not tell."""

    response: str  # its name
    model: str  # as the endpoint named itself
    content: str
    refusal: str
    finish_reason: str
    usage: Usage | None

    def read_turns(self, kind: str) -> tuple[tuple[str, str], ...]:
        """Return the dialogue. Raises: BadReplyError."""
        if self.refusal:
            raise BadReplyError("refusal", self.refusal[:QUOTED_CHARACTERS])
        if self.finish_reason == "length":
            raise BadReplyError("truncated", f"...{self.content[-QUOTED_CHARACTERS:]!r}")
        if self.finish_reason == "content_filter":
            raise BadReplyError("filtered", f"{self.content[:QUOTED_CHARACTERS]!r}")
        return parse_reply(kind, self.content)


def read_answer(body: Any, price_input: float, price_output: float) -> Answer:
    """Return a chat completion, its usage at prices per million tokens.

    Raises: ValueError for what is none.
    """
    try:
        choice, usage = body["choices"][0], body.get("usage")
        message = choice["message"]
        texts = [body.get("id"), body.get("model"), message.get("content"), message.get("refusal")]
        name, model, content, refusal = (one if isinstance(one, str) else "" for one in texts)
        name, model = (one.encode(errors="replace").decode() for one in (name, model))
        finish_reason = choice.get("finish_reason")
        if usage is not None:
            tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            cost = (tokens[0] * price_input + tokens[1] * price_output) / TOKENS
            usage = Usage(*tokens, cost)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"no chat completion: {type(error).__name__} {error} in {str(body)[:QUOTED_CHARACTERS]}"
        ) from error
    return Answer(name, model, content, refusal, str(finish_reason), usage)


def is_filtered(status: int, message: str) -> bool:
    """Tell an error about the contents of one request from one that every request would meet."""
    return status in (400, 422) and any(word in message.lower() for word in FILTERS)
