"""`render_conversation` against the official way, in `official_llava.py`: the same ids and the same labels.

They differ only where the official code garbles a sample: those cases are listed here, each with what becomes of it.
"""

import itertools
import random

import pytest
import sentencepiece

from data.conversation import CHAT_TEMPLATES, IGNORE_INDEX, Rendered, Turn, parse_turns, render_conversation
from data.tokenizer import Tokenizer
from tests.data.official_llava import OfficialExample, OfficialTokenizer, make_example, make_prompt

# White space of all kinds at both ends and inside, scripts in the vocabulary and outside, and what looks like markup.
TEXTS = (
    *(
        "Q1",
        "Is it 3.14?",
        "Yes, it is.",
        "a\nb",
        "\nc\n\nd\n",
        "图中是什么形状?",
        "圆形。",
        "龘靐齉",
        "聪明的鹦鹉",
        "日本語 한국어",
    ),
    *(
        "😀",
        "a😀 👩‍👩‍👧b",
        "🇨🇳",
        " x",
        "x ",
        "  x  y  ",
        "   ",
        " ",
        "\t",
        "a\tb\t",
        "\n",
        "\r\n",
        "\N{NO-BREAK SPACE}x",
    ),
    *(
        "\N{IDEOGRAPHIC SPACE}图 中\N{IDEOGRAPHIC SPACE}",
        "x" + " " * 40 + "y",
        "▁a▁",
        "USER: hi",
        "[INST] a",
    ),
    *("<<SYS>>", "<0x0A>", "<im_start>", "<image", "</ s>", "s>", "<", "don't", "naïve é", "{}\\", "\x00"),
)
GARBLED_TEXTS = ("", "a </s> b", "</s>", "<unk>", "a <unk>")


def make_row(messages: list[str], image_turn: int | None) -> dict:
    """Return a row; the image is in front of the question `image_turn`."""
    values = [f"<image>\n{text}" if number == image_turn else text for number, text in enumerate(messages)]
    turns = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return {"conversations": turns} | ({} if image_turn is None else {"image": "x.png"})


def make_rows() -> list[dict]:
    """Return each text as question and as answer, with image and without, then conversations of many turns."""
    rows = [
        make_row(messages, image_turn)
        for text in TEXTS
        for messages in ([text, "A1"], ["Q1", text], ["Q1", text, text, "A2"])
        for image_turn in (None, 0)
    ]
    source = random.Random(0)
    for num_questions in (2, 3, 4, 7) * 25:
        messages = source.choices(TEXTS, k=2 * num_questions)
        rows.append(make_row(messages, source.choice((None, 0, 2))))
    return rows


def compare(row: dict, template: str, tokenizer: Tokenizer, official: OfficialTokenizer) -> OfficialExample:
    """Check ids, and labels unless the official ones are lost. The official code has one sentinel for an image."""
    expected = make_example(row, template, official)
    rendered = render_conversation(parse_turns(row), tokenizer, 1, template)
    assert rendered.input_ids == expected.input_ids, row
    if not expected.is_masked:
        assert rendered.labels == expected.labels, row
    return expected


def supervised(rendered: Rendered | OfficialExample) -> list[int]:
    return [label for label in rendered.labels if label != IGNORE_INDEX]


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("kind", ["llama", "llama_json"])
def test_ids_and_labels_are_the_official_ones(
    request: pytest.FixtureRequest, kind: str, template: str, llama_processor: sentencepiece.SentencePieceProcessor
) -> None:
    """Text only and with an image, one turn and many, in all of the official code's chat templates."""
    tokenizer, official = request.getfixturevalue(f"{kind}_tokenizer"), OfficialTokenizer(llama_processor)
    rows = make_rows()
    assert len(rows) > 300
    for row in rows:
        assert not compare(row, template, tokenizer, official).is_masked, row


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_ids_are_the_official_ones_in_the_tiny_vocabulary(
    tiny_tokenizer: Tokenizer, tiny_processor: sentencepiece.SentencePieceProcessor, template: str
) -> None:
    """Its USER is cut otherwise than LLaMA's, so the official code loses track of every later vicuna turn."""
    official = OfficialTokenizer(tiny_processor)
    for row in make_rows():
        is_masked = compare(row, template, tiny_tokenizer, official).is_masked
        assert is_masked == (len(row["conversations"]) > 2 and template != "llava_llama_2")


