"""Pictures of `wikimedia/wit_base`, as its parquet files lie on the Hub: the way that needs no Wikipedia.

Pictures are up to 300 pixels wide, those of which a face covers more than a tenth are left out by its makers. A picture
has the pages of many languages; one Chinese page is taken, where it is the main picture if there is such a one. The
files do not say who made a picture and under which licence: the address of its description does.
"""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.prepare.report import Report
from data.zh.record import Record
from data.zh.store import Found

COMMONS = "/wikipedia/commons/"
LICENSE = "see image_url"
COLUMNS = ("image_url", "mime_type", "wit_features")
LANGUAGES = ("zh", "zh-TW")


def find(place: Path, report: Report) -> Iterator[Found]:
    """Yield the pictures with a Chinese page, row group by row group; a picture is read only when it is asked for.

    Raises: FileNotFoundError, or ValueError for files that are not of this data set.
    """
    for file in list_files(place):
        opened = _open(file)
        for group in range(opened.num_row_groups):
            images = cache(partial(_read_images, opened, group))
            for number, row in enumerate(opened.read_row_group(group, columns=list(COLUMNS)).to_pylist()):
                report.read += 1
                page = choose_page(row["wit_features"] or {})
                reason = judge(row, page)
                if reason or page is None:
                    report.drop(reason)
                    continue
                yield Found(make_record(row["image_url"], page), row["image_url"], partial(_pick, images, number))


def list_files(place: Path) -> list[Path]:
    """Return a file, or the parquet files below a folder. Raises: FileNotFoundError if there are none."""
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{place} is no parquet file and no folder of such: fetch data/*.parquet of wit_base")
    return files


def choose_page(features: dict[str, list[Any]] | list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return one Chinese page of a picture, or None. Files hold a list for each column, or for each page a row."""
    if isinstance(features, dict):
        columns = {name: values for name, values in features.items() if values}
        features = [dict(zip(columns, page, strict=True)) for page in zip(*columns.values(), strict=True)]
    chinese = [page for page in features if page.get("language") in LANGUAGES]
    return max(chinese, key=lambda page: bool(page.get("is_main_image")), default=None)  # the first of the best


def judge(row: dict[str, Any], page: dict[str, Any] | None) -> str:
    """Return why a row is of no use, or nothing."""
    if page is None:
        return "page: not Chinese"
    if COMMONS not in urlsplit(row["image_url"] or "").path:
        return "file: not on Commons"
    return "" if page.get("page_title") else "page: no title"


def make_record(url: str, page: dict[str, Any]) -> Record:
    """Return a record with its text as it came: the caption, then the section, or else the page's beginning."""
    section = page.get("context_section_description")
    texts = [page.get("caption_reference_description"), section or page.get("context_page_description")]
    name = urlsplit(url).path.rpartition("/")[2]
    return Record(
        image="",
        sha256="",
        title=page["page_title"],
        section=(page.get("section_title") or "") if section else "",
        text="\n".join(text for text in texts if text),
        topic="wit",
        page_url=page.get("page_url") or "",
        revision=0,
        author=LICENSE,
        license=LICENSE,
        license_url="",
        image_url=f"https://commons.wikimedia.org/wiki/File:{name}",
        source="wit",
    )


def _open(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet files need pyarrow: pip install -r data/requirements.txt") from error
    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is no parquet file: {error}") from error
    missing = {"image", *COLUMNS} - set(opened.schema_arrow.names)
    if missing:
        raise ValueError(f"{file} has no column {', '.join(sorted(missing))}: it is not of wikimedia/wit_base")
    return opened


def _read_images(opened: Any, group: int) -> list[Any]:
    return opened.read_row_group(group, columns=["image"]).column("image").to_pylist()


def _pick(images: Any, number: int) -> bytes:
    content = (images()[number] or {}).get("bytes")
    if not content:
        raise ValueError("the row has no picture")
    return content
