"""The page in a real browser, as visitors use it: at a desk and on a phone, light and dark, in two languages."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

from data.conversation import parse_turns
from demo.record import ask, look_inside, open_page, open_tab, serve, show_picture, wait_for_answer
from model.config import CONFIGS
from model.llava import Llava
from tests.demo.test_dashboard import make_run, write_scores
from tests.model.checkpoints import write_official_lora

DESKTOP, PHONE = (1280, 860), (390, 844)
TIMEOUT_MS = 120_000


@pytest.fixture(scope="module")
def address(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page over a tiny model of random weights, which talks on and on, and an adapter."""
    folder = tmp_path_factory.mktemp("page")
    with torch.device("meta"):
        shapes = Llava(CONFIGS["tiny"])
    write_official_lora(folder / "tuned", shapes, "unused")
    run = make_run(folder / "runs/first")
    write_scores(run, "easy_vqa", 0.25)
    options = ["--model-path", tiny_model_folder, "--adapter", folder / "tuned", "--runs", folder / "runs"]
    with serve([*map(str, options), "--log-dir", str(folder / "votes"), "--device", "cpu"]) as address:
        yield address


class Visit:
    """An open page, and what happened that nobody sees."""

    def __init__(self, browser: Any, address: str, size: tuple[int, int], language: str, is_dark: bool) -> None:
        self.page: Any = open_page(browser, address, size, language, is_dark)
        self.page.set_default_timeout(TIMEOUT_MS)
        self.address = address
        self.problems: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", self.note_error)
        self.page.on("console", self.hear)
        self.page.on("request", self.note)
        self.page.reload()
        self.page.wait_for_selector("#chat-send")

    def note_error(self, error: Any) -> None:
        self.problems.append(str(error))

    def hear(self, said: Any) -> None:
        if said.type == "error":
            self.problems.append(said.text)

    def note(self, request: Any) -> None:
        is_inside = request.url.startswith(("data:", "blob:", "about:"))
        if not is_inside and urlsplit(request.url).netloc != urlsplit(self.address).netloc:
            self.elsewhere.append(request.url)

    def end(self) -> None:
        """Nothing was asked of another machine, nothing failed, and nothing is wider than the window."""
        assert self.elsewhere == []
        assert self.problems == []
        assert self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        self.page.context.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.linear_gradient("L").convert("RGB").save(file)
    return file


def choose_length(page: Any, tab: str, num_tokens: int) -> None:
    """Set the longest answer; the settings lie folded, and when they unfold Gradio sets them once more."""
    number, slider = (page.locator(f"#{tab}-settings input[type={kind}]").last for kind in ("number", "range"))
    if not number.is_visible():
        page.locator(f"#{tab}-settings > button").click()
    for _ in range(20):
        number.fill(str(num_tokens))
        number.press("Tab")
        page.wait_for_timeout(500)
        if slider.input_value() == number.input_value() == str(num_tokens):
            return
    raise AssertionError(f"the slider stays at {slider.input_value()}")


def read_answers(page: Any) -> list[str]:
    return page.locator("#chat .bot.message").all_inner_texts()


