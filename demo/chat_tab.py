"""The tab of the chat: what is where, and which button does what."""

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from demo.chat import Chat, edit, read_messages, show_messages, take_back
from demo.page import build_settings
from demo.service import Service
from demo.words import Words

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


@dataclass(frozen=True)
class Parts:
    """What is on the tab."""

    picture: gr.Image
    address: gr.Textbox
    chatbot: gr.Chatbot
    status: gr.Markdown
    question: gr.Textbox
    send: gr.Button
    stop: gr.Button
    look: gr.Button
    again: gr.Button
    clear: gr.Button
    save: gr.Button
    voice: gr.Dropdown
    settings: list[gr.Component]
    inside: gr.HTML
    saved: gr.Textbox


def build_chat(service: Service, words: Words, examples: Sequence[tuple[str, str]]) -> None:
    """Make the tab's contents. Args: examples: pictures' files, each with a question."""
    connect(Chat(service, words), place(service, words, examples))


def place(service: Service, words: Words, examples: Sequence[tuple[str, str]]) -> Parts:
    """Put everything where it belongs."""
    label, names = words.label, [voice.name for voice in service.voices]
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
    return Parts(
        picture, address, chatbot, status, question, send, stop, look, again, clear, save, voice, settings, inside,
        saved,
    )  # fmt: skip


def connect(chat: Chat, on: Parts) -> None:
    """Say what happens when something is pressed."""
    running = [on.question, on.chatbot, on.status, on.send, on.stop]
    asked = [on.question, on.chatbot, on.picture, on.voice, *on.settings]
    gr.on([on.question.submit, on.send.click], chat.ask, asked, running, api_visibility="private")
    for event, prepare in ((on.chatbot.retry, take_back), (on.chatbot.edit, edit), (on.again.click, take_back)):
        prepared = event(prepare, on.chatbot, [on.question, on.chatbot], api_visibility="private")
        prepared.success(chat.ask, asked, running, api_visibility="private")
    on.chatbot.undo(take_back, on.chatbot, [on.question, on.chatbot], api_visibility="private")
    on.look.click(chat.look, [on.chatbot, on.picture, on.voice], on.inside, api_visibility="private")
    on.stop.click(chat.stop, api_visibility="private")
    on.address.submit(chat.load_address, on.address, [on.picture, on.address], api_visibility="private")
    # A conversation is about one picture.
    gr.on(
        [on.clear.click, on.chatbot.clear, on.picture.change], chat.start_anew, None,
        [on.chatbot, on.status, on.inside], api_visibility="private",
    )  # fmt: skip
    saved = on.save.click(chat.save, [on.chatbot, on.picture, on.voice], on.saved, api_visibility="private")
    saved.success(None, on.saved, None, js=SAVE_JS, api_visibility="private")
