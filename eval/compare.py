"""Put two runs beside each other: `python eval/compare.py runs/tiny runs/tiny-zh`.

Every task that both have answered is compared, question by question: differences of all scores with their intervals,
which of them chance could have made, and the questions whose answers changed, with pictures. Only answers to the same
questions, asked and judged the same way, are compared. Writes `compare.md`, `compare.html` (one file, pictures inside)
and `changes.jsonl`, every question whose answer changed.
"""

import argparse
import hashlib
import json
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from data.names import translate  # noqa: E402
from eval.answers import SCORES, Result, find_results, load_result, reopen_task  # noqa: E402
from eval.comparison import Comparison, Line, compare_results, list_changes, split_changes  # noqa: E402
from eval.page import escape, make_table, save_picture, to_html  # noqa: E402
from eval.task import Task  # noqa: E402

ASKED = ("rule", "prompt", "template", "max_new_tokens", "data_hash")  # settings that both have in common
MAX_PRINTED = 20  # names of a breakdown in the terminal; the files have all
NUM_EXAMPLES = 6
SEED = 0  # decides which of the changed answers are shown
PICTURE_SIDE = 200

# What the tables say, in English and Chinese.
WORDS = {
    "title": ("{first} and {second}", "{first} 与 {second} 的对比"),
    "asked": (
        "{n:,} questions, metric: {metric}, rule: {rule}. Asked as: {prompt}; template {template}, at most "
        "{max_new_tokens} new tokens. Data {data_hash}.",
        "{n:,} 道题，指标：{metric}，规则：{rule}。提示词：{prompt}；对话模板 {template}，最多生成 "
        "{max_new_tokens} 个词元。数据 {data_hash}。",
    ),
    "setting": ("what differs", "不同的设置"),
    "questions": ("questions", "题数"),
    "interval": ("95 % interval", "95% 置信区间"),
    "real": ("significant", "显著"),
    "only": ("right only in A : B", "仅 A 对 : 仅 B 对"),
    "mcnemar": ("p (McNemar)", "p（McNemar）"),
    "yes": ("yes", "是"),
    "alone": ("(yes)", "（是）"),
    "no": ("no", "否"),
    "percent": ("Scores are in %. ", "得分以 % 表示。"),
    "points": ("The benchmark's own points are of {bests} at most. ", "评测自有的分数，满分 {bests}。"),
    "note": (
        "The interval is that of B−A (bootstrap over pictures). p: how often a difference as large comes about when "
        "the two answers to each picture are exchanged by chance. Significant: yes where p < 0.05 even after Holm's "
        "correction for the lines of the table; (yes) where p < 0.05 for the line alone, as chance makes it in one "
        "line of twenty.",
        "置信区间指 B−A（按图片自助抽样）。p：随机交换两者对每张图片的回答时，出现同样大的差异的频率。"
        "显著“是”：按表的行数作 Holm 校正后 p < 0.05；“（是）”：仅该行单独看 p < 0.05，平均每二十行就有一行纯属偶然。",
    ),
    "counts": (
        "Answers: {worse}: {num_worse:,}; {better}: {num_better:,}; other words, worth the same: {num_same:,}; "
        "unchanged: {num_unchanged:,}.",
        "回答：{worse}：{num_worse:,}；{better}：{num_better:,}；措辞不同但得分相同：{num_same:,}；未变：{num_unchanged:,}。",
    ),
    "lost": ("right in A, wrong in B", "A 对 B 错"),
    "won": ("wrong in A, right in B", "A 错 B 对"),
    "worse": ("worth less in B than in A", "B 的得分低于 A"),
    "better": ("worth more in B than in A", "B 的得分高于 A"),
    "changes": ("Answers that changed", "变化的回答"),
    "heading": ("{kind}: {how_many}", "{kind}：{how_many}"),
    "drawn": ("{shown} of {number:,}, drawn by lot", "{number:,} 题中随机抽取 {shown} 题"),
    "every": ("all {number:,}", "全部 {number:,} 题"),
    "none": ("none", "无"),
    "no pictures": (
        "Without pictures: the benchmark's files were not found, or are of another version; `--data` says where they "
        "are.",
        "未附图片：没有找到该评测的文件，或文件版本不同；可用 `--data` 指定其位置。",
    ),
    "picture": ("picture", "图片"),
    "question": ("question, and what was answered", "问题与回答"),
    "reference": ("reference: {answers}", "参考答案：{answers}"),
    "long": ("{name}: {n} lines, in compare.md", "{name}：共 {n} 行，见 compare.md"),
    "lonely": ("Answered by one of the two only: {names}.", "仅其中一方答过：{names}。"),
}
LANGUAGES = ("en", "zh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, metavar="RUN_A", help="a run folder, or a task's folder in its eval/")
    parser.add_argument("second", type=Path, metavar="RUN_B", help="what is compared with it")
    parser.add_argument("--task", nargs="+", metavar="NAME", help="folders in eval/; all that both have if left out")
    parser.add_argument("--out", type=Path, help="folder to write to (default: RUN_B/compare-<name of RUN_A>)")
    parser.add_argument("--data", type=Path, help="the benchmark's files, to show pictures, if they have moved")
    parser.add_argument("--language", choices=LANGUAGES, default="en")
    parser.add_argument("--changes", type=int, default=NUM_EXAMPLES, metavar="N", help="examples shown each way")
    arguments = parser.parse_args()
    if arguments.changes < 0:
        parser.error(f"--changes {arguments.changes}: expected 0 or more")
    out = arguments.out or arguments.second / f"compare-{name_run(arguments.first)}"
    try:
        pairs, lonely = pair_results(arguments.first, arguments.second, arguments.task)
        comparisons = {name: compare_results(*pair) for name, pair in pairs.items()}
        for name, comparison in comparisons.items():
            print(f"\n{_clean(name)}\n{print_comparison(comparison, arguments.language)}")
        if lonely:
            print(say("lonely", arguments.language, names=_clean(", ".join(lonely))))
        names = name_run(arguments.first), name_run(arguments.second)
        write_comparisons(comparisons, lonely, names, out, arguments.data, arguments.language, arguments.changes)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out}/compare.html, compare.md and changes.jsonl")


