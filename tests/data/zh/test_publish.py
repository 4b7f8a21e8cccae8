"""What is published: splits that share nothing, rows that training reads, all of it new or nothing, and its card."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.check
from data.dataset import ConversationDataset, RenderOptions
from data.tokenizer import Tokenizer
from data.zh import card, describe, publish
from data.zh.publish import SHORT_SUFFIX, PublishSettings, assign_splits, group_pictures, make_row, run
from data.zh.record import DIALOGUES, RECORDS
from data.zh.sheet import make_sheet
from tests.conftest import TINY_TOKENIZER
from tests.data.zh.work_folder import make_reply, write_picture, write_rows, write_work

SHARES = PublishSettings(validation_share=0.15, test_share=0.15)


@pytest.fixture(scope="module", autouse=True)
def draw_nothing() -> Iterator[None]:
    """Plots would take most of the time; they have tests of their own."""

    def touch(entries: object, tokenizer: object, folder: Path) -> None:
        for name in describe.PLOTS:
            (folder / name).touch()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(describe, "draw", touch)
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder of 40 pictures on 20 pages, published."""
    work = tmp_path_factory.mktemp("work")
    write_work(work, num_pictures=40, pictures_per_page=2)
    for step, read in (("collect", 45), ("clean", 91)):
        report = {"read": read, "rows": 40, "mended": {}, "dropped": {f"{step}: a | reason": 5}, "notes": ["a * note"]}
        (work / f"{step}.report.json").write_text(json.dumps(report), encoding="utf-8")
    written: dict[str, Any] = {"model": "writer-1", "written": {"short": 60, "text": 31}, "not_applicable": {"text": 7}}
    (work / "generate.report.json").write_text(json.dumps(written | {"failed": {"refusal": 2}}), encoding="utf-8")
    run(SHARES, work)
    return work


def read_rows(work: Path) -> dict[str, list[dict[str, Any]]]:
    splits = ("train", "validation", "test")
    return {split: json.loads((work / f"published/{split}.json").read_text(encoding="utf-8")) for split in splits}


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_groups(tmp_path: Path) -> None:
    """Pages tie pictures together, and pictures pages; of a folder's pictures only the title counts."""
    base = replace(write_picture(tmp_path, np.zeros((2, 2), dtype=np.uint8)), sha256="0", title="甲", page_url="/a")
    records = [
        base,
        replace(base, sha256="3", title="乙", page_url="/b"),
        replace(base, sha256="2", title="甲", page_url="/other"),
        replace(base, sha256="5", title="丙", page_url="/b"),
        replace(base, sha256="0", title="丁", page_url="/d"),  # the first picture on another page
        replace(base, sha256="1", title="丁", page_url="/d2"),
        replace(base, sha256="8", title="", page_url="/d2", source="folder"),
        replace(base, sha256="9", title="", page_url="/d2", source="folder"),
    ]
    groups = {"0": "0", "2": "0", "1": "0", "3": "3", "5": "3", "8": "8", "9": "9"}
    assert group_pictures(records) == groups
    assert group_pictures(reversed(records)) == groups


def test_splits_of_many_groups() -> None:
    """The shares are kept about, another seed draws others, and a group stays where it is when others come."""
    groups = [f"{number:064x}" for number in range(4000)]
    splits = assign_splits(groups, PublishSettings(validation_share=0.1, test_share=0.05))
    counts = {name: list(splits.values()).count(name) for name in ("train", "validation", "test")}
    assert abs(counts["validation"] - 400) < 60  # three standard deviations
    assert abs(counts["test"] - 200) < 42
    assert sum(counts.values()) == 4000
    fewer = assign_splits(groups[::-2], PublishSettings(validation_share=0.1, test_share=0.05))
    assert fewer.items() <= splits.items()
    assert assign_splits(groups, PublishSettings(validation_share=0.1, test_share=0.05, seed=1)) != splits


@pytest.mark.parametrize("shares", [(0.05, 0.05), (0.45, 0.45), (0.01, 0.98), (0.98, 0.01)])
@pytest.mark.parametrize("num_groups", [3, 4, 7])
def test_no_split_is_empty(num_groups: int, shares: tuple[float, float]) -> None:
    """Chance alone would leave some empty among so few."""
    for seed in range(20):
        settings = PublishSettings(validation_share=shares[0], test_share=shares[1], seed=seed)
        splits = assign_splits([str(number) for number in range(num_groups)], settings)
        assert len(splits) == num_groups
        assert set(splits.values()) == {"train", "validation", "test"}


