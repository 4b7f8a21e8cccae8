"""The official files: passed through as they are, each known fault mended or left out, and counted."""

import copy
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.conversation import parse_turns
from data.prepare import llava
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.report import Report
from tests.data.prepare.owners_files import dump, write_coco

ALL_ALLOWED = Leaks(is_allowed=True)
SUFFIX = "\nAnswer the question using a single word or phrase."


def make_row(number: object, image: str | None, *texts: str, first: str = "human", **extra: Any) -> dict:
    """Return a row as the official files have them, its speakers taking turns."""
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    turns = [{"from": speakers[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"id": number} | ({} if image is None else {"image": image}) | {"conversations": turns} | extra


SOUND = [
    make_row(
        "000000033471",
        "coco/train2017/000000033471.jpg",
        "<image>\nWhat are the colors of the bus?",
        "White and red.",
        "Who is on it?",
        "A driver.",
    ),
    make_row("000000033471", "coco/train2017/000000033471.jpg", "Is it moving?\n<image>", "No."),
    make_row("wgByO4Y_0", None, "Why?", "Because.", model=""),
    make_row(2370799, "gqa/images/2370799.jpg", "<image>\nIs it cold?" + SUFFIX, "No"),
    make_row("0553381547", "ocr_vqa/images/0553381547.jpg", "<image>\nWho wrote this book?" + SUFFIX, "Roald Dahl"),
    make_row("0054c91397f2fe05", "textvqa/train_images/0054c91397f2fe05.jpg", "<image>\nWhat does it say?", "Stop."),
    make_row("VG_100K/1", "vg/VG_100K/1.jpg", "<image>\nWhat is at [0.1, 0.2]?", "A clock."),
]
FAULTY: list[tuple[Any, str, Any]] = [  # row, fault, how its conversation reads afterwards
    (
        make_row(1, "gqa/images/2370799.jpg", "What is it?", "A cat."),
        "row: <image> missing or in a later turn, now one in front",
        ["<image>\nWhat is it?", "A cat."],
    ),
    (
        make_row(2, "gqa/images/2370799.jpg", "Hello.", "Hi.", "And <image>?", "A cat."),
        "row: <image> missing or in a later turn, now one in front",
        ["<image>\nHello.", "Hi.", "And ?", "A cat."],
    ),
    (
        make_row(3, "gqa/images/2370799.jpg", "<image>\nWhat is it?", "See <image>, a cat."),
        "row: several <image>, now one in front",
        ["<image>\nWhat is it?", "See , a cat."],
    ),
    (
        make_row(4, None, "I am ready.", "Why?", "Because.", first="gpt"),
        "row: leading answer removed",
        ["Why?", "Because."],
    ),
    (
        make_row(5, None, "Why?", "Because.", "Why?"),
        "row: last question, without an answer, removed",
        ["Why?", "Because."],
    ),
    (make_row(6, None, "<image>\nWhat is it?", "A cat."), "row: <image> without a picture", None),
    ({"id": 7, "conversations": [{"from": "human", "value": "a"}] * 2}, "row: questions and answers do not", None),
    ({"id": 8, "conversations": []}, "row: questions and answers do not alternate", None),
    (make_row(9, None, "Nothing to say.", first="gpt"), "row: questions and answers do not alternate", None),
    ({"id": 10, "text": "no conversation"}, "row: not a conversation", None),
    ({"id": 11, "conversations": [{"value": "Why?"}, {"from": "gpt", "value": "So."}]}, "row: not a", None),
    ({"id": 12, "conversations": [{"from": "human", "value": None}] * 2}, "row: not a conversation", None),
    (make_row(13, None, "half a character: \ud83d", "Why?"), "row: not a conversation", None),
    (make_row(14, None, "a", "b") | {"image": ["1.jpg", "2.jpg"]}, "row: not a conversation", None),
    ("a text", "row: not a conversation", None),
]


def list_images(rows: Sequence[dict]) -> list[str]:
    return sorted({row["image"] for row in rows if "image" in row})


def write(root: Path, rows: Sequence[Any], name: str = "llava_v1_5_mix665k.json", with_pictures: bool = True) -> Path:
    """Write the file, and an empty file for each picture of the sound rows."""
    for image in list_images(SOUND) if with_pictures else []:
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        (root / image).touch()
    return dump(list(rows), root / name)


def prepare(root: Path, leaks: Leaks = ALL_ALLOWED) -> tuple[list[dict], Report]:
    report = Report("llava")
    return list(llava.read(root, Options(), leaks, report)), report


def test_sound_rows_pass_unchanged(tmp_path: Path) -> None:
    """Ids repeat and markers stand behind questions in the official file, too."""
    file = write(tmp_path, SOUND)
    rows, report = prepare(tmp_path)
    sources = ["coco", "coco", "text", "gqa", "ocr_vqa", "textvqa", "vg"]
    assert rows == [row | {"source": source} for row, source in zip(SOUND, sources, strict=True)]
    assert [list(row) for row in rows] == [[*row, "source"] for row in SOUND]
    assert rows[2]["model"] == ""
    assert report.read == 7
    assert report.mended == report.dropped == {}
    assert report.notes == ["1 rows have no picture: kept as text; 1 ids are not the first of their kind"]
    assert [entry["name"] for entry in report.inputs] == [file.name]
    assert prepare(file)[0] == rows


@pytest.mark.parametrize(("row", "fault", "texts"), FAULTY, ids=[f"{number}" for number in range(1, len(FAULTY) + 1)])
def test_faulty_rows(tmp_path: Path, row: Any, fault: str, texts: list[str] | None) -> None:
    write(tmp_path, [SOUND[0], row, SOUND[2]])
    rows, report = prepare(tmp_path)
    assert rows[0]["id"] == SOUND[0]["id"]
    assert rows[-1]["id"] == SOUND[2]["id"]
    counted = report.dropped if texts is None else report.mended
    ((reason, count),) = counted.items()
    assert reason.startswith(fault)
    assert count == 1
    assert report.mended.total() + report.dropped.total() == 1
    assert [[turn["value"] for turn in row["conversations"]] for row in rows[1:-1]] == (
        [] if texts is None else [texts]
    )
    for kept in rows:
        parse_turns(kept)


def test_an_image_that_is_null_is_no_image(tmp_path: Path) -> None:
    write(tmp_path, [make_row(1, None, "Why?", "Because.") | {"image": None}])
    (row,) = prepare(tmp_path)[0]
    assert "image" not in row
    assert row["source"] == "text"


def test_pictures_with_other_endings_and_missing_ones(tmp_path: Path) -> None:
    """OCR-VQA's downloader keeps the addresses' endings, and some addresses are gone."""
    names = ["a.jpg", "b.jpg", "c.jpg", "gone.jpg", "E.jpg"]
    write(tmp_path, [make_row(name, f"ocr_vqa/images/{name}", "<image>\nWho?", "Me") for name in names])
    for name in ("a.jpg", "a.gif", "b.gif", "c.png", "e.JPG"):
        (tmp_path / "ocr_vqa/images" / name).touch()
    rows, report = prepare(tmp_path)
    assert [row["image"].rpartition("/")[2] for row in rows] == ["a.jpg", "b.gif", "c.png", "e.JPG"]
    assert {row["source"] for row in rows} == {"ocr_vqa"}
    assert report.dropped == {"picture: missing, of ocr_vqa": 1}
    assert report.mended == {
        "picture: named .jpg, is .gif, of ocr_vqa": 1,
        "picture: named .jpg, is .png, of ocr_vqa": 1,
        "picture: other letter case or Unicode form": 1,
    }


def test_folders_that_are_not_there_are_not_searched(tmp_path: Path) -> None:
    write(tmp_path, SOUND, with_pictures=False)
    (tmp_path / "gqa/images").mkdir(parents=True)
    (tmp_path / "vg").mkdir()  # with image_data.json alone
    rows, report = prepare(tmp_path)
    assert len(rows) == 6
    assert report.dropped == {"picture: missing, of gqa": 1}
    assert report.notes[-1] == (
        "5 pictures were not looked for: "
        "coco/train2017/, ocr_vqa/images/, textvqa/train_images/, vg/VG_100K/ missing in the image folder"
    )


def test_names_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, [make_row(1, "gqa/../../secret.jpg", "<image>\nWho?", "Me"), SOUND[2]])
    rows, report = prepare(tmp_path)
    assert len(rows) == 1
    assert report.dropped == {"picture: its path leads out of the image folder": 1}


def test_pictures_in_shards(tmp_path: Path) -> None:
    """What they lack is missing: their folders are known by their members alone."""
    write(tmp_path, SOUND, with_pictures=False)
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "images/000.tar", "w") as tar:
        for image in list_images(SOUND)[1:]:
            tar.addfile(
                tarfile.TarInfo(image.replace("ocr_vqa/images/0553381547.jpg", "ocr_vqa/images/0553381547.gif"))
            )
    rows, report = prepare(tmp_path)
    assert [row["source"] for row in rows] == ["text", "gqa", "ocr_vqa", "textvqa", "vg"]
    assert rows[2]["image"] == "ocr_vqa/images/0553381547.gif"
    assert report.dropped == {"picture: missing, of coco": 2}


