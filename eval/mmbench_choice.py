"""Which option an answer to MMBench chooses, as each of the rules in `eval/mmbench.py` reads it; no model judges."""

import re
from collections.abc import Mapping

from eval.task import OFFICIAL

MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
STATED = re.compile(r"answer\s+is\s+\**([A-D])\**", re.IGNORECASE)
WRAPPINGS = [("", mark) for mark in ("", ".", ",", ":", ")", ").")]
WRAPPINGS += [("(", ")"), ("(", ").")] + [(":", mark) for mark in ("", ",", ".", ")", ").")]


def read_choice(prediction: str, options: Mapping[str, str], rule: str) -> str:
    """Return the letter of the option that an answer chooses, "" for none."""
    letter = _read_wrapped_letter(prediction) if rule == "lmms-eval" else _read_letter(prediction, options, rule)
    if letter is not None:
        return letter
    if rule == "vlmevalkit" and len(prediction) > 2 * sum(len(text) for text in options.values()):
        return ""
    named = [letter for letter, text in options.items() if text.lower() in prediction.lower()]
    return named[0] if len(named) == 1 else ""


def _read_letter(prediction: str, options: Mapping[str, str], rule: str) -> str | None:
    """Return the letter, "" where the model chooses none of them, None where its words are to be looked at."""
    if any(refusal in prediction for refusal in REFUSALS):
        return ""
    words = prediction.translate(MARKS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and (rule == OFFICIAL or found[0] not in words[:-4]):
        return found[0]
    if not found and "Z" in words:
        return ""
    if rule == "vlmevalkit" and (stated := STATED.search(prediction)) and stated[1].upper() in options:
        return stated[1].upper()
    return None


def _read_wrapped_letter(prediction: str) -> str | None:
    words = prediction.split()
    for before, after in WRAPPINGS:
        found = [letter for letter in "ABCDE" if before + letter + after in words]
        is_article = before == after == "" and "A" in words and len(words) > 3
        if len(found) == 1 and not is_article:
            return found[0]
    return None
