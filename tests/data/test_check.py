"""The pre-flight: every kind of damage in a real file, and reports that neither kills nor many workers change."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import check
from data.dataset import ConversationDataset, RenderOptions
from data.image import open_image
from data.packing import StepDataset
from data.processes import run_chunks
from data.tokenizer import Tokenizer
from tests.conftest import ROOT, TINY_TOKENIZER
from tests.data.broken_pictures import Case, draw_scene, encode, make_cases

CASES = make_cases()
OPTIONS = ("--tokens-per-image", 3, "--ranks", 2)


def make_row(image: str | None, answer: str = "a thing", **extra: Any) -> dict:
    """Return a row of one question."""
    marker = "" if image is None else "<image>\n"
    turns = [{"from": "human", "value": marker + "what is it?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({} if image is None else {"image": image}), **extra}


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return file


def run_check(file: Path, images: Path, *options: object, workers: int = 1) -> int:
    """Run the command in this process; return its exit code."""
    arguments = ["check", file, "--images", images, *OPTIONS, "--workers", workers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(argument) for argument in (*arguments, *options)])
        with pytest.raises(SystemExit) as ended:
            check.main()
    assert isinstance(ended.value.code, int), ended.value.code
    return ended.value.code


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_report(folder: Path) -> dict:
    return json.loads((folder / "data_report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cases_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, checked: `images/`, `rows.json`, `rows.check/`; read only."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "images/web").mkdir(parents=True)
    for case in CASES:
        (folder / "images/web" / case.name).write_bytes(case.content)
    write_rows(folder / "rows.json", [make_row(f"web/{case.name}") for case in CASES])
    assert run_check(folder / "rows.json", folder / "images") == 1
    return folder


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_kind_of_file(case: Case, cases_folder: Path) -> None:
    """What check says of it, and what training sees."""
    (record,) = (
        line for line in read_lines(cases_folder / "rows.check/pictures.jsonl") if line["image"] == f"web/{case.name}"
    )
    bad = {line["image"]: line["reason"] for line in read_lines(cases_folder / "rows.check/bad.jsonl")}
    if case.problem:
        assert re.search(case.problem, record["problem"])
        assert bad[f"web/{case.name}"] == record["problem"]
        with pytest.raises(ValueError, match="cannot read the picture"):
            open_image(io.BytesIO(case.content))
    else:
        assert f"web/{case.name}" not in bad
        found = (record["problem"], record["mode"], record["odd_format"], record["is_turned"])
        assert found == ("", case.mode, case.odd_format, case.is_turned)
        opened = open_image(io.BytesIO(case.content))
        assert opened.mode == "RGB"
        for place, colour in case.pixels.items():
            assert np.abs(np.subtract(opened.getpixel(place), colour)).max() <= 3  # type: ignore[arg-type]


def test_verify_would_not_notice(cases_folder: Path) -> None:
    """Why every picture is decoded whole."""
    with Image.open(cases_folder / "images/web/truncated.jpg") as image:
        image.verify()


def test_report_of_the_cases(cases_folder: Path) -> None:
    """The totals are those of the single files, and add up."""
    report = read_report(cases_folder / "rows.check")
    total = report["total"]
    broken = [case for case in CASES if case.problem]
    assert report["sources"] == {"web": total}
    assert total["rows"] == total["images"] == len(CASES)
    assert sum(total["broken"].values()) == total["rows_of_bad_images"] == len(broken) == 8
    assert total["usable_rows"] == total["usable_images"] == len(CASES) - len(broken)
    sound = [case for case in CASES if not case.problem]
    modes = [case.mode for case in sound if case.mode != "RGB"]
    assert total["odd_modes"] == {mode: modes.count(mode) for mode in modes}
    assert total["odd_formats"] == {case.odd_format: 1 for case in sound if case.odd_format}
    assert total["turned_upright"] == 1
    assert report["bad_images"]["empty file"] == {"count": 1, "images": ["web/empty.jpg"]}
    assert report["bad_images"]["image file is truncated (N bytes not processed)"]["images"] == ["web/truncated.jpg"]
    with Image.open(cases_folder / "rows.check/token_lengths.png") as picture:
        assert picture.width == 960
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_names(tmp_path: Path) -> None:
    """Found whatever Mac or Windows made of them; missing ones and those that lead elsewhere are told apart."""
    decomposed = unicodedata.normalize("NFD", "café.jpg")
    for number, name in enumerate((decomposed, "UPPER.JPG", "plain.jpg")):
        (tmp_path / name).write_bytes(encode(draw_scene(number), "JPEG"))
    names = [
        unicodedata.normalize("NFC", "café.jpg"),
        "upper.jpg",
        "plain.jpg",
        "gone.jpg",
        "../plain.jpg",
        "UPPER.JPG",
    ]
    assert run_check(write_rows(tmp_path / "rows.json", [make_row(name) for name in names]), tmp_path) == 1
    total = read_report(tmp_path / "rows.check")["total"]
    assert total["images"] == 5  # upper.jpg and UPPER.JPG are one file
    assert total["usable_rows"] == 4
    assert total["found_by_another_spelling"] == 2
    assert total["missing"] == 1
    gone, outside = read_lines(tmp_path / "rows.check/bad.jsonl")
    assert gone == {"image": "gone.jpg", "reason": "missing"}
    assert outside["image"] == "../plain.jpg"
    assert "leads out of the image folder" in outside["reason"]


def test_duplicates(tmp_path: Path) -> None:
    """Bytes under two names are the same; saved anew, smaller and in another format, they look alike."""
    scene = draw_scene(7, 240, 160)
    files = {
        "coco/a.jpg": encode(scene, "JPEG", quality=92),
        "vg/b.jpg": encode(scene, "JPEG", quality=92),
        "vg/c.png": encode(scene.resize((120, 80)), "PNG"),
        "vg/other.jpg": encode(draw_scene(8, 240, 160), "JPEG"),
        "vg/black.png": encode(Image.new("RGB", (20, 20)), "PNG"),
        "vg/white.png": encode(Image.new("RGB", (20, 20), "white"), "PNG"),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert run_check(write_rows(tmp_path / "rows.json", [make_row(name) for name in files]), tmp_path) == 0
    report = read_report(tmp_path / "rows.check")
    assert report["duplicates"] == {
        "same_bytes": [["coco/a.jpg", "vg/b.jpg"]],
        "look_alike": [["coco/a.jpg", "vg/c.png"]],
    }
    counts = {
        name: (source["duplicates"], source["look_alikes"])
        for name, source in [*report["sources"].items(), ("total", report["total"])]
    }
    assert counts == {"coco": (0, 0), "vg": (0, 1), "total": (1, 1)}  # between the sources only the total can tell


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all kinds, with pictures and without, sound and not, checked; read only."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "coco").mkdir()
    (folder / "00453").mkdir()
    for number in range(5):
        (folder / f"coco/{number}.png").write_bytes(encode(draw_scene(number), "PNG"))
    (folder / "00453/0.png").write_bytes(encode(draw_scene(9), "PNG"))
    (folder / "coco/bad.jpg").write_bytes(b"<html></html>")
    rows: list[Any] = [make_row(f"coco/{i % 5}.png", "so it is. " * (i * 7 % 11)) for i in range(40)]
    rows += [make_row(None, "yes " * i) for i in range(1, 20)]
    rows += [make_row(f"coco/{i}.png", source="vg", template="plain") for i in range(3)]
    rows += [make_row("00453/0.png"), make_row("coco/bad.jpg"), make_row("coco/bad.jpg")]
    rows += [make_row(None, "word " * 400), make_row(None, "", source="corpus")]
    question = [{"from": "human", "value": "what? " * 100}, {"from": "gpt", "value": "yes"}]
    rows += [{"conversations": question, "source": "corpus"}]
    rows += ["no object", {"conversations": question[::-1]}, [make_row(None)]]
    rows += [make_row("coco/1.png") | {"image": ["coco/1.png"]}, make_row("half \ud800.png")]
    file = folder / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    assert run_check(file, folder, "--max-tokens", 200, "--batch-size", 16, "--micro-batch-tokens", 600) == 1
    return folder


def test_rows_that_cannot_be_read(mixed_folder: Path) -> None:
    """By number, with what is wrong."""
    lines = read_lines(mixed_folder / "rows.check/bad.jsonl")
    bad = {line["row"]: line["reason"] for line in lines if "row" in line}
    assert bad == {
        68: "expected an object with a list 'conversations'",
        69: "a conversation needs a question (human) and an answer (gpt)",
        70: "expected an object with a list 'conversations'",
        71: "'image' is ['coco/1.png'], expected one path",
        72: "'utf-8' codec can't encode character '\\ud800' in position 5: surrogates not allowed",
    }
    report = read_report(mixed_folder / "rows.check")
    groups = report["bad_rows"]
    assert groups["'image' is ['coco/N.png'], expected one path"] == {"count": 1, "rows": [71]}
    assert sorted(number for group in groups.values() for number in group["rows"]) == list(bad)
    assert sum(group["count"] for group in groups.values()) == report["total"]["unreadable_rows"] == 5


def test_templates_that_are_unknown(tmp_path: Path) -> None:
    """Rows may name their template; training leaves out those that name another."""
    rows = [make_row(None), make_row(None, template="alpaca"), make_row(None, template="plain")]
    assert run_check(write_rows(tmp_path / "rows.json", rows), tmp_path) == 1
    (bad,) = read_lines(tmp_path / "rows.check/bad.jsonl")
    expected = "template 'alpaca' is unknown, expected one of vicuna_v1, llava_v1, llava_llama_2, plain"
    assert bad == {"row": 1, "reason": expected}
    dataset = open_for_training(tmp_path)
    assert [dataset.rows[int(number)].get("template") for number in dataset.row_numbers] == [None, "plain"]


def open_for_training(folder: Path) -> ConversationDataset:
    """Open `rows.json` without what `data.check` found unusable."""
    options = RenderOptions(tokens_per_image=3, image_size=14, max_tokens=200)
    bad_list = folder / "rows.check/bad.jsonl"
    return ConversationDataset(folder / "rows.json", folder, Tokenizer(TINY_TOKENIZER), options, bad_list)


def test_sources_and_sums(mixed_folder: Path) -> None:
    """A row's own word, else its picture's folder unless that is a number, else text."""
    report = read_report(mixed_folder / "rows.check")
    sources = report["sources"]
    assert {name: (counts["rows"], counts["usable_rows"]) for name, counts in sources.items()} == {
        "coco": (42, 40),
        "corpus": (2, 2),
        "images": (2, 1),
        "text": (24, 20),
        "vg": (3, 3),
    }
    for counts in [*sources.values(), report["total"]]:
        parts = (counts["usable_rows"], counts["unreadable_rows"], counts["rows_of_bad_images"])
        assert sum(parts) == counts["rows"]
        assert counts["usable_images"] + counts["missing"] + sum(counts["broken"].values()) == counts["images"]
    for key in ("rows", "usable_rows", "unreadable_rows", "rows_of_bad_images", "over_long_rows", "tokens_cut"):
        assert sum(counts[key] for counts in sources.values()) == report["total"][key]
    assert report["total"]["images"] == 7  # three of them belong to coco and vg


def test_lengths_are_those_of_training(mixed_folder: Path) -> None:
    """The data set leaves out what the bad list names and reads the rest, token by token the same."""
    dataset = open_for_training(mixed_folder)
    total = read_report(mixed_folder / "rows.check")["total"]
    texts = [dataset.render(index) for index in range(len(dataset))]
    assert len(texts) == total["usable_rows"] == 66
    assert sum(map(len, texts)) == total["tokens"]["sum"] - total["tokens_cut"]
    assert sum(text.num_supervised for text in texts) == total["supervised_tokens"]["sum"]
    assert max(text.num_supervised for text in texts) == total["supervised_tokens"]["max"]
    assert total["over_long_rows"] == sum(len(text) == 200 for text in texts) == 2
    assert total["rows_without_supervised_tokens"] == sum(text.num_supervised == 0 for text in texts) == 1
    assert total["rows_with_empty_answers"] == 5  # 4 of coco, and one of corpus
    assert sum(dataset.load_picture(index) is not None for index in range(len(dataset))) == 44


def test_epoch_is_that_of_training(mixed_folder: Path) -> None:
    """Steps, micro-batches and waiting as the loader makes them with seed 0."""
    dataset = open_for_training(mixed_folder)
    loader = StepDataset(dataset, batch_size=16, micro_batch_tokens=600, seed=0, rank=0, num_ranks=2)
    steps = [loader[number] for number in range(5)]  # 66 rows; the last step goes on into the next epoch
    packing = read_report(mixed_folder / "rows.check")["packing"]
    num_micro_batches = [len(step.micro_batches) for step in steps]
    assert (packing["steps_per_epoch"], packing["steps_dealt"]) == (5, 5)
    assert packing["micro_batches_per_rank_and_step"] == round(sum(num_micro_batches) / 5, 2) > 1
    assert packing["packs_per_epoch"] == 2 * sum(num_micro_batches)
    num_tokens = sum(step.num_tokens for step in steps)
    assert packing["tokens_per_pack"] == round(num_tokens / sum(num_micro_batches) / 2, 1)
    assert packing["share_of_tokens_waited"] == pytest.approx(sum(step.waste for step in steps) / 5, abs=1e-4)


def test_any_number_of_workers_finds_the_same(mixed_folder: Path, tmp_path: Path) -> None:
    """To the byte, in all four files."""
    options = ("--max-tokens", 200, "--batch-size", 16, "--micro-batch-tokens", 600, "--out", tmp_path)
    assert run_check(mixed_folder / "rows.json", mixed_folder, *options, workers=3) == 1
    for name in ("data_report.json", "bad.jsonl", "pictures.jsonl", "token_lengths.png"):
        assert (tmp_path / name).read_bytes() == (mixed_folder / "rows.check" / name).read_bytes()


def make_pictures(folder: Path, number: int) -> Path:
    """Write pictures, some of them cut off, and a file of rows about them."""
    (folder / "images").mkdir()
    for i in range(number):
        content = encode(draw_scene(i, 320, 240), "JPEG")
        (folder / f"images/{i}.jpg").write_bytes(content[: len(content) // 2] if i % 50 == 7 else content)
    return write_rows(folder / "rows.json", [make_row(f"{i}.jpg") for i in range(number)])


def test_a_second_run_decodes_only_what_has_changed(tmp_path: Path) -> None:
    """A line per decoding shows which there were."""
    file = make_pictures(tmp_path, 20)
    records, report = tmp_path / "rows.check/pictures.jsonl", tmp_path / "rows.check/data_report.json"
    assert run_check(file, tmp_path / "images") == 1
    first, found = records.read_bytes(), report.read_bytes()
    assert len(read_lines(records)) == 20
    assert run_check(file, tmp_path / "images") == 1
    assert records.read_bytes() == first
    assert report.read_bytes() == found

    records.write_bytes(first[:-30])  # a kill cut the last line
    assert run_check(file, tmp_path / "images") == 1
    assert report.read_bytes() == found
    whole = first[:-30] + b"\n" + first.splitlines(keepends=True)[-1]
    assert records.read_bytes() == whole

    (tmp_path / "images/7.jpg").write_bytes(encode(draw_scene(7, 320, 240), "JPEG"))  # mended
    assert run_check(file, tmp_path / "images") == 0
    (line,) = records.read_bytes().removeprefix(whole).splitlines()
    assert json.loads(line)["image"] == "7.jpg"
    assert (tmp_path / "rows.check/bad.jsonl").read_bytes() == b""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """A killed command leaves no process behind; run again, it goes on and finds the same."""
    file = make_pictures(tmp_path, 300)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "data.check", file, "--images", tmp_path / "images", "--out", killed, *OPTIONS]
    process = subprocess.Popen([*map(str, command), "--workers", "2"], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (killed / "pictures.jsonl").exists() or not (killed / "pictures.jsonl").stat().st_size:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    num_before = (killed / "pictures.jsonl").read_bytes().count(b"\n")
    assert 0 < num_before < 300
    while has_processes(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    for out in (killed, whole):
        assert run_check(file, tmp_path / "images", "--out", out) == 1
    for name in ("data_report.json", "bad.jsonl", "token_lengths.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert len(read_lines(killed / "pictures.jsonl")) == 300  # none twice


def has_processes(group: int) -> bool:
    """Tell whether a process group has any that still runs (who inherits the dead may not bury them)."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group, *_ = file.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # just ended
            continue
        if int(process_group) == group and state != "Z":
            return True
    return False


