"""Files of rows: streamed in bounded memory, indexed once, written whole or not at all."""

import json
import os
import pickle
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import data.rows
from data.rows import NO_IMAGE, RowFile, RowWriter, find_bad_rows, load_rows, stream_items, stream_rows


def make_row(number: int, **extra: Any) -> dict[str, Any]:
    """Return a row of one to three questions, every third without a picture."""
    turns = [
        {"from": speaker, "value": f"{speaker} {number} 第{place}句 \u2028 😀"}
        for place in range(1 + number % 3)
        for speaker in ("human", "gpt")
    ]
    row: dict[str, Any] = {"id": number, "conversations": turns, **extra}
    if number % 3:
        turns[0]["value"] = "<image>\n" + str(turns[0]["value"])
        row["image"] = f"图片/{number}.jpg"
    return row


ROWS = [make_row(number) for number in range(20)]


def make_value(source: random.Random, depth: int = 0) -> Any:
    """Return any JSON value."""
    kind = source.choice(["text", "number", "word", "list", "object"] if depth < 3 else ["text", "number", "word"])
    if kind == "text":
        return "".join(source.choices('ab"\\/[]{},: \n\t\u00e9\u4e2d\U0001f600', k=source.randint(0, 12)))
    if kind == "number":
        return source.choice([0, -1, 12345678, 1.5e-7, -2.25])
    if kind == "word":
        return source.choice([True, False, None])
    if kind == "list":
        return [make_value(source, depth + 1) for _ in range(source.randint(0, 4))]
    return {f"k{number}": make_value(source, depth + 1) for number in range(source.randint(0, 4))}


def test_items_are_those_of_json_wherever_the_buffer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, escapes and characters of several bytes are cut by the buffer's end, and joined again."""
    source = random.Random(0)
    for number in range(150):
        before, items, after = ([make_value(source) for _ in range(source.randint(0, 5))] for _ in range(3))
        document = {"info": {"items": [1]}, "before": before, "items": items, "items2": after}
        text = json.dumps(document, ensure_ascii=number % 2 == 0, indent=source.choice([None, 0, 2]))
        file = tmp_path / "file.json"
        file.write_bytes((b"\xef\xbb\xbf" if number % 3 == 0 else b"") + text.encode())
        monkeypatch.setattr(data.rows, "CHUNK_BYTES", source.randint(1, 30))
        assert list(stream_items(file, "items")) == items
        assert list(stream_items(file, "items2")) == after
        file.write_text(json.dumps(items), encoding="utf-8")
        assert list(stream_items(file)) == items


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ('{"a": [1]}', "b", "has no list 'b'"),
        ('{"a": 5}', "a", "expected '\\['"),
        ("[1,\n2 3]", None, r"expected ',': line 2 column 3 \(byte 6\)"),
        ('[1,\n {"a": tru}]', None, r"Expecting value: line 2 column 8"),
        ("[1, 2,]", None, "expected a value: line 1 column 7"),
        ("[1, 2", None, "expected ','"),
        ("[1] [2]", None, "something follows the list: line 1 column 5"),
        ('["中", "b', None, "Unterminated string .*: line 1 column 9"),
        ('{"a" 5}', "b", "expected ':'"),
        ("", None, "is not JSON: expected"),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path: Path, text: str, key: str | None, message: str) -> None:
    """Lines and columns are those an editor shows (a column counts bytes)."""
    file = tmp_path / "file.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"file\.json .*{message}"):
        list(stream_items(file, key))


def test_an_error_in_the_middle_does_not_read_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A string that never ends could be as long as the file, which may not fit into memory."""
    monkeypatch.setattr(data.rows, "CHUNK_BYTES", 100)
    monkeypatch.setattr(data.rows, "MAX_ITEM_CHARACTERS", 1000)
    file = tmp_path / "file.json"
    file.write_text('["a", "' + "b" * 100_000, encoding="utf-8")
    with data.rows._JsonReader(file) as reader:
        with pytest.raises(ValueError, match=r"Unterminated string .*line 1 column 7"):
            list(reader.read_list())
        assert reader.opened.tell() < 2000


def test_streaming_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visual Genome's questions are 800 MB."""
    monkeypatch.setattr(data.rows, "CHUNK_BYTES", 2**16)
    file = tmp_path / "file.json"
    file.write_text(json.dumps({"skipped": ["x" * 100] * 50_000, "items": ["y" * 100] * 50_000}), encoding="utf-8")
    tracemalloc.start()
    try:
        count = sum(1 for _ in stream_items(file, "items"))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 50_000
    assert file.stat().st_size > 10_000_000
    assert peak_bytes < 1_500_000


