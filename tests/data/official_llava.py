"""How official LLaVA-1.5 goes about a row: the whole string is tokenised, then each of its rounds again.

Labels come from arithmetic on the lengths; where these do not add up, the whole sample is masked. It is the oracle of
`render_conversation`, which works in another way: piece by piece.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import sentencepiece

from data.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID

IMAGE = "<image>"
CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class OfficialExample:
    """`labels` hold nothing but IGNORE_INDEX where the official code lost track."""

    input_ids: list[int]
    labels: list[int]

    @property
    def is_masked(self) -> bool:
        return set(self.labels) == {IGNORE_INDEX}


class OfficialTokenizer:
    """transformers' LLaMA tokenizer with legacy=false: typed control tokens count, only a text's start gets a space."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self.processor = processor

    def __call__(self, text: str) -> list[int]:
        """Return BOS and the ids of `text`."""
        ids = [self.processor.bos_id()]
        for number, part in enumerate(re.split("(<s>|</s>|<unk>)", text)):
            if number % 2:
                ids.append(self.processor.piece_to_id(part))
            elif number == 0:
                ids += self.processor.EncodeAsIds(part)
            elif part:
                # Nothing merges across a newline, which is a byte: this leaves out the space before a text.
                ids += self.processor.EncodeAsIds("\n" + part)[len(self.processor.EncodeAsIds("\n")) :]
        return ids

    def tokenize_around_images(self, text: str) -> list[int]:
        """Return the ids of the chunks between images, each tokenised as a text of its own but for its BOS."""
        first, *others = [self(chunk) for chunk in text.split(IMAGE)]
        return first + [token for chunk in others for token in (IMAGE_TOKEN_ID, *chunk[1:])]


def make_prompt(messages: Sequence[str | None], template: str) -> str:
    """Join questions and answers; None asks for an answer, and so does an empty one."""
    if template == "llava_llama_2":
        text = ""
        for number, message in enumerate(messages):
            if not message:
                continue
            if number == 0:
                message = f"<<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n{message}"  # noqa: PLW2901
            text += f" {message} </s>" if number % 2 else f"<s>[INST] {message} [/INST]"
        return text.lstrip("<s>")  # the official code strips a set of characters, too
    text = {"vicuna_v1": CURIOUS_USER, "llava_v1": CURIOUS_HUMAN}[template] + " "
    for number, message in enumerate(messages):
        role, end = ("ASSISTANT", "</s>") if number % 2 else ("USER", " ")
        text += f"{role}: {message}{end}" if message else f"{role}:"
    return text


def make_example(row: dict, template: str, tokenizer: OfficialTokenizer, max_length: int = 2048) -> OfficialExample:
    """Tokenise a row of LLaVA's JSON and mask all but the answers."""
    has_image = "image" in row
    messages = [turn["value"] for turn in row["conversations"]]
    if has_image:  # markers move to the front
        texts = [message.replace(IMAGE, "").strip() for message in messages]
        pairs = zip(messages, texts, strict=True)
        messages = [f"{IMAGE}\n{text}".strip() if IMAGE in message else message for message, text in pairs]
    if template == "plain":
        caption = messages[1]
        ids = tokenizer.tokenize_around_images(f"{IMAGE}{caption}\n")
        num_masked = len(tokenizer.tokenize_around_images(IMAGE))
        return OfficialExample(ids, [IGNORE_INDEX] * num_masked + ids[num_masked:])

    split = tokenizer.tokenize_around_images if has_image else tokenizer.__call__
    text = make_prompt(messages, template)
    ids = split(text)
    if not has_image:
        ids = ids[:max_length]
    labels = list(ids)
    separator = "[/INST] " if template == "llava_llama_2" else " ASSISTANT: "
    position = 1
    labels[:position] = [IGNORE_INDEX]
    for number, part in enumerate(text.split("</s>")):
        if not part or part.count(separator) != 1:
            break
        # The round's own BOS stands for the </s> that was split off.
        length = len(split(part))
        # Before the answer: less that BOS, and less the space that is part of the answer's first token.
        num_masked = len(split(part[: part.index(separator)] + separator)) - 2
        if number > 0 and template != "llava_llama_2":
            # After </s>, USER is one token; at the start of a text, two.
            length, num_masked = length - 1, num_masked - 1
        labels[position : position + num_masked] = [IGNORE_INDEX] * len(labels[position : position + num_masked])
        position += length
    labels[position:] = [IGNORE_INDEX] * len(labels[position:])
    padding = tokenizer.processor.unk_id()  # there is no pad token: <unk> serves as one
    if position < max_length and position != len(ids) - ids.count(padding):
        labels = [IGNORE_INDEX] * len(ids)
    return OfficialExample(ids, labels)
