"""What is asked, and how captions are mended."""

import re

import pytest

from data.conversation import Turn, parse_turns
from data.prepare.captions import mend_caption, select_captions
from data.prepare.prompts import CAPTION_PROMPTS, SHORT_ANSWER_SUFFIX, ask_briefly, make_conversation
from data.prepare.report import Report


@pytest.mark.parametrize(
    ("typed", "mended", "changes"),
    [
        ("A dog runs.", "A dog runs.", []),
        (" A dog runs. ", "A dog runs.", ["blanks around it removed"]),
        ("A dog runs.\n", "A dog runs.", ["blanks around it removed"]),
        ("A dog  runs\non grass.", "A dog runs on grass.", ["blanks or newlines in a row made one blank"]),
        ("A dog runs", "A dog runs.", ["full stop added"]),
        ("A dog runs,", "A dog runs.", ["full stop added"]),
        ("Does it run?", "Does it run?", []),
        ("a dog runs.", "A dog runs.", ["first letter capitalised"]),
        ("A DOG ON A TV.", "A dog on a tv.", ["all capitals lowered"]),
        ("A dog near a TV.", "A dog near a TV.", []),
        ("4 dogs run.", "4 dogs run.", []),
        ("A dog , white , runs .", "A dog, white, runs.", ["detached punctuation attached"]),
        ("Isn 't it the dog 's ?", "Isn't it the dog's?", ["detached punctuation attached"]),
        ("It does n't run ( yet ) .", "It doesn't run (yet).", ["detached punctuation attached"]),
        ('A " stop " sign .', 'A "stop" sign.', ["detached punctuation attached"]),
        ('It says "stop" and "go".', 'It says "stop" and "go".', []),
        ('A 6" sub on "my" plate.', 'A 6" sub on "my" plate.', []),  # an odd mark says inches
        ("A .22 rifle in the '80s.", "A .22 rifle in the '80s.", []),
        ('A sign says "stop."', 'A sign says "stop."', []),
        ("\n", "", ["blanks around it removed"]),
        (
            " TWO  DOGS , RUN\n",
            "Two dogs, run.",
            [
                "blanks around it removed",
                "blanks or newlines in a row made one blank",
                "detached punctuation attached",
                "all capitals lowered",
                "full stop added",
            ],
        ),
    ],
)
def test_captions_are_mended(typed: str, mended: str, changes: list[str]) -> None:
    assert mend_caption(typed) == (mended, changes)
    assert mend_caption(mended) == (mended, [])


def test_captions_are_left_out_and_counted() -> None:
    report = Report("coco")
    sound = select_captions(
        ["Two tall trees", "", " ", "A vase", "two tall  trees.", "A red bus.", "Two tall trees"], report
    )
    assert sound == ["A red bus.", "Two tall trees."]
    assert report.dropped == {
        "caption: empty": 2,
        "caption: fewer than 3 words": 1,
        "caption: the picture has the same already": 2,
    }
    assert report.mended == {"caption: full stop added": 1}  # of what was kept


@pytest.mark.parametrize("language", ["en", "zh"])
def test_prompts_differ_and_ask_for_one_sentence(language: str) -> None:
    prompts = CAPTION_PROMPTS[language]
    assert len(set(prompts)) == len(prompts) == 12
    wanted = {"en": r"\b(one|single|short|one-)\b.*sentence|sentence.*", "zh": "一句.*英文|英文.*一句"}[language]
    for prompt in prompts:
        assert re.search(wanted, prompt, flags=re.IGNORECASE), prompt
        assert prompt[-1] in {"en": ".?", "zh": "。？"}[language]


def test_short_answers_are_asked_for_as_benchmarks_do() -> None:
    assert SHORT_ANSWER_SUFFIX["en"] == "\nAnswer the question using a single word or phrase."
    assert "英文" in SHORT_ANSWER_SUFFIX["zh"]
    assert ask_briefly([("Is it red?", "no"), ("Why?", "paint")], "en") == [
        ("Is it red?\nAnswer the question using a single word or phrase.", "no"),
        ("Why?", "paint"),
    ]


def test_conversations_are_what_training_reads() -> None:
    turns = make_conversation([("Is it red?", "no"), ("Why?", "paint")])
    assert turns[0] == {"from": "human", "value": "<image>\nIs it red?"}
    assert parse_turns({"image": "a.jpg", "conversations": turns}) == [
        Turn("human", "Is it red?", has_image=True),
        Turn("gpt", "no"),
        Turn("human", "Why?"),
        Turn("gpt", "paint"),
    ]
