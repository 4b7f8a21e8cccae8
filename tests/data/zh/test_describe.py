"""The numbers and the pictures that describe a data set."""

import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from data.fonts import find_chinese_font
from data.tokenizer import Tokenizer
from data.zh import describe
from data.zh.describe import PLOTS, Entry, draw
from tests.data.zh.work_folder import make_reply, write_picture, write_work

BLUE, ORANGE, GREEN, RED = (matplotlib.colors.to_rgb(f"tab:{name}") for name in ("blue", "orange", "green", "red"))


def make_entries(work: Path, num_pictures: int) -> list[Entry]:
    """Return two dialogues of each picture, most of them for training."""
    records, replies = write_work(work, num_pictures)
    by_name = {record.sha256: record for record in records}
    splits = ("validation", "test", *["train"] * 8)
    return [Entry(splits[number // 2 % 10], reply, by_name[reply.sha256]) for number, reply in enumerate(replies)]


def test_numbers(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """Counted by hand."""
    first = write_picture(tmp_path, np.zeros((9, 9), dtype=np.uint8))
    second = replace(write_picture(tmp_path, np.ones((9, 9), dtype=np.uint8)), license="CC0", topic="船")
    turns = (("图中有船吗？", "有，"), ("图中有飞机吗？", "没有"))
    entries = [
        Entry("train", replace(make_reply(first.sha256, "yes_no"), turns=turns), first),
        Entry("train", replace(make_reply(first.sha256, "short"), turns=(("这是什么？", "A380"),)), first),
        Entry("test", replace(make_reply(second.sha256, "yes_no"), turns=turns[:1]), second),
    ]
    found = describe.describe(entries, tiny_tokenizer)
    assert found["splits"] == {
        "train": {"dialogues": 2, "questions": 3, "pictures": 1, "pages": 1},
        "test": {"dialogues": 1, "questions": 1, "pictures": 1, "pages": 1},
        "all": {"dialogues": 3, "questions": 4, "pictures": 2, "pages": 1},
    }
    assert found["kinds"] == {
        "yes_no": {"dialogues": 2, "share": 0.6667, "train": 1, "test": 1},
        "short": {"dialogues": 1, "share": 0.3333, "train": 1, "test": 0},
    }
    assert found["turns"] == {"1": 2, "2": 1}
    assert found["topics"] == {"桥梁": 2, "船": 1}
    assert found["licenses"] == {"CC BY-SA 4.0": 1, "CC0": 1}
    assert found["sources"] == {"wikipedia": 2}
    assert found["distinct_questions"] == 3
    lengths = found["questions"]["characters"]
    assert (lengths["mean"], lengths["min"], lengths["median"], lengths["max"]) == (6.0, 5.0, 6.0, 7.0)
    assert found["answers"]["characters"]["max"] == 4
    assert found["answer_characters_by_kind"]["yes_no"]["mean"] == 2.0
    assert found["short_answers"]["yes_no"] == {"answers": 3, "distinct": 2, "common": {"有": 2, "没有": 1}}
    assert found["han_ratio"] | {"p5": 0, "p95": 0, "mean": 0, "median": 0} == {
        "mean": 0, "min": 0.5, "p5": 0, "median": 0, "p95": 0, "max": 1.0,
    }  # fmt: skip
    texts = [text for entry in entries for turn in entry.reply.turns for text in turn]
    num_tokens = [len(tiny_tokenizer.encode(text)) for text in texts]
    assert found["tokens_per_character"] == round(sum(num_tokens) / sum(map(len, texts)), 4)
    assert found["dialogue_tokens"]["max"] == sum(num_tokens[:4])
    assert found["tokenizer"]["vocab_size"] == 768


def count_pixels(file: Path, colour: tuple[float, float, float]) -> int:
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((np.abs(pixels - 255 * np.array(colour)).sum(axis=2) < 10).sum())


def test_pictures(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """All that is counted is drawn, by split where there are splits; the same bytes each time."""
    entries = make_entries(tmp_path, num_pictures=40)
    topics = ["$\\frac{a", "", "x" * 99, "桥", "\N{GRINNING FACE}"]  # no formula; none; too long; Chinese; in no font
    entries = [
        entry._replace(record=replace(entry.record, topic=topics[number % 5])) for number, entry in enumerate(entries)
    ]
    draw(entries, tiny_tokenizer, tmp_path)
    once = (tmp_path / "kinds.png").read_bytes()
    describe._draw_kinds(entries, tmp_path / "kinds.png")
    assert (tmp_path / "kinds.png").read_bytes() == once
    for name in ("kinds.png", "topics.png"):
        drawn = [count_pixels(tmp_path / name, colour) for colour in (BLUE, ORANGE, GREEN)]
        assert 5.5 < drawn[0] / drawn[1] < 9  # of eight to one, and the legend's
        assert 5.5 < drawn[0] / drawn[2] < 9
    assert count_pixels(tmp_path / "lengths.png", BLUE) > 1000
    assert count_pixels(tmp_path / "characters.png", RED) > 1000


def test_a_single_dialogue(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """It has no spread, and can be drawn."""
    entries = make_entries(tmp_path, num_pictures=1)[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(entries, tiny_tokenizer, tmp_path)
    assert describe.describe(entries, tiny_tokenizer)["splits"]["all"]["dialogues"] == 1
    assert all((tmp_path / name).stat().st_size > 3000 for name in PLOTS)


def test_chinese_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a font every character is drawn; without one topics are numbered, and it is said how to get one."""
    entries = make_entries(tmp_path, num_pictures=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of characters that are in no font
        if find_chinese_font() is not None:
            describe._draw_topics(entries, tmp_path / "topics.png")
            assert capsys.readouterr().err == ""
        monkeypatch.setattr(describe, "find_chinese_font", lambda: None)
        describe._draw_topics(entries, tmp_path / "topics.png")
    assert "topics.png: no font with Chinese characters" in capsys.readouterr().err
    assert (tmp_path / "topics.png").stat().st_size > 3000


def test_font_that_was_installed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib keeps a list of fonts from its first start; a system without a Chinese font has none found."""
    from matplotlib import font_manager

    manager = font_manager.FontManager.__new__(font_manager.FontManager)
    added: list[str] = []
    monkeypatch.setattr(font_manager, "fontManager", manager)
    monkeypatch.setattr(manager, "get_font_names", lambda: ["Noto Sans CJK SC"] if added else ["DejaVu Sans"], False)
    monkeypatch.setattr(manager, "addfont", added.append, False)
    files = ["/fonts/DejaVuSans.ttf", "/fonts/NotoSansCJK-Regular.ttc"]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files[:1])
    assert find_chinese_font() is None
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    assert find_chinese_font() == "Noto Sans CJK SC"
    assert added == files[1:]
