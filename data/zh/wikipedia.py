"""Pages of the Chinese Wikipedia with a free picture: by category, search, list of titles, or at random.

A batch of pages is one question with its continuations; their pictures' licences are a second question, in Chinese
where Commons has it, in HTML always. Batches of all categories, searches and so on take turns, so that a limit on
records does not leave the last of them out.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.prepare.report import Report
from data.zh.record import Record
from data.zh.store import Found
from data.zh.text import clean_text

WIDTHS = (20, 40, 60, 120, 250, 330, 500, 960, 1280, 1920, 3840)  # pixels; Wikimedia makes no others
TEXT_LICENSE = "CC BY-SA 4.0"
BATCH_SIZE = 50  # titles, and pages of a generator
MAX_AUTHOR = 300  # characters
PAGES = {  # the name of the lead picture if it is free, the introduction, address and revision
    "prop": "pageimages|extracts|info",
    "piprop": "name",
    "pilicense": "free",
    "pilimit": "50",
    "exintro": "1",
    "explaintext": "1",
    "exlimit": "20",
    "inprop": "url",
    "variant": "zh-hans",
    "redirects": "1",
    "converttitles": "1",
}
FILES = {
    "prop": "imageinfo",
    "iiprop": "url|size|mime|extmetadata",
    "iiextmetadatalanguage": "zh",
    "iiextmetadatafilter": "LicenseShortName|LicenseUrl|Artist|Credit|NonFree",
}

Ask = Callable[[dict[str, str]], dict[str, Any]]


def find(
    ask: Ask,
    fetch: Callable[[str], bytes],
    categories: tuple[str, ...],
    searches: tuple[str, ...],
    titles: str,
    random: int,
    width: int,
    report: Report,
) -> Iterator[Found]:
    """Yield the pages that have a picture on Commons.

    Raises: ValueError or FileNotFoundError for a file of titles that cannot be used, and what `ask` raises.
    """
    seen: set[int] = set()
    for topic, pages in take_turns(list_parts(ask, categories, searches, titles, random)):
        named = []
        for page in pages:
            report.read += 1
            reason = judge_page(page)
            if not reason and page["pageid"] in seen:
                reason = "page: found before"
            if reason:
                report.drop(reason)
                continue
            seen.add(page["pageid"])
            named.append(page)
        about = describe_files(ask, [page["pageimage"] for page in named], width)
        for page in named:
            file = about.get(_normalise(page["pageimage"]), {})
            reason = judge_file(file)
            if reason:
                report.drop(reason)
                continue
            url = file["imageinfo"][0].get("thumburl") or file["imageinfo"][0]["url"]
            yield Found(make_record(topic, page, file["imageinfo"][0]), url, partial(fetch, url))


def list_parts(
    ask: Ask, categories: tuple[str, ...], searches: tuple[str, ...], titles: str, random: int
) -> list[tuple[str, Iterator[list[dict[str, Any]]]]]:
    """Return what was asked for: topics, each with its batches of pages."""
    size = str(BATCH_SIZE)
    parts = []
    for category in categories:
        name = category.rpartition(":")[2]
        asked = {"generator": "categorymembers", "gcmtitle": f"Category:{name}", "gcmnamespace": "0", "gcmlimit": size}
        parts.append((name, list_batches(ask, PAGES | asked)))
    for text in searches:
        asked = {"generator": "search", "gsrsearch": text, "gsrnamespace": "0", "gsrlimit": size}
        parts.append((text, list_batches(ask, PAGES | asked)))
    if titles:
        parts.append((Path(titles).stem, list_titles(ask, read_titles(Path(titles)))))
    if random:
        asked = {"generator": "random", "grnnamespace": "0", "grnlimit": size}
        parts.append(("random", limit_pages(list_batches(ask, PAGES | asked), random)))
    return parts


def take_turns(parts: list[tuple[str, Iterator[Any]]]) -> Iterator[tuple[str, Any]]:
    """Yield one item of each part, then the next of each."""
    waiting = deque(parts)
    while waiting:
        topic, items = waiting.popleft()
        for item in items:
            yield topic, item
            waiting.append((topic, items))
            break


def list_batches(ask: Ask, parameters: dict[str, str]) -> Iterator[list[dict[str, Any]]]:
    """Yield the pages of a query, batch by batch: the properties of one page may come in several answers.

    Raises: ValueError for a server that continues with what it continued with before.
    """
    pages: dict[Any, dict[str, Any]] = {}
    more: dict[str, str] = {}
    while True:
        answer = ask(parameters | more)
        for page in answer.get("query", {}).get("pages", []):
            pages.setdefault(page.get("pageid", page.get("title")), {}).update(page)
        following = answer.get("continue", {})
        if pages and (answer.get("batchcomplete") or not following):
            yield list(pages.values())
            pages = {}
        if not following:
            return
        if following == more:
            raise ValueError(f"the API goes round in circles: it continues {parameters} twice with {more}")
        more = following


def list_titles(ask: Ask, titles: list[str]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(titles), BATCH_SIZE):
        yield from list_batches(ask, PAGES | {"titles": "|".join(titles[start : start + BATCH_SIZE])})


def read_titles(file: Path) -> list[str]:
    """Return the titles of a file, one a line.

    Raises: FileNotFoundError, or ValueError naming the line for what cannot be a title.
    """
    titles = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        title = line.strip()
        if set(title) & set("#<>[]|{}"):
            raise ValueError(f"{file}, line {number}: {title!r} is no title, which has none of # < > [ ] | {{ }}")
        if title:
            titles.append(title)
    return titles


def limit_pages(batches: Iterator[list[dict[str, Any]]], num_pages: int) -> Iterator[list[dict[str, Any]]]:
    for batch in batches:
        yield batch[:num_pages]
        num_pages -= len(batch)
        if num_pages <= 0:
            return


def describe_files(ask: Ask, names: list[str], width: int) -> dict[str, dict[str, Any]]:
    """Return what is known of the files, by their names."""
    names = sorted(set(names))
    if not names:
        return {}
    titles = "|".join(f"File:{name}" for name in names)
    batches = list_batches(ask, FILES | {"titles": titles, "iiurlwidth": str(width)})
    return {_normalise(page["title"].partition(":")[2]): page for batch in batches for page in batch}


def judge_page(page: dict[str, Any]) -> str:
    """Return why a page is of no use, or nothing."""
    if "missing" in page or "invalid" in page or "pageid" not in page:
        return "page: does not exist"
    if not page.get("extract"):
        return "page: no text"
    return "" if page.get("pageimage") else "page: no free picture"


def judge_file(file: dict[str, Any]) -> str:
    """Return why a file is of no use, or nothing; its licence is not looked at."""
    if not file.get("imageinfo"):
        return "file: does not exist"
    if file.get("imagerepository") != "shared":
        return "file: not on Commons"
    about = file["imageinfo"][0]
    if not str(about.get("mime", "")).startswith("image/"):
        return "file: no picture but a document, sound or film"
    if not (about.get("thumburl") or about.get("url")):
        return "file: no address"
    return "licence: not free" if _read_field(about, "NonFree") == "true" else ""


def make_record(topic: str, page: dict[str, Any], file: dict[str, Any]) -> Record:
    """Return a record with its text as it came."""
    url = _read_field(file, "LicenseUrl")
    author = clean_text(_read_field(file, "Artist")) or clean_text(_read_field(file, "Credit"))
    return Record(
        image="",
        sha256="",
        title=page["title"],
        section="",
        text=page["extract"],
        topic=topic,
        page_url=page.get("canonicalurl") or page.get("fullurl", ""),
        revision=page.get("lastrevid", 0),
        author=" ".join(author.split())[:MAX_AUTHOR],
        license=clean_text(_read_field(file, "LicenseShortName")),
        license_url=f"https:{url}" if url.startswith("//") else url,
        image_url=file.get("descriptionurl", ""),
        source="wikipedia",
    )


def _read_field(file: dict[str, Any], name: str) -> str:
    """Return a field of a file's description, in HTML."""
    metadata = file.get("extmetadata") or {}  # a list where there is none
    return str(metadata[name]["value"]).strip() if name in metadata else ""


def _normalise(name: str) -> str:
    return name.replace("_", " ")
