"""`render_conversation` against the official code's ids (the vectors were rendered by it), and its own promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.conversation import (
    CHAT_TEMPLATES,
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    POSITIONS,
    SYSTEM,
    TEMPLATES,
    Rendered,
    Turn,
    format_tokens,
    main,
    parse_turns,
    render_conversation,
)
from data.tokenizer import Tokenizer
from tests.conftest import ROOT

P = 5  # placeholders of one image

# "{SYSTEM} USER: <image>\nQ1 ASSISTANT:" as llava.mm_utils.tokenizer_image_token gives it, one sentinel per image.
OFFICIAL_PROMPT = [
    *(1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892),
    *(13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871),
    *(IMAGE_TOKEN_ID, 29871, 13, 29984, 29896, 319, 1799, 9047, 13566, 29901),
]
ANSWER_1, ANSWER_2 = [319, 29896, 2], [319, 29906, 2]
# After </s> the official code of today has one piece USER where the first turn has two, US and ER.
SECOND_TURN = [11889, 29901, 660, 29906, 319, 1799, 9047, 13566, 29901]

TWO_TURNS = [Turn("human", "Q1", True), Turn("gpt", "A1"), Turn("human", "Q2"), Turn("gpt", "A2")]


def supervised(rendered: Rendered) -> list[int]:
    """Return the ids that are learned, in order."""
    return [label for label in rendered.labels if label != IGNORE_INDEX]


def select(rendered: Rendered, branch: int) -> tuple[list[int], list[int], list[int]]:
    """Return what one branch sees: ids, labels and positions of the trunk and of itself."""
    seen = [i for i, owner in enumerate(rendered.branch_ids) if owner in (0, branch)]
    columns = (rendered.input_ids, rendered.labels, rendered.position_ids)
    return tuple([column[i] for i in seen] for column in columns)  # type: ignore[return-value]


def make_row(*values: str, image: object = None, first: str = "human") -> dict:
    """Return a row whose turns alternate."""
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    turns = [{"from": speakers[number % 2], "value": value} for number, value in enumerate(values)]
    return {"conversations": turns} | ({} if image is None else {"image": image})


def test_prompt_is_the_official_one(llama_tokenizer: Tokenizer) -> None:
    """One id off and the official weights answer worse without any error."""
    assert len(OFFICIAL_PROMPT) == 45
    rendered = render_conversation(TWO_TURNS[:1], llama_tokenizer, P)
    place = OFFICIAL_PROMPT.index(IMAGE_TOKEN_ID)
    assert rendered.input_ids == OFFICIAL_PROMPT[:place] + [IMAGE_TOKEN_ID] * P + OFFICIAL_PROMPT[place + 1 :]
    assert rendered.num_supervised == 0


def test_two_turns_have_the_official_labels(llama_tokenizer: Tokenizer) -> None:
    """Learned are the answers with their </s>, of every turn; USER: of the second turn is read but not learned."""
    rendered = render_conversation(TWO_TURNS, llama_tokenizer, 1)
    assert rendered.input_ids == OFFICIAL_PROMPT + ANSWER_1 + SECOND_TURN + ANSWER_2
    nothing = IGNORE_INDEX
    assert rendered.labels == [nothing] * 45 + ANSWER_1 + [nothing] * len(SECOND_TURN) + ANSWER_2
    assert rendered.num_supervised == 6


def test_chat_template_differs_in_one_word(llama_tokenizer: Tokenizer) -> None:
    """The official command line and browser speak of a curious human, training and benchmarks of a user."""
    user, human = 1404, 5199
    rendered = render_conversation(TWO_TURNS, llama_tokenizer, 1, "llava_v1")
    prompt = [human if token == user else token for token in OFFICIAL_PROMPT]
    assert prompt.count(human) == 2
    assert rendered.input_ids == prompt + ANSWER_1 + SECOND_TURN + ANSWER_2


def test_llama_2_template_is_the_official_one(llama_tokenizer: Tokenizer) -> None:
    """An answer ends in a space token, and later questions follow a `<s>` of their own, with no space before [INST]."""
    rendered = render_conversation(TWO_TURNS, llama_tokenizer, 1, "llava_llama_2")
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language."
    )
    text = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n \nQ1 [/INST] A1 [INST] Q2 [/INST] A2 "
    assert llama_tokenizer.decode(rendered.input_ids) == text
    place = rendered.input_ids.index(IMAGE_TOKEN_ID)
    inst, end_inst, space = [25580, 29962], [518, 29914, 25580, 29962], 29871
    assert rendered.input_ids[:4] == [1, 518, *inst]
    assert rendered.input_ids[place - 2 : place + 5] == [13, 13, IMAGE_TOKEN_ID, space, 13, 29984, 29896]
    rest = [*end_inst, 319, 29896, space, 2, 1, 29961, *inst, 660, 29906, *end_inst, 319, 29906, space, 2]
    assert rendered.input_ids[place + 5 :] == rest
    assert supervised(rendered) == [319, 29896, space, 2, 319, 29906, space, 2]


def test_plain_template_is_the_official_one(llama_tokenizer: Tokenizer) -> None:
    """Stage 1 reads no instruction, learns the caption and its newline (13), and has no </s>."""
    turns = [Turn("human", "Describe it.", True), Turn("gpt", "A1")]
    rendered = render_conversation(turns, llama_tokenizer, P, "plain")
    assert rendered.input_ids == [1] + [IMAGE_TOKEN_ID] * P + [319, 29896, 13]
    assert rendered.labels == [IGNORE_INDEX] * (1 + P) + [319, 29896, 13]


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize(
    ("question", "answer"),
    [("Is it 3.14?", "Yes, it is."), ("a\nb", "\nc\n\nd"), ("图中是?", "圆形。😀"), ("  x ", " y "), ("", "A")],
)
def test_segments_equal_one_tokenisation(tokenizer: Tokenizer, question: str, answer: str, has_image: bool) -> None:
    """Cutting the text into segments must not change a token: the official code tokenises it in one piece."""
    turns = [Turn("human", question, has_image), Turn("gpt", answer)]
    if has_image:
        head = [*tokenizer.encode(f"{SYSTEM} USER: "), *[IMAGE_TOKEN_ID] * P]
        newline = "\n" if question else ""  # officially stripped from a marker that stands alone
        tail = tokenizer.encode(f"{newline}{question} ASSISTANT: {answer}")
    else:
        head, tail = [], tokenizer.encode(f"{SYSTEM} USER: {question} ASSISTANT: {answer}")
    rendered = render_conversation(turns, tokenizer, P)
    assert rendered.input_ids == [tokenizer.bos_token_id, *head, *tail, tokenizer.eos_token_id]


@pytest.mark.parametrize("has_image", [True, False])
def test_labels_are_the_answers_alone(tokenizer: Tokenizer, has_image: bool) -> None:
    """A label is the token itself (the loss shifts), and only where the assistant speaks."""
    turns = [Turn("human", "is it red?", has_image), Turn("gpt", "yes"), Turn("human", "why?"), Turn("gpt", "因为红。")]
    rendered = render_conversation(turns, tokenizer, P)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(rendered.input_ids, rendered.labels, strict=True))
    end = [tokenizer.eos_token_id]
    assert supervised(rendered) == tokenizer.encode("yes") + end + tokenizer.encode("因为红。") + end
    assert rendered.num_supervised == len(supervised(rendered))
    assert rendered.position_ids == list(range(len(rendered)))
    assert set(rendered.branch_ids) == {0}
    assert rendered.num_images == has_image


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("num_turns", [1, 3, 5])
def test_prompt_is_a_prefix_of_the_full_document(tokenizer: Tokenizer, num_turns: int, template: str) -> None:
    """Answering must see exactly what training saw before the same answer."""
    turns = [*TWO_TURNS, Turn("human", "是什么?"), Turn("gpt", "圆形")]
    prompt = render_conversation(turns[:num_turns], tokenizer, P, template)
    full = render_conversation(turns[: num_turns + 1], tokenizer, P, template)
    assert full.input_ids[: len(prompt)] == prompt.input_ids
    assert full.labels[: len(prompt)] == prompt.labels
    space = " " if template == "llava_llama_2" else ""
    answer = [*tokenizer.encode(turns[num_turns].text + space), tokenizer.eos_token_id]
    assert full.input_ids[len(prompt) :] == full.labels[len(prompt) :] == answer


def test_image_in_a_later_turn_follows_its_question(tokenizer: Tokenizer) -> None:
    """The picture belongs to the turn that shows it: what was said before must not see it."""
    turns = [Turn("human", "hi"), Turn("gpt", "yes"), Turn("human", "what is it?", True)]
    rendered = render_conversation(turns, tokenizer, P)
    before = render_conversation(turns[:2], tokenizer, P)
    expected = [
        *before.input_ids,
        *tokenizer.encode("USER: ", continues=True),
        *[IMAGE_TOKEN_ID] * P,
        *tokenizer.encode("\nwhat is it? ASSISTANT:"),
    ]
    assert rendered.input_ids == expected


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_each_image_has_p_placeholders(tiny_tokenizer: Tokenizer, template: str, has_image: bool) -> None:
    """The model counts placeholders against features: P for every picture, none without."""
    turns = [Turn("human", "what?", has_image), Turn("gpt", "red")]
    rendered = render_conversation(turns, tiny_tokenizer, P, template)
    assert rendered.input_ids.count(IMAGE_TOKEN_ID) == P * has_image == P * rendered.num_images
    assert IMAGE_TOKEN_ID not in rendered.labels


def test_plain_template_without_image(tiny_tokenizer: Tokenizer) -> None:
    """A row of text has no picture to stand for the question, so the question is read; the answer ends the same."""
    rendered = render_conversation([Turn("human", "paper red"), Turn("gpt", "red.")], tiny_tokenizer, P, "plain")
    answer = tiny_tokenizer.encode("red.\n")
    assert rendered.input_ids == [tiny_tokenizer.bos_token_id, *tiny_tokenizer.encode("paper red"), *answer]
    assert supervised(rendered) == answer


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_a_branch_is_the_question_asked_alone(tokenizer: Tokenizer, template: str, has_image: bool) -> None:
    """Many questions about a picture share its prefix; sharing must not change what any of them is."""
    pairs = [("is it red?", "yes"), ("是什么形状?", "圆形"), ("why?\nsay", "because it is"), ("", "")]
    turns = [
        turn
        for number, (question, answer) in enumerate(pairs)
        for turn in (Turn("human", question, has_image and number == 0), Turn("gpt", answer))
    ]
    rendered = render_conversation(turns, tokenizer, P, template, branched=True)
    assert set(rendered.branch_ids) == {0, 1, 2, 3, 4}
    assert rendered.input_ids.count(IMAGE_TOKEN_ID) == P * has_image
    for number, (question, answer) in enumerate(pairs, start=1):
        alone = render_conversation([Turn("human", question, has_image), Turn("gpt", answer)], tokenizer, P, template)
        assert select(rendered, number) == (alone.input_ids, alone.labels, alone.position_ids)


def test_a_branch_without_answer_is_a_prompt(tiny_tokenizer: Tokenizer) -> None:
    """Asking several questions at once ends in a question."""
    turns = [Turn("human", "is it red?", True), Turn("gpt", "yes"), Turn("human", "why?")]
    rendered = render_conversation(turns, tiny_tokenizer, P, branched=True)
    alone = render_conversation([Turn("human", "why?", True)], tiny_tokenizer, P)
    assert select(rendered, 2) == (alone.input_ids, alone.labels, alone.position_ids)


def test_captions_do_not_branch(tiny_tokenizer: Tokenizer) -> None:
    """A pair of the plain template has nothing to be told from; more of them would see each other in silence."""
    for turns in (TWO_TURNS[:2], [Turn("human", "hi"), Turn("gpt", "yes")]):
        one, other = (render_conversation(turns, tiny_tokenizer, P, "plain", branched) for branched in (False, True))
        assert one == other
    with pytest.raises(ValueError, match="template 'plain' has no questions to branch at, but 4 turns"):
        render_conversation(TWO_TURNS, tiny_tokenizer, P, "plain", branched=True)


def test_branches_lose_no_image(tiny_tokenizer: Tokenizer) -> None:
    """Branches share the first turn's picture; one in a later turn is never lost in silence."""
    turns = [Turn("human", "hi"), Turn("gpt", "yes"), Turn("human", "what?", True), Turn("gpt", "red")]
    with pytest.raises(AssertionError, match="branches share the first turn's picture"):
        render_conversation(turns, tiny_tokenizer, P, branched=True)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("has_image", [True, False])