def test_the_pretraining_file(tmp_path: Path) -> None:
    """Its pictures lie one folder deeper, in folders of numbers."""
    rows = [make_row("004539375", "00453/004539375.jpg", "Render a summary.\n<image>", "select luxury furniture")]
    rows.append(make_row("002239345", "00223/002239345.jpg", "<image>\nWhat is it?", "a grey background"))
    write(tmp_path, rows, "blip_laion_cc_sbu_558k.json", with_pictures=False)
    (tmp_path / "images/00453").mkdir(parents=True)
    (tmp_path / "images/00453/004539375.jpg").touch()
    (tmp_path / "images/00223").mkdir()
    found, report = prepare(tmp_path, Leaks([tmp_path]))
    assert found == [rows[0] | {"source": "blip_laion_cc_sbu_558k"}]
    assert report.dropped == {"picture: missing, of blip_laion_cc_sbu_558k": 1}


def test_leaks_under_three_names(tmp_path: Path) -> None:
    """COCO's own, and Visual Genome's, whose numbers GQA shares."""
    write_coco(tmp_path, "val2014", {33471: []})
    write_coco(tmp_path, "val2017", {139: []})
    vg = [
        {"image_id": number, "url": f"https://x.org/rak248/VG_100K/{number}.jpg", "coco_id": coco_id}
        for number, coco_id in ((1, 139), (2370799, 139), (2, None))
    ]
    dump(vg, tmp_path / "vg/image_data.json")
    write(tmp_path, SOUND)
    rows, report = prepare(tmp_path, Leaks([tmp_path]))
    assert [row["source"] for row in rows] == ["text", "ocr_vqa", "textvqa"]
    assert report.dropped == {"in COCO val2014": 2, "in COCO val2017": 2}
    assert report.notes[-1].endswith("--allow-leaks keeps them")
    (tmp_path / "vg/image_data.json").unlink()
    rows, report = prepare(tmp_path, Leaks([tmp_path]))
    assert [row["source"] for row in rows] == ["text", "gqa", "ocr_vqa", "textvqa", "vg"]
    assert any("image_data.json is missing" in note and "NOT" in note for note in report.notes)
    assert prepare(tmp_path)[0][0]["id"] == "000000033471"  # allowed


def test_which_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither of llava_v1_5_mix665k\.json, blip_laion"):
        prepare(tmp_path)
    write(tmp_path, SOUND)
    write(tmp_path, SOUND[2:3], "blip_laion_cc_sbu_558k.json")
    with pytest.raises(ValueError, match=r"both .*--root"):
        prepare(tmp_path)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, SOUND)), encoding="utf-8")
    rows = prepare(tmp_path / "mine.jsonl")[0]
    assert [row["id"] for row in rows] == [row["id"] for row in SOUND]


def test_mending_twice_changes_nothing() -> None:
    for row, _, texts in FAULTY:
        if texts is not None:
            once = copy.deepcopy(row)
            assert len(llava.mend_row(once)) == 1
            assert llava.mend_row(twice := copy.deepcopy(once)) == []
            assert twice == once
