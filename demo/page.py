"""What the tabs of the page share: uploaded pictures, words for what goes wrong, and for what an answer cost."""

import contextlib
import html
import secrets
import threading
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from PIL.Image import Image

from demo.line import LineFullError, Ticket
from demo.look_page import make_look_page
from demo.pictures import read_picture
from demo.service import Look, OutOfMemoryError, Service
from demo.voice import Answer, Settings
from demo.words import Words
from model.sampling import Sampling

T = TypeVar("T")

STOP_TIMEOUT_S = 10.0  # for a page that is gone, and hears nothing any more

# A frame may not be measured from outside: the document says how high it is, and is told the page's theme.
LOOK_JS = """
window.addEventListener("message", (event) => {
    for (const frame of document.querySelectorAll("iframe.look")) {
        if (frame.contentWindow !== event.source || !(event.data?.lookHeight > 0)) continue;
        frame.style.height = `${Math.min(event.data.lookHeight, 20000)}px`;
        const theme = document.body.classList.contains("dark") ? "dark" : "light";
        const background = getComputedStyle(document.body).backgroundColor;
        frame.contentWindow.postMessage({theme, background}, "*");
    }
});
"""

TEXTS = {
    "page_temperature": ("Temperature", "温度"),
    "page_temperature_info": (
        "0: always the likeliest word, the same answer each time",
        "0：总取最可能的词，每次回答相同",
    ),
    "page_top_p": ("Top-p", "Top-p"),
    "page_top_p_info": ("draw from this much of the probability", "从累计概率达到该值的词中抽取"),
    "page_length": ("Longest answer, in tokens", "回答的最大长度（词元）"),
    "page_waiting": ("⏳ {place} before you …", "⏳ 前面还有 {place} 个请求……"),
    "page_working": ("✳ looking …", "✳ 正在看图……"),
    "page_stopped": ("stopped", "已停止"),
    "page_cost": (
        "{num_tokens} tokens · {rate:.1f} tokens/s · first after {first_s:.2f} s · prompt: {prompt_tokens} tokens",
        "{num_tokens} 个词元 · {rate:.1f} 词元/秒 · 首个词元 {first_s:.2f} 秒 · 提示 {prompt_tokens} 个词元",
    ),
    "page_cut": ("ended at the chosen length", "已达到设定的长度"),
    "page_no_picture": (
        "Add a picture first: upload, paste, an address or an example.",
        "请先添加图片：上传、粘贴、网址或示例均可。",
    ),
    "page_no_question": ("Type a question first.", "请先输入问题。"),
    "page_bad_picture": ("This picture cannot be used: {reason}", "无法使用这张图片：{reason}"),
    "page_full": (
        "Many are asking right now, and the line is full. Your question is still here: send it again in a moment.",
        "现在提问的人很多，队列已满。问题仍保留，请稍后再发送。",
    ),
    "page_memory": (
        "The device is out of memory. Make the conversation or the answer shorter, or start the page with --load-4bit.",
        "设备内存不足。请缩短对话或回答，或用 --load-4bit 启动页面。",
    ),
    "page_refused": ("This cannot be asked: {reason}", "无法处理这个请求：{reason}"),
    "page_broken": ("Something went wrong on the server; its terminal says what.", "服务器出错，详情见其终端。"),
}  # fmt: skip


def build_settings(service: Service, words: Words) -> list[gr.Component]:
    """Make the sliders whose values `read_settings` takes."""
    temperature = gr.Slider(
        0, 2, 0, step=0.05, label=words.label("page_temperature"), info=words.label("page_temperature_info")
    )
    top_p = gr.Slider(0.05, 1, 1, step=0.05, label=words.label("page_top_p"), info=words.label("page_top_p_info"))
    most = service.max_new_tokens
    length = gr.Slider(1, most, min(512, most), step=1, label=words.label("page_length"))
    return [temperature, top_p, length]


def read_settings(temperature: float, top_p: float, length: float) -> Settings:
    """Raises: ValueError for values that no slider has."""
    sampling = Sampling(float(temperature), float(top_p), secrets.randbelow(2**31))
    return Settings(int(length), sampling)


