"""The command: one source after another through `main`, twice in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from data.prepare.__main__ import main, sample_rows
from data.prepare.report import Report
from data.rows import load_rows
from tests.conftest import ROOT
from tests.data.prepare import test_visual_genome
from tests.data.prepare.owners_files import dump, write_coco, write_karpathy, write_vqa
from tests.data.test_similar import make_scene

CAPTIONS = {number: [f"A picture with the number {number}."] for number in range(1, 31)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO with thirty pictures, two of which are tested on."""
    write_coco(tmp_path / "coco", captions=CAPTIONS)
    write_coco(tmp_path / "coco", "val2014", {5: [], 6: []})
    write_coco(tmp_path / "coco", "val2017", {6: []})
    return tmp_path / "coco"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["data.prepare", *map(str, arguments)])
    main()


def load_report(out: Path) -> dict:
    return json.loads(out.with_suffix(".report.json").read_text(encoding="utf-8"))


def list_numbers(rows: Sequence[dict]) -> list[int]:
    return [int(row["id"].rpartition("-")[2]) for row in rows]


def test_every_source(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds COCO's lists, or needs none."""
    write_karpathy(tmp_path / "flickr", {"36979.jpg": "train"})
    write_vqa(tmp_path / "vqa")
    test_visual_genome.write(tmp_path / "vg")
    rows = [{"id": 1, "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}]
    dump(rows, tmp_path / "llava/llava_v1_5_mix665k.json")
    for source, folder, num_rows in (
        ("coco", root, 28),
        ("flickr30k", tmp_path / "flickr", 1),
        ("vqav2", tmp_path / "vqa", 3),
        ("visual_genome", tmp_path / "vg", 3),
        ("llava", tmp_path / "llava", 1),
    ):
        out = tmp_path / f"{source}.jsonl"
        run(monkeypatch, source, "--root", folder, "--out", out, "--coco", root)
        assert len(load_rows(out)) == load_report(out)["rows"] == num_rows
        assert load_report(out)["source"] == source


def test_the_command_and_its_report(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("7\n", encoding="utf-8")
    out = tmp_path / "new/coco.json"
    run(monkeypatch, "coco", "--root", root, "--out", out, "--max", 10, "--seed", 3, "--exclude", tmp_path / "mine.txt")
    rows, report = load_rows(out), load_report(out)
    assert len(rows) == report["rows"] == 10
    assert report["read"] == 30
    assert report["dropped"] == {"in COCO val2014": 2, "named in mine.txt": 1, "row: beyond --max": 17}
    assert report["options"] == {
        "root": "coco",
        "max": 10,
        "seed": 3,
        "language": "en",
        "exclude": ["mine.txt"],
        "exclude_pictures": [],
        "images": None,
        "coco": None,
        "allow_leaks": False,
    }
    names = ["captions_train2017.json", "mine.txt", "captions_val2014.json", "captions_val2017.json"]
    assert [entry["name"] for entry in report["inputs"]] == names
    printed = capsys.readouterr().out
    assert "dropped          2  in COCO val2014\n" in printed
    assert printed.endswith(f"{out}, coco.report.json\n")
    assert sorted(file.name for file in out.parent.iterdir()) == ["coco.json", "coco.report.json"]


def test_max_is_a_seeded_sample_in_order(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = []
    for number, (seed, most) in enumerate([(0, 9), (1, 9), (0, 9), (0, 28), (0, 99)]):
        out = tmp_path / f"{number}.json"
        run(monkeypatch, "coco", "--root", root, "--out", out, "--seed", seed, "--max", most)
        samples.append(list_numbers(load_rows(out)))
    assert all(sample == sorted(sample) for sample in samples)
    assert list(map(len, samples)) == [9, 9, 9, 28, 28]
    assert samples[0] == samples[2] != samples[1]
    assert load_report(tmp_path / "4.json")["dropped"] == {"in COCO val2014": 2}


def test_a_sample_keeps_rows_as_they_are(tmp_path: Path) -> None:
    rows = [{"id": number, "text": "线\u2028\n\u0085 é"} for number in range(50)]
    report = Report("coco")
    sample = list(sample_rows(iter(rows), 50, 0, tmp_path / "new", report))
    assert sample == rows
    assert not report.dropped["row: beyond --max"]


def test_allowed_leaks_are_in_the_report(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "coco.json"
    run(monkeypatch, "coco", "--root", root, "--out", out, "--allow-leaks")
    assert list_numbers(load_rows(out)) == list(CAPTIONS)
    assert "evaluation pictures were NOT excluded: --allow-leaks" in load_report(out)["notes"]
    assert load_report(out)["options"]["allow_leaks"] is True


def test_the_same_bytes_whatever_the_workers(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture is on two lists: it counts once."""
    (root / "train2017").mkdir()
    for number in range(1, 31):
        make_scene(number, 64, 48).save(root / f"train2017/{number:012d}.jpg")
    (tmp_path / "MME").mkdir()
    for number in (5, 20):
        make_scene(number, 64, 48).resize((90, 80)).save(tmp_path / "MME" / f"{number}.png")
    made = []
    for workers in (1, 2):
        out = tmp_path / f"{workers}/coco.json"
        arguments = ["--exclude-pictures", tmp_path / "MME", "--workers", workers]
        run(monkeypatch, "coco", "--root", root, "--out", out, *arguments)
        made.append([file.read_bytes() for file in (out, out.with_suffix(".report.json"))])
    assert made[0] == made[1]
    out = tmp_path / "1/coco.json"
    assert list_numbers(load_rows(out)) == [number for number in CAPTIONS if number not in (5, 6, 20)]
    assert load_report(out)["dropped"] == {"in COCO val2014": 2, "looks like a picture of MME": 1}


def test_images_may_lie_elsewhere(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos/train2017").mkdir(parents=True)
    (tmp_path / "MME").mkdir()
    make_scene(1).save(tmp_path / "photos/train2017/000000000001.jpg")
    make_scene(1).save(tmp_path / "MME/1.png")
    Image.new("L", (50, 50)).save(tmp_path / "MME/2.png")
    out = tmp_path / "coco.json"
    arguments = ["--images", tmp_path / "photos", "--exclude-pictures", tmp_path / "MME"]
    run(monkeypatch, "coco", "--root", root, "--out", out, *arguments)
    assert list_numbers(load_rows(out))[0] == 2
    assert load_report(out)["notes"][-3] == "pictures in photos/ were compared by their looks; 27 unreadable"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco", "--root", "empty", "--out", "a.json"], "captions_train2017"),
        (["coco", "--root", "coco", "--out", "folder"], "--out folder: expected a file that ends in"),
        (["coco", "--root", "coco", "--out", "a.json", "--exclude", "no.txt"], "no.txt"),
        (["coco", "--root", "coco", "--out", "a.json", "--exclude-pictures", "no"], "no pictures lie below no"),
        (
            ["coco", "--root", "coco", "--out", "a.json", "--exclude-pictures", "coco"],
            "none of the rows' 28 pictures can be read in coco, .* --images",
        ),
        (["llava", "--root", "nowhere", "--out", "a.json"], "nowhere has neither of"),
        (["mix", "a.json", "--out", "b.json"], "expected FILE:SHARE"),
    ],
)
def test_errors(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """One line, nothing written, and what was there before is still there."""
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("before", encoding="utf-8")
    make_scene(0, 40, 30).save("coco/scene.png")
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        run(monkeypatch, *arguments)
    assert Path("a.json").read_text(encoding="utf-8") == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "coco"]


def test_missing_lists_are_an_error(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "annotations/captions_val2017.json").unlink()
    with pytest.raises(SystemExit, match=r"error: .*COCO val2017 .*annotations_trainval2017\.zip.*--allow-leaks"):
        run(monkeypatch, "coco", "--root", root, "--out", tmp_path / "coco.json")
    assert [file.name for file in tmp_path.iterdir()] == ["coco"]


def test_in_a_process_of_its_own(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README calls it, with other hashes: a source, then a mixture of it; the same as here."""
    made = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        coco, mixed = folder / "coco.json", folder / "mix.json"
        for arguments in (
            ["coco", "--root", str(root), "--out", str(coco)],
            ["mix", f"{coco}:0.5", f"{coco}:1:again", "--out", str(mixed), "--seed", "1"],
        ):
            if folder.name == "1":
                run(monkeypatch, *arguments)
            else:
                command = [sys.executable, "-m", "data.prepare", *arguments]
                subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True)
        made.append({file.name: file.read_bytes() for file in folder.iterdir() if "index" not in file.name})
    assert made[0] == made[1]
    assert sorted(made[0]) == ["coco.json", "coco.report.json", "mix.json", "mix.report.json"]
    rows, report = load_rows(mixed), load_report(mixed)
    assert len(rows) == report["rows"] == 28 + 14
    assert sum(row["image"].startswith("again/train2017/") for row in rows) == 28
    assert report["options"] == {"seed": 1}
    assert [(part["file"], part["share"]) for part in report["parts"]] == [("coco.json", 0.5), ("coco.json", 1.0)]
