"""Programs that were written for OpenAI's API get their answers here; whoever sends nonsense is told what is wrong."""

import argparse
import asyncio
import base64
import functools
import gc
import http.client
import io
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware

import demo.service
from data.conversation import Turn
from data.tokenizer import StreamDecoder
from demo.api import make_routes
from demo.api_request import ASK_FOR_NOTHING, USED, WITHOUT_EFFECT
from demo.guard import Guard
from demo.line import Line
from demo.service import Service
from demo.voice import Answer, Settings, Voice, add_model_arguments, load_voice, speak
from model.sampling import Sampling

KEY = "anna:very secret, 很秘密"
CHINESE = "图中的红色圆形在左边，绿色三角形在右边。饕餮🀄"
ANSWER = {"role": "assistant", "content": "yes"}
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
WAIT_S = 60.0  # of a busy machine; nothing here takes a second on an idle one


@dataclass
class Served:
    """A server that runs."""

    port: int
    service: Service

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.address, api_key=key, max_retries=0, timeout=WAIT_S)

    def send(self, body: bytes | str, **headers: str) -> tuple[int, Any]:
        """Return status and error object, or whatever came instead."""
        status, content, _ = self.request("POST", "/v1/chat/completions", body, **headers)
        return status, content.get("error", content)

    def request(self, method: str, path: str, body: bytes | str = b"", **headers: str) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        body = body.encode() if isinstance(body, str) else body
        named = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(content) if is_json else {}, answer.headers


@pytest.fixture(scope="module")
def voice(tiny_model_folder: Path) -> Voice:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    options = ["--model-path", str(tiny_model_folder), "--dtype", "float32", "--device", "cpu"]
    return replace(load_voice(parser.parse_args(options)), name="tiny")


@pytest.fixture(scope="module")
def serve(voice: Voice) -> Iterator[Callable[..., Served]]:
    servers = []

    def start(key: str | None = None, max_waiting: int = 3) -> Served:
        service = Service([voice, replace(voice, name="tiny, 4 bit")], Line(max_waiting), max_new_tokens=40)
        app = Starlette(routes=make_routes(service, key), middleware=[Middleware(Guard)])
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        wait_until(lambda: server.started)
        return Served(server.servers[0].sockets[0].getsockname()[1], service)

    yield start
    for server, _ in servers:
        server.should_exit = True
    for _, thread in servers:
        thread.join(WAIT_S)


@pytest.fixture(scope="module")
def served(serve: Callable[..., Served]) -> Served:
    return serve()


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.connect()


def wait_until(is_so: Callable[[], object]) -> None:
    limit = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.01)


def make_picture() -> Image.Image:
    picture = Image.new("RGB", (50, 30), "white")
    picture.paste("red", (5, 5, 20, 20))
    return picture


