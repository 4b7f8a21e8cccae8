"""Cleaning: what is kept, what is dropped for which reason, and that the same work gives the same bytes."""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.journal import read_journal
from data.tokenizer import Tokenizer, find_tokenizer
from data.zh.clean import DROPPED, CleanSettings, run, simplify
from data.zh.near import find_like_pictures, find_like_texts, find_text_faults, load_questions
from data.zh.options import make_settings
from data.zh.record import DIALOGUES, RECORDS, REPLIES, Record, Reply, read_replies
from tests.data.test_similar import make_scene
from tests.data.zh.openai_server import GOOD
from tests.data.zh.work_folder import make_reply, write_rows

TINY = Path(__file__).resolve().parents[3] / "data/tiny"
DESCRIPTION = GOOD["description"][0][1]


def write_scene(work: Path, name: str, image: Image.Image, text: str = "红桥是一座桥。") -> Record:
    """Write a picture, and return its record, which is named by a word instead of a hash."""
    path = f"images/{name}.png"
    (work / "images").mkdir(parents=True, exist_ok=True)
    image.save(work / path)
    page = "https://zh.wikipedia.org/wiki/桥"
    return Record(path, name, "红桥", "", text, "桥梁", page, 7, "某人", "CC0", "", f"{page}.png", "wikipedia")


def write(sha256: str, kind: str, turns: Sequence[tuple[str, str]] | None = None) -> Reply:
    return replace(make_reply(sha256, kind), turns=tuple(GOOD[kind] if turns is None else turns))


def save(work: Path, records: list[Record], replies: list[Reply]) -> None:
    write_rows(work / RECORDS, records)
    write_rows(work / REPLIES, replies)


