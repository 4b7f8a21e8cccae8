"""Differences: words for what has spaces, characters for what has none; what is marked is whole, escaped, and all."""

import random
import re
import time

import pytest

from demo.difference import find_differences, mark

A, B = "红色的三角形。", "蓝色的圆形。"


def show(left: str, right: str) -> tuple[str, str]:
    only_left, only_right = find_differences(left, right)
    return mark(left, only_left), mark(right, only_right)


@pytest.mark.parametrize(
    ("left", "right", "left_marked", "right_marked"),
    [
        ("a red shape", "a blue shape", "a <mark>red</mark> shape", "a <mark>blue</mark> shape"),
        ("a red shape", "a shape", "a <mark>red</mark> shape", "a shape"),
        ("red", "reddish", "<mark>red</mark>", "<mark>reddish</mark>"),
        ("it isn't red.", "it isn't red!", "it isn&#x27;t red<mark>.</mark>", "it isn&#x27;t red<mark>!</mark>"),
        (A, B, "<mark>红</mark>色的<mark>三角</mark>形。", "<mark>蓝</mark>色的<mark>圆</mark>形。"),
        ("这是cat。", "这是dog。", "这是<mark>cat</mark>。", "这是<mark>dog</mark>。"),
        ("一只👨‍👩‍👧猫", "一只👨‍👩‍👦猫", "一只<mark>👨‍👩‍👧</mark>猫", "一只<mark>👨‍👩‍👦</mark>猫"),
        ("one  two big\nthree", "four", "<mark>one  two big\nthree</mark>", "<mark>four</mark>"),
        ("", "a", "", "<mark>a</mark>"),
        ("<b>1</b> & 2", "<b>1</b> & 3", "&lt;b&gt;1&lt;/b&gt; &amp; <mark>2</mark>", None),
        ("<script>", "", "<mark>&lt;script&gt;</mark>", ""),
    ],
)
def test_what_only_one_says_is_marked(left: str, right: str, left_marked: str, right_marked: str | None) -> None:
    shown = show(left, right)
    assert shown[0] == left_marked
    assert right_marked is None or shown[1] == right_marked
    assert show(right, left) == shown[::-1]


@pytest.mark.parametrize(
    ("left", "right"), [("", ""), ("红色 的", "红色的"), ("a  red\nshape ", "a red shape"), (A, A)]
)
def test_spaces_make_no_difference(left: str, right: str) -> None:
    assert find_differences(left, right) == ([], [])


@pytest.mark.parametrize("seed", range(20))
def test_what_is_not_marked_is_the_same_on_both_sides(seed: int) -> None:
    rng = random.Random(seed)
    pieces = ["red", "blue ", "。", "红", "色", " ", "<", "&amp;", "isn't", "🙂", "e\u0301", "\n", "2"]
    left, right = ("".join(rng.choices(pieces, k=rng.randrange(40))) for _ in range(2))
    shown = show(left, right)
    for marked in shown:
        assert marked.count("<") == 2 * marked.count("<mark>") == 2 * marked.count("</mark>")
    unmarked = [re.sub(r"<mark>.*?</mark>|\s", "", marked, flags=re.DOTALL) for marked in shown]
    assert unmarked[0] == unmarked[1]


def test_long_answers_keep_what_they_say_often() -> None:
    """difflib would take the words of long texts that come often for noise."""
    often = "the shape " * 150
    shown = show(f"red {often}red", f"blue {often}blue")
    assert shown == (f"<mark>red</mark> {often}<mark>red</mark>", f"<mark>blue</mark> {often}<mark>blue</mark>")


def test_comparing_ends_soon_whatever_is_said() -> None:
    """Two words over and over: difflib alone needs minutes for these."""
    left, right = "x " + "a b " * 3000 + "y", "x " + "b b a " * 2000 + "y"
    started = time.process_time()
    assert [len(spans) for spans in find_differences(left, right)] == [1, 1]
    assert show(left, right)[0].startswith("x <mark>a b")
    assert show(left, right)[0].endswith("b</mark> y")
    assert time.process_time() - started < 10
