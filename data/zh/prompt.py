"""A request for a dialogue: a picture of a record, the text beside it, and the kind of dialogue that is wanted."""

import base64
import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from data.image import open_image
from data.zh.kinds import SCHEMA, Kind, Prompts
from data.zh.record import Record

MAX_SIDE = 512  # pixels of a picture as it is sent
JPEG_QUALITY = 85
MAX_TITLE_CHARACTERS = 100  # of the title and of the section
MAX_TEXT_CHARACTERS = 1500  # of a record's text as it is sent
FRAME_BYTES = 500  # of roles and marks that an endpoint sets around the texts
MARKERS = str.maketrans("【】", "[]")  # what is sent between markers must not hold one


def make_key(sha256: str, kind: str, prompt_version: str, model: str) -> str:
    """Return what names a dialogue: `Reply.key` of one that is written."""
    return f"{sha256}:{kind}:{prompt_version}:{model}"


def make_custom_id(key: str) -> str:
    """Return a key's name in a batch file, of 64 characters at most: some endpoints refuse longer ones."""
    sha256, kind, _ = key.split(":", 2)
    return f"{sha256[:32]}-{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def choose_kinds(sha256: str, kinds: dict[str, Kind], num_kinds: int) -> list[str]:
    """Return the kinds of dialogue that a picture gets: drawn by weight, always the same for the same picture.

    More kinds are the same ones and others, so raising the number pays only for the others.
    """

    def draw(kind: Kind) -> float:
        return random.Random(f"{sha256}:{kind.name}").random() ** (1 / kind.weight)

    return sorted(kinds, key=lambda name: draw(kinds[name]), reverse=True)[:num_kinds]


def make_messages(record: Record, kind: Kind, prompts: Prompts, image_url: str, detail: str) -> list[dict[str, Any]]:
    """Return the messages that ask for a dialogue."""
    text = record.text
    if len(text) > MAX_TEXT_CHARACTERS:
        text = text[:MAX_TEXT_CHARACTERS]
        text = text[: text.rfind("。") + 1] or text
    values = {"title": record.title[:MAX_TITLE_CHARACTERS], "section": record.section[:MAX_TITLE_CHARACTERS]}
    values = {"text": text, **values, "section": values["section"] or prompts.introduction}
    material = {name: value.translate(MARKERS) for name, value in values.items()}
    request = prompts.request.strip().format(task=kind.prompt, **material)
    image = {"type": "image_url", "image_url": {"url": image_url, "detail": detail}}
    return [
        {"role": "system", "content": prompts.system.strip()},
        {"role": "user", "content": [image, {"type": "text", "text": request}]},
    ]


def ask_again(messages: list[dict[str, Any]], prompts: Prompts, reason: str) -> list[dict[str, Any]]:
    """Return the messages with what was wrong with the first reply, but without that reply: it would be paid again."""
    system, user = messages
    note = {"type": "text", "text": prompts.again.format(reason=prompts.reasons[reason])}
    return [system, {**user, "content": [*user["content"], note]}]


def make_body(
    messages: list[dict[str, Any]], model: str, token_limit: str, max_tokens: int, reply_format: str
) -> dict[str, Any]:
    """Return a request's JSON."""
    formats: dict[str, dict[str, Any]] = {
        "json_schema": {
            "type": "json_schema",
            "json_schema": {"name": "dialogue", "strict": True, "schema": SCHEMA},
        },
        "json_object": {"type": "json_object"},
    }
    return {"model": model, "messages": messages, "response_format": formats[reply_format], token_limit: max_tokens}


def encode_picture(file: Path) -> str:
    """Return a picture as a data URI, a JPEG of MAX_SIDE at most.

    Raises: FileNotFoundError or ValueError for what cannot be read.
    """
    image = open_image(file)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def bound_bytes(prompts: Prompts) -> int:
    """Return the most bytes of text that a request can hold; a token has one at least."""
    longest = [
        max(texts, key=len) for texts in ([kind.prompt for kind in prompts.kinds.values()], prompts.reasons.values())
    ]
    texts = [prompts.system, prompts.request, prompts.again, json.dumps(SCHEMA), *longest]
    num_characters = MAX_TEXT_CHARACTERS + 2 * MAX_TITLE_CHARACTERS
    return sum(len(text.encode()) for text in texts) + 4 * num_characters + FRAME_BYTES
