"""A conversation becomes token ids and labels: the one place where that happens, for training and for answering.

Every piece of text is tokenised once and knows whose it is, so labels cannot slip: there is no second tokenisation
whose length has to agree. `<image>` becomes P placeholders here, so a sequence's length is final when it leaves.

Templates, as official LLaVA-1.5 has them (llava/conversation.py):
    vicuna_v1   {system} USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: ...
    plain       <image>{caption}\\n

Shapes: T tokens, P placeholders per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.tokenizer import Tokenizer

IGNORE_INDEX = -100  # a label nothing is learned from
IMAGE_TOKEN_ID = -200  # the official sentinel: outside every vocabulary, stands P times for one image
IMAGE_MARKER = "<image>"

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES = ("vicuna_v1", "plain")


@dataclass(frozen=True)
class Turn:
    """One utterance. The picture belongs to the turn, not to its text: a typed "<image>" is nothing but letters."""

    role: str  # "human" or "gpt", as LLaVA's files say
    text: str
    has_image: bool = False


@dataclass(frozen=True)
class Rendered:
    """A document, all lists T long. `labels` is IGNORE_INDEX or the id itself (the loss shifts by one)."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    branch_ids: list[int]  # 0 for the trunk; n for the n-th branch, which sees the trunk and itself
    num_images: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


def parse_turns(row: object) -> list[Turn]:
    """Read one row of LLaVA's JSON: `{"id", "image"?, "conversations": [{"from", "value"}, ...]}`.

    Note: like the official code, a leading gpt turn is dropped, and markers move to the front of their turn.
    Raises: ValueError saying what is wrong with the row.
    """
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError("expected an object with a list 'conversations'")
    turns = [_parse_turn(number, turn) for number, turn in enumerate(row["conversations"])]
    if turns and turns[0].role == "gpt":
        turns = turns[1:]
    if len(turns) < 2:
        raise ValueError("a conversation needs a question (human) and an answer (gpt)")
    for number, turn in enumerate(turns):
        expected = ("human", "gpt")[number % 2]
        if turn.role != expected:
            raise ValueError(f"turns out of order: turn {number} is from {turn.role!r}, expected {expected!r}")
        if turn.has_image and turn.role == "gpt":
            raise ValueError(f"turn {number}: an answer cannot hold {IMAGE_MARKER}")
    num_images = sum(turn.has_image for turn in turns)
    image = row.get("image")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"'image' is {image!r}, expected one path")
    if image is None and num_images:
        raise ValueError(f"the text has an {IMAGE_MARKER} marker, the row has no 'image'")
    if image is not None and num_images != 1:
        raise ValueError(f"the row has an 'image', its text has {num_images} {IMAGE_MARKER} markers, expected one")
    return turns


def _parse_turn(number: int, turn: object) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise ValueError(f"turn {number} is not an object with a text 'value'")
    if turn.get("from") not in ("human", "gpt"):
        raise ValueError(f"turn {number} is from {turn.get('from')!r}, expected 'human' or 'gpt'")
    try:
        turn["value"].encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"turn {number} holds half a character: {error}") from error
    has_image = IMAGE_MARKER in turn["value"]
    text = turn["value"].replace(IMAGE_MARKER, "").strip() if has_image else turn["value"]
    return Turn(turn["from"], text, has_image)


def render_conversation(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    tokens_per_image: int,
    template: str = "vicuna_v1",
    branched: bool = False,
    max_tokens: int | None = None,
) -> Rendered:
    """Make the ids and labels of a conversation; without a last answer it is a prompt that asks for one.

    Args:
        tokens_per_image: P.
        branched: the turns are independent questions. All that precedes the first question is the trunk, each
            question with its answer a branch, whose tokens are exactly those of asking that question alone.
        max_tokens: cut text from the end to this length; placeholders always stay.

    Note: official LLaVA masks a whole sample when its two tokenisations disagree; here there is only one.
    Raises: ValueError for an unknown template.
    """
    assert not (branched and any(turn.has_image for turn in turns[1:])), "branches share the first turn's picture"
    if template == "plain":
        segments = _segments_plain(turns, tokenizer)
    elif template == "vicuna_v1":
        segments = _segments_vicuna(turns, tokenizer, branched)
    else:
        raise ValueError(f"template {template!r} is unknown, expected one of {', '.join(TEMPLATES)}")
    if max_tokens is not None:
        segments = _truncate(segments, max_tokens, tokens_per_image)
    return _join(segments, tokens_per_image)


@dataclass(frozen=True)
class _Segment:
    """Ids of one speaker. `ids` None stands for an image."""

    ids: list[int] | None
    supervised: bool = False
    branch: int = 0


def _segments_vicuna(turns: Sequence[Turn], tokenizer: Tokenizer, branched: bool) -> list[_Segment]:
    segments = [_Segment([tokenizer.bos_token_id])]
    for number in range(0, len(turns), 2):
        question = turns[number]
        branch = number // 2 + 1 if branched else 0
        if number == 0:
            segments.append(_Segment(tokenizer.encode(f"{SYSTEM} USER:" + (" " if question.has_image else ""))))
        elif not branched:
            user = "USER: " if question.has_image else "USER:"
            segments.append(_Segment(tokenizer.encode(user, continues=True)))
        if question.has_image and (number == 0 or not branched):
            segments.append(_Segment(None))
        text = question.text
        if question.has_image or (branched and turns[0].has_image):
            # The official code tokenises what follows an image by itself, so the newline gets a leading space.
            text = "\n" + text
        segments.append(_Segment(tokenizer.encode(f"{text} ASSISTANT:"), branch=branch))
        if number + 1 < len(turns):
            answer = [*tokenizer.encode(turns[number + 1].text), tokenizer.eos_token_id]
            segments.append(_Segment(answer, supervised=True, branch=branch))
    return segments


def _segments_plain(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[_Segment]:
    segments = [_Segment([tokenizer.bos_token_id])]
    for turn in turns:
        if turn.has_image:
            segments.append(_Segment(None))
        elif turn.role == "human":
            segments.append(_Segment(tokenizer.encode(turn.text)))
        if turn.role == "gpt":  # a picture's instruction is not read in this stage; a caption ends in a newline
            segments.append(_Segment(tokenizer.encode(turn.text + "\n"), supervised=True))
    return segments


def _truncate(segments: Sequence[_Segment], max_tokens: int, tokens_per_image: int) -> list[_Segment]:
    room = max_tokens - tokens_per_image * sum(segment.ids is None for segment in segments)
    kept = []
    for segment in segments:
        ids = segment.ids
        if ids is not None:
            ids = ids[: max(room, 0)]
            room -= len(ids)
        kept.append(_Segment(ids, segment.supervised, segment.branch))
    return kept


def _join(segments: Sequence[_Segment], tokens_per_image: int) -> Rendered:
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    branch_ids: list[int] = []
    trunk_length = next_position = branch = 0
    for segment in segments:
        ids = [IMAGE_TOKEN_ID] * tokens_per_image if segment.ids is None else segment.ids
        if segment.branch != branch:
            if branch == 0:
                trunk_length = next_position
            branch, next_position = segment.branch, trunk_length  # a branch goes on where the trunk ended
        input_ids += ids
        labels += ids if segment.supervised else [IGNORE_INDEX] * len(ids)
        position_ids += range(next_position, next_position + len(ids))
        branch_ids += [branch] * len(ids)
        next_position += len(ids)
    return Rendered(input_ids, labels, position_ids, branch_ids, sum(segment.ids is None for segment in segments))
