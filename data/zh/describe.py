"""What a published data set holds, in numbers and in pictures: lengths, kinds, topics, characters."""

import functools
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from data.fonts import find_chinese_font
from data.tokenizer import Tokenizer
from data.zh.record import Record, Reply
from data.zh.text import han_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHORT_KINDS = ("short", "counting", "yes_no")
SPLITS = ("train", "validation", "test")
COLUMNS = {"dialogues": 10, "questions": 10, "pictures": 10, "pages": 8}  # of a table, with their widths
PLOTS = ("lengths.png", "kinds.png", "topics.png", "characters.png")
MAX_TOPICS = 30  # in the picture, the largest
MAX_LABEL = 18  # characters of a topic's name
MAX_COMMON = 5  # short answers of a kind
CLAUSE_END = re.compile("[，。；：！,;]")
COLOURS = dict(zip(SPLITS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
DPI = 120
NO_FONT = "no font with Chinese characters: topics are numbered as in statistics.json (apt install fonts-noto-cjk)"


class Entry(NamedTuple):
    """A dialogue, and where it is published."""

    split: str
    reply: Reply
    record: Record


def describe(entries: Sequence[Entry], tokenizer: Tokenizer) -> dict[str, Any]:
    """Count what the dialogues hold; lengths are those of the questions and answers alone."""
    questions, answers = (_list_texts(entries, part) for part in (0, 1))
    tokens = [[_count_tokens(tokenizer, text) for text in texts] for texts in (questions, answers)]
    by_kind = Counter(entry.reply.kind for entry in entries)
    splits = {split: [entry for entry in entries if entry.split == split] for split in SPLITS}
    num_tokens = [_count_dialogue(tokenizer, entry) for entry in entries]
    return {
        "splits": {split: _count(of) for split, of in (*splits.items(), ("all", entries)) if of},
        "kinds": {
            kind: {"dialogues": count, "share": round(count / len(entries), 4)}
            | {split: sum(entry.reply.kind == kind for entry in of) for split, of in splits.items() if of}
            for kind, count in _sort(by_kind).items()
        },
        "turns": dict(sorted(Counter(str(len(entry.reply.turns)) for entry in entries).items(), key=_by_number)),
        "questions": {"characters": _summarise(map(len, questions)), "tokens": _summarise(tokens[0])},
        "answers": {"characters": _summarise(map(len, answers)), "tokens": _summarise(tokens[1])},
        "answer_characters_by_kind": {
            kind: _summarise(len(answer) for answer in _list_texts(entries, 1, kind)) for kind in sorted(by_kind)
        },
        "dialogue_tokens": _summarise(num_tokens),
        "tokens_per_character": round(sum(map(sum, tokens)) / sum(map(len, questions + answers)), 4),
        "tokenizer": {
            "file": tokenizer.file.name,
            "vocab_size": tokenizer.vocab_size,
            "sha256": hashlib.sha256(tokenizer.file.read_bytes()).hexdigest(),
        },
        "han_ratio": _summarise(map(_measure_han, entries)),
        "distinct_questions": len(set(questions)),
        "short_answers": {
            kind: _describe_answers(_list_texts(entries, 1, kind)) for kind in sorted({*by_kind} & {*SHORT_KINDS})
        },
        "sources": _count_pictures(entries, lambda record: record.source),
        "licenses": _count_pictures(entries, lambda record: record.license),
        "topics": _sort(Counter(entry.record.topic for entry in entries)),
    }


def _list_texts(entries: Iterable[Entry], part: int, kind: str = "") -> list[str]:
    """Return all questions (part 0) or answers (1), of one kind if need be."""
    return [turn[part] for entry in entries if kind in ("", entry.reply.kind) for turn in entry.reply.turns]


@functools.cache  # texts are measured for the numbers and again for the pictures
def _count_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text))


def _count_dialogue(tokenizer: Tokenizer, entry: Entry) -> int:
    return sum(_count_tokens(tokenizer, text) for turn in entry.reply.turns for text in turn)


def _count(entries: Sequence[Entry]) -> dict[str, int]:
    return {
        "dialogues": len(entries),
        "questions": sum(len(entry.reply.turns) for entry in entries),
        "pictures": len({entry.record.sha256 for entry in entries}),
        "pages": len({(entry.record.title, entry.record.page_url) for entry in entries}),
    }