def test_truncation_takes_text_from_the_end(tiny_tokenizer: Tokenizer, has_image: bool, branched: bool) -> None:
    """A cut placeholder would leave features without a place; a cut label must go with its token."""
    turns = [Turn("human", "is it red?", has_image), Turn("gpt", "yes"), Turn("human", "why?"), Turn("gpt", "it is")]
    full = render_conversation(turns, tiny_tokenizer, P, branched=branched)
    text = [i for i, token in enumerate(full.input_ids) if token != IMAGE_TOKEN_ID]
    images = P * has_image
    for limit in range(1, len(full) + 3):
        cut = render_conversation(turns, tiny_tokenizer, P, branched=branched, max_tokens=limit)
        kept_text = min(max(limit - images, 0), len(text))
        kept = sorted(text[:kept_text] + [i for i in range(len(full)) if i not in text])
        assert len(cut) == images + kept_text
        assert cut.input_ids == [full.input_ids[i] for i in kept]
        assert cut.labels == [full.labels[i] for i in kept]
        assert cut.branch_ids == [full.branch_ids[i] for i in kept]
        assert cut.num_images == has_image
        if limit >= images + text.index(text[-1]):  # the image precedes the cut: positions are those of the full text
            assert cut.position_ids == [full.position_ids[i] for i in kept]