def test_captions_are_the_official_ones(
    llama_tokenizer: Tokenizer, llama_processor: sentencepiece.SentencePieceProcessor
) -> None:
    """The plain template, stage 1."""
    official = OfficialTokenizer(llama_processor)
    for text in (*TEXTS, ""):
        expected = compare(make_row(["Describe it.", text], 0), "plain", llama_tokenizer, official)
        assert supervised(expected)[-1] == 13


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_prompts_are_the_official_ones(
    llama_tokenizer: Tokenizer, llama_processor: sentencepiece.SentencePieceProcessor, template: str
) -> None:
    """What the official command line sends to the model: the marker in front of the first question."""
    official = OfficialTokenizer(llama_processor)
    for first, later, has_image in itertools.product(TEXTS, ("Q2", " 龘 "), (False, True)):
        turns = [Turn("human", first, has_image), Turn("gpt", "A1"), Turn("human", later)]
        shown = "<image>\n" + first if has_image else first
        for num_turns, messages in ((1, [shown, None]), (3, [shown, "A1", later, None])):
            expected = official.tokenize_around_images(make_prompt(messages, template))
            assert render_conversation(turns[:num_turns], llama_tokenizer, 1, template).input_ids == expected


def test_a_question_that_is_nothing_but_an_image(
    llama_tokenizer: Tokenizer, llama_processor: sentencepiece.SentencePieceProcessor
) -> None:
    """Then no newline follows the marker: the official code strips it."""
    official = OfficialTokenizer(llama_processor)
    for value, template in itertools.product(("<image>", "<image>\n", "\n <image> "), CHAT_TEMPLATES):
        row = make_row([value, "A1"], None) | {"image": "x.png"}
        assert not compare(row, template, llama_tokenizer, official).is_masked


def test_a_long_text_is_cut_as_officially(
    llama_tokenizer: Tokenizer, llama_processor: sentencepiece.SentencePieceProcessor
) -> None:
    """Text beyond the limit is lost, and what is left of it still trains."""
    row = make_row(["Q1", "word 龘 " * 300, "Q2", "A2 " * 300], None)
    expected = make_example(row, "vicuna_v1", OfficialTokenizer(llama_processor), max_length=1000)
    rendered = render_conversation(parse_turns(row), llama_tokenizer, 1, max_tokens=1000)
    assert len(expected.input_ids) == 1000
    assert (rendered.input_ids, rendered.labels) == (expected.input_ids, expected.labels)
    assert rendered.num_supervised > 900


@pytest.mark.parametrize(
    ("template", "question", "answer"),
    [
        *((template, "Q1", answer) for template in CHAT_TEMPLATES for answer in GARBLED_TEXTS),
        *((template, question, "A1") for template in CHAT_TEMPLATES for question in GARBLED_TEXTS),
        *(("vicuna_v1", *texts) for texts in (("Q1", "a ASSISTANT: b"), ("a ASSISTANT: b", "A1"))),
        *(("llava_llama_2", *texts) for texts in (("Q1", "a [/INST] b"), ("a [/INST] b", "A1"), ("[/INST]", "A1"))),
    ],
)
def test_samples_that_the_official_code_masks(
    llama_tokenizer: Tokenizer,
    llama_processor: sentencepiece.SentencePieceProcessor,
    template: str,
    question: str,
    answer: str,
) -> None:
    """It loses track of its lengths and learns nothing from them; here they teach their answers, and every </s>."""
    row = make_row([question, answer, "Q2", "A2"], None)
    rendered = render_conversation(parse_turns(row), llama_tokenizer, 1, template)
    space, end = (" " if template == "llava_llama_2" else ""), [llama_tokenizer.eos_token_id]
    first, second = (llama_tokenizer.encode(text + space) + end for text in (answer, "A2"))
    assert supervised(rendered) == first + second
    assert 0 not in rendered.input_ids
    # An empty answer is an exception when other turns follow: the official code glues the turns together, and trains.
    single = make_example(make_row([question, answer], None), template, OfficialTokenizer(llama_processor))
    several = make_example(row, template, OfficialTokenizer(llama_processor))
    assert single.is_masked
    assert several.is_masked == (answer != "")


def test_a_question_that_ends_like_its_frame(
    llama_tokenizer: Tokenizer, llama_processor: sentencepiece.SentencePieceProcessor
) -> None:
    """The official code takes the first "ASSISTANT:" for the answer's, and learns the rest of the question with it."""
    row = make_row(["a ASSISTANT:", "A1"], None)
    expected = make_example(row, "vicuna_v1", OfficialTokenizer(llama_processor))
    rendered = render_conversation(parse_turns(row), llama_tokenizer, 1)
    assert rendered.input_ids == expected.input_ids
    assert llama_tokenizer.decode(supervised(expected)) == "ASSISTANT: A1"
    assert llama_tokenizer.decode(supervised(rendered)) == "A1"


def test_a_typed_bos_is_text(llama_tokenizer: Tokenizer, llama_processor: sentencepiece.SentencePieceProcessor) -> None:
    """The official code trains such samples, with a control token that the user put there; here it is three letters."""
    row = make_row(["a <s> b", "A1"], None)
    expected = make_example(row, "vicuna_v1", OfficialTokenizer(llama_processor))
    rendered = render_conversation(parse_turns(row), llama_tokenizer, 1)
    assert expected.input_ids.count(1) == 2
    assert rendered.input_ids.count(1) == 1
    assert supervised(rendered) == supervised(expected)
    assert "a <s> b" in llama_tokenizer.decode(rendered.input_ids)
