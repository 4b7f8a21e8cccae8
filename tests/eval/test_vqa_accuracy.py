"""VQA accuracy by hand, against a slow second implementation, and what the harnesses differ in."""

import random

import pytest

from eval.vqa_accuracy import (
    CONTRACTIONS,
    MARKS,
    NUMBERS,
    RULES,
    judge,
    leave_one_out,
    normalise,
    process_for_submission,
    vqa_accuracy,
)

WORDS = ["a", "An", "the", "Yes", "no", "cat", "1,000", "3.5", "…", "猫"]
PIECES = [*CONTRACTIONS, *NUMBERS, *MARKS, *"0123456789.,':\n\t ", *WORDS]


def make_text(source: random.Random) -> str:
    return source.choice(["", " "]).join(source.choice(PIECES) for _ in range(source.randrange(5)))


def leave_out_slowly(answer: str, references: list[str]) -> float:
    """The rule as its owner words it: each person left out in turn."""
    values = []
    for person in range(len(references)):
        others = references[:person] + references[person + 1 :]
        values.append(min(1.0, len([other for other in others if other == answer]) / 3))
    return sum(values) / len(values)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("num_matches", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), *((k, 1) for k in range(4, 11))]
)
def test_the_ladder(num_matches: int, value: float, rule: str) -> None:
    """One match: the nine others find it, 9 x 1/3 / 10. Two: (2 x 1/3 + 8 x 2/3) / 10. Three: (3 x 2/3 + 7) / 10."""
    answers = ["red"] * num_matches + ["blue"] * (10 - num_matches)
    assert vqa_accuracy("red", answers, rule) == value
    assert leave_one_out(num_matches, 10) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.", "3"),
        ("3.5", "3.5"),
        (".5.", ".5"),
        ("1,000", "1000"),
        ("1,,000", "1 000"),  # no digit, comma, digit: each comma becomes a blank
        ("1,000 t-shirts; red", "1000 tshirts red"),  # a comma in a number deletes every mark
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("t-shirt -x", "tshirt x"),  # a mark beside a blank is deleted everywhere
        ("dont", "don't"),
        ("don't", "don't"),
        ("Couldnt've", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("Im here", "im here"),  # the table has Im, but the text is in lower case by then
        ("the a an", ""),
        ("A man on the moon", "man on moon"),
        ("ten", "10"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("5:30 pm", "5:30 pm"),  # neither : nor ' is a mark
        ("U.S.A.", "usa"),
        ("...", ""),
        ("…", "…"),
        ("." * 32, ""),
        ("." * 40, "." * 8),
        ("", ""),
        ("\n", ""),
        ("on\tthe\ntable ", "on table"),
        ("yes.", "yes"),
        ("Yes!", "yes"),
        ("猫。", "猫。"),
    ],
)
def test_normalised_by_hand(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_the_table_has_the_owners_120_contractions() -> None:
    assert len(CONTRACTIONS) == 120
    assert {word for word, right in CONTRACTIONS.items() if word.replace("'", "") != right.replace("'", "")} == set()
    assert {word for word, right in CONTRACTIONS.items() if len(right) <= len(word)} == {"let's", "she's", "somebody'd"}
    assert {word for word in CONTRACTIONS if word != word.lower()} == {"Id've", "I'dve", "Im", "Ive"}
    assert (CONTRACTIONS["hed've"], CONTRACTIONS["twas"], CONTRACTIONS["oclock"]) == ("he'd've", "'twas", "o'clock")
    assert "its" not in CONTRACTIONS
    assert "well" not in CONTRACTIONS
    assert len(NUMBERS) == 12
    assert len(MARKS) == 21


def test_where_all_ten_agree_nothing_is_normalised() -> None:
    assert judge("yes", ["yes"] * 10) == 1
    assert judge("Yes", ["yes"] * 10) == 0
    assert judge("two", ["2"] * 10) == 0
    assert judge(" yes\n", ["yes\t"] * 10) == 1  # blanks at the ends are no difference
    assert judge("the cat", ["the cat"] * 10) == 1
    mixed = ["yes"] * 9 + ["no"]
    assert judge("Yes", mixed) == judge("the YES!", mixed) == 1
    assert judge("two", ["2"] * 9 + ["3"]) == 1
    assert judge("2", ["two"] * 2 + ["2."] + ["3"] * 7) == 0.9  # people's answers are normalised as well


def test_a_models_answer_is_normalised_before_the_rule() -> None:
    assert [vqa_accuracy(text, ["yes"] * 10, "official") for text in ("Yes", "yes.", "YES!", "no")] == [1, 1, 1, 0]
    assert vqa_accuracy("Two.", ["2"] * 10, "official") == 1
    # The price, which everybody's numbers have: ten people's article or hyphen cannot be met.
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10, "official") == 0
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"], "official") == 1


