"""One question to two voices, side by side: what only one of them says is marked, and it can be voted on.

Answers are written to the page, never read from it: a vote names a comparison that the server kept.
"""

import html
from collections.abc import Callable, Generator, Sequence
from typing import Any

import gradio as gr
from PIL.Image import Image

from data.conversation import Turn
from demo.difference import find_differences, mark
from demo.line import Ticket
from demo.page import Askings, build_settings, describe_cost, follow, open_upload, read_settings, show_buttons, tell
from demo.service import Service
from demo.voice import Answer, Settings
from demo.votes import CHOICES, VoteError, VoteFile, VoteFolderFullError
from demo.words import Words

TEXTS = {
    "compare_about": (
        "One question, two models, one picture: both answer together, and what only one of them says is marked.",
        "同一张图片、同一个问题，两个模型同时回答；只出现在其中一方的内容会标出来。",
    ),
    "compare_one": (
        "### There is one model here, and nothing to compare it with\n"
        "Start the page with a second one:\n\n"
        "| option | compares |\n|---|---|\n"
        "| `--adapter runs/tiny-zh/final` | the model with and without a LoRA adapter, over one copy of the weights |\n"
        "| `--compare 4bit` (or `8bit`) | the model with itself in fewer bits |\n"
        "| `--compare FOLDER` | two models |",
        "### 目前只有一个模型，没有可以对比的对象\n"
        "启动页面时再加一个：\n\n"
        "| 选项 | 对比内容 |\n|---|---|\n"
        "| `--adapter runs/tiny-zh/final` | 同一份权重，加与不加 LoRA 适配器 |\n"
        "| `--compare 4bit`（或 `8bit`） | 同一个模型与它的低比特版本 |\n"
        "| `--compare 文件夹` | 两个不同的模型 |",
    ),
    "compare_picture": ("Picture", "图片"),
    "compare_question": ("Question", "问题"),
    "compare_placeholder": ("Ask both about the picture … (Enter asks)", "就这张图片向两个模型提问……（回车提问）"),
    "compare_left": ("Left", "左侧"),
    "compare_right": ("Right", "右侧"),
    "compare_settings": ("Settings", "设置"),
    "compare_examples": ("Examples", "示例"),
    "compare_ask": ("Ask both", "同时提问"),
    "compare_stop": ("Stop", "停止"),
    "compare_empty": (
        '<div class="compare-empty">The two answers appear here, side by side.</div>',
        '<div class="compare-empty">两个回答会并排显示在这里。</div>',
    ),
    "compare_nothing": ("(it said nothing)", "（没有输出）"),
    "compare_same": ("Both say the same.", "两个回答相同。"),
    "compare_different": ("Marked: what only one of the two says.", "标出的内容只出现在其中一个回答里。"),
    "compare_which": (
        "**Which answer is better?** A vote stores picture, question and answers on this server.",
        "**哪个回答更好？** 投票后，图片、问题和两个回答会保存在本服务器上。",
    ),
    "compare_vote_left": ("← Left is better", "← 左侧更好"),
    "compare_vote_right": ("Right is better →", "右侧更好 →"),
    "compare_vote_both_good": ("Both good", "都好"),
    "compare_vote_both_bad": ("Both bad", "都不好"),
    "compare_thanks": ("Thank you, your vote is stored.", "谢谢，投票已保存。"),
    "compare_closed": (
        "These answers can no longer be voted on: it was done already, or is too long ago. Ask again.",
        "无法再对这组回答投票：已经投过，或时间太久。请重新提问。",
    ),
    "compare_full": (
        "The folder for votes is full ({limit} MB), so this one was not stored. Whoever runs this page can empty it.",
        "投票文件夹已满（{limit} MB），本次投票未保存。请联系本页面的维护者清理。",
    ),
}

