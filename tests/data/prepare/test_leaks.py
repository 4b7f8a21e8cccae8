"""Pictures that benchmarks ask about: found by COCO's ids, by lists and by looks, or an error where none is known."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from data.prepare.leaks import Leaks, LookAlikes
from data.prepare.report import Report
from tests.data.prepare.owners_files import dump, write_coco
from tests.data.test_similar import make_scene


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO's annotations: val2017's pictures are val2014's and train2014's of before."""
    write_coco(tmp_path, "val2014", {42: [], 73: []})
    write_coco(tmp_path, "val2017", {73: [], 139: []})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "coco_id", "reason"),
    [
        ("train2017/000000000042.jpg", None, "in COCO val2014"),
        ("coco/train2017/000000000042.jpg", None, "in COCO val2014"),
        ("COCO_val2014_000000000042.jpg", None, "in COCO val2014"),
        ("train2014/COCO_train2014_000000000139.jpg", None, "in COCO val2017"),
        ("000000000073.jpg", None, "in COCO val2014"),
        ("VG_100K/2.jpg", 139, "in COCO val2017"),
        ("VG_100K/42.jpg", None, None),
        ("VG_100K/42.jpg", 43, None),
        ("train2017/000000000043.jpg", None, None),
        ("00453/004530042.jpg", None, None),
        ("flickr30k-images/1000092795.jpg", None, None),
    ],
)
def test_cocos_pictures_by_id(coco: Path, name: str, coco_id: int | None, reason: str | None) -> None:
    assert Leaks([coco]).find(name, coco_id) == reason


def test_any_of_cocos_files_will_do(tmp_path: Path) -> None:
    """Whoever has VQA-v2's questions alone need not fetch the captions."""
    dump({"info": {}, "images": [{"id": 42}], "annotations": []}, tmp_path / "person_keypoints_val2017.json")
    questions = [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}]
    dump({"questions": questions}, tmp_path / "vqa/v2_OpenEnded_mscoco_val2014_questions.json")
    leaks = Leaks([tmp_path, tmp_path / "vqa"])
    assert leaks.find("000000000042.jpg") == "in COCO val2017"
    assert leaks.find("000000262148.jpg") == "in COCO val2014"
    report = Report("coco")
    leaks.write_notes(report)
    assert report.notes == [
        "v2_OpenEnded_mscoco_val2014_questions.json names 1 pictures of COCO val2014 to exclude",
        "person_keypoints_val2017.json names 1 pictures of COCO val2017 to exclude",
    ]
    assert [entry["name"] for entry in report.inputs] == [note.split()[0] for note in report.notes]


def test_unknown_ids_are_an_error_for_cocos_pictures_only(tmp_path: Path) -> None:
    leaks = Leaks([tmp_path, tmp_path / "elsewhere"])
    assert leaks.find("flickr30k-images/1000092795.jpg") is None
    report = Report("flickr30k")
    leaks.write_notes(report)
    assert report.notes == ["no picture is known to be COCO's: the ids to exclude were not needed"]
    with pytest.raises(FileNotFoundError, match=r"COCO val2014 .*captions_val2014\.json, .*elsewhere.*--allow-leaks"):
        leaks.find("train2017/000000000009.jpg")
    write_coco(tmp_path, "val2014", {42: []})
    with pytest.raises(FileNotFoundError, match=r"val2017 .*annotations_trainval2017\.zip .*--coco"):
        leaks.find("VG_100K/1.jpg", 9)


def test_vqav2_needs_val2017_alone(tmp_path: Path) -> None:
    write_coco(tmp_path, "val2017", {9: []})
    leaks = Leaks([tmp_path], ["val2017"])
    assert leaks.find("train2014/COCO_train2014_000000000009.jpg") == "in COCO val2017"


