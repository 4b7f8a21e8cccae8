"""What happened inside the model as one HTML document that needs nothing else: a file to keep, or a frame of the page.

`look.html` is the document without its data, `look.js` what makes it answer to clicks. The words' attention travels
as bytes, each layer and head of a word scaled by its own maximum, compressed; the browser unpacks it.

Shapes: A tokens of the answer, L layers, H heads, P patches of the picture, as in `model/inside.py`.
"""

import base64
import io
import json
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.conversation import IMAGE_TOKEN_ID, name_tokens
from data.image import pad_to_square
from data.tokenizer import BYTE_PIECES, SPACE, Tokenizer
from demo.look_words import LOOK_TEXTS
from model.inside import Inside

FOLDER = Path(__file__).parent
MAX_SIDE = 672  # pixels of the picture in the document
THEMES = ("light", "dark")
LINE_END = "<0x0A>"


def make_look_page(
    inside: Inside,
    picture: Image.Image | None,
    input_ids: Sequence[int],
    num_answer_tokens: int,
    tokenizer: Tokenizer,
    question: str,
    language: str = "en",
    theme: str | None = None,
) -> str:
    """Return the document.

    Args:
        picture: the one the conversation is about, as it was before it became pixels of the model's size.
        input_ids: prompt and answer, as `look_inside` got them; what it looked at is the beginning of the answer.
        language: "en" or "zh".
        theme: "light" or "dark"; None follows the reader's system. Whoever frames the document may say otherwise, with
            postMessage({theme: "light" | "dark", background: "rgb(...)"}), and is told {lookHeight: pixels}.
    """
    assert theme is None or theme in THEMES, theme
    texts = {key: pair[language == "zh"] for key, pair in LOOK_TEXTS.items()}
    similarity, low, high = _to_bytes(inside.patch_similarity.float().numpy())
    num_looked, num_layers, num_heads, num_patches = inside.attention.shape
    prompt_length = len(input_ids) - num_answer_tokens
    data = {
        "texts": texts,
        "question": question,
        "sizes": [num_looked, num_layers, num_heads, num_patches],
        "grid": math.isqrt(num_patches),
        "firstPatch": input_ids.index(IMAGE_TOKEN_ID) if num_patches else 0,
        "promptLength": prompt_length,
        "numTokens": len(input_ids),
        "numAnswer": num_answer_tokens,
        "similarityRange": [low, high],
        "tokens": _describe_tokens(input_ids, prompt_length, num_looked, tokenizer),
        "words": _describe_words(inside, tokenizer),
        "picture": "" if picture is None else _to_data_uri(picture),
    }
    page = (FOLDER / "look.html").read_text(encoding="utf-8")
    parts = {
        "language": "zh-Hans" if language == "zh" else "en",
        "theme": f'data-theme="{theme}"' if theme else "",
        "title": texts["title"],
        "data": _escape_json(data),
        "numbers": base64.b64encode(zlib.compress(_pack(inside) + similarity, level=1)).decode("ascii"),
        "script": (FOLDER / "look.js").read_text(encoding="utf-8"),
    }
    # All at once: a name in braces that an answer holds is nothing but letters.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def _pack(inside: Inside) -> bytes:
    """Return shares and scales (A, L, H) in float32, then attention (A, L, H, P) in 255ths of its scale, in bytes."""
    attention = inside.attention.numpy().astype(np.float32)
    scales = attention.max(axis=-1, initial=0.0)
    levels = np.rint(attention * (255 / np.maximum(scales, 1e-8))[..., None]).astype(np.uint8)
    shares = inside.picture_share.numpy().astype("<f4")
    return shares.tobytes() + scales.astype("<f4").tobytes() + levels.tobytes()


def _to_bytes(values: np.ndarray) -> tuple[bytes, float, float]:
    """Return the values in 256 steps, and what the first and the last of these stand for."""
    if not values.size:
        return b"", 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    levels = np.rint((values - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    return levels.tobytes(), low, high


def _to_data_uri(picture: Image.Image) -> str:
    """Return the picture on the square that the model sees."""
    square = pad_to_square(picture)
    if square.width > MAX_SIDE:
        square = square.resize((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if square.width <= 256 else "jpeg"  # pixels that are shown enlarged should be the picture's own
    file = io.BytesIO()
    square.save(file, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def group_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Return names, and how many tokens each stands for: bytes that make a character are one, so is an image."""
    groups = []
    start = 0
    for name in name_tokens(ids, tokenizer):
        count = 1
        if ids[start] == IMAGE_TOKEN_ID:
            count = next((i for i, token in enumerate(ids[start:]) if token != IMAGE_TOKEN_ID), len(ids) - start)
        elif ids[start] in tokenizer.byte_of_id and name not in BYTE_PIECES:
            count = len(name.encode("utf-8"))
        groups.append((name, count))
        start += count
    assert start == len(ids), "names and tokens do not match"
    return groups


def _describe_tokens(
    ids: Sequence[int], prompt_length: int, num_looked: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Return the sequence piece by piece; `word` is the place in the answer, of those that were looked at."""
    described = []
    start = 0
    answer_end = prompt_length + num_looked
    for part in (ids[:prompt_length], ids[prompt_length:answer_end], ids[answer_end:]):
        for name, count in group_tokens(part, tokenizer):
            kind = "text"
            if ids[start] == IMAGE_TOKEN_ID:
                kind = "image"
            elif ids[start] not in tokenizer.text_of_id and ids[start] not in tokenizer.byte_of_id:
                kind = "control"
            described.append({
                "name": name,
                "text": show_piece(name),
                "start": start,
                "ids": [] if kind == "image" else list(ids[start : start + count]),
                "count": count,
                "kind": kind,
                "word": start - prompt_length if prompt_length <= start < answer_end else None,
                "isAnswer": start >= prompt_length,
                "beginsWord": name.startswith(SPACE) or kind == "control",
            })  # fmt: skip
            start += count
    return described


def _describe_words(inside: Inside, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return for each token of the answer: its name, probability and rank, and what it nearly was."""
    chosen = zip(
        inside.chosen_ids.tolist(), inside.chosen_probabilities.tolist(), inside.chosen_ranks.tolist(), strict=True
    )
    candidates = zip(inside.candidate_ids.tolist(), inside.candidate_probabilities.tolist(), strict=True)
    return [
        {
            "name": tokenizer.name(token),
            "id": token,
            "probability": probability,
            "rank": rank,
            "candidates": [
                {"name": tokenizer.name(other), "id": other, "probability": value}
                for other, value in zip(ids, values, strict=True)
            ],
        }
        for (token, probability, rank), (ids, values) in zip(chosen, candidates, strict=True)
    ]


def show_piece(name: str) -> str:
    """Return a name as a word of the answer: without the mark of the space before it."""
    if name == LINE_END:
        return "↵"
    return name.replace(SPACE, " ").strip() or "␣"


def _escape_json(data: object) -> str:
    """Return JSON that may stand inside a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
