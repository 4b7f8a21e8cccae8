"""VQA accuracy: how many of ten people gave the answer, once spelling is set aside.

The owner's rule, `judge`: where the ten answers are not all the same string, theirs and the model's are normalised;
where they are, the strings are compared as they stand. Each of the ten is left out in turn and the answer is worth
min(1, matches among the other nine / 3): 0, 0.3, 0.6, 0.9 for 0 to 3 matches, and 1 from 4 on.

`vqa_accuracy` normalises the model's answer before that, as everybody does: "Yes" would be wrong where all ten said
"yes". Rules, all to the letter of the code that people's numbers come from:

- official: the owner's script, oddities included (below);
- lmms-eval: its prediction goes through the processor that LLaVA makes its submissions with, `process_for_submission`,
  and then by the owner's rule; "1,,000" counts as a number with commas;
- vlmevalkit: always normalised; a full stop behind a digit stays ("3." is not "3").

Other than ten answers, which the owner's data never has, are normalised by every rule. Of fewer than four, no answer
could be worth 1 when one is left out: what counts is the share of them that match, so a single one counts 0 or 1.

Source: Antol et al. 2015; https://visualqa.org/evaluation.html.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

RULES = ("official", "lmms-eval", "vlmevalkit")
NUM_PEOPLE = 10
ENOUGH = 3  # people who agree
MARKS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
# Each is recognised with one of its apostrophes missing, whichever. Text is in lower case by then: I'm never is.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}  # the table's own slips
# A comma in a number, and the full stops that go. The owner's pattern for these means "not behind a digit" but says
# (?!<=\d), which is always true; and re.UNICODE, the number 32, stands where the number of removals is given.
DIGIT_COMMA = re.compile(r"\d,\d")
STOP = re.compile(r"\.(?!\d)")
PATTERNS = {
    "official": (DIGIT_COMMA, STOP),
    "lmms-eval": (re.compile(r"\d,+\d"), STOP),
    "vlmevalkit": (DIGIT_COMMA, re.compile(r"(?<!\d)\.(?!\d)")),
}
MAX_STOPS = 32


def vqa_accuracy(prediction: str, answers: Sequence[str], rule: str) -> float:
    """Return what the model's raw answer is worth, 0 to 1.

    Raises: ValueError for no answers or an unknown rule.
    """
    if rule == "official":
        prediction = normalise(prediction)
    elif rule == "lmms-eval":
        prediction = process_for_submission(prediction)
    return judge(prediction, answers, rule)


def judge(answer: str, answers: Sequence[str], rule: str = "official") -> float:
    """Return what an answer is worth as it is submitted: the owner's rule.

    Raises: as `vqa_accuracy`.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown, expected one of {', '.join(RULES)}")
    if not answers:
        raise ValueError("VQA accuracy needs at least one reference answer")
    answer, references = clean(answer), [clean(reference) for reference in answers]
    are_ten_alike = len(references) == NUM_PEOPLE and len(set(references)) == 1
    if rule == "vlmevalkit" or not are_ten_alike:
        answer, references = normalise(answer, rule), [normalise(reference, rule) for reference in references]
    return leave_one_out(references.count(answer), len(references))


def leave_one_out(num_matches: int, num_answers: int) -> float:
    """Return the mean, over the answers left out in turn, of min(1, matches among the others / 3)."""
    if num_answers <= ENOUGH:
        return num_matches / num_answers
    among_others = num_matches * min(ENOUGH, num_matches - 1) + (num_answers - num_matches) * min(ENOUGH, num_matches)
    return among_others / (ENOUGH * num_answers)


@lru_cache(maxsize=2**16)  # people's answers are short and few
def normalise(text: str, rule: str = "official") -> str:
    """Return the text without marks, articles and capitals, numbers as digits, apostrophes where they belong."""
    digit_comma, stop = PATTERNS[rule]
    text = before = clean(text)
    has_digit_comma = digit_comma.search(before)
    for mark in MARKS:
        is_at_an_edge = mark + " " in before or " " + mark in before
        text = text.replace(mark, "" if is_at_an_edge or has_digit_comma else " ")
    text = stop.sub("", text, count=MAX_STOPS)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def process_for_submission(text: str) -> str:
    """Return an answer as LLaVA uploads it: normalised after commas and question marks are gone and 's stands alone.

    Note: "man's" becomes "man 's", which the owner's rule does not do to people's answers; it may cost points.
    Source: Pythia's EvalAIAnswerProcessor.
    """
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"), "lmms-eval")


def clean(text: str) -> str:
    """Return the text on one line."""
    return text.replace("\n", " ").replace("\t", " ").strip()
