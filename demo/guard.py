"""What stands before every request of the page and the API.

Gradio serves far more than this page asks for: what nobody here needs is not there. Bodies have a limit in bytes and in
seconds, and are whole before Gradio sees them; an event names what exists, and no file that its own check would fetch.
Answers tell the browser to load nothing from elsewhere.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demo.pictures import MAX_BYTES
from demo.sessions import BusyError, Sessions

MAX_REQUESTS = 600  # at a time, streams included
MAX_UPLOAD_BYTES = MAX_BYTES + 100_000  # with the form around it
MAX_EVENT_BYTES = 500_000  # the longest conversation, of characters that are long in JSON, and what is around it
MAX_HELD_BYTES = 200_000_000  # of all bodies
BODY_TIMEOUT_S = 120.0
WRONG_PASSWORD_S = 1.0  # somebody who tries many is slow
SEND_TIMEOUT_S = 60.0  # for one piece of an answer
RETRY_AFTER_S = 5
MAX_DEPTH = 20  # of an event's data: a conversation has 5
EVENT_FIELDS = ("data", "event_data", "fn_index", "session_hash", "trigger_id")
SESSION = re.compile(r"[\w-]{1,64}", re.ASCII)

# Whoever may not use the page yet gets what shows the form to log in. Gradio asks itself for the first of its own.
OPEN = re.compile(
    r"/|/(assets|static)/.+|/(theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/gradio_api/startup-events"
)
LOG_IN = re.compile(r"/(login|logout)/?")
API = re.compile(r"/v1/.*")  # which has limits and a key of its own
JOIN, RUN, STREAM, UPLOAD, CANCEL, RESET = (
    f"/gradio_api/{name}" for name in ("queue/join", "run/predict", "queue/data", "upload", "cancel", "reset")
)
READ = re.compile(STREAM + r"|/gradio_api/(upload_progress|file=(/|[A-Za-z]:[\\/]).+)", re.DOTALL)
WRITE = re.compile(f"{JOIN}|{RUN}|{UPLOAD}|{CANCEL}|{RESET}")

# Gradio's page has its scripts inline. Whatever a model or a stranger writes into it, nothing is loaded from another
# machine, so nothing is told to one.
PAGE_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
FILE_POLICY = "sandbox; default-src 'none'; img-src 'self'; style-src 'unsafe-inline'"  # files are only shown
# What Gradio says of a session it does not know; it would also print an error here for every such request.
NO_SESSION = b'data: {"msg":"unexpected_error","message":"","session_not_found":true,"success":false}\n\n'


class RefusedError(Exception):
    """A request goes no further."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """ASGI middleware of Gradio's app."""

    def __init__(self, app: ASGIApp, max_requests: int = MAX_REQUESTS) -> None:
        self.app, self.max_requests = app, max_requests
        self.num_requests, self.held_bytes = 0, 0
        self.sessions = Sessions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = Sender(send, scope["path"])
        self.num_requests += 1
        try:
            await self.answer(scope, receive, answer)
        except RefusedError as error:
            headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else None
            await PlainTextResponse(str(error), error.status, headers)(scope, receive, answer)
        except SlowReaderError:
            pass  # the connection is closed
        finally:
            self.num_requests -= 1

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may be passed on. Raises: RefusedError."""
        if self.num_requests > self.max_requests:
            raise RefusedError(503, f"{self.max_requests} requests are open already, which is the limit: try again")
        path = scope["path"]
        check_origin(Headers(scope=scope))
        if API.fullmatch(path):
            await self.app(scope, receive, send)
            return
        check_place(scope)
        if path == "/":
            scope["query_string"] = b""  # with one, Gradio would tell more than the page
        if path == STREAM:
            await self.stream(scope, receive, send)
        elif scope["method"] == "POST":
            async with self.hold(receive, MAX_UPLOAD_BYTES if path == UPLOAD else MAX_EVENT_BYTES) as body:
                if path in (JOIN, RUN):
                    event = await self.read_event(body, scope)
                    scope["headers"] = replace_length(scope["headers"], len(event))
                    await self.app(scope, replay(event, receive), send)
                    return
                if path in (CANCEL, RESET):
                    read_object(body)
                await self.app(scope, replay(body, receive), send)
        else:
            await self.app(scope, receive, send)

    @contextlib.asynccontextmanager
    async def hold(self, receive: Receive, max_bytes: int) -> AsyncIterator[bytes]:
        """Hold a whole body while the block runs. Raises: RefusedError."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusedError(400, "the request ended early")
                    body += message.get("body", b"")
                    self.held_bytes += len(message.get("body", b""))
                    if len(body) > max_bytes:
                        raise RefusedError(413, f"the request is larger than {max_bytes} bytes: make it smaller")
                    if self.held_bytes > MAX_HELD_BYTES:
                        raise RefusedError(503, "many large requests are being read: try again")
                    if not message.get("more_body"):
                        break
            yield bytes(body)
        except TimeoutError as error:
            raise RefusedError(408, f"the request took more than {BODY_TIMEOUT_S:g} s to arrive") from error
        finally:
            self.held_bytes -= len(body)

    async def read_event(self, body: bytes, scope: Scope) -> bytes:
        """Return an event with the fields that the page sends. Raises: RefusedError for one that it would not send."""
        blocks, is_queued = scope["app"].get_blocks(), scope["path"] == JOIN
        fields = read_object(body)
        session, number, data = (fields.get(name) for name in ("session_hash", "fn_index", "data"))
        if not isinstance(session, str) or not SESSION.fullmatch(session):
            raise RefusedError(400, "session_hash: expected a short name")
        if type(number) is not int or number not in blocks.fns or is_queued != blocks.fns[number].queue:
            raise RefusedError(404, "fn_index: there is no such event")
        if not isinstance(data, list) or len(data) != len(blocks.fns[number].inputs):
            raise RefusedError(400, "data: expected one value for each input")
        check_values([data, fields.get("event_data")])
        if is_queued:
            try:
                await self.sessions.make_room(blocks, session)
            except BusyError as error:
                raise RefusedError(503, str(error)) from error
        return orjson.dumps({name: fields[name] for name in EVENT_FIELDS if name in fields})

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a session's events, and note that they are read."""
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        if session not in scope["app"].get_blocks()._queue.pending_messages_per_session:
            await Response(NO_SESSION, media_type="text/event-stream")(scope, receive, send)
            return

        async def send_and_note(message: Message) -> None:
            await send(message)
            self.sessions.note_reading(session)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            self.sessions.note_end(session)