def pair_results(
    first: Path, second: Path, tasks: Sequence[str] | None
) -> tuple[dict[str, tuple[Result, Result]], list[str]]:
    """Return the results that both have, by their folders' names, and the names of those that one of them lacks.

    Raises: FileNotFoundError or ValueError, saying what each has, when there is nothing to compare.
    """
    both = [
        {path.name: load_result(path)} if (path / SCORES).is_file() else find_results(path) for path in (first, second)
    ]
    if all((path / SCORES).is_file() for path in (first, second)):
        both[1] = {first.name: load_result(second)}  # whatever the folders are called
    shared = [name for name in both[0] if name in both[1]]
    chosen = shared if tasks is None else list(dict.fromkeys(tasks))
    if not chosen or set(chosen) - set(shared):
        have = [f"{path} has {', '.join(found) or 'none'}" for path, found in zip((first, second), both, strict=True)]
        wanted = ", ".join(name for name in chosen if name not in shared) or "any task"
        raise ValueError(f"there are no finished results of {wanted} in both runs: {'; '.join(have)}")
    lonely = [] if tasks else sorted(both[0].keys() ^ both[1].keys())
    return {name: (both[0][name], both[1][name]) for name in chosen}, lonely


def describe_comparison(comparison: Comparison, language: str) -> str:
    """Return Markdown: how was asked, what differs, a table for each breakdown, and how many answers changed."""
    settings = comparison.first.settings
    asked = {name: escape(str(settings.get(name))) for name in ASKED}
    metric = escape(translate(comparison.first.benchmark.metric, language))
    num_questions = len(comparison.first.questions)
    folders = {"results": (str(comparison.first.folder), str(comparison.second.folder))}
    differing = [[escape(name), *map(escape, pair)] for name, pair in (folders | comparison.differing).items()]
    blocks = [
        say("asked", language, metric=metric, n=num_questions, **asked),
        make_table([say("setting", language), "A", "B"], differing),
    ]
    for breakdown, lines in comparison.tables.items():
        header, *rows = list_cells(breakdown, lines, language)
        figures = [[escape(row[0]), *(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row[1:])] for row in rows]
        blocks.append(make_table([escape(header[0]), *header[1:]], figures))
    bests = {line.first.best for lines in comparison.tables.values() for line in lines}
    scale = say("percent", language) if 1 in bests else ""
    if points := "/".join(f"{best:g}" for best in sorted(bests - {1})):
        scale += say("points", language, bests=points)
    blocks.append(scale + say("note", language))
    return "\n".join(f"{block.rstrip()}\n" for block in (*blocks, count_changes(comparison, language)))