def test_fewer_splits() -> None:
    """A share of 0 makes no split; too few groups are an error that says what to do."""
    assert set(assign_splits("ab", PublishSettings(validation_share=0.0)).values()) == {"train", "test"}
    assert assign_splits("a", PublishSettings(validation_share=0.0, test_share=0.0)) == {"a": "train"}
    with pytest.raises(ValueError, match=r"2 groups of pictures .* are too few for 3 splits: collect more pages, or"):
        assign_splits("ab", PublishSettings())


def test_splits_share_nothing(published: Path) -> None:
    """Neither a picture nor a page; every dialogue is in one of them."""
    pages = {json.loads(line)["image"]: json.loads(line)["page_url"] for line in read_lines(published)}
    seen: defaultdict[str, set[str]] = defaultdict(set)
    rows = read_rows(published)
    for split, of_split in rows.items():
        for row in of_split:
            seen[row["image"]].add(split)
            seen[pages[row["image"]]].add(split)
    assert len(seen) == 40 + 20
    assert all(len(splits) == 1 for splits in seen.values())
    assert len({row["id"] for of_split in rows.values() for row in of_split}) == 80
    assert all(len(of_split) >= 4 for of_split in rows.values())


def read_lines(work: Path) -> list[str]:
    return (work / "published/ATTRIBUTION.jsonl").read_text(encoding="utf-8").splitlines()


