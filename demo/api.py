"""OpenAI's API for the models of the page, so that programs that were written for it work here:

    client = openai.OpenAI(base_url="http://127.0.0.1:7860/v1", api_key="user:password")
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "..."}], stream=True)

The key is the page's user and password; a page without them takes any. What may be asked is in `api_request.py`.
Page and API wait in the same line. While a stream waits, comments (": 3 before you") keep proxies from cutting it.
"""

import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from queue import Empty
from typing import Any

import anyio
import anyio.to_thread
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from demo.api_request import Question, RequestError, find_voice, read_question
from demo.line import LineFullError, Ticket
from demo.service import OutOfMemoryError, Service
from demo.voice import Answer

MAX_BODY_BYTES = 15_000_000  # the largest picture in base64 has 13.4 million
MAX_HELD_BYTES = 100_000_000  # of all requests that are being read
MAX_READERS = 8  # threads, apart from the page's: a picture from the web may take its seconds
BODY_TIMEOUT_S = 60.0
POLL_S = 0.02  # how soon a word is passed on, and how soon a client that is gone is missed
KEEP_ALIVE_S = 10.0
RETRY_AFTER_S = 5
CLIENT_IS_GONE = 499
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass on what comes at once

logger = logging.getLogger(__name__)


def make_routes(service: Service, key: str | None) -> list[Route]:
    """Return what to serve.

    Args:
        key: what clients have to send, "user:password"; None asks for nothing.
    """
    api = Api(service)
    return [
        Route("/v1/chat/completions", Endpoint("POST", api.complete, key)),
        Route("/v1/models", Endpoint("GET", api.list_models, key)),
        Route("/v1/models/{name:path}", Endpoint("GET", api.show_model, key)),
        Route("/v1/{path:path}", Endpoint(None, api.find_nothing, key)),
    ]


@dataclass(frozen=True)
class Endpoint:
    """What every request goes through: key, method, and errors in OpenAI's shape. Starlette gives it all methods."""

    method: str | None  # None: any
    handle: Callable[[Request], Awaitable[Response]]
    key: str | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            self.check(request)
            response = await self.handle(request)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_IS_GONE)  # nobody reads it
        except Exception as error:  # of any kind: what is inside stays inside
            response = respond_error(error)
            error.__traceback__ = None  # its frames hold what was sent
        with contextlib.suppress(ClientDisconnect):
            await response(scope, receive, send)

    def check(self, request: Request) -> None:
        if self.key is not None:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())
            if kind.lower() != "bearer" or not is_right:
                raise RequestError("wrong key: send the page's as user:password", code="invalid_api_key", status=401)
        if self.method not in (None, request.method):
            raise RequestError(f"this takes {self.method} only", code=f"use_{self.method}", status=405)


