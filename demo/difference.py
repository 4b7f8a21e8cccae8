"""Where two answers differ: by words, and where no spaces part words (Chinese, Japanese), by characters."""

import html
import itertools
import re
from collections.abc import Sequence
from difflib import SequenceMatcher

CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Apostrophes and hyphens are parts of words.
PUNCTUATION = r"!-&(-,./:-@\[-`{-~\u2018-\u201f\u2026\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
PIECE = re.compile(rf"[{CJK}]|[{PUNCTUATION}]+|[^\s{CJK}{PUNCTUATION}]+")
# Pieces of one text times those of the other. Where more differ than that, all between what begins and ends alike is
# marked: two words over and over can make difflib compare with the cube of their number, here 0.5 s.
MAX_PAIRS = 250_000

Span = tuple[int, int]  # characters of a text, from and to


def find_differences(left: str, right: str) -> tuple[list[Span], list[Span]]:
    """Return which parts of each text are not in the other, in reading order; spaces make no difference."""
    left_spans, right_spans = ([match.span() for match in PIECE.finditer(text)] for text in (left, right))
    left_pieces = [left[start:end] for start, end in left_spans]
    right_pieces = [right[start:end] for start, end in right_spans]
    only_left, only_right = [], []
    for left_start, left_end, right_start, right_end in _find_changes(left_pieces, right_pieces):
        if left_start < left_end:
            only_left.append((left_spans[left_start][0], left_spans[left_end - 1][1]))
        if right_start < right_end:
            only_right.append((right_spans[right_start][0], right_spans[right_end - 1][1]))
    return only_left, only_right


def _find_changes(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Return what is changed for what, as places among the pieces: left from and to, right from and to."""
    begin = _count_equal(left, right)
    end = _count_equal(left[begin:][::-1], right[begin:][::-1])
    left_middle, right_middle = left[begin : len(left) - end], right[begin : len(right) - end]
    if len(left_middle) * len(right_middle) > MAX_PAIRS:
        return [(begin, len(left) - end, begin, len(right) - end)]
    # Without autojunk: it would take what a long text says often for noise, and mark all of it.
    matcher = SequenceMatcher(None, left_middle, right_middle, autojunk=False)
    return [
        (begin + left_start, begin + left_end, begin + right_start, begin + right_end)
        for kind, left_start, left_end, right_start, right_end in matcher.get_opcodes()
        if kind != "equal"
    ]


def _count_equal(left: Sequence[str], right: Sequence[str]) -> int:
    """Return how many pieces are the same from the start on."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def mark(text: str, spans: Sequence[Span]) -> str:
    """Return the text as HTML, with `spans` marked."""
    parts, done = [], 0
    for start, end in spans:
        parts += [html.escape(text[done:start]), f"<mark>{html.escape(text[start:end])}</mark>"]
        done = end
    return "".join([*parts, html.escape(text[done:])])