def write(file: Path, rows: list[Any], style: str) -> None:
    """Write rows as tools do."""
    if style == "lines":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["", *lines, "  ", ""]).encode())
    else:
        file.write_text(json.dumps(rows, ensure_ascii=False, indent={"pretty": 2, "flat": None}[style]), "utf-8")


@pytest.mark.parametrize(("name", "style"), [("r.json", "flat"), ("r.json", "pretty"), ("r.jsonl", "lines")])
def test_any_row_by_its_number(tmp_path: Path, name: str, style: str) -> None:
    """The index is made at the first opening and read at the second: both give the same."""
    file = tmp_path / name
    write(file, ROWS, style)
    for rows in (RowFile(file), RowFile(file), pickle.loads(pickle.dumps(RowFile(file)))):
        assert len(rows) == len(ROWS)
        assert [rows[number] for number in (7, 0, 19, *range(20))] == [
            ROWS[number] for number in (7, 0, 19, *range(20))
        ]
        assert list(rows.images) == [row.get("image") for row in ROWS]
        assert rows.image_turns.tolist() == [0 if "image" in row else NO_IMAGE for row in ROWS]
        assert rows.flaws == {}
    assert list(stream_rows(file)) == load_rows(file) == ROWS


def test_the_index_is_used_while_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it reads the whole file; using it does not."""
    file = tmp_path / "r.json"
    write(file, ROWS, "flat")
    rows = RowFile(file)
    with monkeypatch.context() as patch:
        patch.setattr(data.rows, "_make_index", lambda *_: pytest.fail("made again"))
        assert RowFile(file)[3] == ROWS[3]
    assert (tmp_path / "r.json.index").stat().st_mode == file.stat().st_mode  # who can read one can read both
    write(file, ROWS[::-1], "flat")
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match=r"r\.json has changed since it was opened"):
        rows[3]
    assert RowFile(file)[3] == ROWS[16]
    (tmp_path / "r.json.index").write_bytes(b"\x10" * 50)  # cut off, or of some other program
    assert RowFile(file)[4] == ROWS[15]


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data often lies on a shared disk: it can be used, a line says what it costs."""
    file = tmp_path / "r.json"
    write(file, ROWS, "flat")
    (tmp_path / "r.json.index").mkdir()
    assert RowFile(file)[5] == ROWS[5]
    assert "r.json.index cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.json.index"]


def test_the_index_knows_flaws(tmp_path: Path) -> None:
    """What is wrong with a row is known at once, though opening does not read it again."""
    file = tmp_path / "r.json"
    late = {"image": "x", "conversations": [*ROWS[0]["conversations"], {"from": "human", "value": "<image>"},
                                            {"from": "gpt", "value": "y"}]}  # fmt: skip
    rows = [ROWS[0], {"conversations": []}, make_row(6, template="plain"), ["no"], late, make_row(9, template="v0")]
    write(file, rows, "pretty")
    for _ in range(2):
        opened = RowFile(file)
        assert sorted(opened.flaws) == [1, 3, 5]
        assert "template 'v0' is unknown" in opened.flaws[5]
        assert "needs a question" in opened.flaws[1]
        assert opened.image_turns.tolist() == [NO_IMAGE, NO_IMAGE, NO_IMAGE, NO_IMAGE, 2, NO_IMAGE]
        assert opened.images[4] == "x"
        assert opened[3] == ["no"]


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_rows_are_written_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    """A run that is stopped leaves what was there before."""
    file = tmp_path / "folder" / name
    for rows in (ROWS[:1], ROWS):
        with RowWriter(file) as writer:
            for row in rows:
                writer.write(row)
        assert writer.num_rows == len(rows)
        assert load_rows(file) == rows
    with pytest.raises(TypeError), RowWriter(file) as writer:  # noqa: PT012
        writer.write({"half": True})
        writer.write({"no JSON": b""})
    assert load_rows(file) == ROWS
    assert [path.name for path in file.parent.iterdir()] == [name]
    assert len(file.read_text(encoding="utf-8").split("\n")) == len(ROWS) + {"r.json": 3, "r.jsonl": 1}[name]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"row": 20}', r"names \{'row': 20\}, expected an 'image', or a 'row' of the 20 in .*r\.json"),
        ('{"pictures": "a"}', "expected an 'image'"),
        ("{", "line 1 is not JSON"),
        (None, "bad list .* is missing"),
    ],
)
def test_bad_lists_that_are_none(tmp_path: Path, line: str | None, message: str) -> None:
    """Of another file, or no list at all: nothing is left out by chance."""
    write(tmp_path / "r.json", ROWS, "flat")
    if line is not None:
        (tmp_path / "bad.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_bad_rows(RowFile(tmp_path / "r.json"), tmp_path / "bad.jsonl")
