"""The comparison: what it shows step by step, what is voted on, and that who stops or goes away stops the model."""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import httpx
import pytest
from PIL import Image

from data.conversation import Turn
from data.tokenizer import Tokenizer
from demo import compare_tab, page
from demo.compare_tab import Compare, build_compare
from demo.line import Line, Ticket
from demo.service import OutOfMemoryError, Service
from demo.voice import Answer, Settings, Voice, speak
from demo.votes import CHOICES, VoteFile
from demo.words import Words
from model.llava import Llava
from tests.conftest import TINY_TOKENIZER

ENGLISH, CHINESE = (
    cast(gr.Request, SimpleNamespace(headers={"accept-language": language}, session_hash="one"))
    for language in ("en-US", "zh-CN,zh;q=0.9")
)
WORDS = Words(page.TEXTS | compare_tab.TEXTS)
LIMIT_S = 60  # for whatever is waited for


class Scripted(Service):
    """Says what it is told to, step by step, and no further than it may."""

    def __init__(self, steps: Sequence[Sequence[str] | Exception], max_waiting: int = 2, is_free: bool = True) -> None:
        names = ["<base>", "tuned & tried"]
        super().__init__([cast(Voice, SimpleNamespace(name=name)) for name in names], Line(max_waiting), 40)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "allowed", threading.Semaphore(10**6 if is_free else 0))
        object.__setattr__(self, "heard", [])
        object.__setattr__(self, "has_begun", threading.Event())
        object.__setattr__(self, "num_ended", [])

    steps: Sequence[Sequence[str] | Exception]
    allowed: threading.Semaphore
    heard: list[Any]
    has_begun: threading.Event
    num_ended: list[int]

    def ask(
        self, voices: Sequence[Voice], turns: Sequence[Turn], picture: Image.Image | None, settings: Settings
    ) -> Ticket[list[Answer]]:
        self.heard.append((voices, turns, picture, settings))
        return self.line.join(self.speak)

    def speak(self) -> Generator[list[Answer], None, None]:
        number = 0
        self.has_begun.set()
        try:
            for number, texts in enumerate(self.steps, 1):
                self.allowed.acquire(timeout=LIMIT_S)
                if isinstance(texts, Exception):
                    raise texts
                is_over = number == len(self.steps)
                yield [Answer(text, is_over, False, 100, number, 0.5, 0.5 + number) for text in texts]
        finally:
            self.num_ended.append(number)

    def advance(self) -> int:
        """Allow a step; return how many are in the line."""
        self.allowed.release()
        return len(self.line.tickets)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    file = tmp_path / "picture.png"
    Image.new("RGB", (50, 30), "red").save(file)
    return str(file)


def ask(compare: Compare, question: str, picture: str | None, **others: Any) -> Iterator[list[Any]]:
    names = [voice.name for voice in compare.service.voices]
    values: dict[str, Any] = {"left": names[0], "right": names[-1], "temperature": 0, "top_p": 1, "length": 12}
    return compare.ask(question, picture, **(values | {"request": ENGLISH} | others))


def test_both_stream_and_what_differs_is_marked_at_the_end(picture: str) -> None:
    service = Scripted([["", ""], ["a <b>", "a"], ["a <b>red</b>", "a blue"]])
    shown = list(ask(Compare(service, WORDS, None), "what?", picture))
    pages = [step[1] for step in shown if isinstance(step[1], str)]
    assert not any("<mark>" in text or "compare-verdict" in text for text in pages[:-1])
    left, right = pages[-1].split("</article>")[:2]
    assert '<p dir="auto">a <mark>&lt;b&gt;red&lt;/b&gt;</mark></p>' in left
    assert '<p dir="auto">a <mark>blue</mark></p>' in right
    assert "<h3>&lt;base&gt;</h3>" in left
    assert "<h3>tuned &amp; tried</h3>" in right
    assert "3 tokens · 0.7 tokens/s · first after 0.50 s · prompt: 100 tokens" in left
    assert "Marked: what only one of the two says." in pages[-1]
    assert "compare-writing" in pages[0]
    assert "compare-writing" not in pages[-1]
    assert [(step[4].get("visible"), step[5].get("visible")) for step in (shown[0], shown[-1])] == [
        (False, True), (True, False)
    ]  # fmt: skip
    ((voices, turns, image, settings),) = service.heard
    assert [voice.name for voice in voices] == ["<base>", "tuned & tried"]
    assert turns == [Turn("human", "what?", has_image=True)]
    assert image.size == (50, 30)
    assert settings.max_new_tokens == 12