def clean(work: Path, **settings: Any) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Return the report, the keys of what is kept, and the reasons of what is dropped; the model's name is left out."""
    report = run(make_settings(CleanSettings, {"workers": 1, **settings}, "test"), work)
    kept = [f"{reply.sha256}:{reply.kind}" for reply in read_replies(work, DIALOGUES)]
    dropped = {f"{row['sha256']}:{row['kind']}": row["reason"] for row in read_journal(work / DROPPED)}
    return report, kept, dropped


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are sound, broken, missing or like others, and dialogues with a fault of every source."""
    work = tmp_path_factory.mktemp("work")
    records = [write_scene(work, name, make_scene(number)) for number, name in enumerate("abcd")]
    records += [
        write_scene(work, "like_a", make_scene(0).resize((150, 120)), text="很长的一段文字。" * 9),
        write_scene(work, "like_b", make_scene(1).resize((150, 120)), text="短"),
        write_scene(work, "exam", make_scene(9)),
        write_scene(work, "missing", make_scene(10)),
        write_scene(work, "torn", make_scene(11)),
    ]
    (work / "images/missing.png").unlink()
    (work / "images/torn.png").write_bytes((work / "images/torn.png").read_bytes()[:900])
    (work / "exam").mkdir()
    make_scene(9).convert("L").save(work / "exam/one.jpg")
    (work / "asked.txt").write_text("\n图中有  几艘船?\n", encoding="utf-8")
    traditional = [
        ("圖中的橋是什麼顏色？", "**紅色**"),
        ("乾隆題的字在哪里？", "在橋頭"),
        ("遠處是什麼？", "青\u200b山"),
    ]
    replies = [
        write("d", "short", traditional),
        write("d", "reasoning"),
        write("d", "counting"),
        write("c", "yes_no", ()),
        write("c", "description"),
        write("c", "text", [("碑上刻了什麼？", "刻有“紅橋”兩個字。")]),
        write("b", "description"),
        write("b", "conversation", [(question, answer + "[1]") for question, answer in GOOD["conversation"]]),
        write("b", "short", [("图\ud83d", "桥")] * 3),
        write("a", "yes_no"),
        write("like_a", "yes_no"),
        write("like_b", "yes_no"),
        write("exam", "yes_no"),
        write("missing", "yes_no"),
        write("torn", "yes_no"),
        write("nowhere", "yes_no"),
        write("b", "description"),
    ]
    save(work, records, [])
    rows = [json.dumps({**row.__dict__}) + "\n" for row in replies]  # with half a character, as JSON can hold it
    (work / REPLIES).write_text("".join(rows), encoding="utf-8")
    return work


@pytest.fixture(scope="module")
def cleaned(work: Path) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    settings = {"exclude_pictures": [str(work / "exam")], "exclude_questions": [str(work / "asked.txt")]}
    return clean(work, **settings)


def test_every_dialogue_is_kept_or_dropped_for_a_reason(
    cleaned: tuple[dict[str, Any], list[str], dict[str, str]],
) -> None:
    report, kept, dropped = cleaned
    assert kept == ["b:description", "c:text", "d:reasoning", "d:short", "like_a:yes_no"]
    assert dropped == {
        "a:yes_no": "picture: looks like another of the set",
        "b:conversation": "text: a citation mark",
        "b:description": "reply: written twice",
        "b:short": "text: empty or broken",
        "c:description": "text: the same as another's",
        "c:yes_no": "kind: does not fit the picture",
        "d:counting": "question: in asked.txt",
        "exam:yes_no": "picture: looks like a picture of exam",
        "like_b:yes_no": "picture: looks like another of the set",
        "missing:yes_no": "picture: missing or unreadable",
        "nowhere:yes_no": "picture: no record has it",
        "torn:yes_no": "picture: missing or unreadable",
    }
    assert report["read"] == report["rows"] + sum(report["dropped"].values()) == 17
    assert report["dropped_by_kind"]["picture: looks like another of the set"] == {"yes_no": 2}
    assert {reason: sum(kinds.values()) for reason, kinds in report["dropped_by_kind"].items()} == report["dropped"]
    assert {"kind": "yes_no", "read": 8, "kept": 1} in report["parts"]
    assert report["pictures"] == 4


def test_what_is_kept_is_mended(work: Path, cleaned: tuple[dict[str, Any], list[str], dict[str, str]]) -> None:
    """乾 stays where it is no 干, and so does what a dialogue about writing reads out."""
    turns = {reply.kind: reply.turns for reply in read_replies(work, DIALOGUES)}
    assert turns["short"] == (
        ("图中的桥是什么颜色？", "红色"),
        ("乾隆题的字在哪里？", "在桥头"),
        ("远处是什么？", "青山"),
    )
    assert turns["text"] == (("碑上刻了什么？", "刻有“紅橋”两个字。"),)
    assert cleaned[0]["mended"] == {
        "Markdown removed": 1,
        "blanks and invisible characters tidied": 1,
        "traditional characters made simplified": 2,
    }


def test_what_is_dropped_is_there_to_be_looked_at(work: Path, cleaned: tuple[object, object, object]) -> None:
    rows = {(row["sha256"], row["kind"]): row for row in read_journal(work / DROPPED)}
    assert rows["b", "conversation"]["detail"] == "[1]"
    assert rows["b", "conversation"]["turns"][0][1] == GOOD["conversation"][0][1] + "[1]"
    assert rows["b", "short"]["turns"][0] == ["图?", "桥"]  # half a character cannot be written
    assert rows["c", "description"]["detail"] == "b:description:1:writer-1"
    assert rows["a", "yes_no"]["detail"] == "images/like_a.png"


def test_report_names_what_it_depends_on_and_no_place(
    work: Path, cleaned: tuple[dict[str, Any], list[str], dict[str, str]]
) -> None:
    report = json.loads((work / "clean.report.json").read_text(encoding="utf-8"))
    assert report == cleaned[0]
    assert report["options"]["exclude_pictures"] == ["exam"]
    assert [entry["name"] for entry in report["inputs"]] == ["asked.txt"]
    assert str(work) not in json.dumps(report)
    assert any("COCO's ids" in note for note in report["notes"])


def test_same_bytes_whatever_the_order_of_replies(
    work: Path, cleaned: tuple[dict[str, Any], list[str], dict[str, str]]
) -> None:
    names = [DIALOGUES, DROPPED, "clean.report.json"]
    before = [(work / name).read_bytes() for name in names]
    lines = (work / REPLIES).read_text(encoding="utf-8").splitlines(keepends=True)
    (work / REPLIES).write_text("".join(reversed(lines)), encoding="utf-8")
    clean(work, exclude_pictures=[str(work / "exam")], exclude_questions=[str(work / "asked.txt")])
    assert [(work / name).read_bytes() for name in names] == before


def test_without_replies_nothing_is_kept(tmp_path: Path) -> None:
    save(tmp_path, [write_scene(tmp_path, "a", make_scene(0))], [])
    report, kept, dropped = clean(tmp_path)
    assert (report["read"], report["rows"], kept, dropped) == (0, 0, [], {})
    assert "no evaluation pictures were given to exclude" in report["notes"]


def test_lengths_are_counted_by_the_tokenizer_that_is_given(tmp_path: Path) -> None:
    save(tmp_path, [write_scene(tmp_path, "a", make_scene(0))], [write("a", "description")])
    file = find_tokenizer(TINY)
    num_tokens = len(Tokenizer(file).encode(DESCRIPTION))
    assert num_tokens != 2 * len(DESCRIPTION)
    too_long = {"a:description": "length: more tokens than the limit"}
    assert clean(tmp_path, max_answer=2 * len(DESCRIPTION))[1] == ["a:description"]
    assert clean(tmp_path, max_answer=2 * len(DESCRIPTION) - 1)[2] == too_long
    report, kept, _ = clean(tmp_path, max_answer=num_tokens, tokenizer=str(file))
    assert kept == ["a:description"]
    assert any("tokens are those of tokenizer.model" in note for note in report["notes"])
    assert clean(tmp_path, max_answer=num_tokens - 1, tokenizer=str(file))[2] == too_long


def test_short_dialogues_may_be_the_same_so_many_times() -> None:
    """About different pictures; a second one about the same picture teaches nothing."""
    turns = [("图中有几只猫？", "两只")]
    replies = [write(f"{number}", "counting", turns) for number in range(5)]
    again = replace(replies[0], model="writer-2")
    faults = find_text_faults([replies[0], again, *replies[1:]], 0.7, max_same=3)
    same = ("text: the same as another's", replies[0].key)
    assert faults == {again.key: same, replies[3].key: same, replies[4].key: same}


def test_long_answers_may_not_be_nearly_the_same() -> None:
    other = DESCRIPTION.replace("两艘小木船", "三艘大木船")
    texts = (("a", DESCRIPTION), ("b", other), ("c", DESCRIPTION))
    replies = [write(name, "description", [("图中有什么？", text)]) for name, text in texts]
    same = ("text: the same as another's", replies[0].key)
    nearly = ("text: answers nearly the same as another's", replies[0].key)
    assert find_text_faults(replies, 0.7, max_same=20) == {replies[1].key: nearly, replies[2].key: same}
    assert find_text_faults(replies, 0.9, max_same=20) == {replies[2].key: same}


def list_grams(text: str) -> set[str]:
    return {text[start : start + 5] for start in range(len(text) - 4)}


@pytest.mark.parametrize("min_jaccard", [0.3, 0.5, 0.7, 1.0])
def test_like_texts_are_those_of_a_comparison_of_all_with_all(min_jaccard: float) -> None:
    generator = random.Random(1)
    texts = ["", "一二三四"]
    for _ in range(150):
        written = list(generator.choice(texts)) if generator.random() < 0.6 else []
        written += generator.choices("一二三四五六七八九十", k=generator.choice((0, 1, 20, 40)))
        if written and generator.random() < 0.7:
            written[generator.randrange(len(written))] = generator.choice("百千")
        texts.append("".join(written))
    expected: list[int | None] = []
    for place, text in enumerate(texts):
        grams, found = list_grams(text), None
        for earlier in range(place):
            others = list_grams(texts[earlier])
            if expected[earlier] is None and grams and len(grams & others) >= min_jaccard * len(grams | others):
                found = earlier
                break
        expected.append(found)
    assert find_like_texts(texts, min_jaccard) == expected
    assert 3 <= sum(one is not None for one in expected) < len(texts)


def test_like_pictures_are_told_by_the_first_that_is_kept() -> None:
    """What is far from the first is kept, though something dropped lies between; plain ones have no like."""
    first = 0x5555_5555_5555_5555
    near, far = first ^ 0b111111, first ^ 0b1111111
    assert find_like_pictures([first, near, far, first, 0, 0]) == [None, 0, None, 0, None, None]
    assert find_like_pictures([near, first, far]) == [None, 0, 0]
    assert find_like_pictures([]) == []


def test_questions_of_evaluations(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "conversations": [{"from": "human", "value": "<image>\n有几只猫？\n请用一个词回答。"}]},
        {"question": "Is it a cat?"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    expected = {"有几只猫", "有几只猫请用一个词回答", "isitacat"}
    assert load_questions(tmp_path / "rows.json") == expected
    (tmp_path / "lines.txt").write_text("\ufeff有几只猫？\n\n Is it a cat?\n", encoding="utf-8")
    assert load_questions(tmp_path / "lines.txt") == {"有几只猫", "isitacat"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n", "empty.txt has no questions"),
        ("rows.json", b'[{"image": "a.png"}]', "rows.json has no questions"),
        ("broken.json", b"[{", "broken.json is not JSON"),
        ("old.txt", b"\xff\xfe", "old.txt is not UTF-8"),
        ("gone.txt", None, "gone.txt, a list of questions to exclude, is missing"),
    ],
)
def test_bad_files_of_questions(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_questions(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("short", "刻著名的“紅橋”", "刻著名的“红桥”"),
        ("text", "刻著名的“紅橋”和「藍天」兩處", "刻著名的“紅橋”和「藍天」两处"),
        ("text", "“紅橋”", "“紅橋”"),
        ("text", "", ""),
        ("text", "紅\ud83d", "紅\ud83d"),
    ],
)
def test_simplified_characters(kind: str, text: str, expected: str) -> None:
    assert simplify(kind, text) == expected


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"min_han": 1.5}, "min_han = 1.5, expected a number from 0 to 1"),
        ({"max_same": 0}, "max_same = 0, expected at least 1"),
        ({"workers": -1}, "workers = -1, expected 0 or more"),
        ({"min_jaccard": 0.0}, "min_jaccard = 0.0"),
        ({"second_look_share": 0.5}, "second_look_share = 0.5 needs model"),
        ({"max_cost": 1.0}, "max_cost = 1 needs price_input and price_output"),
        ({"min_han_ratio": 0.5}, "unknown key 'min_han_ratio', did you mean 'min_han'"),
    ],
)
def test_impossible_settings(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(CleanSettings, table, "test")


def test_command_line_names_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.zh.clean", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/records.jsonl is missing: `python -m data.zh.collect` writes it\n"
