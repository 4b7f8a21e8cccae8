"""What makes a dialogue unfit for training, one small function for each fault; none of them asks a model.

A filter gets a `Dialogue` and returns what it stumbled over, or None. Their order, in `make_filters`, is fixed: a
dialogue is dropped for the first. The rules are about words, not meaning: what they cannot see is said where they are.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from data.conversation import IMAGE_MARKER
from data.zh.kinds import Kind, check_turns
from data.zh.persons import PRIVATE_DATA, find_unknown_name
from data.zh.text import CITATIONS, HAN, SELECTORS, URLS, clean_text, han_ratio, is_instruction, split_sentences

CUT_OFF_LENGTH = 40  # characters; a longer answer is made of sentences, and the last has an end
NGRAM = 8  # characters
MAX_REPEATED = 0.25  # of an answer's n-grams
SAME_ANSWER_LENGTH = 15  # characters, as below; shorter answers may come twice in a dialogue
SAME_SENTENCE_LENGTH = 6  # characters without punctuation; shorter sentences may come twice in an answer

QUOTED = re.compile(r"“[^”]*”|「[^」]*」|『[^』]*』|《[^》]*》|\"[^\"]*\"|‘[^’]*’")
REFUSALS = re.compile(
    r"""
      ^\W*(?:非常|十分|很|真的)?(?:抱歉|对不起|遗憾|不好意思)
    | 作为(?:一个|一名|一款|一种|一位)?(?:ai|人工智能|大?语言模型|智能助手|助手|机器人)
    | 我(?:只是|是|仅仅是)(?:一个|一名|一款|一种)?(?:ai|人工智能|大?语言模型|智能助手|机器人)
    | 我(?:暂时|目前|还|并|也)?(?:无法|不能|没办法|没有办法|不便)
    | (?:^|[，。；！？\s]|我们|(?:图片?|照片|画面)[中里上]?|因此|所以|但|不过|[仅光]凭[^，。]{1,8})
      (?:并|也|暂时|仍|还|是)?(?:无法|不能)(?:准确|直接|明确|具体|清楚地?|完全|从[^，。]{1,8})?
      (?:确定|判断|识别|辨认|辨别|确认|回答|得知|知道|获知|推断|看出|提供[^，。]{0,6}(?:信息|描述|答案|帮助))
    | (?:图片?|照片|画面)[中里上]?(?:太模糊|看不清)
    | (?:没有|没|未|缺乏|缺少)(?:提供|给出|提及|提到|说明|足够)[^，。]{0,8}(?:信息|线索|依据)|信息(?:不足|有限)
    | 请(?:您)?(?:提供|上传|重新上传)[^，。]{0,8}(?:图|照片|信息)
    | \bi(?:['’]m|\ am)\ (?:sorry|unable)|\bi\ (?:can['’]?t|cannot)\b|\bas\ an\ ai\b
    | \bunable\ to\ (?:determine|see|assist)
    """,
    re.VERBOSE,
)
IN_THE_PICTURE = re.compile(  # whose text may be spoken of
    r"(?:(?:图|图片|图像|画面|照片)[中里上]|牌|碑|海报|封面|匾|墙|书|报|屏幕|包装|标签|横幅|上方|下方|旁边)[^，。？！；]{0,8}"
    r"(?:文字|文本|标题|描述|介绍|内容|说明|资料)"
)
BY = (
    r"(?:根据|依据|依照|按照|基于|结合|从)"
    r"(?:以上|上述|上面|下面|以下|给定|给出|所?提供|已知|参考|相关|这段|该段|这些|该)?的?"
)
SAYS = r"[中里]?(?:明确|并|还|也|曾)?(?:提到|提及|指出|写道|记载"
LEAKS = re.compile(
    rf"""
      {BY}(?:描述|资料|上下文|条目|词条|百科|维基)|{BY}图片?的?描述(?=[，。中里可])
    | (?:提供|给定|给出)的(?:文字|文本|文章|描述|资料|标题|信息|背景|介绍|材料|内容|上下文)
    | (?:资料|描述|条目|词条|背景信息|百科){SAYS}|显示|表明)|(?:材料|介绍){SAYS})
    | 维基百科[上中里]?的?(?:介绍|条目|词条|记载|资料|文章|页面)|图片标题|(?<![a-z])captions?(?![a-z])
    """,
    re.VERBOSE,
)
LEAKS_BUT_FOR_READING = re.compile(  # of a text kind, they may mean what is written in the picture
    rf"""
      {BY}(?:文字|文本|文章|标题|材料)
    | (?:^|[^\u4e00-\u9fff]|[如据上下原正从该本])文中(?!字)
    | (?:这段|该段|此段|上述|以上|这篇)(?:文字|文章|文本|描述|介绍|资料|材料|短文)
    | (?:文字|文本|标题|原文){SAYS}|显示|表明)
    """,
    re.VERBOSE,
)
RUNS = re.compile(r"([^\W\d_])\1{5,}|([^\W\d_][^。\n]{1,19}?)\2{3,}")
PAIRS = dict(zip("”」』》〉）)】]", "“「『《〈（(【[", strict=True))
LIST_MARKS = re.compile(r"(?:^|(?<=[\s。；：;:，]))[0-9a-zA-Z一二三四五六七八九十]{1,2}[)）]")
INCHES = re.compile(r'(?<=\d)"')
ENDS = "。！？!?…．.~～；;"
CLOSERS = '”」』》〉）)】]"’'
UNFINISHED = "，、：,:（(“「『《【"


@dataclass(frozen=True)
class Dialogue:
    """What a model wrote, and what it had before it besides the picture."""

    kind: str
    turns: tuple[tuple[str, str], ...]
    title: str = ""
    text: str = ""

    @property
    def questions(self) -> list[str]:
        return [question for question, _ in self.turns]

    @property
    def answers(self) -> list[str]:
        return [answer for _, answer in self.turns]

    @property
    def texts(self) -> list[str]:
        return [text for turn in self.turns for text in turn]

    def speaks(self, text: str) -> str:
        """Return the text without what it reads out from the picture, where that is the dialogue's kind."""
        return QUOTED.sub("", text) if self.kind == "text" else text


