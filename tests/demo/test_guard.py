"""What stands before every request, before an app that would take anything."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.datastructures import Headers
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

import demo.guard
from demo.guard import Guard, check_origin, check_values
from demo.sessions import BusyError, Sessions

SMALL = b'{"fn_index": 3, "data": ["x"], "session_hash": "a", "batched": true, "event_id": "b"}'


class Queue:
    """What the guard knows of Gradio's queue."""

    def __init__(self) -> None:
        self.pending_event_ids_session: dict[str, set[str]] = {}
        self.pending_messages_per_session: dict[str, Any] = {}
        self.cleaned: list[str] = []

    async def clean_events(self, session_hash: str) -> None:
        self.cleaned.append(session_hash)


def make_app(auth: object = None) -> Any:
    event = SimpleNamespace(queue=True, inputs=[1])
    blocks = SimpleNamespace(fns={3: event}, _queue=Queue())
    return SimpleNamespace(auth=auth, tokens={"t": "ada"}, cookie_id="c", get_blocks=lambda: blocks)


class Echo:
    """Takes a whole body, and answers it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, is_more = b"", True
        while is_more:
            message = await receive()
            body, is_more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def ask(
    guard: Guard, method: str, path: str, pieces: list[bytes] | None = None, headers: dict[str, str] | None = None,
    app: Any = None,
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    """Send a request; a body that does not end waits for ever."""
    sent: list[Message] = []
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in (pieces or [b""])]
    if pieces is None or pieces[-1:] != [b"never"]:
        messages[-1]["more_body"] = False

    async def receive() -> Message:
        if not messages or messages[0]["body"] == b"never":
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in {"host": "here:7860", **(headers or {})}.items()]
    where, _, query = path.partition("?")
    scope = {
        "type": "http", "method": method, "path": where, "query_string": query.encode(), "headers": raw,
        "app": app or make_app(),
    }  # fmt: skip
    asyncio.run(guard(scope, receive, send))
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], told, b"".join(message.get("body", b"") for message in sent[1:])


def test_a_body_is_whole_before_it_is_passed_on() -> None:
    echo = Echo()
    assert ask(Guard(echo), "POST", "/gradio_api/upload", [b"a" * 1000, b"b" * 1000])[0] == 200
    assert echo.bodies == [b"a" * 1000 + b"b" * 1000]


@pytest.mark.parametrize(("path", "num_bytes"), [("upload", 10_100_001), ("queue/join", 500_001), ("cancel", 500_001)])
def test_large_bodies_are_refused(path: str, num_bytes: int) -> None:
    echo = Echo()
    guard = Guard(echo)
    pieces = [bytes(100_000)] * (num_bytes // 100_000) + [bytes(num_bytes % 100_000)]
    status, _, told = ask(guard, "POST", f"/gradio_api/{path}", pieces)
    assert (status, guard.held_bytes, guard.num_requests) == (413, 0, 0)
    assert str(num_bytes - 1).encode() in told
    assert echo.bodies == []


def test_slow_bodies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.guard, "BODY_TIMEOUT_S", 0.05)
    guard = Guard(Echo())
    assert ask(guard, "POST", "/gradio_api/upload", [b"a", b"never"])[0] == 408
    assert guard.held_bytes == 0


def test_all_bodies_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.guard, "MAX_HELD_BYTES", 1500)
    guard = Guard(Echo())
    assert ask(guard, "POST", "/gradio_api/upload", [bytes(1000)])[0] == 200
    assert ask(guard, "POST", "/gradio_api/upload", [bytes(1000), bytes(1000)])[0] == 503
    assert guard.held_bytes == 0


def test_open_requests_have_a_limit() -> None:
    assert ask(Guard(Echo(), max_requests=1), "GET", "/")[0] == 200
    status, headers, _ = ask(Guard(Echo(), max_requests=0), "GET", "/")
    assert (status, headers["retry-after"]) == (503, "5")


def test_nobody_is_waited_for_who_takes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.guard, "SEND_TIMEOUT_S", 0.05)

    async def generate() -> AsyncIterator[bytes]:
        while True:
            yield b"data: x\n\n"

    guard = Guard(StreamingResponse(generate()))

    async def send(message: Message) -> None:
        await asyncio.Event().wait()

    async def receive() -> Message:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [], "app": make_app()}
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 60))
    assert guard.num_requests == 0


def test_an_event_has_only_what_the_page_sends() -> None:
    echo = Echo()
    assert ask(Guard(echo), "POST", "/gradio_api/queue/join", [SMALL])[0] == 200
    assert orjson.loads(echo.bodies[0]) == {"fn_index": 3, "data": ["x"], "session_hash": "a"}
    assert ask(Guard(echo), "POST", "/gradio_api/run/predict", [SMALL])[0] == 404  # it has to wait in line


@pytest.mark.parametrize("headers", [{}, {"cookie": "access-token-c=x"}, {"cookie": "access-token-d=t"}])
def test_a_cookie_is_asked_for(headers: dict[str, str]) -> None:
    locked = make_app(auth={"ada": "x"})
    for method, name in (("GET", "file=/x"), ("POST", "upload"), ("POST", "cancel")):
        path = f"/gradio_api/{name}"
        assert ask(Guard(Echo()), method, path, [b"{}"], headers, locked)[0] == 401
        assert ask(Guard(Echo()), method, path, [b"{}"], {"cookie": "access-token-unsecure-c=t"}, locked)[0] == 200
    for path in ("/", "/assets/x.js", "/theme.css", "/login", "/v1/models"):  # the API has a key of its own
        assert ask(Guard(Echo()), "GET", path, None, headers, locked)[0] == 200


@pytest.mark.parametrize("origin", ["http://here:7860", "https://here", "http://HERE:1"])
def test_own_pages_may_ask(origin: str) -> None:
    check_origin(Headers({"host": "here:7860", "origin": origin}))
    check_origin(Headers({"host": "inside:1", "x-forwarded-host": "here", "origin": origin}))


@pytest.mark.parametrize("origin", ["http://there", "null", "", "http://here.there", "http://[", "file://"])
def test_pages_of_others_may_not(origin: str) -> None:
    assert ask(Guard(Echo()), "POST", "/gradio_api/queue/join", [SMALL], {"origin": origin})[0] == 403
    assert ask(Guard(Echo()), "GET", "/v1/models", None, {"origin": origin})[0] == 403


def test_values_that_gradio_would_fetch() -> None:
    check_values([{"path": "/tmp/x.png", "url": "http://here/file=/tmp/x.png"}, "http://there", [[{"a": "data:x"}]]])
    for value in ({"path": "http://x"}, [[{"x": {"path": "HTTPS://x"}}]], {"url": " DATA:image/png;base64,"}):
        with pytest.raises(demo.guard.RefusedError):
            check_values([value])


def test_every_answer_has_the_policies() -> None:
    for path, policy in (("/", "default-src 'self'"), ("/gradio_api/file=/x", "sandbox"), ("/nothing", "default-src")):
        _, headers, _ = ask(Guard(Echo()), "GET", path)
        assert headers["content-security-policy"].startswith(policy)
        assert headers["x-content-type-options"] == "nosniff"


def test_who_reads_no_events_gets_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    guard, queue = Guard(Echo()), app.get_blocks()._queue
    queue.pending_event_ids_session["a"] = {str(number) for number in range(16)}
    assert ask(guard, "POST", "/gradio_api/queue/join", [SMALL], app=app)[0] == 503
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 50)
    assert ask(guard, "POST", "/gradio_api/queue/join", [SMALL], app=app)[0] == 200
    assert queue.cleaned == ["a"]
    assert queue.pending_event_ids_session == {}


def test_all_unread_events_have_a_limit_and_readers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    app, sessions = make_app(), Sessions()
    queue = app.get_blocks()._queue
    queue.pending_event_ids_session.update({f"{number}": set(range(8)) for number in range(32)})
    with pytest.raises(BusyError):
        asyncio.run(sessions.make_room(app.get_blocks(), "new"))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 30)
    sessions.note_reading("1")
    sessions.note_end("2")
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    asyncio.run(sessions.make_room(app.get_blocks(), "new"))
    assert list(queue.pending_event_ids_session) == ["1"]
    assert set(sessions.ends) == {"1", "new"}


def test_unknown_sessions_are_told_so() -> None:
    echo = Echo()
    status, headers, body = ask(Guard(echo), "GET", "/gradio_api/queue/data?session_hash=x")
    assert (status, headers["content-type"], echo.bodies) == (200, "text/event-stream; charset=utf-8", [])
    assert b'"session_not_found":true' in body