def test_positions_of_the_longest_documents(tiny_tokenizer: Tokenizer) -> None:
    """Longer than most, where positions are made in another way."""
    turns = [Turn("human", "is it red? " * 3000), Turn("gpt", "yes")]
    rendered = render_conversation(turns, tiny_tokenizer, P)
    assert len(rendered) > 2 * len(POSITIONS)
    assert rendered.position_ids == list(range(len(rendered)))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("typed", ["</s>", "<s>", "<unk>", "<image>", "</s><s><image><unk></s>", "<0x0A>"])
def test_typed_control_tokens_stay_text(tokenizer: Tokenizer, typed: str, template: str) -> None:
    """Otherwise a question could end the conversation, speak for the assistant or claim a second picture."""
    turns = [Turn("human", typed), Turn("gpt", f"a {typed} b"), Turn("human", f"x {typed}"), Turn("gpt", typed)]
    rendered = render_conversation(turns, tokenizer, P, template)
    harmless = [Turn(turn.role, "x") for turn in turns]
    expected = render_conversation(harmless, tokenizer, P, template)
    for token_id in (0, tokenizer.bos_token_id, tokenizer.eos_token_id, IMAGE_TOKEN_ID, 13):
        assert rendered.input_ids.count(token_id) == expected.input_ids.count(token_id)
    assert rendered.num_images == 0
    text = tokenizer.decode([token for token in rendered.input_ids if token != IMAGE_TOKEN_ID])
    assert text.count(typed) == len(turns)