def test_decoders_that_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory Python raises an error without text; without a disk nothing is known of the picture."""

    def run_out_of_memory(*_: object) -> None:
        raise MemoryError

    (tmp_path / "a.png").write_bytes(encode(draw_scene(0), "PNG"))
    assert check.inspect_picture(tmp_path, "a.png")["problem"] == ""
    monkeypatch.setattr("data.image.convert_to_rgb", run_out_of_memory)
    assert check.inspect_picture(tmp_path, "a.png")["problem"] == "its decoder gave no reason (out of memory?)"
    (tmp_path / "a.png").unlink()
    gone = check.inspect_picture(tmp_path, "a.png")
    assert gone["problem"].startswith("FileNotFoundError: ")
    assert gone["sha256"] == "0"


KILLERS = """
import os, signal, sys
sys.path[0] = {root!r}
from data import check

def open_image(file):
    if b"kill" in file.getvalue():
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    return picture(file)

picture, check.open_image = check.open_image, open_image
if __name__ == "__main__":
    check.main()
"""


def test_pictures_that_kill_their_process(tmp_path: Path) -> None:
    """They are found one by one and named; what was lost with the process is done again."""
    file = make_pictures(tmp_path, 60)
    for number in (3, 4, 41):
        (tmp_path / f"images/{number}.jpg").write_bytes(encode(draw_scene(number), "JPEG") + b"kill")
    script = tmp_path / "killers.py"
    script.write_text(KILLERS.format(root=str(ROOT)), encoding="utf-8")
    command = [sys.executable, str(script), str(file), "--images", str(tmp_path / "images"), "--workers", "2"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 1, ended.stderr
    bad_list = tmp_path / "rows.check/bad.jsonl"
    assert ended.stdout.splitlines()[-1].startswith(f'5 bad: set bad_list = "{bad_list}" in the stage\'s configuration')
    bad = {line["image"]: line["reason"] for line in read_lines(bad_list)}
    assert [name for name, reason in bad.items() if "was killed" in reason] == ["3.jpg", "4.jpg", "41.jpg"]
    assert len(bad) == 5
    assert len(read_lines(tmp_path / "rows.check/pictures.jsonl")) == 57  # these three will be tried again


def kill_at_thirteen(number: int) -> int:
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.mark.parametrize("num_workers", [1, 3])
def test_work_in_order_whoever_dies(num_workers: int) -> None:
    """All items, in chunks, each with its result."""
    chunks = list(run_chunks(kill_at_thirteen, range(50), 7, num_workers))
    assert [item for items, _ in chunks for item in items] == list(range(50))
    assert [result for _, results in chunks for result in results] == [i * i if i != 13 else None for i in range(50)]
    assert max(len(items) for items, _ in chunks) == 7


def test_pictures_in_shards(cases_folder: Path, tmp_path: Path) -> None:
    """Tars of the same files give the same report."""
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / f"tars/{number}.tar", "w") as tar:
            for case in CASES[number::2]:
                tar.add(cases_folder / "images/web" / case.name, f"web/{case.name}")
    for _ in range(2):
        assert run_check(cases_folder / "rows.json", tmp_path / "tars", "--out", tmp_path / "out") == 1
        assert len(read_lines(tmp_path / "out/pictures.jsonl")) == len(CASES)
    assert read_report(tmp_path / "out") | {"images": ""} == read_report(cases_folder / "rows.check") | {"images": ""}
    assert (tmp_path / "out/bad.jsonl").read_bytes() == (cases_folder / "rows.check/bad.jsonl").read_bytes()


def test_sound_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, a table, and the tokenizer that the lengths are of."""
    (tmp_path / "a.png").write_bytes(encode(draw_scene(0), "PNG"))
    rows = [make_row("a.png", source="sourc\x1b[31m"), make_row(None)]
    assert run_check(write_rows(tmp_path / "rows.json", rows), tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"tokenizer: {TINY_TOKENIZER}, template: vicuna_v1")
    table = [line.split() for line in lines[1:5]]
    assert [row[0] for row in table] == ["source", "'sourc\\x1b[31m'", "text", "total"]
    assert table[3][1:6] == ["2", "2", "1", "0", "0"]
    assert len({len(line) for line in lines[1:5]}) == 1  # aligned
    assert lines[-1] == "all rows and pictures are sound"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, (), "data file .*rows.json is missing"),
        ("[{}, {]", (), "rows.json is not JSON: .* line 1 column"),
        ("[]", (), "holds no rows"),
        ("[1]", ("--workers", 0), "--workers is 0, expected at least 1"),
        ("[1]", ("--tokenizer", "nowhere.model"), "tokenizer nowhere.model is missing"),
        ("[1]", ("--images", "/nowhere"), "image folder /nowhere is missing"),
    ],
)
def test_what_cannot_be_opened(
    content: str | None, options: tuple, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, no traceback."""
    if content is not None:
        (tmp_path / "rows.json").write_text(content, encoding="utf-8")
    arguments = ["check", tmp_path / "rows.json", "--workers", 1, *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        check.main()