class Api:
    """The answers to what may be asked."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.started = int(time.time())
        self.held_bytes = 0
        self.readers = anyio.CapacityLimiter(MAX_READERS)

    async def list_models(self, _: Request) -> Response:
        models = [self.describe_model(voice.name) for voice in self.service.voices]
        return respond({"object": "list", "data": models})

    async def show_model(self, request: Request) -> Response:
        return respond(self.describe_model(find_voice(request.path_params["name"], self.service).name))

    def describe_model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "plain-llava"}

    async def find_nothing(self, _: Request) -> Response:
        raise RequestError("there are /v1/chat/completions and /v1/models", code="unknown_url", status=404)

    async def complete(self, request: Request) -> Response:
        """Answer a conversation."""
        # A page of another site can make a browser send texts and forms here, but JSON only after this server agreed.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("the content type has to be application/json", code="wrong_content_type", status=415)
        async with self.receive(request) as body:
            question = await anyio.to_thread.run_sync(read_question, body, self.service, limiter=self.readers)
        ticket = self.service.ask([question.voice], question.turns, question.picture, question.settings)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": question.voice.name}
        if question.is_stream:
            return TicketStream(ticket, stream_events(question, ticket, request, head))
        answer = Answer()
        try:
            async for step in follow(ticket, request):
                if not isinstance(step, int):
                    (answer,) = step
        finally:
            ticket.leave()
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": name_end(answer)}
        return respond({**head, "object": "chat.completion", "choices": [choice], "usage": count_usage(answer)})

    @contextlib.asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytearray]:
        """Hold what was sent while the block runs. Raises: RequestError for more than there is room for."""
        body = bytearray()
        try:
            with anyio.fail_after(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    body += chunk
                    self.held_bytes += len(chunk)
                    if len(body) > MAX_BODY_BYTES:
                        limit = f"the request is larger than {MAX_BODY_BYTES} bytes"
                        raise RequestError(f"{limit}: make the picture smaller", code="too_large", status=413)
                    if self.held_bytes > MAX_HELD_BYTES:
                        raise LineFullError("many large requests are being read: try again")
            yield body
        finally:
            self.held_bytes -= len(body)


class TicketStream(StreamingResponse):
    """A stream that leaves the line however it ends, even before its beginning."""

    def __init__(self, ticket: Ticket, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers=STREAM_HEADERS, media_type="text/event-stream")
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.leave()


async def stream_events(
    question: Question, ticket: Ticket[list[Answer]], request: Request, head: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    """Yield the answer in pieces, as server-sent events."""

    def make_chunk(delta: Mapping[str, str], end: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": end}
        usage = {"usage": None} if question.has_usage else {}
        return make_event({**head, "object": "chat.completion.chunk", "choices": [choice], **usage})

    answer = Answer()
    yield make_chunk({"role": "assistant", "content": ""})
    try:
        async for step in follow(ticket, request):
            if isinstance(step, int):
                yield f": {step} before you\n\n".encode()
                continue
            before, (answer,) = answer, step
            if answer.text != before.text:
                yield make_chunk({"content": answer.text[len(before.text) :]})
    except ClientDisconnect:
        return
    except Exception as error:  # of any kind: the status was sent long ago
        yield make_event(describe_error(error)[1])
        error.__traceback__ = None  # as above
        return
    yield make_chunk({}, name_end(answer))
    if question.has_usage:
        yield make_event({**head, "object": "chat.completion.chunk", "choices": [], "usage": count_usage(answer)})
    yield b"data: [DONE]\n\n"


async def follow(ticket: Ticket[list[Answer]], request: Request) -> AsyncIterator[int | list[Answer]]:
    """Yield how many are before this one, when that changes and now and then; then the answer as far as it is known.

    No thread waits meanwhile, unlike in `Ticket.follow`: there may be more clients than threads, and one that is gone
    is missed although nothing comes.
    Raises: ClientDisconnect, or whatever the job raised.
    """
    place, told = 0, time.monotonic()
    while not await request.is_disconnected():
        is_done = ticket.is_done.is_set()  # asked before the last result is taken
        result: list[Answer] | None = None
        with contextlib.suppress(Empty):
            result = ticket.results.get_nowait()
        now = ticket.line.count_before(ticket)
        if result is not None:
            told = time.monotonic()
            yield result
        elif now != place or time.monotonic() - told > KEEP_ALIVE_S:
            place, told = now, time.monotonic()
            yield place
        if is_done and ticket.outcome is not None:
            raise ticket.outcome
        if is_done:
            return
        await anyio.sleep(POLL_S)
    raise ClientDisconnect


def name_end(answer: Answer) -> str:
    return "length" if answer.is_cut else "stop"


def count_usage(answer: Answer) -> dict[str, int]:
    """Return the tokens, the picture's patches among them."""
    total = answer.prompt_tokens + answer.num_tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.num_tokens, "total_tokens": total}


def describe_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status of what went wrong, and OpenAI's error object."""
    match error:
        case RequestError():
            return error.status, make_error(str(error), "invalid_request_error", error.param, error.code)
        case LineFullError():
            return 429, make_error(str(error), "requests", None, "rate_limit_exceeded")
        case OutOfMemoryError():
            advice = "the device is out of memory: make the conversation or the answer shorter"
            return 503, make_error(advice, "server_error", None, "out_of_memory")
        case TimeoutError():
            return 408, make_error("the request took too long to arrive", "invalid_request_error", None, "timeout")
        case ValueError():
            return 400, make_error(str(error), "invalid_request_error", None, None)
        case _:
            logger.error("a request failed", exc_info=error)
            advice = "something went wrong on the server; its terminal says what"
            return 500, make_error(advice, "server_error", None, None)


def make_error(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond_error(error: Exception) -> Response:
    status, content = describe_error(error)
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif status == 405:
        headers["Allow"] = content["error"]["code"].removeprefix("use_")
    elif status == 429:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return respond(content, status, headers)


def respond(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def make_event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