def encode_picture(size: tuple[int, int] | None = None) -> str:
    file = io.BytesIO()
    (make_picture() if size is None else Image.new("1", size)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(text: str, url: str | None = None) -> dict[str, Any]:
    if url is None:
        return {"role": "user", "content": text}
    picture = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
    return {"role": "user", "content": [{"type": "text", "text": text}, picture]}


def request_of(*messages: object, **fields: object) -> dict[str, Any]:
    return {"model": "tiny", "messages": list(messages)} | fields


def create(client: openai.OpenAI, *messages: object, **fields: object) -> Any:
    """Ask; the client's types know other ways to write the same."""
    return client.chat.completions.create(**request_of(*messages, **fields))


def echo(
    voices: Sequence[Voice], turns: Sequence[Turn], picture: Image.Image | None, settings: Settings
) -> Generator[list[Answer], None, None]:
    """Say the question again, token by token, as a model would."""
    tokenizer = voices[0].tokenizer
    decoder, text = StreamDecoder(tokenizer), ""
    ids = tokenizer.encode(turns[-1].text)
    for number, token_id in enumerate(ids, 1):
        text += decoder.push(token_id)
        yield [Answer(text, number == len(ids), False, 7, number)]


def one_by_one(served: Served, steps: Iterator[list[Answer]]) -> Generator[list[Answer], None, None]:
    """Go on when the last step was taken: of several that come in between, a client gets the last one alone."""
    (ticket,) = served.service.line.tickets
    for step in steps:
        yield step
        wait_until(ticket.results.empty)


class Gate:
    """An answer that goes on until it is allowed to end."""

    def __init__(self) -> None:
        self.is_open, self.has_begun, self.was_left = threading.Event(), threading.Event(), threading.Event()

    def speak(self, *_: object) -> Generator[list[Answer], None, None]:
        self.has_begun.set()
        try:
            number = 0
            while not self.is_open.wait(0.01):
                number += 1
                yield [Answer("word " * number, num_tokens=number)]
            yield [Answer("word " * number + "end", is_over=True, num_tokens=number + 1)]
        except GeneratorExit:
            self.was_left.set()
            raise


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(demo.service, "speak", gate.speak)
    yield gate
    gate.is_open.set()


def test_stream_answer_and_speak_agree(
    served: Served, client: openai.OpenAI, voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About a picture, after an exchange; the second question is asked of the whole conversation."""
    turns = [Turn("human", "what shape is it?", True), Turn("gpt", "a circle"), Turn("human", "什么颜色?")]
    steps = [answer for (answer,) in speak([voice], turns, make_picture(), Settings(30, Sampling(1.0, seed=5)))]
    expected = steps[-1]
    monkeypatch.setattr(demo.service, "speak", lambda *asked: one_by_one(served, speak(*asked)))
    messages = [ask("what shape is it?", encode_picture()), ANSWER | {"content": "a circle"}, ask("什么颜色?")]
    whole = create(client, *messages, temperature=1, seed=5, max_tokens=30)
    first, *pieces, last, usage = create(
        client, *messages, temperature=1, seed=5, max_completion_tokens=30, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert whole.choices[0].message.content == expected.text
    assert "".join(piece.choices[0].delta.content or "" for piece in [first, *pieces, last]) == expected.text
    assert len(pieces) == len({answer.text for answer in steps} - {""}) > 10
    assert first.choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in [first, *pieces]] == [None] * (len(pieces) + 1)
    reason = "length" if expected.is_cut else "stop"
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason == reason
    assert usage.choices == []
    assert usage.usage == whole.usage
    assert whole.usage.prompt_tokens == len(voice.render(turns)) > 64
    assert whole.usage.completion_tokens == expected.num_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert len({piece.id for piece in [first, *pieces, last, usage]} | {whole.id}) == 2
    assert whole.id.startswith("chatcmpl-")
    assert (whole.model, whole.object, first.object) == ("tiny", "chat.completion", "chat.completion.chunk")
    assert abs(whole.created - time.time()) < 3600


def test_the_picture_is_seen(client: openai.OpenAI) -> None:
    urls = (None, encode_picture(), encode_picture((40, 60)))
    answers = [create(client, ask("what?", url), temperature=1, seed=5, max_tokens=20) for url in urls]
    assert len({answer.choices[0].message.content for answer in answers}) == 3


def test_how_messages_become_turns(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    def listen(voices: Sequence[Voice], turns: Any, picture: Any, settings: Any) -> Generator[list[Answer], None, None]:
        heard.append((voices[0].name, turns, picture, settings))
        return echo(voices, turns, picture, settings)

    monkeypatch.setattr(demo.service, "speak", listen)
    given = create(
        client,
        {"role": "system", "content": "Answer briefly."},
        {"role": "developer", "content": [{"type": "text", "text": "In Chinese."}]},
        ask("Here is a picture.", encode_picture()),
        ask("What <image> is it?"),
        {"role": "assistant", "content": "A circle.", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "Which"}, {"type": "text", "text": "colour?"}]},
        model="tiny, 4 bit", temperature=0.5, top_p=0.9, seed=7, stop=["\n\n", "USER"], max_tokens=11, user="anna", n=1,
        presence_penalty=0.0, response_format={"type": "text"}, store=None, tools=[],
    )  # fmt: skip
    ((name, turns, picture, settings),) = heard
    assert turns == [
        Turn("human", "Answer briefly.\n\nIn Chinese.\n\nHere is a picture.\nWhat <image> is it?", has_image=True),
        Turn("gpt", "A circle."),
        Turn("human", "Which\ncolour?"),
    ]
    assert picture.tobytes() == make_picture().tobytes()
    assert settings == Settings(11, Sampling(0.5, 0.9, 7), ("\n\n", "USER"))
    assert name == given.model == "tiny, 4 bit"
    assert given.choices[0].message.content == "Which\ncolour?"


def test_chinese_comes_whole(served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that are several tokens each, there and back."""
    monkeypatch.setattr(demo.service, "speak", lambda *asked: one_by_one(served, echo(*asked)))
    pieces = [piece.choices[0].delta.content or "" for piece in create(client, ask(CHINESE), stream=True)]
    assert "".join(pieces) == CHINESE
    assert [piece for piece in pieces if piece] == list(CHINESE)


def test_sampling_depends_on_its_seed_alone(client: openai.OpenAI) -> None:
    def draw(seed: int | None) -> str:
        answer = create(client, ask("hello"), temperature=1.5, seed=seed, max_tokens=25)
        return answer.choices[0].message.content

    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_stop(client: openai.OpenAI) -> None:
    def answer(**fields: object) -> Any:
        return create(client, ask("red?"), temperature=1, seed=5, **fields).choices[0]

    whole = answer(max_tokens=30).message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopped = answer(max_tokens=30, stop=stop)
    assert stopped.message.content == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    assert answer(max_tokens=2).finish_reason == "length"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny, 4 bit"]
    assert client.models.retrieve("tiny, 4 bit").owned_by == "plain-llava"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5': there are tiny, tiny, 4 bit"):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, ask("hello"), model="gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_key(serve: Callable[..., Served]) -> None:
    served = serve(KEY)
    key = KEY.encode().decode("latin-1")  # how a header carries it
    for path, method in (("/v1/models", "GET"), ("/v1/chat/completions", "POST"), ("/v1/none", "GET")):
        for header in ("", "Bearer", "Bearer ", f"Basic {key}", f"Bearer {key}x", "Bearer anna:", "Bearer \xff"):
            status, content, headers = served.request(method, path, b"{", Authorization=header)
            assert (status, content["error"]["code"]) == (401, "invalid_api_key")
            assert headers["WWW-Authenticate"] == "Bearer"
            assert "secret" not in str(content)
    assert served.request("GET", "/v1/models", Authorization=f"bearer {key}")[0] == 200
    with pytest.raises(openai.AuthenticationError):
        served.connect("sk-wrong").models.list()


def test_a_full_line_refuses_and_nobody_hangs(serve: Callable[..., Served], gate: Gate) -> None:
    """One answer is being given, three wait, the others are told at once; models are listed meanwhile."""
    served = serve(max_waiting=3)

    async def ask_all() -> list[Any]:
        client = openai.AsyncOpenAI(base_url=served.address, api_key="any", max_retries=0, timeout=WAIT_S)
        calls = [asyncio.create_task(client.chat.completions.create(**request_of(ask("hello")))) for _ in range(30)]
        while sum(call.done() for call in calls) < 26:
            await asyncio.sleep(0.01)
        assert len((await client.models.list()).data) == 2
        assert not any(call.done() and not call.exception() for call in calls)
        gate.is_open.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(asyncio.wait_for(ask_all(), 2 * WAIT_S))
    refused = [outcome for outcome in outcomes if isinstance(outcome, openai.RateLimitError)]
    assert len(refused) == 26
    assert refused[0].response.headers["retry-after"] == "5"
    assert refused[0].code == "rate_limit_exceeded"
    assert all(answer.choices[0].message.content.endswith("end") for answer in outcomes if answer not in refused)
    assert not served.service.line.tickets


def test_whoever_waits_hears_how_many_are_before(served: Served, gate: Gate) -> None:
    """In comments, which clients pass over."""
    sockets = open_in_order(served, 2)
    read_until(sockets[1], b"\n: 1 before you\n\n")
    second_client = iter(create(served.connect(), ask("hello"), stream=True))
    assert next(second_client).choices[0].delta.role == "assistant"
    gate.is_open.set()
    assert "".join(piece.choices[0].delta.content or "" for piece in second_client) == "end"
    for one in sockets:
        assert read_until(one, b"data: [DONE]\n\n")
        one.close()


def test_proxies_hear_of_a_long_wait(served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.api.KEEP_ALIVE_S", 0.05)
    sockets = open_in_order(served, 2)
    read_until(sockets[1], b": 1 before you\n\n", times=3)
    for one in sockets:
        one.close()
    wait_until(lambda: not served.service.line.tickets)  # or they would be heard of in the next test


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_is_gone_frees_its_place(served: Served, gate: Gate, is_stream: bool) -> None:
    """While it waits, and while its answer is given."""
    tickets = served.service.line.tickets
    sockets = open_in_order(served, 3, is_stream)
    running, gone, patient = tickets
    sockets[1].close()
    wait_until(lambda: gone not in tickets)
    assert list(tickets) == [running, patient]
    assert not gate.was_left.is_set()
    if is_stream:
        read_until(sockets[0], b'"content":"word ')
    sockets[0].close()
    assert gate.was_left.wait(WAIT_S)
    wait_until(lambda: list(tickets) == [patient])
    gate.is_open.set()
    assert read_until(sockets[2], b'end"')
    sockets[2].close()


def has_length(tickets: Sequence[object], length: int) -> bool:
    return len(tickets) == length


def open_in_order(served: Served, number: int, is_stream: bool = True) -> list[socket.socket]:
    """Send so many questions, each when the one before stands in line."""
    tickets = served.service.line.tickets
    wait_until(lambda: not tickets)
    sockets = []
    for length in range(1, number + 1):
        sockets.append(open_request(served, request_of(ask("hello"), stream=is_stream)))
        wait_until(functools.partial(has_length, tickets, length))
    return sockets


def open_request(served: Served, body: dict[str, Any]) -> socket.socket:
    """Send a request, and leave what comes to the caller."""
    content = json.dumps(body).encode()
    return send_raw(served, f"Content-Length: {len(content)}\r\n\r\n".encode() + content)


def send_raw(served: Served, rest: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), WAIT_S)
    connection.sendall(HEAD.encode() + rest)
    return connection


def read_until(connection: socket.socket, text: bytes, times: int = 1) -> bytes:
    heard, deadline = b"", time.monotonic() + WAIT_S
    while heard.count(text) < times:
        piece = connection.recv(65_536)
        assert piece, heard
        assert time.monotonic() < deadline, heard[-1000:]
        heard += piece
    return heard


PICTURE = encode_picture()
DATA = "data:image/png;base64,"


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"messages": []}, "the last message has to be the user's", "messages"),
        ({"messages": None}, "messages: expected a list, it is missing", "messages"),
        ({"messages": {"role": "user"}}, "messages: expected a list, it is an object", "messages"),
        ({"messages": ["hello"]}, "messages[0]: expected an object", "messages[0]"),
        ({"messages": [ask("a")] * 1001}, "1001 messages, the limit is 1000", "messages"),
        ({"messages": [{"content": "a"}]}, "messages[0].role: expected a text, it is missing", "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "expected one of system, developer", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "expected a text, it is missing", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "it is a whole number", "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "'name' is not supported", "messages[0]"),
        ({"messages": [{"role": "user", "content": [7]}]}, "type is text or image_url", "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "type is text",
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "missing", "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "expected an object",
         "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": []}}]}]}, "a text",
         "messages[0].content[0].image_url.url"),
        ({"messages": [ANSWER, ask("a")]}, "take turns, the user first", "messages"),
        ({"messages": [ask("a"), ANSWER, ANSWER, ask("a")]}, "take turns", "messages"),
        ({"messages": [ask("a"), ANSWER]}, "the last message has to be the user's", "messages"),
        ({"messages": [ask("a"), ANSWER, {"role": "system", "content": "b"}, ask("a")]}, "a system", "messages"),
        ({"messages": [ask("a", PICTURE), ask("b", PICTURE)]}, "2 pictures, LLaVA-1.5 was", "messages"),
        ({"messages": [ask("a"), ANSWER, ask("a", PICTURE)]}, "in the first user message", "messages"),
        ({"messages": [{**ask("a", PICTURE), "role": "system"}, ask("a")]}, "in the first user message", "messages"),
        ({"messages": [ask("a", "picture.png")]}, "expected a picture as data:image/...;base64,...", "messages"),
        ({"messages": [ask("a", DATA + "???")]}, "the picture is not base64", "messages"),
        ({"messages": [ask("a", DATA + base64.b64encode(b"<svg/>").decode())]}, "it is none of JPEG, PNG", "messages"),
        ({"messages": [ask("a", encode_picture((9000, 9000)))]}, "9000 x 9000 pixels, the limits are", "messages"),
        ({"messages": [ask("a", "file:///etc/passwd")]}, "not an address that starts with http://", "messages"),
        ({"messages": [ask("a", "http://127.0.0.1:9/a.png")]}, "inside a private network", "messages"),
        ({"messages": [ask("a", "http://[::1]:9/a.png")]}, "inside a private network", "messages"),
        ({"messages": [ask("a", "http://a/" + "b" * 5000)]}, "the limit is 2000", "messages"),
        ({"messages": [ask("a" * 20_001)]}, "20001 characters, the limit is 20000", None),
        ({"messages": [ask("red " * 4000)]}, "no room is left for an answer: start a new one", None),
        ({"model": None}, "model: expected a text, it is missing", "model"),
        ({"model": ["tiny"]}, "model: expected a text, it is a list", "model"),
        ({"max_tokens": 41}, "41 new tokens, expected 1 to 40", None),
        ({"max_completion_tokens": 0}, "0 new tokens, expected 1 to 40", None),
        ({"max_tokens": -(2**63)}, "new tokens, expected 1 to 40", None),
        ({"max_tokens": 5.5}, "max_tokens: expected a whole number, it is a number", "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens: expected a whole number", "max_tokens"),
        ({"max_tokens": True}, "max_tokens: expected a whole number, it is true or false", "max_tokens"),
        ({"temperature": "warm"}, "temperature: expected a number, it is a text", "temperature"),
        ({"temperature": -1}, "temperature = -1.0, expected", None),
        ({"temperature": 1e-300}, "temperature = 1e-300, expected", None),
        ({"top_p": 0}, "top_p = 0.0, expected above 0", None),
        ({"top_p": {}}, "top_p: expected a number, it is an object", "top_p"),
        ({"seed": -1}, "seed = -1, expected at least 0", None),
        ({"stop": ""}, "stop: expected a text of 1 to 100 characters", "stop"),
        ({"stop": ["a"] * 5}, "a list of up to 4", "stop"),
        ({"stop": [1]}, "stop: expected a text", "stop"),
        ({"stop": "a" * 101}, "stop: expected a text of 1 to 100", "stop"),
        ({"stream": "yes"}, "stream: expected true or false, it is a text", "stream"),
        ({"stream_options": {"include_usage": True}}, "for stream: true only", "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "expected true or false", "include_usage"),
        ({"n": 2}, "'n' is not supported here with another value", "n"),
        ({"logprobs": True}, "'logprobs' is not supported", "logprobs"),
        ({"frequency_penalty": 0.1}, "'frequency_penalty' is not supported", "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "'tools' is not supported", "tools"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported", "response_format"),
        ({"store": True}, "'store' is not supported", "store"),
        ({"temprature": 1}, "'temprature' is not known here", "temprature"),
        ({"x" * 9999: 1}, f"'{'x' * 50}' is not known here", "x" * 50),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(served: Served, fields: dict[str, Any], message: str, param: str | None) -> None:
    status, error = served.send(json.dumps(request_of(ask("hello")) | fields))
    assert status == 400, error
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\x00", b"{", b"[]", b"null", b"7", b'"a"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000,
        b'{"a":' * 50_000, b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 10_000 + b"}",
        b'{"\\udfff": 1}',
    ],
)  # fmt: skip
def test_no_json(served: Served, body: bytes) -> None:
    status, error = served.send(body)
    assert status == 400
    assert error["message"].startswith("the body is not ")


