"""Collect pictures of an encyclopedia and the text beside them: `python -m data.zh.collect --work DIR --source ...`.

    wikipedia    pages of the Chinese Wikipedia, by its API (data/zh/wikipedia.py)
    wit          files of wikimedia/wit_base (data/zh/wit.py)
    folder       pictures and texts of one's own (data/zh/folder.py)

Writes `images/`, `records.jsonl`, `ATTRIBUTION.jsonl` and `collect.report.json` into the work folder. It may be killed
at any time: the same command goes on, asking for nothing twice; other settings use what is there already.
"""

import dataclasses
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.prepare.report import Report
from data.zh import folder, wikipedia, wit
from data.zh.mediawiki import MediaWiki, check_user_agent
from data.zh.options import run_command, setting
from data.zh.record import ATTRIBUTION, RECORDS, Record, as_row
from data.zh.store import Found, Store
from data.zh.text import clean_text, han_ratio, is_instruction, remove_instructions, split_sentences, to_simplified

SOURCES = ("wikipedia", "wit", "folder")
REPORT = "collect.report.json"
MIN_HAN = 0.3  # share of a text's characters; names of plants and of machines are Latin
LINE_EVERY = 100  # records, where progress is no bar
# Short names as Commons writes them, in English or Chinese: CC BY-SA 3.0 de, CC BY 2.5-2.0, PD-old, ...
FREE = re.compile(
    r"cc0([ -]1\.0)?|cc[ -]by([ -]sa)?([ -][\d.,-]+)?([ -][a-z]{2,8})?"
    r"|(cc[ -])?pdm?\b.*|public[ -]domain.*|公[有共][领領]域.*",
    re.IGNORECASE,
)
NOT_FREE = re.compile(r"\b(nc|nd)\b|non-?commercial|no-?deriv", re.IGNORECASE)