def _count_pictures(entries: Iterable[Entry], name: Callable[[Record], str]) -> dict[str, int]:
    records = {entry.record.sha256: entry.record for entry in entries}
    return _sort(Counter(map(name, records.values())))


def _sort(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _by_number(pair: tuple[str, int]) -> int:
    return int(pair[0])


def _measure_han(entry: Entry) -> float:
    return han_ratio("".join(text for turn in entry.reply.turns for text in turn))


def _describe_answers(answers: Sequence[str]) -> dict[str, Any]:
    """Return how one-sided a kind's answers are, up to their first comma."""
    common = _sort(Counter(CLAUSE_END.split(answer, maxsplit=1)[0] for answer in answers))
    return {"answers": len(answers), "distinct": len(common), "common": dict(list(common.items())[:MAX_COMMON])}


def _summarise(values: Iterable[float]) -> dict[str, float]:
    array = np.array(list(values))
    low, median, high = np.percentile(array, (5, 50, 95))
    found = {"mean": array.mean(), "min": array.min(), "p5": low, "median": median, "p95": high, "max": array.max()}
    return {name: round(float(value), 4) for name, value in found.items()}


def draw(entries: Sequence[Entry], tokenizer: Tokenizer, folder: Path) -> None:
    """Draw PLOTS into a folder."""
    _draw_lengths(entries, tokenizer, folder / "lengths.png")
    _draw_kinds(entries, folder / "kinds.png")
    _draw_topics(entries, folder / "topics.png")
    _draw_characters(entries, tokenizer, folder / "characters.png")


def _draw_lengths(entries: Sequence[Entry], tokenizer: Tokenizer, picture: Path) -> None:
    """Draw how long the questions and answers of each kind are, in characters and in tokens."""
    import matplotlib
    from matplotlib.figure import Figure

    kinds = sorted({entry.reply.kind for entry in entries})
    colours = matplotlib.colormaps["tab10"](range(len(kinds)))
    measures: dict[str, Callable[[str], int]] = {
        "characters": len,
        "tokens": functools.partial(_count_tokens, tokenizer),
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    for row, (unit, measure) in zip(figure.subplots(2, 2), measures.items(), strict=True):
        for part, (axis, what) in enumerate(zip(row, ("questions", "answers"), strict=True)):
            lengths = [np.array([measure(text) for text in _list_texts(entries, part, kind)]) for kind in kinds]
            every = np.concatenate(lengths)
            step = max(1, round(np.percentile(every, 99.5) / 50))
            end = int(np.percentile(every, 99.5)) // step * step + step
            clipped = [np.minimum(of, end) for of in lengths]
            axis.hist(
                clipped,
                np.arange(0, end + 2 * step, step) - 0.5,
                stacked=True,
                histtype="stepfilled",
                color=colours,
                label=kinds,
            )
            axis.axvline(np.median(every), color="0.2", linestyle="--", linewidth=1)
            low, high = np.percentile(every, (50, 95))
            axis.set_title(f"{what}: median {low:,.0f}, 95 % up to {high:,.0f}, longest {every.max():,}")
            axis.set(xlabel=f"{unit}; the last bar: {end:,} and more", ylabel=what)
            _tidy(axis, "both")
    figure.suptitle(
        f"Lengths by kind; tokens of {tokenizer.file.name} with {tokenizer.vocab_size:,} pieces", fontsize=11
    )
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds), fontsize=8)
    figure.savefig(picture, dpi=DPI)


