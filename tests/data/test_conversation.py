"""`render_conversation` against the official code's ids (the vectors were rendered by it), and its own promises."""

import pytest

from data.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    SYSTEM,
    Rendered,
    Turn,
    parse_turns,
    render_conversation,
)
from data.tokenizer import Tokenizer

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
        tail = tokenizer.encode(f"\n{question} ASSISTANT: {answer}")
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


@pytest.mark.parametrize("num_turns", [1, 3, 5])
def test_prompt_is_a_prefix_of_the_full_document(tokenizer: Tokenizer, num_turns: int) -> None:
    """Answering must see exactly what training saw before the same answer."""
    turns = [*TWO_TURNS, Turn("human", "是什么?"), Turn("gpt", "圆形")]
    prompt = render_conversation(turns[:num_turns], tokenizer, P)
    full = render_conversation(turns[: num_turns + 1], tokenizer, P)
    assert full.input_ids[: len(prompt)] == prompt.input_ids
    assert full.labels[: len(prompt)] == prompt.labels
    answer = [*tokenizer.encode(turns[num_turns].text), tokenizer.eos_token_id]
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
@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
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
def test_a_branch_is_the_question_asked_alone(tokenizer: Tokenizer, has_image: bool) -> None:
    """Many questions about a picture share its prefix; sharing must not change what any of them is."""
    pairs = [("is it red?", "yes"), ("是什么形状?", "圆形"), ("why?\nsay", "because it is"), ("", "")]
    turns = [
        turn
        for number, (question, answer) in enumerate(pairs)
        for turn in (Turn("human", question, has_image and number == 0), Turn("gpt", answer))
    ]
    rendered = render_conversation(turns, tokenizer, P, branched=True)
    assert set(rendered.branch_ids) == {0, 1, 2, 3, 4}
    assert rendered.input_ids.count(IMAGE_TOKEN_ID) == P * has_image
    for number, (question, answer) in enumerate(pairs, start=1):
        alone = render_conversation([Turn("human", question, has_image), Turn("gpt", answer)], tokenizer, P)
        assert select(rendered, number) == (alone.input_ids, alone.labels, alone.position_ids)


def test_a_branch_without_answer_is_a_prompt(tiny_tokenizer: Tokenizer) -> None:
    """Asking several questions at once ends in a question."""
    turns = [Turn("human", "is it red?", True), Turn("gpt", "yes"), Turn("human", "why?")]
    rendered = render_conversation(turns, tiny_tokenizer, P, branched=True)
    alone = render_conversation([Turn("human", "why?", True)], tiny_tokenizer, P)
    assert select(rendered, 2) == (alone.input_ids, alone.labels, alone.position_ids)


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


@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
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
    with pytest.raises(ValueError, match=r"'v0' is unknown, expected one of vicuna_v1, plain"):
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
