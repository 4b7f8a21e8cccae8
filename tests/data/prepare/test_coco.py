"""COCO Captions: from files in its owners' format, flaws included, to rows."""

import json
import random
from pathlib import Path

import pytest

from data.conversation import parse_turns
from data.prepare import coco
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.prompts import CAPTION_PROMPTS
from data.prepare.report import Report
from tests.data.prepare.owners_files import COCO_CAPTIONS, dump, write_coco

ALL_ALLOWED = Leaks(is_allowed=True)
SOUND = {  # what is left of COCO_CAPTIONS, sorted
    9: [
        "A bowl of fruit and a plate of bread.",
        "A meal in a box with bread.",
        "Bread, fruit and broccoli in containers.",
        "Closeup of bins of food.",
        "Various foods on a table.",
    ],
    25: ["A giraffe eats leaves.", "Two tall trees."],
    36: ["A woman holds an umbrella.", "A woman in the rain.", "Person with a red umbrella."],
}


def prepare(root: Path, options: Options | None = None, leaks: Leaks = ALL_ALLOWED) -> tuple[list[dict], Report]:
    report = Report("coco")
    return list(coco.read(root, options or Options(), leaks, report)), report


def count_pictures(report: Report) -> int:
    """Return how many pictures were dropped, captions not counted."""
    return sum(count for reason, count in report.dropped.items() if not reason.startswith("caption:"))


def test_one_row_for_each_picture_with_a_sound_caption(tmp_path: Path) -> None:
    write_coco(tmp_path)
    rows, report = prepare(tmp_path)
    assert [row["id"] for row in rows] == ["coco-9", "coco-25", "coco-36"]
    assert [row["image"] for row in rows] == [f"train2017/{number:012d}.jpg" for number in SOUND]
    for row, captions in zip(rows, SOUND.values(), strict=True):
        question, answer = parse_turns(row)
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert question.text in CAPTION_PROMPTS["en"]
        assert answer.text in captions
        assert (row["source"], row["lang"]) == ("coco", "en")
    assert [row["license"] for row in rows[1:]] == [
        "http://flickr.com/commons/usage/",
        "http://creativecommons.org/licenses/by-nc-sa/2.0/",
    ]
    assert report.read == len(rows) + count_pictures(report) == 5


def test_every_flaw_is_counted(tmp_path: Path) -> None:
    file = write_coco(tmp_path)
    _, report = prepare(tmp_path)
    assert report.mended == {
        "caption: all capitals lowered": 1,
        "caption: blanks around it removed": 2,
        "caption: blanks or newlines in a row made one blank": 1,
        "caption: detached punctuation attached": 1,
        "caption: first letter capitalised": 1,
        "caption: full stop added": 2,
    }
    assert report.dropped == {
        "caption: empty": 2,
        "caption: fewer than 3 words": 2,
        "caption: its picture is not listed": 1,
        "caption: the picture has the same already": 4,
        "picture: no sound caption": 2,
    }
    left_out = sum(count for reason, count in report.dropped.items() if reason.startswith("caption:"))
    num_captions = sum(map(len, COCO_CAPTIONS.values()))
    assert num_captions == left_out + sum(map(len, SOUND.values()))
    assert [(entry["name"], entry["bytes"]) for entry in report.inputs] == [(file.name, file.stat().st_size)]


def test_the_caption_is_chosen_by_the_stated_rule(tmp_path: Path) -> None:
    write_coco(tmp_path)
    rows, _ = prepare(tmp_path, Options(seed=7))
    for row, (image_id, captions) in zip(rows, SOUND.items(), strict=True):
        random_order = random.Random(f"7:coco:{image_id}")
        assert row["conversations"][1]["value"] == random_order.choice(captions)
        assert row["conversations"][0]["value"] == "<image>\n" + random_order.choice(CAPTION_PROMPTS["en"])


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    write_coco(tmp_path)
    made = [json.dumps(prepare(tmp_path, Options(seed=seed))[0]) for seed in (0, 1, 0)]
    assert made[0] == made[2] != made[1]


def test_a_choice_depends_on_nothing_else_in_the_file(tmp_path: Path) -> None:
    """More pictures, captions in another order, lists in another order: the same row."""
    write_coco(tmp_path)
    (row,) = (row for row in prepare(tmp_path)[0] if row["id"] == "coco-36")
    write_coco(tmp_path, captions={36: COCO_CAPTIONS[36][::-1]}, annotations_first=True)
    assert prepare(tmp_path)[0] == [row]


def test_2014_is_read_where_2017_is_missing(tmp_path: Path) -> None:
    write_coco(tmp_path, "train2014")
    rows, report = prepare(tmp_path)
    assert rows[0]["image"] == "train2014/COCO_train2014_000000000009.jpg"
    assert report.notes == ["pictures are named as in train2014/"]
    write_coco(tmp_path)
    assert prepare(tmp_path)[0][0]["image"] == "train2017/000000000009.jpg"


def test_pictures_of_val2014_and_val2017_are_left_out(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, "val2014", {25: [], 42: []})
    write_coco(tmp_path, "val2017", {36: []})
    rows, report = prepare(tmp_path, leaks=Leaks([tmp_path]))
    assert [row["id"] for row in rows] == ["coco-9"]
    assert (report.dropped["in COCO val2014"], report.dropped["in COCO val2017"]) == (1, 1)
    assert report.read == len(rows) + count_pictures(report)


def test_chinese_prompts_ask_for_english(tmp_path: Path) -> None:
    write_coco(tmp_path)
    rows, _ = prepare(tmp_path, Options(language="zh"))
    assert [row["lang"] for row in rows] == ["zh"] * 3
    assert all(parse_turns(row)[0].text in CAPTION_PROMPTS["zh"] for row in rows)


def test_missing_annotations_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"captions_train2017\.json nor .*captions_train2014\.json"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("key", "item", "message"),
    [
        ("annotations", {"image_id": 9}, r"item 19 of 'annotations' is .*caption \(str\)"),
        ("annotations", "A red bus.", r"item 19 of 'annotations' is A red bus\., expected an object"),
        ("annotations", {"image_id": "9", "caption": "A red bus."}, r"item 19 of 'annotations' .*image_id \(int\)"),
        (
            "images",
            {"id": 50, "file_name": "000000000050.jpg", "license": 12},
            r"picture 50 has licence 12, .*\[1, 7\]",
        ),
    ],
    ids=["no caption", "no object", "wrong type", "unknown licence"],
)
def test_broken_items_are_named(tmp_path: Path, key: str, item: object, message: str) -> None:
    file = write_coco(tmp_path)
    content = json.loads(file.read_text(encoding="utf-8"))
    content[key].append(item)
    dump(content, file)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path)
