"""Collecting from files: a folder of one's own pictures, and parquet files as those of wikimedia/wit_base."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import data.zh.wit
from data.zh.collect import CollectSettings, run
from data.zh.record import ATTRIBUTION, read_records
from tests.conftest import ROOT
from tests.data.broken_pictures import draw_scene, encode, make_cases

TEXT = "是一座位于中国北方的历史建筑，始建于明朝，以木结构和彩绘闻名，每年有许多游客前来参观。"
COMMONS = "https://upload.wikimedia.org/wikipedia/commons"
ROW = {"image": "塔.jpg", "title": "塔", "text": TEXT, "license": "CC BY 4.0"}


def make_picture(seed: int) -> bytes:
    return encode(draw_scene(seed, 150, 120), "JPEG", quality=80)


def write_folder(folder: Path, *rows: Any) -> CollectSettings:
    folder.mkdir(exist_ok=True)
    (folder / "塔.jpg").write_bytes(make_picture(1))
    text = "\n".join(json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else row for row in rows)
    (folder / "index.jsonl").write_text(text, encoding="utf-8")
    return CollectSettings(source="folder", folder=str(folder))


def test_sample(tmp_path: Path) -> None:
    """What ships is read as it says: with a licence each, and with what is wrong in it on purpose."""
    report = run(CollectSettings(source="folder", folder=str(ROOT / "data/zh/sample")), tmp_path)
    assert report["rows"] == report["read"] - 1 >= 10
    assert report["dropped"] == {"text: less than 40 characters": 1}
    assert report["mended"]["sentence: talks to a model, removed"] == 1
    assert report["options"] == {"folder": "sample", "max_records": 10_000, "min_text": 40, "max_text": 2000}
    lines = [json.loads(line) for line in (tmp_path / ATTRIBUTION).read_text(encoding="utf-8").splitlines()]
    assert all(line["license"] and line["text_license"] == line["license"] for line in lines)
    assert [line["image"] for line in lines] == [record.image for record in read_records(tmp_path)]


def test_folder(tmp_path: Path) -> None:
    """All that its line says is in the record; what it does not say is empty."""
    about = {"section": "歷史", "topic": "古蹟", "author": "李", "license_url": "https://example.org/by"}
    about |= {"page_url": "https://example.org/塔", "image_url": "https://example.org/塔.jpg"}
    settings = write_folder(tmp_path / "own", ROW | about | {"text": f"<b>臺灣</b>的塔{TEXT}"}, "")
    run(settings, tmp_path / "work")
    (record,) = read_records(tmp_path / "work")
    assert (record.title, record.section, record.topic, record.text) == ("塔", "历史", "古迹", f"台湾的塔{TEXT}")
    assert (record.author, record.license, record.license_url) == ("李", "CC BY 4.0", "https://example.org/by")
    assert (record.page_url, record.image_url, record.revision) == (about["page_url"], about["image_url"], 0)
    assert (record.source, record.image) == ("folder", f"images/{record.sha256[:2]}/{record.sha256}.jpg")
    assert (tmp_path / "work" / record.image).read_bytes() == make_picture(1)


def test_folder_with_broken_pictures(tmp_path: Path) -> None:
    """Every broken kind is dropped with a reason, and what is not broken is too small here."""
    folder = tmp_path / "own"
    cases = make_cases()
    settings = write_folder(
        folder, ROW, *(ROW | {"image": case.name} for case in cases), ROW | {"image": "none.jpg"}, ROW
    )
    for case in cases:
        (folder / case.name).write_bytes(case.content)
    report = run(settings, tmp_path / "work")
    num_broken = sum(bool(case.problem) for case in cases)
    assert report["dropped"] == {
        "picture: cannot be decoded": num_broken,
        "picture: smaller than 100 pixels": len(cases) - num_broken,
        "picture: missing": 1,
        "picture: found before": 1,
    }
    assert (report["read"], report["rows"]) == (len(cases) + 3, 1)


def test_picture_that_was_replaced(tmp_path: Path) -> None:
    """What the journal knows of a file holds for that content."""
    settings = write_folder(tmp_path / "own", ROW)
    run(settings, tmp_path / "work")
    (first,) = read_records(tmp_path / "work")
    (tmp_path / "own/塔.jpg").write_bytes(make_picture(2))
    run(settings, tmp_path / "work")
    (second,) = read_records(tmp_path / "work")
    assert second.sha256 != first.sha256
    assert (tmp_path / "work" / second.image).read_bytes() == make_picture(2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: it is no JSON object"),
        (ROW | {"licence": "CC0"}, "line 2: unknown key 'licence', did you mean 'license'?"),
        (ROW | {"title": 3}, "line 2: title = 3, expected a text"),
        ({"image": "塔.jpg", "text": TEXT}, "line 2: title, license is missing"),
        ({"image": "塔.jpg", "title": "塔", "license": "CC0"}, "line 2: text is missing"),
        (ROW | {"image": "../塔.jpg"}, "line 2: image = '../塔.jpg' is not below the folder"),
        (ROW | {"image": "/塔.jpg"}, "line 2: image = '/塔.jpg' is not below the folder"),
    ],
)
def test_index_that_is_wrong(tmp_path: Path, row: Any, message: str) -> None:
    """Its owner can mend it: the line is named."""
    settings = write_folder(tmp_path / "own", ROW, row)
    with pytest.raises(ValueError, match=r"index\.jsonl, " + message.replace("?", r"\?").replace("[", r"\[")):
        run(settings, tmp_path / "work")


def test_folder_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"index.jsonl is missing"):
        run(CollectSettings(source="folder", folder=str(tmp_path)), tmp_path / "work")


def make_page(language: str = "zh", **values: Any) -> dict[str, Any]:
    return {
        "language": language,
        "page_title": "塔",
        "page_url": f"https://{language}.wikipedia.org/wiki/塔",
        "section_title": None,
        "is_main_image": False,
        "caption_reference_description": None,
        "context_page_description": TEXT,
        "context_section_description": None,
    } | values


def write_wit(file: Path, *rows: tuple[str, bytes | None, list[dict[str, Any]]], in_columns: bool = True) -> None:
    """Write a file as the Hub has them: the pages of a picture lie in columns of lists, or as rows."""
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": content, "path": None} for _, content, _ in rows],
        "image_url": [url for url, _, _ in rows],
        "embedding": [[0.5] * 8 for _ in rows],
        "mime_type": ["image/jpeg" for _ in rows],
        "wit_features": [
            {name: [page[name] for page in pages] for name in make_page()} if in_columns else pages
            for _, _, pages in rows
        ],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=3)


@pytest.mark.parametrize("in_columns", [True, False])
def test_wit(tmp_path: Path, in_columns: bool) -> None:
    """The Chinese page is taken where the picture is the main one; caption and section come before the beginning."""
    main = make_page(page_title="主頁", is_main_image=True, caption_reference_description="塔的照片。")
    section = make_page(section_title="歷史", context_section_description=f"清朝{TEXT}")
    write_wit(
        tmp_path / "train-0.parquet",
        (f"{COMMONS}/a/ab/A_1.jpg", make_picture(1), [make_page("en"), make_page(page_title="次页"), main]),
        (f"{COMMONS}/a/ab/B.jpg", make_picture(2), [section]),
        (f"{COMMONS}/a/ab/C.jpg", make_picture(3), [make_page("en"), make_page("ja")]),
        ("https://upload.wikimedia.org/wikipedia/zh/a/ab/D.jpg", make_picture(4), [make_page()]),
        (f"{COMMONS}/a/ab/E.jpg", None, [make_page()]),
        (f"{COMMONS}/a/ab/F.jpg", b"<html>", [make_page("zh-TW")]),
        (f"{COMMONS}/a/ab/G.jpg", make_picture(7), [make_page(context_page_description=None)]),
        (f"{COMMONS}/a/ab/H.jpg", make_picture(8), [make_page(page_title=None)]),
        in_columns=in_columns,
    )
    report = run(CollectSettings(source="wit", wit=str(tmp_path)), tmp_path / "work")
    first, second = read_records(tmp_path / "work")
    assert (first.title, first.section, first.text) == ("主页", "", f"塔的照片。\n{TEXT}")
    assert (second.title, second.section, second.text) == ("塔", "历史", f"清朝{TEXT}")
    assert first.image_url == "https://commons.wikimedia.org/wiki/File:A_1.jpg"
    assert first.license == first.author == "see image_url"
    assert (first.source, first.topic, first.page_url) == ("wit", "wit", "https://zh.wikipedia.org/wiki/塔")
    assert report["dropped"] == {
        "file: not on Commons": 1,
        "page: no title": 1,
        "page: not Chinese": 1,
        "picture: cannot be decoded": 1,
        "picture: cannot be fetched": 1,
        "text: less than 40 characters": 1,
    }
    assert report["read"] == 8


def test_wit_reads_no_picture_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups without a new Chinese page are not unpacked: the files of the Hub have 300 GB."""
    rows = [(f"{COMMONS}/a/ab/{number}.jpg", make_picture(number), [make_page()]) for number in range(6)]
    rows += [(f"{COMMONS}/a/ab/{number}.jpg", make_picture(number), [make_page("en")]) for number in range(6, 9)]
    write_wit(tmp_path / "train-0.parquet", *rows)
    groups = []
    read = data.zh.wit._read_images

    def note(opened: Any, group: int) -> list[Any]:
        groups.append(group)
        return read(opened, group)

    monkeypatch.setattr(data.zh.wit, "_read_images", note)
    settings = CollectSettings(source="wit", wit=str(tmp_path / "train-0.parquet"), max_records=4)
    run(settings, tmp_path / "work")
    assert groups == [0, 1]
    settings = CollectSettings(source="wit", wit=str(tmp_path))
    assert run(settings, tmp_path / "work")["rows"] == 6
    assert groups == [0, 1, 1]
    assert run(settings, tmp_path / "work")["rows"] == 6
    assert groups == [0, 1, 1]


def test_files_that_are_not_of_wit(tmp_path: Path) -> None:
    settings = CollectSettings(source="wit", wit=str(tmp_path / "x.parquet"))
    with pytest.raises(FileNotFoundError, match=r"x.parquet is no parquet file and no folder of such"):
        run(settings, tmp_path / "work")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"x.parquet is no parquet file"):
        run(settings, tmp_path / "work")
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a"], "text": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet has no column image_url, mime_type, wit_features"):
        run(settings, tmp_path / "work")
