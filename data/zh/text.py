"""Plain Chinese text: markup out, simplified characters in, and nothing in it that gives orders to a model."""

import html
import re
import unicodedata
from functools import cache
from typing import Any

MAX_NESTING = 12  # of tags and templates; what is nested deeper is no text, and loses its brackets
REFERENCES = re.compile(
    r"<!--.*?(?:-->|\Z)|<(ref|script|style|math|gallery|table)\b[^<>]*(?<!/)>(?:(?!<\1\b).)*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
LINE_ENDS = re.compile(r"<br\s*/?>|</(?:p|div|li|h\d|tr)\s*>", re.IGNORECASE)
TAGS = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
TEMPLATES = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")
FORMULAS = re.compile(r"\{\\(?:display|text)style(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}")
VARIANTS = re.compile(r"-\{(?:[^{}|]*\|)?([^{}]*)\}-")  # -{zh-hans:A;zh-hant:B}-
SIMPLIFIED_VARIANT = re.compile(r"(?:^|;)\s*zh(?:-hans|-cn|-sg)\s*:\s*([^;]*)")
FILES = re.compile(r"\[\[\s*(?:file|image|category|文件|檔案|档案|图像|圖像|分类|分類)\s*:[^\[\]]*\]\]", re.IGNORECASE)
LINKS = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
WEB_LINKS = re.compile(r"\[(?:https?:)?//[^\s\[\]]+\s*([^\[\]]*)\]", re.IGNORECASE)
URLS = re.compile(r"(?:(?:https?|ftp)://|\bwww\.)[\w.~:/?#@!$&'*+,;=%-]+", re.IGNORECASE | re.ASCII)
HEADINGS = re.compile(r"^[ \t]*(={2,6})[ \t]*(\S[^\n]*?)[ \t]*\1[ \t]*$", re.MULTILINE)
QUOTES = re.compile(r"'{2,}")
WORDS = re.compile(r"__[A-Z]{3,}__|\b(?:thumb|REDIRECT)\|")
CITATIONS = re.compile(
    r"\[(?:\d{1,3}|[a-z]|(?:注|註|note|参|參)\s*\d*|[来來]源[请請]求|需要引用|citation needed)\](?::\d+(?:[-,–]\d+)*)?",
    re.IGNORECASE,
)
EMPTY_BRACKETS = re.compile(r"[（(【\[](?:\w{1,5}[：:]|[\s，,；;、：:])*[）)】\]]")  # a template may have stood there
LISTS = re.compile(r"^[ \t]*[*#:;]+[ \t]*", re.MULTILINE)
BLANKS = re.compile(r"[^\S\n]+")
SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef\u034f\u115f\u1160\u3164\uffa0]")  # drawn as nothing
SENTENCES = re.compile(r"(?:[^。！？!?；;\n.]|\.(?![\s\u4e00-\u9fff]))*(?:[。！？!?；;\n.]+[”’」』）)]*|\Z)")
HAN = re.compile("[々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
BLANKS_IN_HAN = re.compile(r"(?<=[\u4e00-\u9fff])\s+(?=[\u4e00-\u9fff])")
# Sentences are looked at in simplified characters, lower case and half width.
INSTRUCTIONS = re.compile(
    r"""
    (?:^|[\s，,、:：；;“"'「『(（]|请|務必|务必|必须|现在|并且?|然后|你要?|应该)
        (?:忽略|无视|忘记|忘掉|不要理会|不必理会|抛开|丢弃)[^，。]{0,10}
        (?:以上|上述|上面|之前|先前|前面|前述|此前|所有|一切|系统|你的)
    | (?:把|将)?(?:以上|上述|上面|之前|前面)的?[^，。]{0,8}(?:指令|指示|提示词?|要求)[^，。]{0,6}(?:忽略|无效|作废|忘)
    | 你现在(?:是|扮演|的身份|的任务|必须)|从现在(?:起|开始)[，,]?\s*你|你(?:将|要|必须|需要?)扮演
    | (?:你是|作为)(?:一个|一名|一位)?\s*(?:ai|人工智能|大?语言模型|聊天机器人|智能助手|助手)
    | (?:只|仅|必须|请|直接)(?:需|要|能|可以?|准)?(?:回答|输出|回复|打印)\s*[“"「『':：]
    | 系统提示词?|新的?指令\s*[:：]|开发者模式|越狱模式
    | ^[\s“"「『\[(]*(?:system|assistant|user|human|developer|系统|助手|用户|指令)\s*[\])]?\s*[:：]
    | \b(?:ignore|disregard|forget|override)\b.{0,40}
        \b(?:above|previous|prior|earlier|preceding|instructions?|prompts?|everything)\b
    | \byou\ are\ now\b|\bpretend\ (?:that\ )?you\b|\bas\ an?\ (?:ai|language)\b|\bsystem\ prompt\b
    | \b(?:new|following)\ instructions?\s*:|\b(?:respond|reply|answer)\ only\ with\b
    | \bdo\ not\ describe\ the\ (?:image|picture)
    | <\|[a-z_|]*\|?>|\|>|\[/?inst\]|<</?sys>>|</?s>|</?image>
    | ^\s*\#{2,}\s*(?:system|instruction|human|assistant|response)
    """,
    re.VERBOSE,
)


def clean_text(text: str) -> str:
    """Return plain text: no HTML, wiki markup, citation marks, addresses, control or invisible characters.

    Paragraphs stay apart by a newline each; the characters are composed (NFC).
    """
    for _ in range(2):  # what is escaped twice, once in the page and once in the answer
        text = html.unescape(text)
    text = _remove_invisible(text)
    text = REFERENCES.sub("", text)
    text = TAGS.sub("", LINE_ENDS.sub("\n", text))
    for pattern in (TAGS, FORMULAS, TEMPLATES):
        text = _remove_nested(pattern, text)
    text = VARIANTS.sub(lambda found: _choose_variant(found[1]), text)
    for pattern, replacement in (
        (FILES, ""),
        (LINKS, r"\1"),
        (FILES, ""),  # a caption may hold links
        (WEB_LINKS, r"\1"),
        (URLS, ""),
        (HEADINGS, r"\2"),
        (LISTS, ""),
        (QUOTES, ""),
        (WORDS, ""),
        (CITATIONS, ""),
        (EMPTY_BRACKETS, ""),
    ):
        text = pattern.sub(replacement, text)
    text = re.sub(r"\{\{|\}\}|\[\[|\]\]", "", text)
    lines = (line.strip() for line in BLANKS.sub(" ", text).split("\n"))
    return unicodedata.normalize("NFC", "\n".join(line for line in lines if line))


def _remove_invisible(text: str) -> str:
    text = re.sub("\r\n?|[\u2028\u2029\v\f\x85]", "\n", text)
    text = SELECTORS.sub("", text)
    return "".join(one for one in text if one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf", "Co", "Cs"))


def _remove_nested(pattern: re.Pattern[str], text: str) -> str:
    """Remove from the inside out: what is left of `<im<b>age>` is no tag either."""
    for _ in range(MAX_NESTING):
        text, count = pattern.subn("", text)
        if not count:
            return text
    return re.sub(r"[<>{}]", "", text)


def _choose_variant(text: str) -> str:
    simplified = SIMPLIFIED_VARIANT.search(text)
    return simplified[1].strip() if simplified else text.partition(";")[0].rpartition(":")[2].strip()


def to_simplified(text: str) -> str:
    """Return the text in simplified characters (OpenCC t2s). Raises: ValueError where OpenCC is not installed."""
    return _load_converter().convert(text)


@cache
def _load_converter() -> Any:
    try:
        import opencc
    except ImportError as error:
        raise ValueError("simplified characters need OpenCC: pip install -r data/requirements.txt") from error
    return opencc.OpenCC("t2s")


def han_ratio(text: str) -> float:
    """Return the share of Han characters among letters, marks and digits; 0 where there are none of these."""
    num_written = sum(unicodedata.category(one)[0] in "LMN" for one in text)
    return len(HAN.findall(text)) / num_written if num_written else 0.0


def split_sentences(text: str) -> list[str]:
    """Return the sentences with their ends; joined they are the text."""
    return [sentence for sentence in SENTENCES.findall(text) if sentence]


def remove_instructions(text: str) -> tuple[str, int]:
    """Return the text without sentences that talk to a model instead of the reader, and how many those were."""
    sentences = split_sentences(text)
    kept = [sentence for sentence in sentences if not is_instruction(sentence)]
    if len(kept) == len(sentences):
        return text, 0
    return re.sub(r"\n{2,}", "\n", "".join(kept)).strip(), len(sentences) - len(kept)


def is_instruction(sentence: str) -> bool:
    """Tell whether a sentence talks to a model: it is to ignore, to be somebody else, or to obey a marker."""
    plain = to_simplified(unicodedata.normalize("NFKC", sentence)).casefold()
    return INSTRUCTIONS.search(BLANKS_IN_HAN.sub("", plain)) is not None