@pytest.mark.parametrize(("size", "is_dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)])
def test_a_visit(address: str, browser: Any, picture: Path, size: tuple[int, int], is_dark: bool) -> None:
    """Upload a picture, ask in Chinese, ask on, look inside, compare, vote, see the runs."""
    visit = Visit(browser, address, size, "zh-CN", is_dark)
    page = visit.page
    assert page.locator("#chat-send").inner_text() == "发送"
    show_picture(page, picture, "chat")
    choose_length(page, "chat", 24)
    ask(page, "图中是什么形状？")
    ask(page, "为什么 <b>？")
    assert [len(text) > 0 for text in read_answers(page)] == [True, True]
    assert "为什么 <b>？" in page.locator("#chat").inner_text()
    assert "\N{REPLACEMENT CHARACTER}" not in page.locator("#chat .user.message").first.inner_text()
    assert re.search(r"24 个词元 · [\d.]+ 词元/秒 · 首个词元 [\d.]+ 秒 · 提示 \d+ 个词元 · 已达到设定的长度",
                     page.locator("#chat-status").inner_text())  # fmt: skip

    frame = look_inside(page)
    words = frame.locator("#words .word")
    seen = set()
    for number in (0, 1):
        words.nth(number).click()
        seen.add(frame.locator("#where-hint").inner_text())
    assert len(seen) == 2
    assert frame.locator(".bar.chosen").count() == 1
    is_frame_dark = frame.locator("html").evaluate("html => getComputedStyle(html).colorScheme") == "dark"
    assert is_frame_dark == is_dark

    open_tab(page, 1)
    show_picture(page, picture, "compare")
    choose_length(page, "compare", 24)
    page.fill("#compare-question textarea", "图中是什么形状？")
    page.click("#compare-ask")
    page.wait_for_selector(".compare-verdict")
    wait_for_answer(page, "compare")
    assert page.locator(".compare-side mark").count() >= 2
    page.click("#compare-vote-both_bad")
    page.wait_for_selector("#compare-votes", state="hidden")
    assert "谢谢" in page.locator("#compare-status").inner_text()

    open_tab(page, 2)
    page.wait_for_selector("#dashboard_runs >> text=first")
    page.wait_for_selector("img[src^='data:image/png']")
    visit.end()


def test_an_answer_streams_until_it_is_stopped(address: str, browser: Any, picture: Path) -> None:
    """And what was said until then stays, is part of the conversation, and can be made anew."""
    visit = Visit(browser, address, DESKTOP, "en-US", is_dark=False)
    page = visit.page
    show_picture(page, picture, "chat")
    choose_length(page, "chat", 900)
    page.fill("#chat-question textarea", "tell me a long story")
    page.click("#chat-send")
    page.wait_for_function("document.querySelector('#chat .bot.message')?.innerText.length > 5")
    early = read_answers(page)[0]
    page.wait_for_function(f"document.querySelector('#chat .bot.message').innerText.length > {len(early) + 5}")
    page.click("#chat-stop")
    page.wait_for_selector("#chat-stop", state="hidden")
    page.wait_for_function("document.querySelector('#chat-status').innerText.includes('stopped')")
    stopped = read_answers(page)
    assert early.strip() == stopped[0].strip()[: len(early.strip())]
    choose_length(page, "chat", 8)
    ask(page, "and now?")
    assert len(read_answers(page)) == 2
    assert read_answers(page)[0].strip().startswith(early.strip())
    before = page.locator("#chat-status").inner_text()
    page.click("#chat-again")
    page.wait_for_function("told => document.querySelector('#chat-status').innerText !== told", arg=before)
    wait_for_answer(page, "chat")
    assert len(read_answers(page)) == 2
    with page.expect_download() as download:
        page.click("#chat-save")
    (row,) = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [turn.text for turn in parse_turns(row)][::2] == ["tell me a long story", "and now?"]
    page.click("#chat-clear")
    page.wait_for_function("!document.querySelector('#chat .message')")
    visit.end()


def test_a_question_is_changed_and_asked_again(address: str, browser: Any, picture: Path) -> None:
    visit = Visit(browser, address, DESKTOP, "en-US", is_dark=False)
    page = visit.page
    show_picture(page, picture, "chat")
    choose_length(page, "chat", 8)
    ask(page, "what is it?")
    ask(page, "why?")
    page.locator("#chat button[aria-label=Edit]").first.click()
    page.locator("#chat textarea").first.fill("what is that?")
    page.locator("#chat button[aria-label=Submit]").first.click()
    page.wait_for_function("document.querySelectorAll('#chat .user.message').length === 1")
    page.wait_for_function("document.querySelector('#chat .bot.message')?.innerText.length > 0")
    wait_for_answer(page, "chat")
    assert page.locator("#chat .user.message").all_inner_texts() == ["what is that?"]
    visit.end()


def test_pictures_are_pasted(address: str, browser: Any) -> None:
    """Anywhere on the page; another picture is another conversation."""
    visit = Visit(browser, address, DESKTOP, "en-US", is_dark=False)
    page = visit.page
    choose_length(page, "chat", 8)
    for color in ("red", "blue"):
        content = io.BytesIO()
        Image.new("RGB", (40, 40), color).save(content, "PNG")
        page.evaluate(
            """text => {
                const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
                const clipboardData = new DataTransfer();
                clipboardData.items.add(new File([bytes], "pasted.png", {type: "image/png"}));
                document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
            }""",
            base64.b64encode(content.getvalue()).decode(),
        )
        page.wait_for_selector("#chat-picture img")
        page.wait_for_function("!document.querySelector('#chat .message')")
        ask(page, f"is it {color}?")
        assert page.locator("#chat .user.message").all_inner_texts() == [f"is it {color}?"]
    visit.end()


def test_mistakes_are_told_in_words_and_nothing_typed_is_lost(address: str, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    visit = Visit(browser, address, DESKTOP, "en-US", is_dark=False)
    page = visit.page
    page.fill("#chat-question textarea", "what is it?")
    page.click("#chat-send")
    page.wait_for_selector("text=Add a picture first")
    assert page.input_value("#chat-question textarea") == "what is it?"
    page.fill("#chat-address input", "http://127.0.0.1:1/picture.png")
    page.press("#chat-address input", "Enter")
    page.wait_for_selector("text=private network")
    page.set_input_files("#chat-picture input[type=file]", tmp_path / "text.png")
    page.wait_for_selector("text=This picture cannot be used")
    assert page.input_value("#chat-question textarea") == "what is it?"
    assert [problem for problem in visit.problems if "415" not in problem] == []  # the browser's own note of it
    visit.problems.clear()
    visit.end()