@dataclass(frozen=True)
class CollectSettings:
    source: str = setting("wikipedia", "where from", SOURCES)
    categories: tuple[str, ...] = setting((), "wikipedia: a category's pages, without its subcategories")
    searches: tuple[str, ...] = setting((), "wikipedia: what a search finds; deepcat:NAME has subcategories too")
    titles: str = setting("", "wikipedia: a file with a page's title a line")
    random: int = setting(0, "wikipedia: so many pages at random")
    user_agent: str = setting("", "wikipedia: your program, and an address or mail to write to")
    api: str = setting("https://zh.wikipedia.org/w/api.php", "wikipedia: the API's address")
    width: int = setting(500, f"wikipedia: of a picture, one of {', '.join(map(str, wikipedia.WIDTHS))} pixels")
    pause: float = setting(0.5, "wikipedia: seconds between two requests")
    backoff: float = setting(2.0, "wikipedia: seconds before the second try of a request, doubled for each further one")
    wit: str = setting("", "wit: a parquet file of wikimedia/wit_base, or a folder of them")
    folder: str = setting("", "folder: pictures and index.jsonl")
    max_records: int = setting(10_000, "stop at so many")
    min_text: int = setting(40, "characters; pages with less are dropped")
    max_text: int = setting(2000, "characters; longer texts are cut at a sentence's end")

    def __post_init__(self) -> None:
        for name, least in (("random", 0), ("pause", 0), ("backoff", 0), ("max_records", 1), ("min_text", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least {least}")
        if self.max_text < self.min_text:
            raise ValueError(f"max_text = {self.max_text} is less than min_text = {self.min_text}")
        if self.source == "wikipedia":
            check_user_agent(self.user_agent)
            if self.width not in wikipedia.WIDTHS:
                raise ValueError(f"width = {self.width}, expected one of {', '.join(map(str, wikipedia.WIDTHS))}")
            if not (self.categories or self.searches or self.titles or self.random):
                raise ValueError("which pages? Give categories, searches, titles or random")
        elif not getattr(self, self.source):
            raise ValueError(f"source = {self.source!r} needs {self.source}, the place of its files")


def run(settings: CollectSettings, work: Path) -> dict[str, Any]:
    """Collect into a work folder, print a table and return the report.

    Raises: ValueError, FileNotFoundError or ConnectionError with what to do.
    """
    report = Report(settings.source)
    report.options = describe_options(settings)
    with Store(work) as store:
        records = list(follow(collect(settings, store, report), settings.max_records))
        write_lines(work / RECORDS, [as_row(record) for record in records])
        write_lines(work / ATTRIBUTION, [attribute(record) for record in records])
    report.rows = len(records)
    report.write(work / REPORT)
    report.print()
    return json.loads((work / REPORT).read_text(encoding="utf-8"))


def collect(settings: CollectSettings, store: Store, report: Report) -> Iterator[Record]:
    """Yield the records, each picture and no picture twice."""
    taken: set[str] = set()
    for found in find(settings, store, report):
        mended: Counter[str] = Counter()
        try:
            record = prepare_record(found.record, settings.min_text, settings.max_text, mended)
        except ValueError as reason:
            report.drop(str(reason))
            continue
        row = store.keep(found)
        if "problem" in row:
            report.drop(f"picture: {row['problem']}")
        elif row["sha256"] in taken:
            report.drop("picture: found before")
        else:
            taken.add(row["sha256"])
            report.mended.update(mended + Counter([f"picture: {row['mended']}"] if row["mended"] else []))
            yield dataclasses.replace(record, image=row["image"], sha256=row["sha256"])
            if len(taken) == settings.max_records:
                return


def find(settings: CollectSettings, store: Store, report: Report) -> Iterator[Found]:
    if settings.source == "wit":
        return wit.find(Path(settings.wit), report)
    if settings.source == "folder":
        return folder.find(Path(settings.folder), report)
    wiki = MediaWiki(settings.api, settings.user_agent, settings.pause, settings.backoff)

    def ask(parameters: dict[str, str]) -> Any:
        return store.ask([wiki.api, parameters], functools.partial(wiki.query, parameters))

    asked = (settings.categories, settings.searches, settings.titles, settings.random)
    return wikipedia.find(ask, wiki.fetch, *asked, settings.width, report)


def prepare_record(record: Record, min_text: int, max_text: int, mended: Counter[str]) -> Record:
    """Return a record in plain, simplified Chinese. Raises: ValueError with the reason for one that is of no use."""
    if record.source == "wikipedia" and not is_free(record.license):
        raise ValueError("licence: not free")
    title, section, topic = (prepare_line(text) for text in (record.title, record.section, record.topic))
    if not title:
        raise ValueError("title: empty, or talks to a model")
    text = prepare_text(record.text, max_text, mended)
    if len(text) < min_text:
        raise ValueError(f"text: less than {min_text} characters")
    if han_ratio(text) < MIN_HAN:
        raise ValueError(f"text: less than {MIN_HAN:.0%} Chinese")
    return dataclasses.replace(record, title=title, section=section, topic=topic, text=text)


def prepare_line(text: str) -> str:
    """Return a plain title in simplified characters; "" for one that talks to a model."""
    line = to_simplified(" ".join(clean_text(text).split()))
    return "" if is_instruction(line) else line


def prepare_text(text: str, max_text: int, mended: Counter[str]) -> str:
    """Return a plain text in simplified characters, no longer than it may be; what was mended is counted."""
    plain = clean_text(text)
    simplified = to_simplified(plain)
    if simplified != plain:
        mended["text: traditional characters made simplified"] += 1
    kept, num_removed = remove_instructions(simplified)
    mended["sentence: talks to a model, removed"] += num_removed
    if len(kept) <= max_text:
        return kept
    mended[f"text: cut to {max_text} characters"] += 1
    return cut_text(kept, max_text)


def cut_text(text: str, max_text: int) -> str:
    """Return the first sentences that fit, or what fits of the first one."""
    kept = ""
    for sentence in split_sentences(text):
        if len(kept) + len(sentence) > max_text:
            break
        kept += sentence
    return kept.strip() or text[:max_text].strip()


def is_free(license: str) -> bool:
    """Tell public domain, CC0, CC BY and CC BY-SA of any version from other licences, by their short names."""
    return FREE.fullmatch(license.strip()) is not None and NOT_FREE.search(license) is None


def attribute(record: Record) -> dict[str, Any]:
    """Return what those who pass on a picture and its text have to say. A folder's text is licensed as its picture."""
    names = ("image", "title", "author", "license", "license_url", "image_url", "page_url", "revision")
    text_license = record.license if record.source == "folder" else wikipedia.TEXT_LICENSE
    return {name: getattr(record, name) for name in names} | {"text_license": text_license}


def follow(records: Iterator[Record], total: int) -> Iterator[Record]:
    """Show progress: a bar in a terminal, a line now and then elsewhere."""
    with tqdm(records, "collect", total, unit=" records", file=sys.stderr, disable=None) as bar:
        for number, record in enumerate(bar, start=1):
            if bar.disable and number % LINE_EVERY == 0:
                print(f"collect: {number} of at most {total} records", file=sys.stderr, flush=True)
            yield record


def describe_options(settings: CollectSettings) -> dict[str, Any]:
    """Return what the result depends on, files by name; nobody's address."""
    elsewhere = ["source", "user_agent", "pause", "backoff"]
    if settings.source != "wikipedia":
        elsewhere += ["api", "width"]
    values = {name: value for name, value in dataclasses.asdict(settings).items() if value and name not in elsewhere}
    return values | {name: Path(values[name]).name for name in ("titles", "wit", "folder") if name in values}


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    partial = file.with_name(file.name + ".partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.write_text(text, encoding="utf-8", errors="replace")  # JSON can name halves of a character
    partial.replace(file)


def main() -> None:
    run_command("collect", str(__doc__), CollectSettings, run)


if __name__ == "__main__":
    main()