def test_what_the_rules_differ_in() -> None:
    def values(prediction: str, answers: list[str]) -> list[float]:
        return [vqa_accuracy(prediction, answers, rule) for rule in ("official", "lmms-eval", "vlmevalkit")]

    assert values("3", ["3."] * 4 + ["4"] * 6) == [1, 1, 0]  # the corrected pattern keeps a full stop behind a digit
    assert values("t-shirt", ["t-shirt"] * 10) == [0, 0, 1]  # nothing stands as it is
    assert values("the man's hat", ["man's hat"] * 9 + ["hat"]) == [1, 0, 1]  # "man 's hat"
    assert normalise("1,,000 x-y", "lmms-eval") == "1000 xy"
    assert normalise("1,,000 x-y", "official") == normalise("1,,000 x-y", "vlmevalkit") == "1 000 x y"
    stops = "x" + "." * 64  # are taken 32 at a time
    assert values(stops, ["x"] * 4 + ["y"] * 6) == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("10,000", "10000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("t-shirt", "t shirt"),
        ("none", "0"),
        ("5:30 pm", "5:30 pm"),
        ("the man's hat", "man 's hat"),
        ("hows", "how's"),  # 's is parted before the table puts one in
        ("really?yes", "reallyyes"),
        ("red,blue", "redblue"),
        ("\tA\nB", "b"),
        ("", ""),
    ],
)
def test_processed_for_submission_by_hand(text: str, expected: str) -> None:
    assert process_for_submission(text) == expected


def test_one_by_one_against_the_slow_rule() -> None:
    source = random.Random(7)
    for _ in range(3000):
        pool = [make_text(source) for _ in range(source.randrange(1, 4))]
        answers = [source.choice(pool) for _ in range(10)]
        prediction = source.choice([*pool, make_text(source)])
        cleaned = [" ".join(answer.replace("\n", "\t").split("\t")).strip() for answer in answers]
        ours, theirs = normalise(prediction), cleaned
        if len(set(cleaned)) > 1:
            ours, theirs = normalise(ours), [normalise(answer) for answer in answers]
        assert vqa_accuracy(prediction, answers, "official") == pytest.approx(leave_out_slowly(ours, theirs))
        both = [normalise(text, "vlmevalkit") for text in (prediction, *answers)]
        assert vqa_accuracy(prediction, answers, "vlmevalkit") == pytest.approx(leave_out_slowly(both[0], both[1:]))


def test_normalising_twice_changes_nothing() -> None:
    """With more full stops than are taken at a time it would."""
    source = random.Random(8)
    for _ in range(3000):
        text = make_text(source)
        for rule in RULES:
            once = normalise(text, rule)
            assert normalise(once, rule) == once, text
    assert normalise(normalise("." * 40)) == ""
    assert process_for_submission(process_for_submission("hows")) == "how 's"


def test_the_order_of_people_does_not_matter() -> None:
    source = random.Random(9)
    for _ in range(300):
        answers = [make_text(source) for _ in range(4)] + ["yes"] * source.randrange(7) + ["no"] * 2
        for rule in RULES:
            value = vqa_accuracy("Yes", answers, rule)
            assert vqa_accuracy("Yes", source.sample(answers, len(answers)), rule) == value


def test_more_matches_are_never_worth_less() -> None:
    for number in (1, 2, 3, 4, 5, 9, 10, 12):
        values = [leave_one_out(matches, number) for matches in range(number + 1)]
        assert values == sorted(values)
        assert (values[0], values[-1]) == (0, 1)
        if number > 3:
            for matches, value in enumerate(values):
                assert value == pytest.approx(leave_out_slowly("x", ["x"] * matches + ["y"] * (number - matches)))


@pytest.mark.parametrize("rule", RULES)
def test_other_than_ten_answers_are_normalised_and_few_are_shared_out(rule: str) -> None:
    assert vqa_accuracy("yes.", ["Yes"], rule) == 1
    assert vqa_accuracy("no", ["Yes"], rule) == 0
    assert vqa_accuracy("The cat", ["cat", "dog"], rule) == 0.5
    assert vqa_accuracy("cat", ["A cat", "dog", "the cat"], rule) == pytest.approx(2 / 3)
    assert vqa_accuracy("cat", ["Cat"] * 5, rule) == 1
    assert vqa_accuracy("cat", ["cat", "dog", "dog", "dog"], rule) == 0.25  # (0 + 3 x 1/3) / 4


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="VQA accuracy needs at least one reference answer"):
        vqa_accuracy("yes", [], "official")
    with pytest.raises(ValueError, match="rule 'strict' is unknown, expected one of official, lmms-eval, vlmevalkit"):
        vqa_accuracy("yes", ["yes"] * 10, "strict")
