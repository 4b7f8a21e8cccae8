"""What the tabs of the page share: uploaded pictures, words for what goes wrong, and for what an answer cost."""

import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from PIL.Image import Image

from demo.line import LineFullError, Ticket
from demo.pictures import read_picture
from demo.service import OutOfMemoryError
from demo.voice import Answer
from demo.words import Words

T = TypeVar("T")

TEXTS = {
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


def follow(join: Callable[[], Ticket[T]], words: Words, request: gr.Request | None) -> Generator[str | T, None, None]:
    """Stand in line; yield where in it as a text, then the job's results.

    Raises: gr.Error in the user's words.
    """
    try:
        yield words.say("page_working", request)
        for result in join().follow():
            yield words.say("page_waiting", request, place=result) if isinstance(result, int) else result
    except LineFullError as error:
        raise tell("page_full", words, request) from error
    except OutOfMemoryError as error:
        raise tell("page_memory", words, request) from error
    except ValueError as error:
        raise tell("page_refused", words, request, reason=str(error)) from error
    except Exception as error:
        traceback.print_exception(error)
        raise tell("page_broken", words, request) from error


def describe_cost(answer: Answer, words: Words, request: gr.Request | None) -> str:
    """Return what an answer cost, in one line."""
    cost: dict[str, Any] = {
        "num_tokens": answer.num_tokens, "rate": answer.tokens_per_s, "first_s": answer.first_s,
        "prompt_tokens": answer.prompt_tokens,
    }  # fmt: skip
    told = words.say("page_cost", request, **cost)
    return f"{told} · {words.say('page_cut', request)}" if answer.is_cut else told
