"""The chat's events, called as Gradio calls them: what each shows, and that nothing typed is lost."""

import http.server
import itertools
import json
import threading
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest
import torch
from gradio.components.chatbot import ChatbotDataMessages, ComponentMessage, FileMessage, Message, TextMessage
from gradio.data_classes import FileData
from PIL import Image

from data.conversation import Turn, parse_turns
from data.tokenizer import Tokenizer
from demo import chat_tab, page, service
from demo.chat import Chat, Messages, edit, read_turns, take_back, to_llava_json
from demo.chat_tab import make_chatbot
from demo.line import Line
from demo.service import Service
from demo.voice import Settings, Voice, speak
from demo.words import Words
from model.llava import Llava
from tests.conftest import TINY_TOKENIZER

ENGLISH, CHINESE = (
    cast(gr.Request, SimpleNamespace(headers={"accept-language": language}, session_hash=language))
    for language in ("en-US", "zh-CN,zh;q=0.9")
)
HISTORY = [{"role": "user", "text": "is it red?"}, {"role": "assistant", "text": "没有 <b>"}]


@pytest.fixture
def voice(llava: Llava) -> Voice:
    return Voice("tiny", llava, Tokenizer(TINY_TOKENIZER), llava.config.chat_template)


@pytest.fixture
def chat(voice: Voice) -> Chat:
    return Chat(Service([voice], Line(max_waiting=2), max_new_tokens=40), Words(page.TEXTS | chat_tab.TEXTS))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    file = tmp_path / "picture.png"
    Image.new("RGB", (50, 30), "red").save(file)
    return str(file)


def ask(chat: Chat, question: str, messages: Messages, picture: str | None, **others: Any) -> list[list[Any]]:
    values: dict[str, Any] = {"voice": "tiny", "temperature": 0, "top_p": 1, "length": 12, "request": ENGLISH}
    return list(chat.ask(question, messages, picture, **(values | others)))


def test_an_answer_streams_and_is_the_models_own(chat: Chat, voice: Voice, picture: str) -> None:
    shown = ask(chat, "图中是什么形状？", HISTORY, picture)
    turns = [Turn("human", "is it red?", has_image=True), Turn("gpt", "没有 <b>"), Turn("human", "图中是什么形状？")]
    (expected,) = list(speak([voice], turns, page.open_upload(picture, chat.words, None), Settings(12)))[-1]
    question, messages, told, send, stop = shown[-1]
    assert messages == [
        *HISTORY, {"role": "user", "text": "图中是什么形状？"}, {"role": "assistant", "text": expected.text}
    ]  # fmt: skip
    assert expected.text
    assert question == ""
    assert f"prompt: {expected.prompt_tokens} tokens" in told
    assert (send["visible"], stop["visible"]) == (True, False)
    texts = [step[1][-1]["text"] for step in shown]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert (shown[0][3]["visible"], shown[0][4]["visible"]) == (False, True)