def open_upload(file: str | None, words: Words, request: gr.Request | None) -> Image:
    """Read the picture that a component names. Raises: gr.Error in the user's words."""
    if not file:
        raise tell("page_no_picture", words, request)
    try:
        return read_picture(Path(file))
    except (ValueError, OSError) as error:
        raise tell("page_bad_picture", words, request, reason=str(error).replace(str(file), "")) from error


def tell(key: str, words: Words, request: gr.Request | None, **values: object) -> gr.Error:
    """Return an error to raise: the page shows it, and what was typed stays where it is."""
    return gr.Error(words.say(key, request, **values), duration=None, title="", print_exception=False)


class Asking:
    """What an open page is waiting for."""

    def __init__(self) -> None:
        self.ticket: Ticket | None = None
        self.is_stopped = False
        self.has_ended = threading.Event()

    def stop(self) -> None:
        self.is_stopped = True
        if self.ticket is not None:
            self.ticket.leave()


class Askings:
    """What all open pages are waiting for: each for one thing, which it can stop.

    Gradio's own way, `cancels`, breaks off what it cancels, whose last words may then come after those of who stopped
    it, or not at all. Here the stopped one ends by itself.
    """

    def __init__(self) -> None:
        self.now: dict[str, Asking] = {}  # by the name that Gradio gives an open page

    @contextlib.contextmanager
    def begin(self, request: gr.Request) -> Generator[Asking, None, None]:
        """Wait for something new; what the page waited for before is stopped."""
        self.stop(request)
        asking = self.now[request.session_hash or ""] = Asking()
        try:
            yield asking
        finally:
            asking.has_ended.set()
            if self.now.get(request.session_hash or "") is asking:
                del self.now[request.session_hash or ""]

    def stop(self, request: gr.Request) -> None:
        """Stop what the page waits for, and return after all that it has to show was shown."""
        asking = self.now.get(request.session_hash or "")
        if asking is not None:
            asking.stop()
            asking.has_ended.wait(STOP_TIMEOUT_S)


def follow(
    join: Callable[[], Ticket[T]], asking: Asking, words: Words, request: gr.Request
) -> Generator[str | T, None, None]:
    """Stand in line; yield where in it as a text, then the job's results; end where it is stopped.

    Raises: gr.Error in the user's words.
    """
    with in_words(words, request):
        yield words.say("page_working", request)
        asking.ticket = join()
        if asking.is_stopped:
            asking.stop()
        for result in asking.ticket.follow():
            if isinstance(result, int):
                yield words.say("page_waiting" if result else "page_working", request, place=result)
            else:
                yield result


@contextlib.contextmanager
def in_words(words: Words, request: gr.Request) -> Generator[None, None, None]:
    """Run the block; what goes wrong in it is raised as gr.Error in the user's words."""
    try:
        yield
    except LineFullError as error:
        raise tell("page_full", words, request) from error
    except OutOfMemoryError as error:
        raise tell("page_memory", words, request) from error
    except ValueError as error:
        raise tell("page_refused", words, request, reason=str(error)) from error
    except Exception as error:
        traceback.print_exception(error)
        raise tell("page_broken", words, request) from error


def show_buttons(is_running: bool) -> tuple[Any, Any]:
    """Return how a button that asks and one that stops are shown."""
    return gr.update(visible=not is_running), gr.update(visible=is_running)


def describe_cost(answer: Answer, words: Words, request: gr.Request | None) -> str:
    """Return what an answer cost, in one line."""
    cost: dict[str, Any] = {
        "num_tokens": answer.num_tokens, "rate": answer.tokens_per_s, "first_s": answer.first_s,
        "prompt_tokens": answer.prompt_tokens,
    }  # fmt: skip
    told = words.say("page_cost", request, **cost)
    return f"{told} · {words.say('page_cut', request)}" if answer.is_cut else told


def frame_look(look: Look, picture: Image, language: str) -> str:
    """Return the document about the inside as a frame of the page; it can run its scripts, and reach nothing else."""
    document = make_look_page(
        look.inside, picture, look.input_ids, look.num_answer_tokens, look.voice.tokenizer, look.question, language
    )
    return f'<iframe class="look" sandbox="allow-scripts" srcdoc="{html.escape(document)}"></iframe>'