@dataclass(frozen=True)
class Limits:
    """What `count` may say of a question, an answer and a whole dialogue, and the least share of Han characters."""

    count: Callable[[str], int]
    max_question: int
    max_answer: int
    max_dialogue: int
    min_han: float


Filter = Callable[[Dialogue], str | None]


def make_filters(kinds: Mapping[str, Kind], limits: Limits) -> list[tuple[str, Filter]]:
    """Return the filters in their order, each with the reason that it drops a dialogue for."""
    return [
        ("text: empty or broken", find_broken_text),
        ("length: more tokens than the limit", lambda dialogue: find_bad_length(dialogue, limits)),
        ("answer: a refusal", find_refusal),
        ("text: talks to a model", find_instruction),
        ("person: a name that the source does not have", find_named_person),
        ("person: private data", find_private_data),
        ("text: an address", find_address),
        ("text: a citation mark", find_citation),
        ("text: markup", find_markup),
        ("text: not Chinese", lambda dialogue: find_other_language(dialogue, limits.min_han)),
        ("text: speaks of its source", find_leak),
        ("text: quotes or brackets without their other half", find_unbalanced),
        ("answer: cut off", find_cut_off),
        ("answer: repeats itself", find_repetition),
        ("answer: repeats the question", find_echo),
        ("question: asked twice in a dialogue", find_same_question),
        ("turns: not as the kind wants them", lambda dialogue: find_bad_turns(dialogue, kinds)),
    ]