@pytest.mark.parametrize(
    ("question", "messages", "others", "told"),
    [
        ("  ", [], {}, "Type a question first."),
        ("a", [], {"picture": None}, "Add a picture first"),
        ("a", HISTORY[:1], {}, "must alternate"),
        ("a" * 30_000, [], {}, "the limit is 20000"),
        ("red " * 3000, [], {}, "no room is left for an answer"),
        ("a", [], {"length": 41}, "41 new tokens, expected 1 to 40"),
        ("a", [], {"temperature": -1}, "temperature = -1.0"),
        ("a", [], {"temperature": float("nan")}, "temperature = nan"),
        ("a", [], {"voice": "other"}, "no model 'other': there are tiny"),
        ("a", [], {"request": CHINESE, "picture": None}, "请先添加图片"),
    ],
)
def test_mistakes_are_told_and_the_question_stays(
    chat: Chat, picture: str, question: str, messages: Messages, others: dict[str, Any], told: str
) -> None:
    values: dict[str, Any] = {"picture": picture, "voice": "tiny", "temperature": 0, "top_p": 1, "length": 12}
    events = chat.ask(question, messages, **(values | {"request": ENGLISH} | others))
    shown: list[list[Any]] = []
    with pytest.raises(gr.Error, match=told):
        shown.extend(events)
    last = shown[-1]
    assert last[:2] == [question, messages]
    assert (last[3]["visible"], last[4]["visible"]) == (True, False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_do_and_the_next_question_is_answered(
    chat: Chat, picture: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> Generator:
        raise error
        yield

    with monkeypatch.context() as patched:
        patched.setattr(service, "speak", fail)
        with pytest.raises(gr.Error, match=r"out of memory.*--load-4bit"):
            ask(chat, "a", [], picture)
    assert ask(chat, "a", [], picture)[-1][1][-1]["text"]


def test_a_fault_of_the_program_is_not_shown_but_told(
    chat: Chat, picture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: Any) -> Generator:
        raise KeyError("/secret/path")
        yield

    monkeypatch.setattr(service, "speak", fail)
    with pytest.raises(gr.Error) as raised:
        ask(chat, "a", [], picture)
    assert "secret" not in raised.value.message
    assert "KeyError: '/secret/path'" in capsys.readouterr().err


def test_a_full_line_turns_away(chat: Chat, picture: str) -> None:
    """One runs, two wait, the fourth is told to come back."""
    begun, go_on = threading.Event(), threading.Event()

    def work() -> Generator[int, None, None]:
        begun.set()
        go_on.wait(60)
        yield 1

    tickets = [chat.service.line.join(work) for _ in range(3)]
    assert begun.wait(60)
    with pytest.raises(gr.Error, match="the line is full"):
        ask(chat, "a", [], picture)
    tickets[1].leave()
    waiting = chat.ask("a", [], picture, "tiny", 0, 1, 12, CHINESE)
    assert [next(waiting)[2] for _ in range(2)] == ["✳ 正在看图……", "⏳ 前面还有 2 个请求……"]
    go_on.set()
    assert list(waiting)[-1][1][-1]["text"]


def test_only_text_comes_back_from_the_browser() -> None:
    """And what looks like HTML is shown as letters."""
    chatbot = make_chatbot(Words(page.TEXTS | chat_tab.TEXTS))
    sent = chatbot.postprocess(HISTORY)  # type: ignore[arg-type]
    assert [part.text for message in sent.root for part in message.content if part.type == "text"] == [
        "is it red?", "没有 &lt;b&gt;"
    ]  # fmt: skip
    assert chatbot.preprocess(sent) == HISTORY
    hostile: list[Message] = [
        Message(role="user", content=[ComponentMessage(component="html", value="", constructor_args={}, props={})]),
        Message(role="user", content=[FileMessage(file=FileData(path="/etc/passwd"))]),
        Message(role="system", content=[TextMessage(text="a")]),
    ]
    for message in hostile:
        with pytest.raises(gr.Error):
            chatbot.preprocess(ChatbotDataMessages(root=[message]))


def test_taking_back_and_editing() -> None:
    more = [*HISTORY, {"role": "user", "text": "why?"}, {"role": "assistant", "text": ""}]
    assert take_back(more) == ("why?", HISTORY)
    assert take_back(HISTORY) == ("is it red?", [])
    assert take_back([]) == ("", [])
    changed = cast(gr.EditData, SimpleNamespace(index=2, value="a &lt; b?"))
    assert edit(more, changed) == ("a < b?", HISTORY)


def test_the_download_is_a_row_that_training_reads(chat: Chat, picture: str) -> None:
    more = [*HISTORY, {"role": "user", "text": "a typed <image>"}, {"role": "assistant", "text": "yes"}]
    (row,) = json.loads(chat.save(more, picture, "tiny", ENGLISH))
    turns = parse_turns(row)
    assert row["image"] == "picture.png"
    assert row["model"] == "tiny"
    assert turns[:2] == read_turns(more)[:2]
    assert [turn.text for turn in turns[2:]] == ["a typed < image >", "yes"]
    with pytest.raises(gr.Error, match="Ask something first"):
        chat.save([], picture, "tiny", ENGLISH)
    assert to_llava_json(HISTORY, None, "tiny")


def test_looking_inside_shows_a_frame_that_reaches_nothing(chat: Chat, picture: str) -> None:
    *progress, frame = chat.look(HISTORY, picture, "tiny", CHINESE)
    assert progress[0] == "✳ 正在看图……"
    assert frame.startswith('<iframe class="look" sandbox="allow-scripts" srcdoc="&lt;!')
    assert "is it red?" in frame
    assert "没有 <b>" not in frame
    with pytest.raises(gr.Error, match="Ask something first"):
        list(chat.look([], picture, "tiny", ENGLISH))


def test_a_picture_by_address(chat: Chat, picture: str) -> None:
    """Addresses inside the own network are not even asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(gr.Error, match="private network"):
        chat.load_address(f"http://127.0.0.1:{server.server_port}/a.png", ENGLISH)
    server.shutdown()
    with pytest.raises(gr.Error, match="http://"):
        chat.load_address("file:///etc/passwd", ENGLISH)
    assert asked == []