def test_rows_are_those_that_training_reads(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set opens them with their pictures, and the check before training finds nothing to complain about."""
    folder = published / "published"
    rows = read_rows(published)
    for split, of_split in rows.items():
        dataset = ConversationDataset(
            folder / f"{split}.json",
            folder,
            Tokenizer(TINY_TOKENIZER),
            RenderOptions(tokens_per_image=3, image_size=14),
        )
        assert len(dataset) == len(of_split)
        assert dataset.render(0).num_images == 1
        assert dataset.image(0) == of_split[0]["image"]
        assert dataset.load_picture(0) is not None
    monkeypatch.setattr("sys.argv", ["check", str(folder / "validation.json"), "--workers", "1"])
    with pytest.raises(SystemExit) as ended:
        data.check.main()
    assert ended.value.code == 0
    assert rows["train"][0].keys() == {
        "id", "image", "conversations", "source", "license", "lang", "kind", "topic",
    }  # fmt: skip
    assert {(row["lang"], row["source"]) for row in rows["train"]} == {("zh", "wikipedia")}


def test_pictures_and_their_licences(published: Path) -> None:
    """Every picture is there with a line, linked, so that it takes no room."""
    folder = published / "published"
    lines = [json.loads(line) for line in read_lines(published)]
    assert len(lines) == 40
    for line in lines:
        assert line["author"] == "某人"
        assert line["revision"] == 7
        assert (folder / line["image"]).samefile(published / line["image"])


def test_copies_where_links_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    records, _ = write_work(tmp_path, num_pictures=5)
    monkeypatch.setattr(os, "link", refuse)
    run(SHARES, tmp_path)
    copy = tmp_path / "published" / records[0].image
    assert copy.read_bytes() == (tmp_path / records[0].image).read_bytes()
    assert not copy.samefile(tmp_path / records[0].image)


def test_running_again(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It costs nothing; from the beginning and from another order it gives the same bytes."""
    before = read_bytes(published / "published")
    stamp = (published / "published").stat().st_mtime_ns
    report = run(SHARES, published)
    assert "publish: nothing to do" in capsys.readouterr().out
    assert (published / "published").stat().st_mtime_ns == stamp
    assert json.loads((published / "publish.report.json").read_text(encoding="utf-8")) == report
    _, replies = write_work(tmp_path, num_pictures=40, pictures_per_page=2)
    write_rows(tmp_path / DIALOGUES, replies[::-1])
    for name in ("collect.report.json", "generate.report.json", "clean.report.json"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    run(SHARES, tmp_path)
    after = read_bytes(tmp_path / "published")
    assert len(after) == 40 + len(report["files"])
    assert after.items() <= before.items()


def test_changes_are_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other dialogues, settings or marks, or a file that was deleted: all is made anew, without leavings."""
    _, replies = write_work(tmp_path, num_pictures=12)
    assert run(SHARES, tmp_path)["splits"]["all"]["dialogues"] == 24
    write_rows(tmp_path / DIALOGUES, replies[2:])
    assert run(SHARES, tmp_path)["splits"]["all"]["dialogues"] == 22
    assert len(list((tmp_path / "published/images").rglob("*.png"))) == 11
    run(replace(SHARES, name="other"), tmp_path)
    assert "# other" in read_card(tmp_path)
    sheet = make_sheet(tmp_path, 5, 0, 0)
    write_marks(tmp_path / "marks.json", sheet, 4)
    run(replace(SHARES, name="other"), tmp_path)
    assert "| all | 5 | 4 | 1 | 0 | 80.0% | 37.6% to 96.4% |" in read_card(tmp_path)
    (tmp_path / "published/test.json").unlink()
    run(replace(SHARES, name="other"), tmp_path)
    assert (tmp_path / "published/test.json").is_file()
    assert "nothing to do" not in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("published")) == ["published"]


def write_marks(file: Path, sheet: dict[str, Any], num_good: int) -> None:
    marks = [
        {"id": item["id"], "mark": "good" if number < num_good else "wrong", "reasons": []}
        for number, item in enumerate(sheet["items"])
    ]
    file.write_text(json.dumps({"sheet": sheet["sheet"], "marks": marks}), encoding="utf-8")


def read_card(work: Path) -> str:
    return (work / "published/DATASET_CARD.md").read_text(encoding="utf-8")


def test_failure_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens on the way, what was published before is still there, whole."""

    def fail(*_: object) -> str:
        raise OSError("no space left on device")

    _, replies = write_work(tmp_path, num_pictures=6)
    run(SHARES, tmp_path)
    before = read_bytes(tmp_path / "published")
    write_rows(tmp_path / DIALOGUES, replies[1:])
    with monkeypatch.context() as patched:
        patched.setattr(card, "write", fail)
        with pytest.raises(OSError, match="no space left"):
            run(SHARES, tmp_path)
    assert read_bytes(tmp_path / "published") == before
    assert run(SHARES, tmp_path)["splits"]["all"]["dialogues"] == 11
    assert not (tmp_path / "published.partial").exists()


@pytest.mark.parametrize(
    ("kind", "answers", "is_asked"),
    [
        ("short", ["红色", "木头"], True),
        ("yes_no", ["是", "不是"], True),
        ("counting", ["三只"], True),
        ("counting", ["一共有三只猫，都在窗台上。"], False),
        ("yes_no", ["是", "不是，那是一座塔。"], False),
        ("short", ["一个很长很长很长很长的短语"], False),
        ("conversation", ["红色", "木头"], False),
    ],
)
def test_request_for_a_short_answer(published: Path, kind: str, answers: list[str], is_asked: bool) -> None:
    """It stands once, in the first question, and only where the answers obey it."""
    record = publish.read_records(published)[0]
    turns = tuple((f"问题{number}？", answer) for number, answer in enumerate(answers))
    row = make_row(replace(make_reply(record.sha256, "short"), kind=kind, turns=turns), record)
    asked = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
    assert asked[0] == "<image>\n问题0？" + ("\n请用一个词或短语回答问题。" if is_asked else "")
    assert asked[1:] == [f"问题{number}？" for number in range(1, len(answers))]
    assert [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"] == answers


def test_several_dialogues_of_a_kind(tmp_path: Path) -> None:
    """Those of two models about one picture have names of their own."""
    _, replies = write_work(tmp_path, num_pictures=6)
    write_rows(tmp_path / DIALOGUES, [*replies, replace(replies[0], model="writer-2")])
    run(SHARES, tmp_path)
    names = [row["id"] for of_split in read_rows(tmp_path).values() for row in of_split]
    assert len(names) == len(set(names)) == 13
    assert f"{replies[0].sha256[:16]}-{replies[0].kind}-2" in names


def test_what_cannot_be_published(tmp_path: Path) -> None:
    """Each is an error that says what, and where."""
    with pytest.raises(FileNotFoundError, match=r"records.jsonl is missing: `python -m data.zh.collect` writes it"):
        run(SHARES, tmp_path)
    records, replies = write_work(tmp_path, num_pictures=6)
    with pytest.raises(ValueError, match=r"license = 'mit', but texts of wikipedia ask for 'cc-by-sa-4.0'"):
        run(replace(SHARES, license="mit"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer nowhere is missing"):
        run(replace(SHARES, tokenizer="nowhere"), tmp_path)
    cases = [
        ([], "dialogues.jsonl holds no dialogue to publish"),
        ([replace(replies[0], sha256="12ab")], "dialogues.jsonl names the picture 12ab, which no record has"),
        (replies[:4], "2 groups of pictures .* are too few for 3 splits"),
        (
            [*replies, replace(replies[0], model="x", turns=())],
            "dialogues.jsonl, the dialogue .*:x: a conversation needs",
        ),
        ([*replies, replace(replies[0], model="x", turns=(("问？", "<image>"),))], "an answer cannot hold <image>"),
    ]
    for given, message in cases:
        write_rows(tmp_path / DIALOGUES, given)
        with pytest.raises(ValueError, match=message):
            run(SHARES, tmp_path)
    write_rows(tmp_path / DIALOGUES, replies)
    (tmp_path / records[2].image).unlink()
    with pytest.raises(FileNotFoundError, match=f"picture .*{records[2].image} is missing"):
        run(SHARES, tmp_path)
    assert not (tmp_path / "published").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_share": -0.1}, "validation_share = -0.1 and test_share = 0.05, expected shares"),
        ({"validation_share": 0.5, "test_share": 0.5}, "expected shares"),
        ({"name": " "}, "name is empty"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PublishSettings(**settings)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints a table, and errors in a line."""
    monkeypatch.setattr("sys.argv", ["publish", "--work", str(tmp_path), "--test-share", "0.2"])
    with pytest.raises(SystemExit, match=r"error: .*records.jsonl is missing"):
        publish.main()
    write_work(tmp_path, num_pictures=6)
    publish.main()
    assert re.search(r"  all +12 +\d+ +6 +6\n", capsys.readouterr().out)


def test_card(published: Path) -> None:
    """Its numbers are those of the files."""
    text = read_card(published)
    rows = read_rows(published)
    num_questions = sum(len(row["conversations"]) // 2 for of_split in rows.values() for row in of_split)
    assert text.startswith(
        '---\nlicense: "cc-by-sa-4.0"\nlanguage:\n- zh\ntask_categories:\n- visual-question-answering\n'
    )
    assert "size_categories:\n- n<1K\n" in text
    assert f"80 Chinese dialogues ({num_questions} questions and answers) about 40 pictures of 20 pages" in text
    assert "| writer-1 | writer-1-2026-01-01 | 1 | 80 |" in text
    assert "| dropped | clean: a \\| reason | 5 |" in text
    assert "| read |  | 91 |" in text
    assert "- a \\* note\n" in text
    assert "writer-1 wrote 91 dialogues, before filtering; 7 times it said" in text
    assert "2 replies were of no use (refusal 2)." in text
    assert "| CC BY-SA 4.0 | 20 |\n| Public domain | 20 |" in text
    for split, of_split in rows.items():
        assert re.search(rf"\| {split} \| {len(of_split)} \| ", text)
    suffixes = sum(SHORT_SUFFIX in row["conversations"][0]["value"] for of_split in rows.values() for row in of_split)
    assert f"{suffixes} dialogues ask for a word" in text
    assert 0 < suffixes < 80
    assert "Not judged yet" in text
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (published / "published" / picture).is_file()


def test_card_of_ones_own_pictures(tmp_path: Path) -> None:
    """Nothing is said of Wikipedia, and no licence is claimed that nobody gave."""
    records, _ = write_work(tmp_path, num_pictures=6)
    own = [replace(record, source="folder", revision=0) for record in records]
    write_rows(tmp_path / RECORDS, own)
    run(SHARES, tmp_path)
    text = read_card(tmp_path)
    assert 'license: "other"' in text
    assert "ncyclopedia" not in text
    assert "Wikipedia" not in text
    assert "revision" not in text.split("## Files")[0]
    run(replace(SHARES, license="mit"), tmp_path)
    assert 'license: "mit"' in read_card(tmp_path)


def test_text_of_others_in_the_card(tmp_path: Path) -> None:
    """Neither a licence nor an answer is taken for markup."""
    records, replies = write_work(tmp_path, num_pictures=6)
    write_rows(tmp_path / RECORDS, [replace(records[0], license="CC\n| <b>0</b> ![x](y) `"), *records[1:]])
    write_rows(tmp_path / DIALOGUES, [replace(replies[0], kind="short", turns=(("问？", "a|b*"),)), *replies[1:]])
    run(SHARES, tmp_path)
    text = read_card(tmp_path)
    assert r"| CC \| \<b\>0\</b\> \!\[x\](y) \` | 1 |" in text
    assert r"a\|b\* (1)" in text