@pytest.mark.parametrize("text", ["图中是什么形状?", "龘靐齉", "a😀b", "👩‍👩‍👧", "é à ü", "日本語 한국어 العربية"])
def test_text_outside_the_vocabulary_survives(tokenizer: Tokenizer, text: str) -> None:
    """Byte fallback: no character is unknown, to a question or to an answer."""
    rendered = render_conversation([Turn("human", text), Turn("gpt", text)], tokenizer, P)
    assert 0 not in rendered.input_ids
    assert tokenizer.decode(supervised(rendered)) == text
    assert text in tokenizer.decode(rendered.input_ids)


def test_unknown_template_is_an_error(tiny_tokenizer: Tokenizer) -> None:
    """The official code falls back to vicuna_v1 without a word."""
    assert len(TEMPLATES) == 4
    with pytest.raises(ValueError, match=r"'v0' is unknown, expected one of vicuna_v1, llava_v1, llava_llama_2, plain"):
        render_conversation(TWO_TURNS, tiny_tokenizer, P, "v0")


TEXT = {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object with a list 'conversations'"),
        ({}, "expected an object with a list 'conversations'"),
        ({"conversations": "hi"}, "expected an object with a list 'conversations'"),
        ({"conversations": []}, "needs a question"),
        (make_row("q"), "needs a question"),
        (make_row("a", first="gpt"), "needs a question"),
        (make_row("a", "q", first="gpt"), "needs a question"),
        ({"conversations": ["q", TEXT]}, "turn 0 is not an object with a text 'value'"),
        ({"conversations": [{"from": "human", "value": 3}, TEXT]}, "turn 0 is not an object with a text 'value'"),
        ({"conversations": [{"from": "human"}, TEXT]}, "turn 0 is not an object with a text 'value'"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]}, "turn 1 is from 'bot'"),
        ({"conversations": [{"value": "q"}, TEXT]}, "turn 0 is from None"),
        ({"conversations": [*make_row("q", "a")["conversations"], TEXT]}, "turn 2 is from 'gpt', expected 'human'"),
        ({"conversations": make_row("q")["conversations"] * 2}, "turn 1 is from 'human', expected 'gpt'"),
        (make_row("q", "a <image>", image="x.png"), "turn 1: an answer cannot hold <image>"),
        (make_row("<image>\nq", "a"), "the row has no 'image'"),
        (make_row("q", "a", image="x.png"), "has 0 <image> markers, expected one"),
        (make_row("<image>\nq", "a", "<image>\nq", "a", image="x.png"), "has 2 <image> markers, expected one"),
        (make_row("<image>\nq", "a", image=["x.png", "y.png"]), "expected one path"),
        (make_row("<image>\nq", "a", image=3), "'image' is 3, expected one path"),
    ],
)
def test_a_wrong_row_says_what_is_wrong(row: object, message: str) -> None:
    """Official LLaVA trains on such rows, or masks them; here each is found before the run starts."""
    with pytest.raises(ValueError, match=message):
        parse_turns(row)