def find_fault(dialogue: Dialogue, filters: Iterable[tuple[str, Filter]]) -> tuple[str, str] | None:
    """Return the reason and the detail of the first filter that stumbles, or None for a sound dialogue."""
    for reason, find in filters:
        detail = find(dialogue)
        if detail is not None:
            return reason, detail
    return None


def squeeze(text: str) -> str:
    """Return what is left when case, width, blanks and punctuation do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(one for one in folded if unicodedata.category(one)[0] in "LMN")


def find_broken_text(dialogue: Dialogue) -> str | None:
    """Find texts that are empty, hold half a character, or the marker of a picture."""
    for text in dialogue.texts:
        if not squeeze(text):
            return "an empty text"
        if IMAGE_MARKER in text:
            return IMAGE_MARKER
        if any(unicodedata.category(one) == "Cs" for one in text):
            return "half a character"
    return None


def find_bad_length(dialogue: Dialogue, limits: Limits) -> str | None:
    """Find a question, an answer or a dialogue that is too long."""
    total = 0
    for question, answer in dialogue.turns:
        asked, answered = limits.count(question), limits.count(answer)
        if asked > limits.max_question:
            return f"a question of {asked}, the limit is {limits.max_question}"
        if answered > limits.max_answer:
            return f"an answer of {answered}, the limit is {limits.max_answer}"
        total += asked + answered
    return f"{total} in all, the limit is {limits.max_dialogue}" if total > limits.max_dialogue else None


def find_bad_turns(dialogue: Dialogue, kinds: Mapping[str, Kind]) -> str | None:
    """Find what the kind of dialogue does not allow: its number of turns, an answer's length, one polarity only."""
    if dialogue.kind not in kinds:
        return f"kind '{dialogue.kind}' is unknown"
    try:
        check_turns(kinds[dialogue.kind], dialogue.turns)
    except ValueError as error:
        return str(error)
    return None


def find_refusal(dialogue: Dialogue) -> str | None:
    """Find an answer that does not answer."""
    return _find(REFUSALS, (dialogue.speaks(answer).casefold() for answer in dialogue.answers))


def find_instruction(dialogue: Dialogue) -> str | None:
    """Find what an article's orders to a model leave behind, and markers of chat templates."""
    whole = (text.encode("utf-8", "replace").decode() for text in dialogue.texts)
    sentences = (sentence for text in whole for sentence in split_sentences(text))
    return next((sentence for sentence in sentences if is_instruction(sentence)), None)


def find_address(dialogue: Dialogue) -> str | None:
    """Find web addresses."""
    return _find(URLS, dialogue.texts)


def find_citation(dialogue: Dialogue) -> str | None:
    """Find citation marks: [1], [来源请求]."""
    return _find(CITATIONS, dialogue.texts)


def find_markup(dialogue: Dialogue) -> str | None:
    """Find HTML and wiki markup: all that `clean_text` would take away besides blanks and invisible characters."""
    return next((text for text in dialogue.texts if _list_seen(clean_text(text)) != _list_seen(text)), None)


def _list_seen(text: str) -> list[str]:
    composed = SELECTORS.sub("", unicodedata.normalize("NFC", text))
    return [one for one in composed if unicodedata.category(one)[0] not in "CZ"]


def find_other_language(dialogue: Dialogue, min_han: float) -> str | None:
    """Find too few Han characters in all, and answers in words that are neither Han nor the source's.

    A name that title or text has in Latin letters, an abbreviation ("LED", "A380") and a number are answers.
    """
    ratio = han_ratio("".join(dialogue.speaks(text) for text in dialogue.texts))
    if ratio < min_han:
        return f"Han ratio {ratio:.2f}, at least {min_han} is expected"
    known = f"{dialogue.title} {dialogue.text}".casefold()
    for answer in dialogue.answers:
        if dialogue.kind == "text" or HAN.search(answer):
            continue
        words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\w*\d\w*", "", answer))
        if any(not word.isupper() and word.casefold() not in known for word in words):
            return answer
    return None


