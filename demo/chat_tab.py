"""The chat: several turns about one picture, and a look inside the last answer.

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
    build_settings,
    describe_cost,
    follow,
    frame_look,
    in_words,
    open_upload,
    read_settings,
    tell,
)
from demo.pictures import fetch
from demo.service import Look, Service
from demo.voice import Answer
from demo.words import Words

Messages = list[dict[str, str]]  # "role", as Gradio calls it: "user" or "assistant"; "text"

TEXTS = {
    "chat_picture": ("Picture", "图片"),
    "chat_address": ("https://… address of a picture, then Enter", "https://… 图片网址，按回车"),
    "chat_examples": ("Examples", "示例"),
    "chat_voice": ("Model", "模型"),
    "chat_settings": ("Settings", "设置"),
    "chat_conversation": ("Conversation", "对话"),
    "chat_welcome": (
        "**Add a picture and ask about it.**\n"
        "Upload it, paste it anywhere on the page, give its address, or take an example.",
        "**添加一张图片，然后提问。**\n可以上传、在页面任意位置粘贴、填写网址，或选用示例。",
    ),
    "chat_question": ("Ask about the picture … (Enter sends)", "针对图片提问……（回车发送）"),
    "chat_send": ("Send", "发送"),
    "chat_stop": ("Stop", "停止"),
    "chat_again": ("Regenerate", "重新生成"),
    "chat_clear": ("New conversation", "新对话"),
    "chat_save": ("Download", "下载对话"),
    "chat_look": ("Look inside", "看看内部"),
    "chat_nothing": ("Ask something first.", "请先提一个问题。"),
}


# Beside the conversation, or on a phone below it, is what one seldom needs.
CSS = """
#chat-grid { display: grid; grid-template: "picture chat" auto "options chat" 1fr / minmax(0, 2fr) minmax(0, 3fr); }
#chat-left { grid-area: picture; } #chat-right { grid-area: chat; } #chat-options { grid-area: options; }
#chat-grid > * { min-width: 0 !important; }
@media (max-width: 700px) { #chat-grid { grid-template: "picture" "chat" "options" / minmax(0, 1fr); } }
"""

# Stores a text as a file, in the browser: on the server it would have to be kept for somebody to fetch.
SAVE_JS = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
    URL.revokeObjectURL(link.href);
}"""

# A picture that is pasted anywhere goes where one is uploaded; Gradio's own paste button wants https.
PASTE_JS = """
document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    const input = document.querySelector("#chat-picture input[type=file]");
    if (!file || !input) return;
    const files = new DataTransfer();
    files.items.add(file);
    input.files = files.files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
    event.preventDefault();
});
"""


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


def make_chatbot(words: Words) -> gr.Chatbot:
    """Return the component with the conversation, whose value are `Messages`."""
    chatbot = gr.Chatbot(
        label=words.label("chat_conversation"), placeholder=words.label("chat_welcome"), height=460, editable="user",
        buttons=["copy"], latex_delimiters=[], allow_tags=False, render_markdown=False, elem_id="chat",
    )  # fmt: skip
    # Not a class of its own: beside its file, Gradio would write another one.
    chatbot.preprocess = read_messages  # type: ignore[method-assign,assignment]
    chatbot.postprocess = show_messages  # type: ignore[method-assign,assignment]
    return chatbot


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
                yield [question, messages, error.message, *_show_buttons(is_running=False)]
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
            yield ["", [*asked, {"role": "assistant", "text": text}], told, *_show_buttons(is_running=True)]
        if asking.is_stopped:
            told = self.words.say("page_stopped", request) + (f" · {told}" if text else "")
        if asking.is_stopped and not text:
            yield [question, messages, told, *_show_buttons(is_running=False)]
        else:
            yield ["", [*asked, {"role": "assistant", "text": text}], told, *_show_buttons(is_running=False)]

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


def _show_buttons(is_running: bool) -> tuple[Any, Any]:
    return gr.update(visible=not is_running), gr.update(visible=is_running)


def build_chat(service: Service, words: Words, examples: Sequence[tuple[str, str]]) -> None:
    """Make the tab's contents. Args: examples: pictures' files, each with a question."""
    label, chat, names = words.label, Chat(service, words), [voice.name for voice in service.voices]
    with gr.Row(elem_id="chat-grid"):
        with gr.Column(elem_id="chat-left"):
            picture = gr.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], label=label("chat_picture"),
                height=320, elem_id="chat-picture", buttons=["fullscreen"],
            )  # fmt: skip
            address = gr.Textbox(
                show_label=False, placeholder=label("chat_address"), max_lines=1, container=False,
                elem_id="chat-address",
            )  # fmt: skip
        with gr.Column(elem_id="chat-right"):
            chatbot = make_chatbot(words)
            status = gr.Markdown(elem_classes="status", elem_id="chat-status", sanitize_html=True)
            with gr.Row():
                question = gr.Textbox(
                    show_label=False, placeholder=label("chat_question"), container=False, scale=5, lines=1,
                    max_lines=6, autofocus=True, elem_id="chat-question",
                )  # fmt: skip
                send = gr.Button(label("chat_send"), variant="primary", scale=1, min_width=80, elem_id="chat-send")
                stop = gr.Button(
                    label("chat_stop"), variant="stop", scale=1, min_width=80, visible=False, elem_id="chat-stop"
                )
            with gr.Row(elem_classes="small-buttons"):
                look = gr.Button(label("chat_look"), size="sm", min_width=100, elem_id="chat-look")
                again = gr.Button(label("chat_again"), size="sm", min_width=100, elem_id="chat-again")
                clear = gr.Button(label("chat_clear"), size="sm", min_width=100, elem_id="chat-clear")
                save = gr.Button(label("chat_save"), size="sm", min_width=100, elem_id="chat-save")
        with gr.Column(elem_id="chat-options"):
            voice = gr.Dropdown(names, value=names[-1], label=label("chat_voice"), visible=len(names) > 1)
            with gr.Accordion(label("chat_settings"), open=False, elem_id="chat-settings"):
                settings = build_settings(service, words)
            if examples:
                pairs = [list(pair) for pair in examples]
                gr.Examples(pairs, [picture, question], label=label("chat_examples"), elem_id="chat-examples")
    inside = gr.HTML(elem_id="inside")
    saved = gr.Textbox(visible=False)

    running = [question, chatbot, status, send, stop]
    asked = [question, chatbot, picture, voice, *settings]
    gr.on([question.submit, send.click], chat.ask, asked, running, api_visibility="private")
    for event, prepare in ((chatbot.retry, take_back), (chatbot.edit, edit), (again.click, take_back)):
        prepared = event(prepare, chatbot, [question, chatbot], api_visibility="private")
        prepared.success(chat.ask, asked, running, api_visibility="private")
    look.click(chat.look, [chatbot, picture, voice], inside, api_visibility="private")
    stop.click(chat.stop, api_visibility="private")
    chatbot.undo(take_back, chatbot, [question, chatbot], api_visibility="private")
    address.submit(chat.load_address, address, [picture, address], api_visibility="private")
    # A conversation is about one picture.
    gr.on(
        [clear.click, chatbot.clear, picture.change], chat.start_anew, None, [chatbot, status, inside],
        api_visibility="private",
    )  # fmt: skip
    save.click(chat.save, [chatbot, picture, voice], saved, api_visibility="private").success(
        None, saved, None, js=SAVE_JS, api_visibility="private"
    )