def list_cells(breakdown: str, lines: Sequence[Line], language: str) -> list[list[str]]:
    """Return a table's cells, the header first, as plain text."""
    header = [translate(breakdown, language), say("questions", language), "A", "B", "B−A", say("interval", language)]
    header += ["p", *(say(word, language) for word in ("real", "only", "mcnemar"))]
    rows = []
    for line in lines:
        scale = 100 if line.first.best == 1 else 1
        scores = [f"{scale * part.score:.1f}" for part in (line.first, line.second)]
        low, high = (_sign(scale * end) for end in line.found.interval)
        row = [translate(line.name, language), f"{line.first.num_questions:,}", *scores]
        row += [_sign(scale * line.found.difference), f"{low} … {high}", _format_p(line.found.p_value)]
        row += [say(line.verdict, language)]
        row += [f"{line.changes[0]:,} : {line.changes[1]:,}", _format_p(line.changes[2])] if line.changes else ["", ""]
        rows.append(row)
    width = len(header) if any(line.changes for line in lines) else len(header) - 2
    return [row[:width] for row in (header, *rows)]


def count_changes(comparison: Comparison, language: str) -> str:
    """Return one sentence: how many answers changed, and for better or worse."""
    worse, better, same = split_changes(comparison)
    return say(
        "counts",
        language,
        worse=say("lost" if comparison.is_right_or_wrong else "worse", language),
        better=say("won" if comparison.is_right_or_wrong else "better", language),
        num_worse=len(worse),
        num_better=len(better),
        num_same=len(same),
        num_unchanged=len(comparison.first.questions) - len(worse) - len(better) - len(same),
    )


def show_changes(comparison: Comparison, task: Task | None, folder: Path, language: str, number: int) -> str:
    """Return Markdown: some of the answers that changed, both ways, with pictures if the task's files are open.

    Args:
        folder: where the pictures are written.
        number: how many are shown each way.
    """
    blocks = []
    if task is None:
        blocks.append(say("no pictures", language))
    kinds = ("lost", "won") if comparison.is_right_or_wrong else ("worse", "better")
    for kind, numbers in zip(kinds, split_changes(comparison)[:2], strict=True):
        shown = sorted(random.Random(SEED).sample(numbers, min(number, len(numbers))))
        how_many = "none" if not numbers else "every" if len(shown) == len(numbers) else "drawn"
        title = say(how_many, language, shown=len(shown), number=len(numbers))
        blocks.append("#### " + say("heading", language, kind=say(kind, language), how_many=title))
        if shown:
            columns = ["question"] if task is None else ["picture", "question"]
            rows = [_show_change(comparison, one, task, folder, language) for one in shown]
            blocks.append(_make_list([say(column, language) for column in columns], rows))
    return "\n".join(f"{block.rstrip()}\n" for block in blocks)