@pytest.mark.parametrize(
    ("texts", "request_", "expected"),
    [
        (["圆形。", "圆形 。"], CHINESE, "两个回答相同。"),
        (["红色的圆", "蓝色的圆"], CHINESE, "<mark>红</mark>色的圆"),
        (["", ""], ENGLISH, "<em>(it said nothing)</em>"),
        (["same", "same"], ENGLISH, "Both say the same."),
    ],
)
def test_equal_and_empty_answers_are_said_to_be(
    picture: str, texts: list[str], request_: gr.Request, expected: str
) -> None:
    *_, last, _ = ask(Compare(Scripted([texts]), WORDS, None), "a", picture, request=request_)
    assert expected in last[1]
    assert ("<mark>" in last[1]) == ("<mark>" in expected)


def test_base_and_itself_say_what_the_model_says(llava: Llava, picture: str) -> None:
    """Through the real service: the answers shown are the model's own."""
    voice = Voice("tiny", llava, Tokenizer(TINY_TOKENIZER), llava.config.chat_template)
    service = Service([voice], Line(max_waiting=2), max_new_tokens=40)
    *_, last, _ = ask(Compare(service, WORDS, None), "图中是什么形状？", picture)
    turns = [Turn("human", "图中是什么形状？", has_image=True)]
    *_, (expected,) = speak([voice], turns, page.open_upload(picture, WORDS, None), Settings(12))
    assert expected.text
    assert last[1].count(f'<p dir="auto">{compare_tab.mark(expected.text, [])}</p>') == 2


@pytest.mark.parametrize(
    ("question", "others", "told"),
    [
        ("  ", {}, "Type a question first."),
        ("a", {"picture": None}, "Add a picture first"),
        ("a", {"left": "another"}, "no model 'another'"),
        ("a", {"top_p": 0}, "top_p = 0.0"),
    ],
)
def test_mistakes_are_told_and_can_be_corrected(picture: str, question: str, others: dict[str, Any], told: str) -> None:
    compare, values = Compare(Scripted([["a", "b"]]), WORDS, None), {"picture": picture} | others
    shown: list[list[Any]] = []
    with pytest.raises(gr.Error, match=told):
        shown.extend(ask(compare, question, **values))
    assert (shown[-1][4]["visible"], shown[-1][5]["visible"]) == (True, False)


def test_what_ends_an_answer_is_told_and_nothing_can_be_voted_on(picture: str, tmp_path: Path) -> None:
    votes = VoteFile(tmp_path / "log")
    compare = Compare(Scripted([["a", "b"], OutOfMemoryError("none")]), WORDS, votes)
    shown: list[list[Any]] = []
    with pytest.raises(gr.Error, match="out of memory"):
        shown.extend(ask(compare, "a", picture))
    assert (shown[-1][2], shown[-1][3]["visible"]) == ("", False)
    assert not votes.open


def test_a_vote_is_about_what_the_server_said(picture: str, tmp_path: Path) -> None:
    """A browser gets a name for it, nothing else; once used, it is worth nothing."""
    compare = Compare(Scripted([["a", "b"], ["a!", "b!"]]), WORDS, VoteFile(tmp_path / "log"))
    shown = list(ask(compare, "what?", picture, temperature=0.5))
    assert not any(step[2] for step in shown[:-1] if isinstance(step[2], str))
    ballot = shown[-1][2]
    assert shown[-1][3]["visible"] is True
    for name, told in (("made up", "can no longer"), (ballot, "Thank you"), (ballot, "can no longer")):
        status, emptied, buttons = compare.vote_for("both_good")(name, ENGLISH)
        assert told in status
        assert (emptied, buttons["visible"]) == ("", False)
    (line,) = map(json.loads, (tmp_path / "log" / "votes.jsonl").read_text(encoding="utf-8").splitlines())
    assert line["answers"] == ["a!", "b!"]
    assert line["models"] == ["<base>", "tuned & tried"]
    assert line["question"] == "what?"
    assert line["vote"] == "both_good"
    assert line["settings"].items() >= {"temperature": 0.5, "top_p": 1.0, "max_new_tokens": 12}.items()
    assert (tmp_path / "log" / line["picture"]).is_file()


def test_a_full_folder_is_told(picture: str, tmp_path: Path) -> None:
    compare = Compare(Scripted([["a", "b"]]), WORDS, VoteFile(tmp_path / "log", max_bytes=0))
    ballot = list(ask(compare, "what?", picture))[-1][2]
    assert "投票文件夹已满（0 MB）" in compare.vote_for("left")(ballot, CHINESE)[0]


def build(service: Service, votes: VoteFile | None = None) -> gr.Blocks:
    with gr.Blocks(analytics_enabled=False) as blocks:
        build_compare(service, WORDS, votes)
    return blocks