def find_leak(dialogue: Dialogue) -> str | None:
    """Find words that give away that the writer had a text; what is written in the picture may be spoken of."""
    texts = [IN_THE_PICTURE.sub("", dialogue.speaks(text)).casefold() for text in dialogue.texts]
    return _find(LEAKS, texts) or (None if dialogue.kind == "text" else _find(LEAKS_BUT_FOR_READING, texts))


def find_unbalanced(dialogue: Dialogue) -> str | None:
    """Find quotes and brackets without their other half, but for the marks of lists, and inches."""
    for text in dialogue.texts:
        if not is_balanced(text) and not is_balanced(LIST_MARKS.sub("", INCHES.sub("", text))):
            return text
    return None


def is_balanced(text: str) -> bool:
    """Tell whether every quote and bracket is closed, in the order in which they were opened."""
    opened: list[str] = []
    for one in text:
        if one in PAIRS.values():
            opened.append(one)
        elif one in PAIRS and (not opened or opened.pop() != PAIRS[one]):
            return False
    return not opened and text.count('"') % 2 == 0


def find_cut_off(dialogue: Dialogue) -> str | None:
    """Find an answer that ends in the middle of a sentence."""
    for answer in dialogue.answers:
        end = answer.rstrip().rstrip(CLOSERS)[-1:]
        is_long = len(answer) > CUT_OFF_LENGTH and dialogue.kind != "text"
        if answer.rstrip()[-1:] in UNFINISHED or (is_long and end not in ENDS):
            return answer[-CUT_OFF_LENGTH:]
    return None


def find_repetition(dialogue: Dialogue) -> str | None:
    """Find an answer that goes round in circles, or that was given before in the dialogue."""
    seen: set[str] = set()
    for answer in dialogue.answers:
        if found := RUNS.search(answer):
            return found[0]
        bare = squeeze(answer)
        if len(bare) >= SAME_ANSWER_LENGTH and bare in seen:
            return answer
        seen.add(bare)
        sentences = [one for one in map(squeeze, split_sentences(answer)) if len(one) >= SAME_SENTENCE_LENGTH]
        if len(set(sentences)) < len(sentences):
            return next(one for one in sentences if sentences.count(one) > 1)
        grams = [bare[start : start + NGRAM] for start in range(len(bare) - NGRAM + 1)]
        if len(bare) > CUT_OFF_LENGTH and 1 - len(set(grams)) / len(grams) > MAX_REPEATED:
            return next(gram for gram in grams if grams.count(gram) > 1)
    return None


def find_echo(dialogue: Dialogue) -> str | None:
    """Find an answer that is the question, or hardly more."""
    for question, answer in dialogue.turns:
        asked, answered = squeeze(question), squeeze(answer)
        if answered == asked or (len(asked) >= NGRAM and answered.startswith(asked) and len(answered) < len(asked) + 2):
            return answer
    return None


def find_same_question(dialogue: Dialogue) -> str | None:
    """Find a question that was asked before."""
    asked = [squeeze(question) for question in dialogue.questions]
    return next((text for place, text in enumerate(dialogue.questions) if asked[place] in asked[:place]), None)


def find_named_person(dialogue: Dialogue) -> str | None:
    """Find persons called by a name that neither title nor text has; see `persons.py` for what that sees."""
    names = (find_unknown_name(text, dialogue.title, dialogue.text) for text in dialogue.texts)
    return next((name for name in names if name is not None), None)


def find_private_data(dialogue: Dialogue) -> str | None:
    """Find mobile numbers, identity numbers, e-mail addresses and number plates of China's mainland."""
    return _find(PRIVATE_DATA, dialogue.texts)


def _find(pattern: re.Pattern[str], texts: Iterable[str]) -> str | None:
    return next((found[0] for text in texts if (found := pattern.search(text))), None)