def test_allowed_leaks_are_recorded_and_lists_still_hold(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("000000000009.jpg\n", encoding="utf-8")
    leaks = Leaks([tmp_path], lists=[tmp_path / "mine.txt"], is_allowed=True)
    assert leaks.is_allowed
    assert leaks.find("train2017/000000000042.jpg") is None
    assert leaks.find("train2017/000000000009.jpg") == "named in mine.txt"
    report = Report("coco")
    leaks.write_notes(report)
    assert report.notes == [
        "evaluation pictures were NOT excluded: --allow-leaks",
        "mine.txt names 1 pictures to exclude",
    ]


def test_a_list_of_names_and_ids(tmp_path: Path) -> None:
    """A byte order mark, blank lines and Windows' line ends are what editors leave."""
    lines = ["\ufeff1000092795.jpg", "", "42", "VG_100K/2.jpg ", "COCO_val2014_000000000073.jpg", "a/b/c.png"]
    (tmp_path / "test.txt").write_bytes("\r\n".join(lines).encode())
    leaks = Leaks(lists=[tmp_path / "test.txt"], splits=())
    assert leaks.has_list
    assert not Leaks().has_list
    named = ["1000092795.jpg", "images/1000092795.jpg", "000000000042.jpg", "vg/VG_100K/2.jpg"]
    named += ["coco/train2017/000000000073.jpg", "b/c.png", "c.png", "x/a/b/c.png"]
    assert [leaks.find(name) for name in named] == ["named in test.txt"] * 8
    others = ["11000092795.jpg", "VG_100K_2/2.jpg", "gqa/images/2.jpg", "42.jpg", "x/c.png", "bb/c.png"]
    assert [leaks.find(name) for name in others] == [None] * 6


@pytest.mark.parametrize("name", ["held_out.json", "held_out.jsonl"])
def test_a_conversation_file_is_a_list(tmp_path: Path, name: str) -> None:
    rows = [{"id": 1, "image": "coco/train2017/000000000042.jpg"}, {"id": 2}, {"id": 3, "image": "vg/VG_100K/2.jpg"}]
    text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text, encoding="utf-8")
    leaks = Leaks(lists=[tmp_path / name], splits=())
    asked = ["train2014/COCO_train2014_000000000042.jpg", "VG_100K/2.jpg", "VG_100K/3.jpg"]
    assert [leaks.find(image) for image in asked] == [f"named in {name}", f"named in {name}", None]
    assert leaks.notes == [f"{name} names 2 pictures to exclude"]


def test_wrong_lists(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test\.txt, a list of excluded pictures, is missing"):
        Leaks(lists=[tmp_path / "test.txt"])
    (tmp_path / "test.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"test\.txt names no pictures"):
        Leaks(lists=[tmp_path / "test.txt"])
    dump([{"id": 1, "conversations": []}], tmp_path / "text.json")
    with pytest.raises(ValueError, match=r"text\.json names no pictures"):
        Leaks(lists=[tmp_path / "text.json"])


def make_row(image: str | None, number: int) -> dict:
    return {"id": number} | ({} if image is None else {"image": image})


@pytest.mark.parametrize("workers", [1, 2])
def test_looks(tmp_path: Path, workers: int) -> None:
    """A copy in another format, size and colour is left out in every row; a broken or missing picture stays."""
    mme, images = tmp_path / "MME_Benchmark", tmp_path / "images"
    (mme / "count").mkdir(parents=True)
    images.mkdir()
    for seed in range(3):
        make_scene(seed).save(mme / f"count/{seed}.png")
    page = Image.new("L", (300, 200), 255)
    ImageDraw.Draw(page).text((100, 100), "def main():")
    page.save(mme / "code.JPG")
    (mme / "broken.jpg").write_bytes(b"<html>")
    (mme / "count/0.txt").write_text("Is there one?\tYes\n", encoding="utf-8")
    make_scene(1).convert("L").resize((200, 150)).save(images / "copy.jpg", quality=60)
    make_scene(9).save(images / "other.jpg")
    page.save(images / "page.png")
    (images / "broken.jpg").write_bytes(b"")
    names = ["other.jpg", "copy.jpg", None, "missing.jpg", "copy.jpg", "page.png", "broken.jpg", "missing.jpg"]
    report = Report("coco")
    likes = LookAlikes([mme], workers, report)
    rows = [make_row(name, number) for number, name in enumerate(names * 30)]
    kept = list(likes.leave_out(rows, images, report))
    assert kept == [row for row in rows if row.get("image") != "copy.jpg"]
    assert report.dropped == {"looks like a picture of MME_Benchmark": 60}
    assert report.notes == [
        "MME_Benchmark: 3 pictures compared by their looks, 1 too plain for that, 1 unreadable",
        "pictures in images/ were compared by their looks; 2 unreadable",
    ]


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    """A mistyped path would exclude nothing."""
    with pytest.raises(FileNotFoundError, match="no pictures lie below"):
        LookAlikes([tmp_path / "mme"], 1, Report("coco"))