def _tidy(axis: "Axes", counted: Literal["x", "y", "both"]) -> None:
    """Write counts, which are on the axes `counted`, as whole numbers with commas, over a light grid."""
    for name in "xy" if counted == "both" else counted:
        one = getattr(axis, f"{name}axis")
        one.get_major_locator().set_params(integer=True)
        one.set_major_formatter("{x:,.0f}")
    axis.title.set_fontsize(9)
    axis.set_axisbelow(True)
    axis.grid(axis=counted, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_kinds(entries: Sequence[Entry], picture: Path) -> None:
    """Draw the dialogues of each kind by split, and how many questions a dialogue has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _stack_bars(left, Counter((entry.reply.kind, entry.split) for entry in entries), len(entries))
    left.set(xlabel="dialogues", title=f"{len(entries):,} dialogues by kind")
    turns = Counter(len(entry.reply.turns) for entry in entries)
    right.bar(list(turns), list(turns.values()), color="tab:purple")
    right.set(xlabel="questions in a dialogue", ylabel="dialogues", title="questions", xticks=range(1, max(turns) + 1))
    right.set_xlim(0.4, max(turns) + 0.6)
    _tidy(left, "x")
    _tidy(right, "y")
    figure.legend(loc="outside lower center", ncols=len(SPLITS), fontsize=8)
    figure.savefig(picture, dpi=DPI)


def _stack_bars(axis: "Axes", counts: Counter[tuple[str, str]], total: int) -> list[str]:
    """Draw a bar for each name, of its counts by split, the largest on top; return the names, top down."""
    sums: Counter[str] = Counter()
    for (name, _), count in counts.items():
        sums[name] += count
    names = list(_sort(sums))
    starts = np.zeros(len(names))
    for split in SPLITS:
        widths = np.array([counts[name, split] for name in names])
        if widths.any():
            axis.barh(range(len(names)), widths, left=starts, color=COLOURS[split], label=split, height=0.75)
        starts += widths
    for place, name in enumerate(names):
        axis.text(starts[place], place, f" {sums[name]:,} ({sums[name] / total:.1%})", va="center", fontsize=8)
    axis.set(yticks=range(len(names)), ylim=(len(names) - 0.4, -0.6), xlim=(0, starts.max() * 1.22))
    axis.set_yticklabels(names, parse_math=False)
    return names


def _draw_topics(entries: Sequence[Entry], picture: Path) -> None:
    """Draw the largest topics, and all others as one; numbered where no font has their characters."""
    import matplotlib
    from matplotlib.figure import Figure

    topics = _sort(Counter(entry.record.topic for entry in entries))
    shown = list(topics)[:MAX_TOPICS]
    font = find_chinese_font()
    families = ["DejaVu Sans", *([font] if font else [])]  # a character is drawn in the first that has it
    with matplotlib.rc_context({"font.family": families}):
        figure = Figure(figsize=(9, 1.4 + 0.24 * len(shown)), layout="constrained")
        axis = figure.subplots()
        counts = Counter((entry.record.topic, entry.split) for entry in entries if entry.record.topic in shown)
        names = _stack_bars(axis, counts, len(entries))
        labels = [
            _shorten(name) if font or name.isascii() else f"topic {place}" for place, name in enumerate(names, start=1)
        ]
        axis.set_yticklabels(labels, parse_math=False, fontsize=9)
        title = f"{len(topics):,} topics"
        if len(topics) > len(shown):
            others = sum(topics.values()) - sum(topics[name] for name in shown)
            title += f", the {len(shown)} largest; {others:,} dialogues ({others / len(entries):.1%}) are of others"
        if "topic 1" in " ".join(labels) and not font:
            print(f"topics.png: {NO_FONT}", file=sys.stderr)
            title += f"\n{NO_FONT}"
        axis.set(xlabel="dialogues", title=title)
        _tidy(axis, "x")
        axis.legend(loc="lower right", fontsize=8)
        figure.savefig(picture, dpi=DPI)


def _shorten(text: str) -> str:
    if not text:
        return "(none)"
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"


def _draw_characters(entries: Sequence[Entry], tokenizer: Tokenizer, picture: Path) -> None:
    """Draw how Chinese the dialogues are, and how many tokens a character takes."""
    from matplotlib.figure import Figure

    ratios = np.array([_measure_han(entry) for entry in entries])
    lengths = np.array([sum(len(text) for turn in entry.reply.turns for text in turn) for entry in entries])
    per_character = np.array([_count_dialogue(tokenizer, entry) for entry in entries]) / lengths
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(ratios, bins=np.linspace(0, 1, 41), color="tab:red")
    left.set(xlabel="Han characters of all letters and digits", ylabel="dialogues", xlim=(0, 1))
    left.set_title(f"Han ratio: median {np.median(ratios):.2f}, 5 % below {np.percentile(ratios, 5):.2f}")
    right.hist(per_character, bins=41, color="tab:cyan")
    right.set(xlabel=f"tokens of {tokenizer.file.name} for a character", ylabel="dialogues")
    mean = (per_character * lengths).sum() / lengths.sum()
    right.set_title(f"tokens per character: {mean:.2f} over all text")
    for axis in (left, right):
        _tidy(axis, "y")
    figure.savefig(picture, dpi=DPI)
