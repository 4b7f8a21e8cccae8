"""Flickr30k: Karpathy's, the owners' and Kaggle's file, flaws included, become the same rows."""

import json
import random
from pathlib import Path

import pytest

from data.conversation import parse_turns
from data.prepare import flickr30k
from data.prepare.leaks import Leaks
from data.prepare.options import Options
from data.prepare.prompts import CAPTION_PROMPTS
from data.prepare.report import Report
from tests.data.prepare.owners_files import dump, write_csv, write_karpathy, write_token

SPLITS = {"1000092795.jpg": "test", "10002456.jpg": "train", "2199200615.jpg": "train", "36979.jpg": "val"}
WORKERS = [  # what 10002456.jpg has, sorted
    "Four men on top of a tall structure.",
    'Man\'s shirt says "Dodgers" on it.',
    "Several men in hard hats are operating a giant pulley system.",
    "The boy isn't looking at the dog's ball (a red one).",
    "Workers look down from up above on a piece of equipment.",
]


def prepare(root: Path, options: Options | None = None, leaks: Leaks | None = None) -> tuple[list[dict], Report]:
    report = Report("flickr30k")
    return list(flickr30k.read(root, options or Options(), leaks or Leaks(), report)), report


def count_pictures(report: Report) -> int:
    """Return how many pictures were dropped, captions not counted."""
    return sum(count for reason, count in report.dropped.items() if not reason.startswith("caption:"))


def exclude(root: Path, *names: str) -> Leaks:
    (root / "exclude.txt").write_text("\n".join(names), encoding="utf-8")
    return Leaks(lists=[root / "exclude.txt"])


def test_only_the_train_split_becomes_rows(tmp_path: Path) -> None:
    write_karpathy(tmp_path, SPLITS)
    rows, report = prepare(tmp_path)
    assert [(row["id"], row["image"]) for row in rows] == [
        ("flickr30k-10002456", "flickr30k-images/10002456.jpg"),
        ("flickr30k-2199200615", "flickr30k-images/2199200615.jpg"),
    ]
    assert report.dropped == {
        "picture: in Flickr30k's test split": 1,
        "picture: in Flickr30k's val split": 1,
    }
    assert report.read == len(rows) + count_pictures(report) == 4
    for row in rows:
        question, answer = parse_turns(row)
        assert question.has_image
        assert question.text in CAPTION_PROMPTS["en"]
        assert answer.text.endswith(".")
        assert (row["source"], row["lang"]) == ("flickr30k", "en")
        assert "non-commercial" in row["license"]


def test_the_caption_is_chosen_by_the_stated_rule(tmp_path: Path) -> None:
    write_karpathy(tmp_path, SPLITS)
    chosen = set()
    for seed in range(20):
        random_order = random.Random(f"{seed}:flickr30k:10002456")
        row = prepare(tmp_path, Options(seed=seed))[0][0]
        chosen.add(row["conversations"][1]["value"])
        assert row["conversations"][1]["value"] == random_order.choice(WORKERS)
        assert row["conversations"][0]["value"] == "<image>\n" + random_order.choice(CAPTION_PROMPTS["en"])
    assert chosen == set(WORKERS)


@pytest.mark.parametrize("write", [write_token, write_csv])
def test_files_without_splits_need_a_list(tmp_path: Path, write: type) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"which pictures Flickr30k is tested on: put dataset_flickr30k\.json"):
        prepare(tmp_path)
    assert len(prepare(tmp_path, leaks=Leaks(is_allowed=True))[0]) == 4
    rows, report = prepare(tmp_path, leaks=exclude(tmp_path, "1000092795.jpg", "36979.jpg"))
    assert report.read == len(rows) + count_pictures(report) == 4
    assert report.dropped["named in exclude.txt"] == 2


def test_karpathys_file_is_preferred(tmp_path: Path) -> None:
    write_token(tmp_path)
    write_csv(tmp_path)
    write_karpathy(tmp_path, {"2199200615.jpg": "train"})
    rows, report = prepare(tmp_path)
    assert [row["id"] for row in rows] == ["flickr30k-2199200615"]
    assert [entry["name"] for entry in report.inputs] == ["dataset_flickr30k.json"]


def test_tokenised_captions_become_what_was_typed(tmp_path: Path) -> None:
    """The owners' file gives the rows that Karpathy's gives."""
    write_token(tmp_path)
    tokenised, report = prepare(tmp_path, leaks=exclude(tmp_path, "1000092795.jpg", "36979.jpg"))
    assert report.mended["caption: detached punctuation attached"] == 10
    write_karpathy(tmp_path, SPLITS)
    typed, report = prepare(tmp_path)
    assert report.mended == {}
    assert tokenised == typed


def test_the_broken_line_of_kaggles_file_is_repaired(tmp_path: Path) -> None:
    write_csv(tmp_path)
    rows, report = prepare(tmp_path, leaks=Leaks(is_allowed=True))
    assert report.mended["caption: its line lacks a separator"] == 1
    assert [reason for reason in report.dropped if "line" in reason] == []
    write_token(tmp_path)  # preferred
    assert prepare(tmp_path, leaks=Leaks(is_allowed=True))[0] == rows


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    write_csv(
        tmp_path, b"2199200615.jpg\n\n2199200615.jpg| 5| A caf\xe9 by the sea .\n7.jpg| 0| A red bus , and a tram .\n"
    )
    rows, report = prepare(tmp_path, leaks=Leaks(is_allowed=True))
    assert report.dropped == {"caption: its line cannot be read": 2}
    assert rows[-1]["conversations"][1]["value"] == "A red bus, and a tram."


@pytest.mark.parametrize("folder", ["images", "flickr30k_images", "flickr30k-images"])
def test_pictures_lie_where_they_are(tmp_path: Path, folder: str) -> None:
    write_karpathy(tmp_path, SPLITS)
    (tmp_path / folder).mkdir()
    rows, report = prepare(tmp_path)
    assert rows[0]["image"] == f"{folder}/10002456.jpg"
    assert report.notes == [f"pictures are named as in {folder}/"]


def test_seeds_and_languages_differ_and_repeat(tmp_path: Path) -> None:
    write_karpathy(tmp_path, SPLITS)
    made = [
        json.dumps(prepare(tmp_path, Options(seed, language))[0])
        for seed, language in ((0, "en"), (1, "en"), (0, "zh"))
    ]
    assert len(set(made)) == 3
    assert json.dumps(prepare(tmp_path)[0]) == made[0]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"none of dataset_flickr30k\.json, results_20130124\.token, results\.csv"
    ):
        prepare(tmp_path)
    dump(
        {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"tokens": []}]}]},
        tmp_path / "dataset_flickr30k.json",
    )
    with pytest.raises(ValueError, match=r"a sentence of 1\.jpg is .* expected an object with raw \(str\)"):
        prepare(tmp_path)
