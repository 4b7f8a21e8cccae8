"""A conversation becomes token ids and labels: the one place where that happens, for training and for answering.

Every piece of text is tokenised once and knows whose it is, so labels cannot slip: there is no second tokenisation
whose length has to agree. `<image>` becomes P placeholders here, so a sequence's length is final when it leaves.

Templates, as official LLaVA-1.5 has them (llava/conversation.py); learned are the answers, each with its end:
    vicuna_v1      {system} USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: ...
    llava_v1       the same with another system prompt: the official chat; training and benchmarks use vicuna_v1
    plain          <image>{caption}\\n
    llava_llama_2  [INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n<image>\\n{question} [/INST] {answer} </s><s>[INST] ...

Note: ids and labels are the official ones, except where the official code loses track and masks the whole sample:
    an empty question or answer; a typed "</s>" or "<unk>"; " ASSISTANT: " (llama_2: "[/INST] ") inside of either.
These teach their answers here. A question that ends in "ASSISTANT:" is not learned itself (officially its end is), and
a typed control token, "<s>" too, is nothing but letters.

Shapes: T tokens, P placeholders per image.

`python -m data.conversation --show FILE --row N` shows what a row of a data set becomes.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.tokenizer import Tokenizer

IGNORE_INDEX = -100  # a label nothing is learned from
IMAGE_TOKEN_ID = -200  # the official sentinel: outside every vocabulary, stands P times for one image
IMAGE_MARKER = "<image>"
POSITIONS = list(range(4096))  # making the numbers anew for every document takes longer than all else of joining it

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_SYSTEM = SYSTEM.replace("user", "human")
LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class ChatTemplate:
    """What stands around questions and answers. `</s>` follows every answer."""

    before_first: str  # question
    before_later: str  # question; follows `</s>` directly, so it gets no leading space
    before_answer: str
    after_answer: str = ""
    later_bos: bool = False  # later questions have a `<s>` of their own


CHAT_TEMPLATES = {
    "vicuna_v1": ChatTemplate(f"{SYSTEM} USER: ", "USER: ", " ASSISTANT:"),
    "llava_v1": ChatTemplate(f"{CHAT_SYSTEM} USER: ", "USER: ", " ASSISTANT:"),
    "llava_llama_2": ChatTemplate(
        f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n", "[INST] ", " [/INST]", after_answer=" ", later_bos=True
    ),
}
TEMPLATES = (*CHAT_TEMPLATES, "plain")


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
    num_cut: int = 0  # tokens that did not fit

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


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
    if image is not None and not (isinstance(image, str) and image):
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

    Raises: ValueError for an unknown template, or a plain one that is to branch.
    """
    assert not (branched and any(turn.has_image for turn in turns[1:])), "branches share the first turn's picture"
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown, expected one of {', '.join(TEMPLATES)}")
    if template == "plain" and branched and len(turns) > 2:
        raise ValueError(f"template 'plain' has no questions to branch at, but {len(turns)} turns: use vicuna_v1")
    if template == "plain":
        segments = _segments_plain(turns, tokenizer)
    else:
        segments = _segments_chat(turns, tokenizer, CHAT_TEMPLATES[template], branched)
    whole = _join(segments, tokens_per_image)
    if max_tokens is None or len(whole) <= max_tokens:
        return whole
    kept = _join(_truncate(segments, max_tokens, tokens_per_image), tokens_per_image)
    return replace(kept, num_cut=len(whole) - len(kept))


@dataclass(frozen=True)
class _Segment:
    """Ids of one speaker. `ids` None stands for an image."""

    ids: list[int] | None
    supervised: bool = False
    branch: int = 0