def test_votes_are_there_only_where_they_are_written(tmp_path: Path) -> None:
    found = {
        has_votes: {str(block.elem_id) for block in build(Scripted([]), votes).blocks.values()}
        for has_votes, votes in ((False, None), (True, VoteFile(tmp_path)))
    }
    buttons = {f"compare-vote-{choice}" for choice in CHOICES}
    assert found[True] >= buttons | {"compare-ask"}
    assert "compare-ask" in found[False]
    assert not found[False] & (buttons | {"compare-votes"})


def test_one_voice_alone_is_told_how_to_get_another() -> None:
    service = Scripted([])
    alone = Service(service.voices[:1], service.line, 40)
    blocks = build(alone)
    assert {block.elem_id for block in blocks.blocks.values()} & {"compare-one", "compare-ask"} == {"compare-one"}
    for text in compare_tab.TEXTS["compare_one"]:
        assert "--adapter" in text
        assert "--compare" in text


class Browser:
    """Does what a page does: asks, reads what comes of it, stops it, goes away."""

    def __init__(self, blocks: gr.Blocks) -> None:
        self.session = secrets.token_hex(8)
        self.numbers = {fn.name: number for number, fn in blocks.fns.items()}
        self.client = httpx.Client(base_url=f"{blocks.local_url}gradio_api", timeout=LIMIT_S, trust_env=False)
        self.responses = contextlib.ExitStack()

    def ask(self, picture: str) -> Iterator[dict[str, Any]]:
        """Upload a picture and ask about it; the messages that come of it."""
        (path,) = self.post("/upload", files={"files": Path(picture).read_bytes()})
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        values = ["what?", file, "<base>", "tuned & tried", 0, 1, 12]
        self.start("ask", values)
        stream = self.client.stream("GET", "/queue/data", params={"session_hash": self.session})
        lines = self.responses.enter_context(stream).iter_lines()
        return (json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:"))

    def post(self, address: str, **values: Any) -> Any:
        return self.client.post(address, **values).raise_for_status().json()

    def start(self, name: str, values: Sequence[Any] = ()) -> None:
        event = {"data": values, "fn_index": self.numbers[name], "session_hash": self.session}
        self.post("/queue/join", json=event)

    def stop(self) -> None:
        self.start("stop")

    def close(self) -> None:
        self.responses.close()
        self.client.close()


@contextlib.contextmanager
def serve(service: Service) -> Iterator[gr.Blocks]:
    blocks = build(service)
    blocks.queue(default_concurrency_limit=None)
    blocks.launch(prevent_thread_lock=True, quiet=True, i18n=WORDS.i18n, ssr_mode=False)
    try:
        yield blocks
    finally:
        blocks.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


LEAVE = pytest.mark.parametrize("leave", [Browser.stop, Browser.close], ids=["stop", "tab closed"])


@LEAVE
def test_who_stops_or_goes_away_stops_the_model(picture: str, leave: Callable[[Browser], None]) -> None:
    """The job has 1000 steps; it ends soon after somebody leaves, and the next one's turn comes."""
    service = Scripted([["a", "b"]] * 1000, is_free=False)
    with serve(service) as blocks, contextlib.closing(Browser(blocks)) as first:
        messages = first.ask(picture)
        service.allowed.release(3)
        assert any("compare-pair" in json.dumps(message) for message in messages)  # shown while it is empty, too
        assert service.has_begun.wait(LIMIT_S)
        leave(first)
        if leave is Browser.stop:
            assert any("stopped" in json.dumps(message) for message in messages)
        wait_for(lambda: service.advance() == 0)
        assert service.num_ended[0] < 1000
        service.allowed.release(10**6)
        assert is_answered(blocks, picture)


@LEAVE
def test_who_stops_waiting_leaves_the_line(picture: str, leave: Callable[[Browser], None]) -> None:
    """The one before is not disturbed, and whoever went away without a word is not answered either."""
    service = Scripted([["a", "b"]] * 1000, is_free=False)
    with serve(service) as blocks, contextlib.closing(Browser(blocks)) as first:
        first.ask(picture)
        wait_for(lambda: len(service.line.tickets) == 1)
        with contextlib.closing(Browser(blocks)) as second:
            messages = second.ask(picture)
            assert any("1 before you" in json.dumps(message) for message in messages)
            leave(second)
            if leave is Browser.stop:
                wait_for(lambda: len(service.line.tickets) == 1)
        first.stop()
        wait_for(lambda: service.advance() == 0)
        assert 1000 not in service.num_ended


def is_answered(blocks: gr.Blocks, picture: str) -> bool:
    with contextlib.closing(Browser(blocks)) as browser:
        return any(message["msg"] == "process_completed" and message["success"] for message in browser.ask(picture))
