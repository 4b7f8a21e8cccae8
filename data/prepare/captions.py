"""Captions as people typed them become one sound sentence per picture; every change is counted.

Mended, whatever the source: blanks and newlines around a caption or in a row, punctuation that a tokeniser detached
(`the man 's hat , a " Dodgers " one .`), ALL CAPITALS, a small first letter, a missing full stop. Left out: captions
that are empty, have fewer than three words, or repeat another one of the same picture.

Which one becomes the answer: `random.Random(f"{seed}:{source}:{image_id}")` first picks among the sound captions of
the picture, mended and sorted, then among the prompts. So the choice depends on nothing else in the file.
"""

import random
import re
from collections.abc import Iterable

from data.prepare.options import Options
from data.prepare.prompts import CAPTION_PROMPTS, make_conversation
from data.prepare.report import Report

MIN_WORDS = 3


def make_row(
    source: str, image_id: int | str, image: str, captions: Iterable[str], options: Options, report: Report
) -> dict | None:
    """Make the row of a picture; None, counted, where no caption is sound."""
    sound = select_captions(captions, report)
    if not sound:
        report.drop("picture: no sound caption")
        return None
    random_order = random.Random(f"{options.seed}:{source}:{image_id}")
    caption = random_order.choice(sound)
    prompt = random_order.choice(CAPTION_PROMPTS[options.language])
    return {
        "id": f"{source}-{image_id}",
        "image": image,
        "conversations": make_conversation([(prompt, caption)]),
        "source": source,
        "lang": options.language,
    }


def select_captions(captions: Iterable[str], report: Report) -> list[str]:
    """Return the sound captions of a picture, mended and sorted."""
    sound: set[str] = set()
    for typed in captions:
        caption, changes = mend_caption(typed)
        if len(caption.split()) < MIN_WORDS:
            report.drop(f"caption: fewer than {MIN_WORDS} words" if caption else "caption: empty")
        elif caption in sound:
            report.drop("caption: the picture has the same already")
        else:
            sound.add(caption)
            for change in changes:
                report.mend(f"caption: {change}")
    return sorted(sound)


def mend_caption(typed: str) -> tuple[str, list[str]]:
    """Return a caption as a sentence, and what was changed."""
    changes = []
    caption = typed.strip()
    if caption != typed:
        changes.append("blanks around it removed")
    if caption != (joined := " ".join(caption.split())):
        caption = joined
        changes.append("blanks or newlines in a row made one blank")
    if caption != (attached := attach_punctuation(caption)):
        caption = attached
        changes.append("detached punctuation attached")
    if caption.isupper():
        caption = caption.capitalize()
        changes.append("all capitals lowered")
    if caption[:1].islower():
        caption = caption[0].upper() + caption[1:]
        changes.append("first letter capitalised")
    if caption and not re.search(r"[.!?][\"')\]]*$", caption):
        caption = caption.rstrip(" ,;:-") + "."
        changes.append("full stop added")
    return caption, changes


def attach_punctuation(text: str) -> str:
    """Undo what tokenisers do to punctuation: `the man 's hat , isn 't it ( really ) ?` loses its extra blanks."""
    text = re.sub(r" ([.,;:!?)]|n't|'(?:s|re|ve|ll|d|m|t))(?!\w)", r"\1", text)
    text = text.replace("( ", "(")
    parts = text.split('"')
    if len(parts) % 2 == 1:  # quotation marks in pairs: each second part stands between two
        parts[1::2] = [part.strip() for part in parts[1::2]]
    return '"'.join(parts)