def _segments_chat(
    turns: Sequence[Turn], tokenizer: Tokenizer, template: ChatTemplate, branched: bool
) -> list[_Segment]:
    segments = [_Segment([tokenizer.bos_token_id])]
    for number in range(0, len(turns), 2):
        question = turns[number].text
        branch = number // 2 + 1 if branched else 0
        is_first = number == 0 or branched
        has_image = turns[0 if branched else number].has_image
        lead = template.before_first if is_first else template.before_later
        if has_image:
            # The official code tokenises what follows an image by itself, and every text begins with a space.
            question = " \n" + question if question else " "
        else:
            # A space belongs to the token of the word that follows.
            lead, question = lead.rstrip(" "), lead[len(lead.rstrip(" ")) :] + question
        if number == 0 or not branched:
            bos = [tokenizer.bos_token_id] if template.later_bos and not is_first else []
            segments.append(_Segment([*bos, *tokenizer.encode(lead, continues=not is_first)]))
            segments += [_Segment(None)] * has_image
        segments.append(_Segment(tokenizer.encode(question + template.before_answer, continues=True), branch=branch))
        if number + 1 < len(turns):
            answer = tokenizer.encode(turns[number + 1].text + template.after_answer)
            segments.append(_Segment([*answer, tokenizer.eos_token_id], supervised=True, branch=branch))
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
        end = next_position + len(ids)
        position_ids += POSITIONS[next_position:end] if end <= len(POSITIONS) else range(next_position, end)
        branch_ids += [branch] * len(ids)
        next_position = end
    return Rendered(input_ids, labels, position_ids, branch_ids, sum(segment.ids is None for segment in segments))


def format_tokens(rendered: Rendered, tokenizer: Tokenizer, in_color: bool) -> str:
    """Return the tokens by name, those that are learned in green, or else in brackets."""
    parts = []
    pairs = zip(rendered.input_ids, rendered.labels, strict=True)
    for is_learned, run in itertools.groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX):
        text = " ".join(name_tokens([token_id for token_id, _ in run], tokenizer))
        if is_learned:
            text = f"\033[32m{text}\033[0m" if in_color else f"[{text}]"
        parts.append(text)
    return " ".join(parts)


def name_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return what the tokens are called: an image is one name, and so are the bytes of a character."""
    names = []
    for is_byte, run in itertools.groupby(ids, tokenizer.byte_of_id.__contains__):
        if is_byte:
            # Python reads half a character as surrogates; like a newline, they are not printable.
            for character in bytes(tokenizer.byte_of_id[i] for i in run).decode("utf-8", "surrogateescape"):
                spelled = [f"<0x{byte:02X}>" for byte in character.encode("utf-8", "surrogateescape")]
                names += [character] if character.isprintable() else spelled
        else:
            for is_image, group in itertools.groupby(run, IMAGE_TOKEN_ID.__eq__):
                same = list(group)
                names += [f"{IMAGE_MARKER} x {len(same)}"] if is_image else [tokenizer.name(i) for i in same]
    return names


def main() -> None:
    from data.rows import RowFile  # which imports this module

    parser = argparse.ArgumentParser(description="Show the tokens of a row, and which of them are learned.")
    parser.add_argument("--show", type=Path, required=True, metavar="FILE", help="LLaVA's JSON, or JSONL")
    parser.add_argument("--row", type=int, default=0, help="counted from 0")
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent / "tiny/tokenizer.model")
    parser.add_argument("--template", choices=TEMPLATES, help="of rows that name none; else vicuna_v1")
    parser.add_argument("--tokens-per-image", type=int, default=576)
    arguments = parser.parse_args()
    try:
        tokenizer = Tokenizer(arguments.tokenizer)
        rows = RowFile(arguments.show)
        if not 0 <= arguments.row < len(rows):
            raise ValueError(f"{arguments.show} has rows 0 to {len(rows) - 1}, none is {arguments.row}")
        row = rows[arguments.row]
        try:
            turns = parse_turns(row)
            template = row.get("template", arguments.template or "vicuna_v1")
            rendered = render_conversation(turns, tokenizer, arguments.tokens_per_image, template)
        except ValueError as error:
            raise ValueError(f"{arguments.show}, row {arguments.row}: {error}") from error
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(format_tokens(rendered, tokenizer, in_color=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    print(f"{len(rendered)} tokens, {rendered.num_supervised} supervised, {rendered.num_images} images")


if __name__ == "__main__":
    main()
