"""The kinds of dialogue a model is asked to write, and whether a reply is one.

`prompts.toml` has every word that is sent. An endpoint may ignore the schema that comes with a request, so a reply is
checked as if there were none. What it says, clean.py judges; here it is refused only where asking again may help.
"""

import json
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data.zh.text import HAN

PROMPTS = Path(__file__).parent / "prompts.toml"
QUESTION_LENGTH = (2, 120)  # characters
FOREIGN_LENGTH = 20  # characters; a longer answer without any Han character was not written in Chinese
QUOTED_CHARACTERS = 160  # of a bad reply, in a message
FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)
REFUSALS = re.compile(
    r"""
    ^\s*(?:非常|很|十分)?(?:抱歉|对不起|遗憾)
    | 作为(?:一个|一名|一款)?\s*(?:AI|人工智能|大?语言模型|智能助手)
    | 我(?:无法|不能|没法|没有办法|不便)(?:查看|看到|看见|识别|辨认|协助|帮助|提供|回答|完成|处理|描述|满足)
    | ^\s*(?:I'?m\ sorry|Sorry|I\ (?:can(?:no|')t|am\ unable|cannot))|\bas\ an\ AI\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
YES = re.compile(r"[是有对能会可在确]")
NO = re.compile(r"[不没否无未]|并不|并没|并非")
SCHEMA = {
    "type": "object",
    "properties": {
        "applicable": {"type": "boolean"},
        "turns": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["applicable", "turns"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Kind:
    name: str
    prompt: str
    weight: float  # how often it is drawn
    turns: tuple[int, int]  # fewest and most
    answer: tuple[int, int]  # shortest and longest, in characters


@dataclass(frozen=True)
class Prompts:
    """The file of prompts."""

    version: str
    system: str
    request: str
    introduction: str
    again: str
    reasons: dict[str, str]  # why a reply was not taken, as it is told to the model
    kinds: dict[str, Kind]


class BadReplyError(ValueError):
    """A reply that cannot be used: `reason` is one of the prompts' [reasons], `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        shown = detail.encode(errors="replace").decode()  # half a character, as JSON can hold, cannot be written
        super().__init__(f"{reason}: {shown}")
        self.reason = reason
        self.detail = shown


@cache
def load_prompts() -> Prompts:
    """Return what `prompts.toml` says."""
    table = tomllib.loads(PROMPTS.read_text(encoding="utf-8"))
    kinds = {
        name: Kind(name, kind["prompt"].strip(), kind["weight"], tuple(kind["turns"]), tuple(kind["answer"]))
        for name, kind in table.pop("kinds").items()
    }
    return Prompts(kinds=kinds, **table)


def load_kinds() -> dict[str, Kind]:
    """Return the kinds of dialogue by name, in the order of `prompts.toml`."""
    return load_prompts().kinds


def parse_reply(kind: str, content: str) -> tuple[tuple[str, str], ...]:
    """Return the questions and answers of a reply; none of one that says the kind does not fit the picture.

    The JSON object may stand in a ``` fence, as endpoints without structured output like to send it; any other text
    around it makes the reply a bad one.

    Raises: BadReplyError, a ValueError.
    """
    fenced = FENCE.fullmatch(content)
    try:
        reply = json.loads(fenced[1] if fenced else content)
    except (ValueError, RecursionError) as error:
        reason = "refusal" if REFUSALS.search(content) else "not_json"
        raise BadReplyError(reason, f"{error} in {content[:QUOTED_CHARACTERS]!r}") from error
    turns = _read_turns(reply)
    if reply["applicable"]:
        check_turns(load_kinds()[kind], turns)
    elif turns:
        raise BadReplyError("wrong_shape", f"{len(turns)} turns in a reply that says none are applicable")
    return turns


def _read_turns(reply: Any) -> tuple[tuple[str, str], ...]:
    """Return the turns of a reply of the right shape, whatever they say."""
    found = repr(reply)[:QUOTED_CHARACTERS]
    if not isinstance(reply, dict) or reply.keys() != {"applicable", "turns"}:
        raise BadReplyError("wrong_shape", f"{found}, expected the keys applicable and turns")
    if not isinstance(reply["applicable"], bool) or not isinstance(reply["turns"], list):
        raise BadReplyError("wrong_shape", f"{found}, expected true or false and a list")
    turns = []
    for turn in reply["turns"]:
        if not isinstance(turn, dict) or turn.keys() != {"question", "answer"}:
            raise BadReplyError("wrong_shape", f"{turn!r:.{QUOTED_CHARACTERS}}, expected the keys question and answer")
        question, answer = turn["question"], turn["answer"]
        if not isinstance(question, str) or not isinstance(answer, str):
            raise BadReplyError("wrong_shape", f"{turn!r:.{QUOTED_CHARACTERS}}, expected two texts")
        if re.search(r"[\ud800-\udfff\0]", question + answer):
            raise BadReplyError("wrong_shape", f"{turn!r:.{QUOTED_CHARACTERS}} holds half a character")
        turns.append((question.strip(), answer.strip()))
    return tuple(turns)


def check_turns(kind: Kind, turns: tuple[tuple[str, str], ...]) -> None:
    """Raises: BadReplyError for turns that are not what the kind asks for."""
    for question, answer in turns:
        if REFUSALS.search(answer):
            raise BadReplyError("refusal", f"{answer[:QUOTED_CHARACTERS]!r}")
        if not HAN.search(question) or (len(answer) >= FOREIGN_LENGTH and not HAN.search(answer)):
            raise BadReplyError("not_chinese", f"{question[:QUOTED_CHARACTERS]!r}, {answer[:QUOTED_CHARACTERS]!r}")
        for name, text, (low, high) in (("question", question, QUESTION_LENGTH), ("answer", answer, kind.answer)):
            if not low <= len(text) <= high:
                shown = repr(text[:QUOTED_CHARACTERS])
                raise BadReplyError(
                    "length", f"{kind.name}: {name} {shown} has {len(text)} characters, expected {low} to {high}"
                )
    low, high = kind.turns
    if not low <= len(turns) <= high:
        raise BadReplyError("number_of_turns", f"{kind.name} with {len(turns)} turns, expected {low} to {high}")
    if len({question for question, _ in turns}) < len(turns):
        raise BadReplyError("repeated", "a question is asked twice")
    if kind.name == "yes_no":
        answers = [answer for _, answer in turns]
        num_no = sum(NO.match(answer) is not None for answer in answers)
        num_yes = sum(YES.match(answer) is not None for answer in answers)
        if not num_no or not num_yes or num_no + num_yes != len(answers):
            raise BadReplyError("polarity", f"{num_yes} times yes and {num_no} times no in {len(answers)} answers")
