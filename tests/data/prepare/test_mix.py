"""Mixtures: what each part gives, how often, and that rows stay what they were."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.conversation import parse_turns
from data.prepare import mix
from data.prepare.report import Report
from tests.data.prepare.owners_files import dump


def write(folder: Path, name: str, num_rows: int, text_every: int = 3) -> str:
    """Write rows, of which each `text_every`th has no picture; return the file's path."""
    rows = []
    for number in range(num_rows):
        has_picture = number % text_every
        question = f"{name} {number}?"
        turns = [
            {"from": "human", "value": f"<image>\n{question}" if has_picture else question},
            {"from": "gpt", "value": "Yes."},
        ]
        rows.append({"id": number, **({"image": f"{number}.jpg"} if has_picture else {}), "conversations": turns})
    return str(dump(rows, folder / name))


def read(parts: Sequence[str], seed: int = 0) -> tuple[list[dict], Report]:
    report = Report("mix")
    return list(mix.read([mix.Part.parse(part) for part in parts], seed, report)), report


def list_questions(rows: Sequence[dict]) -> list[str]:
    return [parse_turns(row)[0].text for row in rows]


def test_shares(tmp_path: Path) -> None:
    """Half of one, all of another, a third twice and a quarter of it once more."""
    a, b, c = write(tmp_path, "a.json", 20), write(tmp_path, "b.json", 9), write(tmp_path, "c.json", 8)
    rows, report = read([f"{a}:0.5", f"{b}:1.0", f"{c}:2.25"])
    counts = Counter(list_questions(rows))
    by_file = Counter(question.split()[0] for question in counts.elements())
    assert by_file == {"a.json": 10, "b.json": 9, "c.json": 18}
    assert sum(question.startswith("a") for question in counts) == 10
    assert Counter(count for question, count in counts.items() if question.startswith("c")) == {2: 6, 3: 2}
    assert report.read == 37
    assert [part["rows"] for part in report.parts] == [10, 9, 18]
    assert [part["share of the mixture"] for part in report.parts] == [0.2703, 0.2432, 0.4865]
    has_picture = Counter(
        text.split()[0] for text, row in zip(list_questions(rows), rows, strict=True) if "image" in row
    )
    assert {part["file"]: part["rows with pictures"] for part in report.parts} == has_picture
    assert [entry["name"] for entry in report.inputs] == ["a.json", "b.json", "c.json"]


def test_the_order_is_mixed_and_seeded(tmp_path: Path) -> None:
    parts = [write(tmp_path, "a.json", 50) + ":1", write(tmp_path, "b.json", 50) + ":0.5"]
    first, other, again = (read(parts, seed)[0] for seed in (0, 1, 0))
    assert first == again
    assert first != other
    assert {tuple(sorted(list_questions(rows)))[50:] for rows in (first, other)} != {()}
    early = Counter(question.split()[0] for question in list_questions(first[:40]))
    assert min(early["a.json"], early["b.json"]) > 5
    drawn = [{question for question in list_questions(rows) if question.startswith("b")} for rows in (first, other)]
    assert drawn[0] != drawn[1]


def test_parts_of_the_same_file_are_drawn_apart(tmp_path: Path) -> None:
    a = write(tmp_path, "a.json", 40)
    counts = Counter(list_questions(read([f"{a}:0.5", f"{a}:0.5"])[0]))
    assert counts.total() == 40
    assert 20 < len(counts) < 40


def test_ids_are_unique_and_kept_where_they_can_be(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.json", 6), write(tmp_path, "b.json", 6)
    rows, report = read([f"{a}:3", f"{b}:1"])
    ids = [row["id"] for row in rows]
    assert len({str(one) for one in ids}) == len(ids) == 24
    assert {one for one in ids if isinstance(one, int)} == set(range(6))
    assert all(re.fullmatch(r"[ab]-\d(-\d)?", one) for one in ids if isinstance(one, str))
    assert report.mended == {"id: not the first of its kind, renamed": 18}


def test_a_folder_is_put_in_front_of_pictures(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.json", 6), write(tmp_path, "b.json", 6)
    rows, report = read([f"{a}:1:coco/2017/", f"{b}:1"])
    for text, row in zip(list_questions(rows), rows, strict=True):
        name, number = text.rstrip("?").split()
        expected = f"{number}.jpg" if name == "b.json" else f"coco/2017/{number}.jpg"
        assert row.get("image", expected) == expected
    assert [part["folder"] for part in report.parts] == ["coco/2017", ""]
    assert sum("image" in row for row in rows) == 8


@pytest.mark.parametrize("part", ["a.json", "a.json:", "a.json:half", "a.json:0", "a.json:-1", "a.json:nan", "a:200"])
def test_wrong_parts(part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"part {part!r}: expected FILE:SHARE")):
        mix.Part.parse(part)


def test_rows_that_are_no_conversations_are_named(tmp_path: Path) -> None:
    file = dump([{"conversations": []}], tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json, row 0: a conversation needs"):
        read([f"{file}:1"])
    with pytest.raises(FileNotFoundError, match=r"b\.json is missing"):
        read([f"{tmp_path / 'b.json'}:1"])


def test_a_share_too_small_for_one_row(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.json", 3), write(tmp_path, "b.json", 3)
    with pytest.raises(ValueError, match=r"a\.json:0\.1 is not one row of 3"):
        read([f"{a}:0.1", f"{b}:1"])