def test_every_type_everywhere(served: Served) -> None:
    """Any value in any place is answered or refused, never an error of the server's own."""
    numbers = [0, -1, 2**62, 2**64 - 1, 0.5, 1e308]
    values: list[Any] = [None, True, *numbers, "", "\0", "很", [], [[]], {}, {"a": {}}, [None], ["a"], [{}]]
    names = [*USED, *WITHOUT_EFFECT, *ASK_FOR_NOTHING]
    statuses = set()
    for name in names:
        for value in values:
            statuses.add(served.send(json.dumps(request_of(ask("a"), max_tokens=1) | {name: value}))[0])
    for value in values:
        picture = {"type": "image_url", "image_url": value}
        address = {"type": "image_url", "image_url": {"url": value}}
        for content in (value, [value], [{"type": value}], [{"type": "text", "text": value}], [picture], [address]):
            statuses.add(served.send(json.dumps(request_of({"role": "user", "content": content}, max_tokens=1)))[0])
        statuses.add(served.send(json.dumps(request_of({"role": value, "content": "a"}, max_tokens=1)))[0])
    assert statuses == {200, 400, 404}


def test_other_methods_paths_and_types(served: Served) -> None:
    for method, path, allowed in (("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/models/tiny", "GET")):
        status, content, headers = served.request(method, path)
        assert (status, headers["Allow"]) == (405, allowed)
        assert content["error"]["message"] == f"this takes {allowed} only"
    for path in ("/v1/embeddings", "/v1/", "/v1/models/", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%ff%00"):
        status, content, _ = served.request("GET", path)
        assert status == 404
        assert content["error"]["type"] == "invalid_request_error"
    body = json.dumps(request_of(ask("a"), max_tokens=1))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; boundary=a"):
        status, error = served.send(body, Content_Type=kind)
        assert (status, error["code"]) == (415, "wrong_content_type")
    assert served.send(body, Content_Type="Application/JSON; charset=utf-8")[0] == 200


def test_a_body_without_end_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for: the answer comes while the client goes on sending."""
    assert served.send(b" " * 15_000_000)[0] == 400
    assert served.send(b" " * 17_000_000)[0] == 413
    monkeypatch.setattr("demo.api.MAX_BODY_BYTES", 300_000)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    )
    with socket.create_connection(("127.0.0.1", served.port), WAIT_S) as connection:
        connection.sendall(head + b"\r\n\r\n" + (b"10000\r\n" + b" " * 65_536 + b"\r\n") * 5)
        assert read_until(connection, b"the request is larger than 300000 bytes").startswith(b"HTTP/1.1 413 ")


def test_nothing_that_was_refused_is_kept(served: Served) -> None:
    """Not even until Python looks for what is held by itself alone."""
    large = "A" * 12_000_000
    bodies = [large, "[" + large, json.dumps(request_of(ask("a", DATA + large))), json.dumps(request_of(ask(large)))]
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for body in bodies:
            assert served.send(body)[0] == 400
        wait_until(lambda: tracemalloc.get_traced_memory()[0] < 3_000_000)
    finally:
        tracemalloc.stop()
        gc.enable()


def test_requests_that_are_read_have_a_limit_together(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that do not go on hold the room, until they are gone."""
    monkeypatch.setattr("demo.api.MAX_HELD_BYTES", 300_000)
    body = json.dumps(request_of(ask("a"), max_tokens=1)) + " " * 100_000
    assert served.send(body)[0] == 200
    stuck = [send_raw(served, b"Content-Length: 999999\r\n\r\n" + b" " * 149_000) for _ in range(2)]
    wait_until(lambda: served.send(body)[0] == 429)
    for one in stuck:
        one.close()
    wait_until(lambda: served.send(body)[0] == 200)


def test_a_body_that_does_not_arrive_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.api.BODY_TIMEOUT_S", 0.05)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), WAIT_S) as connection:
        connection.sendall(head)
        assert read_until(connection, b"took too long").startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory at 0x7f"), 503, "the device is out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503, "the device is out of memory"),
        (KeyError("/home/anna/secret"), 500, "something went wrong on the server"),
    ],
)
def test_errors_while_answering(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, message: str
) -> None:
    """As a status, or in the stream, whose status was sent long ago; what is inside is not told."""

    def break_down(*_: object) -> Generator[list[Answer], None, None]:
        yield [Answer("well", num_tokens=1)]
        raise error

    monkeypatch.setattr(demo.service, "speak", break_down)
    given, told = served.send(json.dumps(request_of(ask("a"))))
    assert given == status
    assert told["message"].startswith(message)
    heard = ""
    with pytest.raises(openai.APIError, match=message) as caught:  # noqa: PT012 (the stream breaks after its beginning)
        for piece in create(served.connect(), ask("a"), stream=True):
            heard += piece.choices[0].delta.content or ""
    assert heard == "well"
    assert "secret" not in f"{told} {caught.value.body}"
    assert "0x7f" not in f"{told} {caught.value.body}"