class SlowReaderError(Exception):
    """Nobody takes the answer."""


class Sender:
    """Sends an answer with the headers that all have, to those who take it."""

    def __init__(self, send: Send, path: str) -> None:
        self.send, self.is_login = send, LOG_IN.fullmatch(path) is not None
        self.policy = FILE_POLICY if path.startswith("/gradio_api/file=") else PAGE_POLICY

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.is_login and message["status"] >= 400:
                await asyncio.sleep(WRONG_PASSWORD_S)
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = self.policy
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self.send(message)
        except TimeoutError as error:
            raise SlowReaderError from error


def check_origin(headers: Headers) -> None:
    """Refuse what a page of another site makes a browser send: Gradio's own check knows local addresses only.

    Raises: RefusedError.
    """
    origin = headers.get("origin")
    hosts = (headers.get(name, "").partition(",")[0].strip() for name in ("host", "x-forwarded-host"))
    if origin is not None and find_host(origin) not in {find_host(f"//{host}") for host in hosts if host}:
        raise RefusedError(403, "this comes from a page of another site")


def find_host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def check_place(scope: Scope) -> None:
    """Raises: RefusedError for what is not there, or not for this visitor."""
    path, is_read = scope["path"], scope["method"] in ("GET", "HEAD")
    is_there = (is_read and (OPEN.fullmatch(path) or READ.fullmatch(path))) or LOG_IN.fullmatch(path)
    if not is_there and not (scope["method"] == "POST" and WRITE.fullmatch(path)):
        raise RefusedError(404, "there is nothing here")
    app = scope["app"]
    if app.auth is None or OPEN.fullmatch(path) or LOG_IN.fullmatch(path):
        return
    cookies = HTTPConnection(scope).cookies
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    if not any(cookies.get(name) in app.tokens for name in names):
        raise RefusedError(401, "log in first")


def read_object(body: bytes) -> Mapping[str, Any]:
    """Read a JSON object. Raises: RefusedError."""
    try:
        # Unlike Python's own, this reader refuses NaN, half characters and deep nesting.
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RefusedError(400, "the body is not a JSON object")
    return fields


def check_values(values: list[Any]) -> None:
    """Refuse files that Gradio would fetch from the web, or unpack onto the disk; it checks the others itself.

    Raises: RefusedError.
    """
    rest: list[tuple[Any, int]] = [(values, 0)]
    while rest:
        value, depth = rest.pop()
        if not isinstance(value, dict | list):
            continue
        if depth > MAX_DEPTH:
            raise RefusedError(400, f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            path, url = value.get("path"), value.get("url")
            is_elsewhere = isinstance(path, str) and "://" in path
            if is_elsewhere or (isinstance(url, str) and url.lstrip().lower().startswith("data:")):
                raise RefusedError(400, "a file has to be uploaded first")
        rest += [(part, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]


def replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read, then what comes next."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def replace_length(headers: list[tuple[bytes, bytes]], num_bytes: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(num_bytes).encode())]