CSS = """
.compare-pair { display: grid; grid-template-columns: 1fr 1fr; gap: var(--layout-gap, 16px); }
.compare-side { display: flex; flex-direction: column; min-width: 0; overflow: hidden;
    border: 1px solid var(--border-color-primary); border-radius: var(--block-radius, 8px);
    background: var(--block-background-fill); }
.compare-side h3 { margin: 0; padding: 8px 14px; font-size: .95em; font-weight: 600; overflow-wrap: anywhere;
    border-bottom: 1px solid var(--border-color-primary); border-top: 3px solid var(--compare-ink);
    color: var(--body-text-color); }
.compare-side p { flex: 1; margin: 0; padding: 14px; min-height: 5em; font-size: 1.1em; line-height: 1.65;
    white-space: pre-wrap; overflow-wrap: anywhere; color: var(--body-text-color); }
.compare-side footer { padding: 6px 14px; font-size: .8em; color: var(--body-text-color-subdued);
    border-top: 1px solid var(--border-color-primary); min-height: 2.4em; }
.compare-side em { color: var(--body-text-color-subdued); }
.compare-side mark { color: inherit; padding: .05em .15em; border-radius: 4px; background: var(--compare-wash);
    box-shadow: inset 0 -2px var(--compare-ink); -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.compare-left { --compare-ink: #d97706; --compare-wash: #f59e0b40; }
.compare-right { --compare-ink: #2563eb; --compare-wash: #3b82f640; }
.tabitem:has(#compare-stop) .compare-writing p::after { content: "▍"; color: var(--compare-ink);
    animation: compare-blink 1s steps(2) infinite; }
@keyframes compare-blink { 50% { opacity: 0; } }
.compare-verdict { margin: 10px 2px 0; min-height: 1.5em; font-size: .9em; color: var(--body-text-color-subdued); }
.compare-verdict.same { color: var(--body-text-color); font-weight: 600; }
#compare-answers .html-container { padding: 0; }
.compare-empty { padding: 28px; text-align: center; color: var(--body-text-color-subdued);
    border: 1px dashed var(--border-color-primary); border-radius: var(--block-radius, 8px); }
#compare-picture img { width: 100%; height: 100%; object-fit: contain; }
#compare-left input, #compare-right input { text-overflow: ellipsis; padding-right: 2em; }
@media (max-width: 640px) { .compare-pair { grid-template-columns: 1fr; } }
@media (prefers-reduced-motion: reduce) { .tabitem:has(#compare-stop) .compare-writing p::after { animation: none; } }
"""


