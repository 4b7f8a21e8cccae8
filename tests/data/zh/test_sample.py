"""The committed sample goes through the whole chain by its command: without a network, without a key, and twice."""

import json
import os
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from data.dataset import ConversationDataset, RenderOptions
from data.journal import read_journal
from data.tokenizer import Tokenizer
from data.zh.build import build, load_config
from data.zh.record import DIALOGUES, Record, read_records, read_replies
from data.zh.text import to_simplified
from tests.conftest import ROOT, TINY_TOKENIZER

SAMPLE = ROOT / "data/zh/sample"
SPLITS = ("train", "validation", "test")
FAILED = {  # by generate, which asks for such a reply again
    "brick.jpg description": "refusal",
    "camera.jpg reasoning": "truncated",
    "horse.png conversation": "repeated",
    "horse.png yes_no": "polarity",
}
DROPPED = {  # by clean
    "brick.jpg short": "text: not Chinese",
    "camera.jpg conversation": "person: a name that the source does not have",
    "cell.jpg conversation": "text: speaks of its source",
    "cell.jpg reasoning": "answer: repeats itself",
    "coffee.jpg conversation": "text: talks to a model",
    "microaneurysms.png description": "answer: cut off",
    "rocket.jpg description": "text: a citation mark",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's configuration with another work folder, and that folder built.

    No key is there, and whoever asks an endpoint nevertheless finds nobody.
    """
    folder = tmp_path_factory.mktemp("sample")
    text = (SAMPLE / "build.toml").read_text(encoding="utf-8")
    assert 'work = "runs/zh_sample"' in text
    file = folder / "build.toml"
    file.write_text(text.replace("runs/zh_sample", str(folder / "work")), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    done = subprocess.run(
        [sys.executable, "-m", "data.zh.build", str(file)],
        cwd=ROOT,
        env=environment | {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return file


@pytest.fixture(scope="module")
def work(config: Path) -> Path:
    return Path(tomllib.loads(config.read_text(encoding="utf-8"))["work"])


@pytest.fixture(scope="module")
def names(work: Path) -> dict[str, str]:
    """What the sample calls each picture, by the hash of its content."""
    contents = {(SAMPLE / row["image"]).read_bytes(): row["image"] for row in read_index()}
    return {record.sha256: contents[(work / record.image).read_bytes()] for record in read_records(work)}


def read_index() -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLE / "index.jsonl").read_text(encoding="utf-8").splitlines()]


def read_report(work: Path, step: str) -> dict[str, Any]:
    return json.loads((work / f"{step}.report.json").read_text(encoding="utf-8"))


def read_rows(work: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: json.loads((work / f"published/{split}.json").read_text(encoding="utf-8")) for split in SPLITS}


def find_record(work: Path, title: str, section: str = "") -> Record:
    (found,) = [one for one in read_records(work) if (one.title, one.section) == (title, section)]
    return found


def test_counts_of_every_step(work: Path) -> None:
    collected = read_report(work, "collect")
    assert (collected["read"], collected["rows"]) == (15, 14)
    assert collected["dropped"] == {"text: less than 40 characters": 1}
    assert collected["mended"] == {
        "sentence: talks to a model, removed": 1,
        "text: traditional characters made simplified": 1,
    }
    generated = read_report(work, "generate")
    assert generated["batch"]["lines"] == 14 * 7
    assert generated["batch"]["unknown"] == generated["batch"]["duplicate"] == 0
    assert sum(generated["failed"].values()) == len(FAILED)
    assert generated["not_applicable"] == {"counting": 3, "text": 12}
    assert sum(generated["written"].values()) == 79
    assert generated["cost"] == 0
    cleaned = read_report(work, "clean")
    assert (cleaned["read"], cleaned["rows"]) == (94, 72)
    assert sum(cleaned["dropped"].values()) == len(DROPPED) + 15
    assert sum(len(rows) for rows in read_rows(work).values()) == 72


def test_bad_replies_are_dropped_for_their_reasons(work: Path, names: dict[str, str]) -> None:
    failed = {}
    for row in read_journal(work / "failed.jsonl"):
        sha256, kind, _ = row["key"].split(":", 2)
        failed[f"{names[sha256]} {kind}"] = row["reason"]
    assert failed == FAILED
    dropped = {f"{names[row['sha256']]} {row['kind']}": row["reason"] for row in read_journal(work / "dropped.jsonl")}
    unfit = {name for name in dropped if name.endswith((" text", " counting"))}
    assert len(unfit) == 15
    assert {name: reason for name, reason in dropped.items() if name not in unfit} == DROPPED


def test_texts_are_plain_and_simplified(work: Path, names: dict[str, str]) -> None:
    cat, coffee = find_record(work, "家猫"), find_record(work, "意式浓缩咖啡")
    assert cat.text.startswith("家猫是一种小型食肉哺乳动物，属于食肉目猫科，被人类驯养已有数千年。猫的听觉灵敏")
    assert not set("[]{}'<>") & set(cat.text)
    assert "忽略" not in coffee.text
    assert "一杯茶" not in coffee.text
    assert coffee.text.endswith("也是卡布奇诺、拿铁等饮品的基底。")
    for record in read_records(work):
        assert to_simplified(record.title + record.text) == record.title + record.text
    dialogues = {f"{names[reply.sha256]} {reply.kind}": reply.turns for reply in read_replies(work, DIALOGUES)}
    ((question, answer),) = dialogues["retina.jpg description"]
    assert question == "请描述这张眼底照片。"
    assert "橙红色的圆形区域" in answer


def test_splits_share_no_picture_and_no_page(work: Path) -> None:
    splits_of: defaultdict[str, set[str]] = defaultdict(set)
    for split, rows in read_rows(work).items():
        assert rows
        for row in rows:
            splits_of[row["image"]].add(split)
    assert len(splits_of) == 14
    assert all(len(splits) == 1 for splits in splits_of.values())
    pair = [find_record(work, "眼底", section).image for section in ("", "微动脉瘤")]
    assert splits_of[pair[0]] == splits_of[pair[1]]


def test_every_picture_is_attributed(work: Path, names: dict[str, str]) -> None:
    published = work / "published"
    lines = {row["image"]: row for row in read_journal(published / "ATTRIBUTION.jsonl")}
    pictures = {str(file.relative_to(published)) for file in (published / "images").rglob("*.*")}
    assert lines.keys() == pictures == {row["image"] for rows in read_rows(work).values() for row in rows}
    index = {row["image"]: row for row in read_index()}
    for image, row in lines.items():
        origin = index[names[Path(image).stem]]
        for key in ("author", "license", "license_url", "image_url"):
            assert row[key] == origin[key]
        assert row["author"]
        assert row["image_url"]


def test_the_readme_says_whose_each_picture_is() -> None:
    lines = (SAMPLE / "README.md").read_text(encoding="utf-8").splitlines()
    for row in read_index():
        (line,) = [line for line in lines if line.startswith(f"| `{row['image']}` | ") and row["image_url"] in line]
        assert row["license"] in line
        assert row["author"] in line
    assert {file.name for file in SAMPLE.iterdir() if file.suffix in (".jpg", ".png")} == {
        row["image"] for row in read_index()
    }


def test_training_reads_the_rows(work: Path) -> None:
    tokenizer, options = Tokenizer(TINY_TOKENIZER), RenderOptions(tokens_per_image=5, image_size=14)
    for split, rows in read_rows(work).items():
        dataset = ConversationDataset(work / f"published/{split}.json", work / "published", tokenizer, options)
        assert len(dataset) == len(rows)
        for number, row in enumerate(rows):
            rendered, picture = dataset.render(number), dataset.load_picture(number)
            assert rendered.num_images == 1
            assert rendered.num_cut == 0
            assert rendered.num_supervised > len(row["conversations"][1]["value"])  # a byte is a token at least
            assert picture is not None
            assert picture.shape == (3, 14, 14)


def test_a_second_run_does_nothing(
    config: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_all() -> dict[str, bytes]:
        return {str(file.relative_to(work)): file.read_bytes() for file in work.rglob("*") if file.is_file()}

    before = read_all()
    monkeypatch.chdir(ROOT)
    build(*load_config(config), "publish")
    assert capsys.readouterr().out.count(", nothing new\n") == 4
    assert read_all() == before
