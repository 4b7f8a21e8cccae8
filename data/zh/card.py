"""The card of a published data set: what it is, how it was made, what its licences ask for, and what it is not.

Every number is counted from the files of the work folder; what they do not tell is left out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.zh import sheet
from data.zh.describe import COLUMNS, SPLITS, Entry

if TYPE_CHECKING:
    from data.zh.publish import PublishSettings

SHARE_ALIKE = "cc-by-sa-4.0"
SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
SOURCES = {
    "wikipedia": "the Chinese Wikipedia (zh.wikipedia.org), by its API, with pictures of Wikimedia Commons",
    "wit": "the Wikipedia image-text data set (wikimedia/wit_base), its Chinese part",
    "folder": "pictures and texts that whoever built this had",
}
KINDS = {
    "short": "a word or a phrase answers",
    "description": "the picture is described",
    "conversation": "several turns",
    "reasoning": "why, what for, what follows",
    "text": "reading what is written in the picture",
    "counting": "how many",
    "yes_no": "yes and no, each the right answer to some",
}


def find_marks(work: Path) -> list[Path]:
    """Return the files of judges' marks in a work folder."""
    return sorted(work.glob("marks*.json"))


def write(settings: "PublishSettings", work: Path, entries: Sequence[Entry], statistics: dict[str, Any]) -> str:
    """Return the card. Raises: ValueError for marks that cannot be counted."""
    is_own = {*statistics["sources"]} == {"folder"}
    license = settings.license or ("other" if is_own else SHARE_ALIKE)
    parts = [
        _write_head(settings.name, license, statistics),
        f"# {show(settings.name)}\n\n{_introduce(statistics)}",
        "## How it was made\n\n" + _tell_origin(work, entries, statistics),
        "## Files and fields\n\n" + FIELDS,
        "## Splits\n\n" + _tell_splits(settings, statistics),
        "## Statistics\n\n" + _tell_statistics(statistics),
        "## Licences, and what they ask of you\n\n" + _tell_licenses(license, is_own, statistics),
        "## Judged quality\n\n" + _tell_quality(work),
        "## Limits\n\n" + "\n".join([LIMITS] if is_own else [LIMITS, ENCYCLOPEDIA_LIMITS]),
    ]
    return "\n\n".join(parts) + "\n"


def show(text: str) -> str:
    """Return a text from elsewhere so that it stays text in a line or a table of Markdown."""
    line = " ".join(text.split())
    return "".join(f"\\{one}" if one in "\\`*_{}[]<>#|$!" else one for one in line)