def test_leading_answer_is_dropped() -> None:
    """ShareGPT rows start with the assistant; the official code drops that turn."""
    assert parse_turns(make_row("a", "q", "b", first="gpt")) == [Turn("human", "q"), Turn("gpt", "b")]


@pytest.mark.parametrize("text", ["<image>\nq?", "q?\n<image>", "<image> q? ", "<image>q?<image>", "\n<image> \nq?"])
def test_markers_move_to_the_front(text: str) -> None:
    """The picture belongs to the turn; where its marker stood, and how often, is of no account (as officially)."""
    assert parse_turns(make_row(text, " a ", image="x.png")) == [Turn("human", "q?", True), Turn("gpt", " a ")]


def test_marker_in_a_later_question() -> None:
    """The turn that shows the picture keeps it; text without a marker is not touched."""
    turns = parse_turns(make_row(" q ", "a", "<image>\nr", "b", image="x.png"))
    assert turns == [Turn("human", " q "), Turn("gpt", "a"), Turn("human", "r", True), Turn("gpt", "b")]


SHOWN_ROW = make_row("<image>\n图龘\x1b?", "red 😀.", "why?", "yes", image="x.png")
SHOWN = (
    "<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The ▁assistant ▁gives "
    "▁helpful , ▁detailed , ▁and ▁polite ▁answers ▁to ▁the ▁user ' s ▁questions . ▁USER : ▁ <image> x 7 ▁ <0x0A> 图 龘 "
    "<0x1B> ? ▁ASSISTANT : [▁red ▁ 😀 . </s>] US ER : ▁w h y ? ▁ASSISTANT : [▁y es </s>]"
)