def _show_change(comparison: Comparison, number: int, task: Task | None, folder: Path, language: str) -> list[str]:
    question = comparison.first.questions[number]
    counted = Counter(question.answers).most_common()
    references = ", ".join(f"{escape(answer)} ×{n}" if n > 1 else escape(answer) for answer, n in counted)
    lines = [f"**{escape(question.text)}**", say("reference", language, answers=references)]
    for name, result in (("A", comparison.first), ("B", comparison.second)):
        credit = result.credits[number] or 0
        mark = "✓" if credit == 1 else "✗" if credit == 0 else f"{credit:.2g}"
        lines.append(f"{name} {mark} {escape(result.predictions[number])}")
    text = "<br>".join(lines)
    if task is None:
        return [text]
    if not question.image:
        return ["", text]
    name = hashlib.sha256(f"{comparison.first.settings['data_hash']} {question.image}".encode()).hexdigest()[:12]
    return [save_picture(task.open_picture(question.image), folder, f"{name}.jpg", PICTURE_SIDE), text]


def _make_list(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text, all columns to the left."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, [":---"] * len(header), *rows))


def print_comparison(comparison: Comparison, language: str) -> str:
    """Return what the terminal shows: the tables that are short, and how many answers changed."""
    blocks = [
        align(list_cells(breakdown, lines, language))
        if len(lines) <= MAX_PRINTED
        else say("long", language, name=_clean(translate(breakdown, language)), n=len(lines)) + "\n"
        for breakdown, lines in comparison.tables.items()
    ]
    return "\n".join([*blocks, count_changes(comparison, language)])


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return cells in columns for a terminal, where a Chinese character is two wide."""
    rows = [[_clean(cell) for cell in row] for row in rows]
    widths = [max(map(_measure, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [" " * (width - _measure(cell)) + cell for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first + " " * (widths[0] - _measure(first)), *cells]) + "\n")
    return "".join(lines)


def write_comparisons(
    comparisons: dict[str, Comparison],
    lonely: Sequence[str],
    names: tuple[str, str],
    out: Path,
    data: Path | None,
    language: str,
    number: int,
) -> None:
    """Write `compare.md`, `compare.html` and `changes.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    title = say("title", language, first=names[0], second=names[1])
    blocks = [f"# {say('title', language, first=escape(names[0]), second=escape(names[1]))}"]
    for name, comparison in comparisons.items():
        task = open_pictures(name, comparison.first, data)
        blocks += [f"## {escape(name)}", describe_comparison(comparison, language)]
        blocks += [f"### {say('changes', language)}", show_changes(comparison, task, out, language, number)]
    if lonely:
        blocks.append(say("lonely", language, names=escape(", ".join(lonely))))
    markdown = "\n".join(f"{block.rstrip()}\n" for block in blocks)
    with (out / "changes.jsonl").open("w", encoding="utf-8") as file:
        for name, comparison in comparisons.items():
            for row in list_changes(comparison):
                file.write(json.dumps({"task": name} | row, ensure_ascii=False) + "\n")
    (out / "compare.md").write_text(markdown, encoding="utf-8")
    (out / "compare.html").write_text(to_html(markdown, out, title, language), encoding="utf-8")


def open_pictures(name: str, result: Result, data: Path | None) -> Task | None:
    """Open a benchmark's files for their pictures; None, said on stderr, where they are of another version."""
    try:
        return reopen_task(result, data)
    except ValueError as error:  # what is compared is in the results: only pictures are lost
        print(f"{_clean(name)} is shown without pictures: {error}", file=sys.stderr)
        return None


def name_run(path: Path) -> str:
    """Return a run folder's name, that of the run for a task's folder in it."""
    path = path.resolve()
    return path.parents[1].name if path.parent.name == "eval" else path.name


def say(key: str, language: str, **values: Any) -> str:
    return WORDS[key][LANGUAGES.index(language)].format(**values)


def _sign(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def _format_p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _clean(text: str) -> str:
    """Return text that cannot command a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _measure(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


if __name__ == "__main__":
    main()