def tabulate(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of Markdown, its first column of names and all others of numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _write_head(name: str, license: str, statistics: dict[str, Any]) -> str:
    """Return what the Hub reads; JSON's quotes are YAML's."""
    total = statistics["splits"]["all"]["dialogues"]
    size = next((size for limit, size in SIZES if total < limit), "n>1M")
    splits = [split for split in SPLITS if split in statistics["splits"]]
    files = "".join(f"\n  - split: {split}\n    path: {split}.json" for split in splits)
    return f"""---
license: {json.dumps(license)}
language:
- zh
task_categories:
- visual-question-answering
- image-text-to-text
pretty_name: {json.dumps(name, ensure_ascii=False)}
size_categories:
- {size}
configs:
- config_name: default
  data_files:{files}
---"""


def _introduce(statistics: dict[str, Any]) -> str:
    counts = statistics["splits"]["all"]
    return (
        f"{counts['dialogues']:,} Chinese dialogues ({counts['questions']:,} questions and answers) about "
        f"{counts['pictures']:,} pictures of {counts['pages']:,} pages, to tune vision-language models on: rows of "
        "LLaVA's conversation format, in simplified characters. Each was written from a picture and the text beside "
        "it, by whom stands below; filters took out what was unfit."
    )


def _tell_origin(work: Path, entries: Sequence[Entry], statistics: dict[str, Any]) -> str:
    sources = [
        f"- {SOURCES.get(name, show(name))}: {count:,} pictures" for name, count in statistics["sources"].items()
    ]
    writers = Counter(
        (entry.reply.model, entry.reply.model_snapshot or "not named", entry.reply.prompt_version) for entry in entries
    )
    rows = [(*map(show, writer), count) for writer, count in sorted(writers.items())]
    parts = [
        "Pictures and texts are of\n\n" + "\n".join(sources),
        _tell_revisions(entries),
        "The dialogues were written by\n\n"
        + tabulate(("model", "as its endpoint names itself", "version of the prompts", "dialogues"), rows),
        _tell_writing(work),
        _tell_step(work, "collect", "Collecting counted, of pictures and their texts:"),
        _tell_step(work, "clean", "Filtering counted, of dialogues:"),
    ]
    return "\n\n".join(part for part in parts if part)


def _tell_revisions(entries: Sequence[Entry]) -> str:
    revisions = [entry.record.revision for entry in entries if entry.record.revision]
    if not revisions:
        return ""
    return (
        f"The pages are as they were at the revisions that `ATTRIBUTION.jsonl` names ({min(revisions)} to "
        f"{max(revisions)}; a page's revision tells its date)."
    )


def _load_report(work: Path, step: str) -> Any:
    """Return a step's report; None where there is none."""
    file = work / f"{step}.report.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _tell_step(work: Path, step: str, title: str) -> str:
    """Return what a step read, mended, dropped and noted; nothing where there is no report."""
    report = _load_report(work, step)
    if report is None:
        return ""
    rows = [("read", "", report["read"])]
    rows += [(done, show(reason), count) for done in ("mended", "dropped") for reason, count in report[done].items()]
    rows += [("kept", "", report["rows"])]
    lines = [f"{title}\n", "| | for | number |", "| --- | --- | ---: |"]
    lines += [f"| {done} | {reason} | {count:,} |" for done, reason, count in rows]
    lines += ["", *(f"- {show(note)}" for note in report["notes"])] if report["notes"] else []
    return "\n".join(lines)


def _tell_writing(work: Path) -> str:
    """Return how many replies were of use, of those that are in the work folder."""
    report = _load_report(work, "generate")
    if report is None:
        return ""
    written, unfit, failed = (sum(report[name].values()) for name in ("written", "not_applicable", "failed"))
    reasons = ", ".join(f"{show(reason)} {count:,}" for reason, count in report["failed"].items())
    return (
        f"{show(report['model'])} wrote {written:,} dialogues, before filtering; {unfit:,} times it said that a "
        f"kind does not fit the picture, and {failed:,} replies were of no use{f' ({reasons})' if reasons else ''}."
    )


FIELDS = """\
A split is a JSON list; `images/` lies beside it. A row:

- `id`: the picture's name and the kind
- `image`: path of the picture, named by the SHA-256 of its content
- `conversations`: LLaVA's turns, `{"from": "human" or "gpt", "value": ...}`; `<image>` stands in the first
- `source`, `topic`: where the picture is from, and what it was found under
- `license`: the picture's own
- `lang`: zh
- `kind`: of dialogue, see below

`ATTRIBUTION.jsonl` has a line for each picture: page, revision, author, licence."""


def _tell_splits(settings: "PublishSettings", statistics: dict[str, Any]) -> str:
    rows = [[split, *(counts[name] for name in COLUMNS)] for split, counts in statistics["splits"].items()]
    return (
        tabulate(("split", *COLUMNS), rows) + "\n\nPictures of one page, and pages of one picture, are in one split. A "
        f"hash of its name and the seed {settings.seed} sends such a group to validation with a chance of "
        f"{settings.validation_share:.1%}, and to test with one of {settings.test_share:.1%}."
    )


def _tell_statistics(statistics: dict[str, Any]) -> str:
    splits = [split for split in SPLITS if split in statistics["splits"]]
    kinds = [
        (
            f"{kind}: {KINDS[kind]}" if kind in KINDS else show(kind),
            counts["dialogues"],
            *(counts[split] for split in splits),
        )
        for kind, counts in statistics["kinds"].items()
    ]
    lengths = [
        (f"{what}, {unit}", *(f"{statistics[what][unit][name]:,.0f}" for name in ("median", "mean", "p95", "max")))
        for what in ("questions", "answers")
        for unit in ("characters", "tokens")
    ]
    tokenizer, answers = statistics["tokenizer"], statistics["short_answers"]
    parts = [
        tabulate(("kind", "dialogues", *splits), kinds),
        "![kinds](kinds.png)",
        tabulate(("length", "median", "mean", "95 % up to", "longest"), lengths),
        "![lengths](lengths.png)",
        f"Tokens are those of `{tokenizer['file']}` with {tokenizer['vocab_size']:,} pieces (sha256 "
        f"`{tokenizer['sha256'][:16]}`): {statistics['tokens_per_character']:.2f} for a character. Of letters and "
        f"digits {statistics['han_ratio']['mean']:.1%} are Han characters, in a dialogue at least "
        f"{statistics['han_ratio']['min']:.1%}. {statistics['asked_for_short_answers']:,} dialogues ask for a word or "
        "a phrase in their first question.",
        "![Han ratio and tokens per character](characters.png)",
        f"{len(statistics['topics']):,} topics:\n\n![topics](topics.png)",
    ]
    if answers:
        rows = [
            (
                kind,
                of["answers"],
                of["distinct"],
                ", ".join(f"{show(text)} ({n:,})" for text, n in of["common"].items()),
            )
            for kind, of in answers.items()
        ]
        parts.append(
            "The most frequent answers (up to their first comma), by which a model that does not look would score:\n\n"
            + tabulate(("kind", "answers", "distinct", "most frequent"), rows)
        )
    return "\n\n".join(parts)


def _tell_licenses(license: str, is_own: bool, statistics: dict[str, Any]) -> str:
    if not is_own:
        text = (
            "The dialogues are made from Wikipedia's texts, which are CC BY-SA 4.0: what you make of them and pass on "
            "has to be under the same licence, must name the pages (`page_url` and `revision` in `ATTRIBUTION.jsonl` "
            "do) and say what was changed."
        )
    else:
        whose = "that of each text" if license != "other" else "that of each text; no other was named"
        text = f"The dialogues' licence is `{license}`; `text_license` in `ATTRIBUTION.jsonl` is {whose}."
    rows = [(show(name) or "not named", count) for name, count in statistics["licenses"].items()]
    return "\n\n".join(
        (
            text,
            "Each picture keeps the licence of its own. Whoever passes it on names its author and licence, links both "
            "(`image_url`, `license_url`), and says if it was changed; pictures under CC BY-SA stay under it. "
            "`ATTRIBUTION.jsonl` has all of this, and has to go with the pictures.",
            tabulate(("licence of the picture", "pictures"), rows),
            "The provider of the model that wrote the dialogues may have terms about what its output is used for, "
            "such as training models that compete with its own: read those that held when it was written.",
            "Free licences are about copyright alone: persons in pictures have rights of their own, and trademarks do.",
        )
    )


def _tell_quality(work: Path) -> str:
    files = find_marks(work)
    if not files:
        return "Not judged yet. `python -m data.zh.sheet` makes a page of random dialogues for people to judge."
    result = sheet.tally(work, files)
    parts = [f"People judged dialogues drawn at random ({result['items']:,}), with picture and text before them."]
    for number, judge in enumerate(result["judges"], start=1):
        rows = [
            (
                kind,
                of["judged"],
                *(of[mark] for mark in sheet.MARKS),
                f"{of['share']:.1%}",
                f"{of['low']:.1%} to {of['high']:.1%}",
            )
            for kind, of in judge["kinds"].items()
            if of["judged"]
        ]
        parts.append(tabulate((f"judge {number}", "judged", *sheet.MARKS, "share good", "95 % interval"), rows))
        if judge["reasons"]:
            reasons = ", ".join(f"{name} ({count})" for name, count in judge["reasons"].items())
            parts.append(f"What was wrong: {reasons}.")
    if "disagreement" in result:
        found = result["disagreement"]
        parts.append(f"Of {found['judged_by_several']} that several judged, they differ in {len(found['differing'])}.")
    return "\n\n".join(parts)


LIMITS = """\
- What a model writes may be seen wrongly, or added from memory. Filters look at words, not at truth.
- Pictures show people who did not ask for it. Do not use this to recognise persons.
- Pictures of evaluations were kept out by their looks only, and only of those that were given; see the filters above.
- Chinese of the mainland, in simplified characters; no dialects, no other languages."""

ENCYCLOPEDIA_LIMITS = """\
- An encyclopedia's pictures are not everyday ones: buildings, maps, artworks, machines, species and known persons are
  frequent, homes and streets are rare. Topics are those that were collected.
- Its choice of subjects and its wording have a point of view of their own, and the model that wrote has another."""