@pytest.fixture
def shown_file(tmp_path: Path) -> Path:
    """Three rows: one that is fine, one without an answer, one with a template that does not exist."""
    rows = [SHOWN_ROW, make_row("q"), make_row("q", "a") | {"template": "v0"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def show(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run `python -m data.conversation` in this process."""
    monkeypatch.setattr(sys, "argv", ["conversation.py", *map(str, arguments)])
    main()


def test_show_marks_what_is_learned(
    shown_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One look tells whether the labels are right: brackets in a file or a pipe, green in a terminal."""
    show(monkeypatch, "--show", shown_file, "--row", 0, "--tokens-per-image", 7)
    shown, counts = capsys.readouterr().out.splitlines()
    assert shown == SHOWN
    # Of the names, the image stands for 7 tokens, 龘 for three bytes and 😀 for four.
    assert len(shown.replace("<image> x 7", "<image>").split()) == 59
    assert counts == f"{59 + 6 + 2 + 3} tokens, 11 supervised, 1 images"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(monkeypatch, "--show", shown_file, "--tokens-per-image", 7)
    assert capsys.readouterr().out.splitlines()[0] == SHOWN.replace("[", "\033[32m").replace("]", "\033[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    show(monkeypatch, "--show", shown_file, "--tokens-per-image", 7)
    assert capsys.readouterr().out.splitlines()[0] == SHOWN


@pytest.mark.parametrize("template", TEMPLATES)
def test_show_takes_a_template(
    shown_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_tokenizer: Tokenizer,
    template: str,
) -> None:
    """The counts are those of `render_conversation`, with the official number of placeholders."""
    show(monkeypatch, "--show", shown_file, "--template", template)
    rendered = render_conversation(parse_turns(SHOWN_ROW), tiny_tokenizer, 576, template)
    shown, counts = capsys.readouterr().out.splitlines()
    assert counts == f"{len(rendered)} tokens, {rendered.num_supervised} supervised, 1 images"
    assert shown == format_tokens(rendered, tiny_tokenizer, in_color=False)
    assert "<image> x 576" in shown


def test_show_spells_half_characters(tokenizer: Tokenizer) -> None:
    """A limit may cut a character; its bytes stay visible, and every token with a name of its own is named."""
    ids = [*tokenizer.encode("\n龘", continues=True)[:-1], tokenizer.eos_token_id, *[IMAGE_TOKEN_ID] * 2, 0]
    rendered = Rendered(ids, [IGNORE_INDEX] * len(ids), [], [], 1)
    assert format_tokens(rendered, tokenizer, in_color=True) == "<0x0A> <0xE9> <0xBE> </s> <image> x 2 <unk>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", 3], "{file} has rows 0 to 2, none is 3"),
        (["--row", -1], "{file} has rows 0 to 2, none is -1"),
        (["--row", 1], "{file}, row 1: a conversation needs a question (human) and an answer (gpt)"),
        (["--row", 2], "{file}, row 2: template 'v0' is unknown"),
        (["--show", "nowhere.json"], "data file nowhere.json is missing"),
        (["--tokenizer", "nowhere.model"], "tokenizer nowhere.model is missing"),
        (["--tokenizer", __file__], "is not a SentencePiece model or a tokenizer.json"),
    ],
)
def test_show_says_what_is_wrong(
    shown_file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], message: str
) -> None:
    """One line, and no traceback."""
    with pytest.raises(SystemExit) as caught:
        show(monkeypatch, "--show", shown_file, *arguments)
    text = str(caught.value)
    assert text.startswith("error: ")
    assert message.format(file=shown_file) in text
    assert "\n" not in text


def test_show_as_a_command(shown_file: Path) -> None:
    """As the reader types it: the text on standard output, an error on the other, and exit status 1."""
    command = [sys.executable, "-m", "data.conversation", "--show", str(shown_file), "--tokens-per-image", "7", "--row"]
    done, failed = (
        subprocess.run([*command, row], cwd=ROOT, capture_output=True, check=False, encoding="utf-8") for row in "03"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == SHOWN
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"error: {shown_file} has rows 0 to 2, none is 3\n"