class Compare:
    """What happens when something is pressed."""

    def __init__(self, service: Service, words: Words, votes: VoteFile | None) -> None:
        self.service, self.words, self.votes, self.askings = service, words, votes, Askings()

    def ask(
        self, question: str, picture: str | None, left: str, right: str, temperature: float, top_p: float,
        length: float, request: gr.Request,
    ) -> Generator[list[Any], None, None]:  # fmt: skip
        """Yield what status line, answers, ballot, votes, Ask and Stop show while the answers come."""
        with self.askings.begin(request) as asking:
            yield ["", gr.skip(), *_show_votes(""), *show_buttons(is_running=True)]
            try:
                if not question.strip():
                    raise tell("page_no_question", self.words, request)
                image, names = open_upload(picture, self.words, request), (left, right)
                settings, join = self.prepare(names, question, image, (temperature, top_p, length), request)
                answers = [Answer(), Answer()]
                for step in follow(join, asking, self.words, request):
                    told, answers = (step, answers) if isinstance(step, str) else ("", step)
                    yield [told, self.show(names, answers, request), *[gr.skip()] * 4]
            except gr.Error:
                yield ["", gr.skip(), *_show_votes(""), *show_buttons(is_running=False)]
                raise
            told, ballot = self.words.say("page_stopped", request) if asking.is_stopped else "", ""
            if self.votes is not None and not asking.is_stopped:
                ballot = self.votes.offer(_describe(names, question, answers, settings), image)
            yield [told, gr.skip(), *_show_votes(ballot), *show_buttons(is_running=False)]

    def prepare(
        self, names: Sequence[str], question: str, picture: Image, sliders: Sequence[float], request: gr.Request | None
    ) -> tuple[Settings, Callable[[], Ticket[list[Answer]]]]:
        """Return how it is to be answered, and how to stand in line for that. Raises: gr.Error in the user's words."""
        try:
            settings, voices = read_settings(*sliders), [self.service.find(name) for name in names]
        except ValueError as error:
            raise tell("page_refused", self.words, request, reason=str(error)) from error
        turns = [Turn("human", question, has_image=True)]
        return settings, lambda: self.service.ask(voices, turns, picture, settings)

    def show(self, names: Sequence[str], answers: Sequence[Answer], request: gr.Request | None) -> str:
        """Return both answers as HTML; what differs is marked when both are over."""
        say, verdict = self.words.say, ""
        texts = [html.escape(answer.text) for answer in answers]
        if all(answer.is_over for answer in answers):
            differences = find_differences(answers[0].text, answers[1].text)
            texts = [mark(answer.text, spans) for answer, spans in zip(answers, differences, strict=True)]
            texts = [text or f"<em>{say('compare_nothing', request)}</em>" for text in texts]
            kind = "different" if any(differences) else "same"
            verdict = f'<div class="compare-verdict {kind}">{say(f"compare_{kind}", request)}</div>'
        sides = []
        for side, name, answer, text in zip(("left", "right"), names, answers, texts, strict=True):
            writing = "" if answer.is_over else "compare-writing"
            cost = describe_cost(answer, self.words, request) if answer.num_tokens else ""
            sides.append(
                f'<article class="compare-side compare-{side} {writing}"><h3>{html.escape(name)}</h3>'
                f'<p dir="auto">{text}</p><footer>{cost}</footer></article>'
            )
        return f'<div class="compare-pair">{"".join(sides)}</div>{verdict}'

    def vote_for(self, choice: str) -> Callable[[str, gr.Request], list[Any]]:
        """Return what a vote button does: what status line, ballot and votes show after it was pressed."""

        def vote(ballot: str, request: gr.Request) -> list[Any]:
            assert self.votes is not None
            try:
                self.votes.vote(ballot, choice)
                told = self.words.say("compare_thanks", request)
            except VoteFolderFullError as error:
                told = self.words.say("compare_full", request, limit=error.max_bytes // 10**6)
            except VoteError:
                told = self.words.say("compare_closed", request)
            return [told, *_show_votes("")]

        return vote

    def stop(self, request: gr.Request) -> None:
        self.askings.stop(request)


def _describe(names: Sequence[str], question: str, answers: Sequence[Answer], settings: Settings) -> dict[str, Any]:
    """Return what a vote on these answers is about."""
    return {
        "models": list(names),
        "question": question,
        "answers": [answer.text for answer in answers],
        "settings": {
            "temperature": settings.sampling.temperature,
            "top_p": settings.sampling.top_p,
            "seed": settings.sampling.seed,
            "max_new_tokens": settings.max_new_tokens,
        },
    }


def _show_votes(ballot: str) -> tuple[Any, Any]:
    return ballot, gr.update(visible=bool(ballot))


def build_compare(
    service: Service, words: Words, votes: VoteFile | None, examples: Sequence[tuple[str, str]] = ()
) -> None:
    """Make the tab's contents. Args: examples: pictures' files, each with a question."""
    label, compare, names = words.label, Compare(service, words, votes), [voice.name for voice in service.voices]
    if len(names) < 2:
        gr.Markdown(label("compare_one"), elem_id="compare-one")
        return
    gr.Markdown(label("compare_about"))
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            picture = gr.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], label=label("compare_picture"),
                height=300, elem_id="compare-picture", buttons=["fullscreen"],
            )  # fmt: skip
        with gr.Column(scale=3, min_width=280):
            question = gr.Textbox(
                label=label("compare_question"), placeholder=label("compare_placeholder"), lines=1, max_lines=6,
                elem_id="compare-question",
            )  # fmt: skip
            with gr.Row():
                left, right = (
                    gr.Dropdown(names, value=name, label=label(key), min_width=180, elem_id=key.replace("_", "-"))
                    for key, name in (("compare_left", names[0]), ("compare_right", names[-1]))
                )
            with gr.Accordion(label("compare_settings"), open=False, elem_id="compare-settings"):
                settings = build_settings(service, words)
            ask = gr.Button(label("compare_ask"), variant="primary", elem_id="compare-ask")
            stop = gr.Button(label("compare_stop"), variant="stop", visible=False, elem_id="compare-stop")
            status = gr.Markdown(elem_classes="status", elem_id="compare-status", sanitize_html=True)
    answers = gr.HTML(label("compare_empty"), elem_id="compare-answers", padding=False)
    ballot, choices = _build_votes(compare, words, status)
    if examples:
        gr.Examples(
            [list(pair) for pair in examples], [picture, question], label=label("compare_examples"),
            elem_id="compare-examples",
        )  # fmt: skip

    gr.on(
        [question.submit, ask.click], compare.ask, [question, picture, left, right, *settings],
        [status, answers, ballot, choices, ask, stop], api_visibility="private", show_progress="hidden",
    )  # fmt: skip
    stop.click(compare.stop, api_visibility="private")


def _build_votes(compare: Compare, words: Words, status: gr.Component) -> tuple[gr.Component, gr.Column]:
    """Make what appears below two answers: the name to vote on them with, which nobody sees, and the buttons."""
    ballot = gr.Textbox(visible=False)
    with gr.Column(visible=False) as choices:
        if compare.votes is None:
            return ballot, choices
        gr.Markdown(words.label("compare_which"))
        with gr.Row(elem_id="compare-votes"):
            for choice in CHOICES:
                label = words.label(f"compare_vote_{choice}")
                button = gr.Button(label, size="sm", min_width=130, elem_id=f"compare-vote-{choice}")
                outputs = [status, ballot, choices]
                button.click(compare.vote_for(choice), ballot, outputs, api_visibility="private")
    return ballot, choices
