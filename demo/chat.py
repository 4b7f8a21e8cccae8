"""What happens in the chat when something is pressed: several turns about one picture, and a look inside.

The conversation lives in the browser and comes back with every question, so the server keeps nothing of anybody.
"""

import html
import json
import secrets
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.chatbot import ChatbotDataMessages, Message, TextMessage
from PIL import Image

from data.conversation import IMAGE_MARKER, Turn
from demo.line import Ticket
from demo.page import (
    Asking,
    Askings,
    describe_cost,
    follow,
    frame_look,
    in_words,
    open_upload,
    read_settings,
    show_buttons,
    tell,
)
from demo.pictures import fetch
from demo.service import Look, Service
from demo.voice import Answer
from demo.words import Words

Messages = list[dict[str, str]]  # "role", as Gradio calls it: "user" or "assistant"; "text"


def read_messages(payload: ChatbotDataMessages | None) -> Messages:
    """Take a conversation back from the browser: of messages that are not text, Gradio would build any component.

    Raises: gr.Error for anything but texts of user and assistant.
    """
    messages: Messages = []
    for message in [] if payload is None else payload.root:
        if message.role not in ("user", "assistant") or any(part.type != "text" for part in message.content):
            raise gr.Error("a conversation has messages of user and assistant, and these are text")
        text = "".join(part.text for part in message.content if part.type == "text")
        messages.append({"role": message.role, "text": html.unescape(text)})
    return messages


def show_messages(messages: Messages | None) -> ChatbotDataMessages:
    """Give a conversation to the browser, letters as they are: also without Markdown, Gradio takes "<b>" for HTML."""
    return ChatbotDataMessages(
        root=[
            Message(role=message["role"], content=[TextMessage(text=html.escape(message["text"], quote=False))])
            for message in messages or []
        ]
    )


def read_turns(messages: Messages) -> list[Turn]:
    """Return what was said; the picture belongs to the first question.

    Raises: ValueError unless questions and answers alternate.
    """
    roles = [message["role"] for message in messages]
    if roles != [("user", "assistant")[number % 2] for number in range(len(roles))]:
        raise ValueError("questions and answers must alternate: start a new conversation")
    return [
        Turn("gpt" if number % 2 else "human", message["text"], has_image=number == 0)
        for number, message in enumerate(messages)
    ]


def to_llava_json(messages: Messages, picture: str | None, model: str) -> str:
    """Return the conversation as LLaVA's data files have it: rows of `id`, `image`, `conversations`."""
    conversation = []
    for number, message in enumerate(messages):
        text = message["text"].replace(IMAGE_MARKER, "< image >")  # a typed one is not the picture
        is_first = number == 0
        speaker = "gpt" if number % 2 else "human"
        conversation.append({"from": speaker, "value": f"{IMAGE_MARKER}\n{text}" if is_first else text})
    name = Path(picture).name if picture else ""
    row = {"id": secrets.token_hex(8), "image": name, "model": model, "conversations": conversation}
    return json.dumps([row], ensure_ascii=False, indent=2)


class Chat:
    """What happens when something is pressed."""

    def __init__(self, service: Service, words: Words) -> None:
        self.service, self.words, self.askings = service, words, Askings()

    def ask(
        self, question: str, messages: Messages, picture: str | None, voice: str, temperature: float, top_p: float,
        length: float, request: gr.Request,
    ) -> Generator[list[Any], None, None]:  # fmt: skip
        """Yield what the question box, the conversation, the line below, Send and Stop show while an answer comes."""

        def join(turns: Sequence[Turn], image: Image.Image) -> Ticket[list[Answer]]:
            settings = read_settings(temperature, top_p, length)
            return self.service.ask([self.service.find(voice)], turns, image, settings)

        with self.askings.begin(request) as asking:
            try:
                yield from self._answer(question, messages, picture, join, asking, request)
            except gr.Error as error:  # nothing is lost: the question goes back to where it was typed
                yield [question, messages, error.message, *show_buttons(is_running=False)]
                raise

    def _answer(
        self, question: str, messages: Messages, picture: str | None,
        join: Callable[[Sequence[Turn], Image.Image], Ticket[list[Answer]]], asking: Asking, request: gr.Request,
    ) -> Generator[list[Any], None, None]:  # fmt: skip
        if not question.strip():
            raise tell("page_no_question", self.words, request)
        image = open_upload(picture, self.words, request)
        asked = [*messages, {"role": "user", "text": question}]
        told, text = "", ""
        for step in follow(lambda: join(read_turns(asked), image), asking, self.words, request):
            if not isinstance(step, str):
                told, text = describe_cost(step[0], self.words, request), step[0].text
            elif not text:
                told = step
            yield ["", [*asked, {"role": "assistant", "text": text}], told, *show_buttons(is_running=True)]
        if asking.is_stopped:
            told = self.words.say("page_stopped", request) + (f" · {told}" if text else "")
        if asking.is_stopped and not text:
            yield [question, messages, told, *show_buttons(is_running=False)]
        else:
            yield ["", [*asked, {"role": "assistant", "text": text}], told, *show_buttons(is_running=False)]

    def look(
        self, messages: Messages, picture: str | None, voice: str, request: gr.Request
    ) -> Generator[str, None, None]:
        """Yield what the place for the look inside the last answer shows."""
        if len(messages) < 2:
            raise tell("chat_nothing", self.words, request)
        image = open_upload(picture, self.words, request)

        def join() -> Ticket[Look]:
            return self.service.look(self.service.find(voice), read_turns(messages), image)

        with self.askings.begin(request) as asking:
            for step in follow(join, asking, self.words, request):
                if isinstance(step, str):
                    yield step
                    continue
                with in_words(self.words, request):
                    yield frame_look(step, image, self.words.choose(request))

    def stop(self, request: gr.Request) -> None:
        self.askings.stop(request)

    def start_anew(self, request: gr.Request) -> list[Any]:
        """Return an empty conversation, an empty line below and no look inside; what was asked is stopped."""
        self.askings.stop(request)
        return [[], "", ""]

    def load_address(self, address: str, request: gr.Request) -> tuple[Image.Image, str]:
        """Return the picture that lies at an address, and an empty box."""
        try:
            return fetch(address), ""
        except ValueError as error:
            raise tell("page_bad_picture", self.words, request, reason=str(error)) from error

    def save(self, messages: Messages, picture: str | None, voice: str, request: gr.Request) -> str:
        """Return the conversation as a data file, which the browser then stores."""
        if not messages:
            raise tell("chat_nothing", self.words, request)
        return to_llava_json(messages, picture, voice)


def take_back(messages: Messages) -> tuple[str, Messages]:
    """Return the last question, and the conversation before it."""
    number = next((place for place in reversed(range(len(messages))) if messages[place]["role"] == "user"), None)
    return ("", messages) if number is None else (messages[number]["text"], messages[:number])


def edit(messages: Messages, event: gr.EditData) -> tuple[str, Messages]:
    """Return a question as it was changed, and the conversation before it."""
    number = event.index[0] if isinstance(event.index, list | tuple) else event.index
    return html.unescape(str(event.value)), messages[:number]
