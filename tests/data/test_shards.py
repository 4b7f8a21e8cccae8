"""Pictures packed into shards and read in their order: nothing lost, the same bytes, no shard read twice."""

import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from data.pictures import INDEX_NAME, PictureFolder, list_members
from data.shards import order_by_shard, plan_shards, write_shards
from tests.conftest import ROOT

NUM_PICTURES = 60
SHARD_BYTES = 40_000


def make_pictures(folder: Path) -> dict[str, bytes]:
    """Write files of 1 to 4,000 bytes, among them one with a name too long and one with a name too French for ustar."""
    random = np.random.default_rng(0)
    names = [f"coco/train2017/{number:012d}.jpg" for number in range(NUM_PICTURES - 3)]
    names += [unicodedata.normalize("NFD", "café/1.jpg"), "/".join(["long" * 15] * 3) + ".jpg", "图.png"]
    files = {name: random.bytes(int(random.integers(1, 4000))) for name in names}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def write_rows(file: Path, images: list[str | None]) -> Path:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    text = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
    rows = [{"image": image, "conversations": turns} if image else {"conversations": text} for image in images]
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return file


def run_command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data.shards", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def read_shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.tar")}


def test_the_command_packs_every_picture_once(tmp_path: Path) -> None:
    files = make_pictures(tmp_path / "images")
    (tmp_path / "images/unasked.jpg").write_bytes(b"not in any row")
    images = [*files, None, *list(files)[:20], "./coco//train2017/000000000003.jpg"]
    rows = write_rows(tmp_path / "rows.json", images)
    done = run_command(rows, "--images", tmp_path / "images", "--out", tmp_path / "shards", "--shard-mb", 0.04)
    assert done.returncode == 0, done.stderr
    num_shards = len(read_shards(tmp_path / "shards"))
    assert f"{NUM_PICTURES} pictures in {num_shards} shards" in done.stdout
    assert num_shards > 2
    assert INDEX_NAME in os.listdir(tmp_path / "shards")

    pictures = PictureFolder(tmp_path / "shards")
    assert {name: pictures.read(name) for name in files} == files
    assert all(pictures.find(name) for name in images if name)
    members = [name for file in sorted((tmp_path / "shards").glob("*.tar")) for name, _, _ in list_members(file)]
    assert sorted(members) == sorted(files)
    assert members != sorted(files), "shuffled"


def test_other_tools_read_the_shards(tmp_path: Path) -> None:
    files = make_pictures(tmp_path / "images")
    write_shards(files, PictureFolder(tmp_path / "images"), tmp_path / "shards", SHARD_BYTES, seed=0)
    (tmp_path / "unpacked").mkdir()
    for shard in (tmp_path / "shards").glob("*.tar"):
        assert shard.stat().st_size < SHARD_BYTES + 20_000  # tar's own blocks
        subprocess.run(["tar", "-xf", str(shard), "-C", str(tmp_path / "unpacked")], check=True)
    assert {name: (tmp_path / "unpacked" / name).read_bytes() for name in files} == files


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    files = make_pictures(tmp_path / "images")
    pictures = PictureFolder(tmp_path / "images")
    write_shards(files, pictures, tmp_path / "first", SHARD_BYTES, seed=0)
    for name in files:
        os.utime(tmp_path / "images" / name, (1, 1))
        os.chmod(tmp_path / "images" / name, 0o600)
    write_shards(
        reversed([*files, *files]), PictureFolder(tmp_path / "images"), tmp_path / "second", SHARD_BYTES, seed=0
    )
    write_shards(files, pictures, tmp_path / "other", SHARD_BYTES, seed=1)
    # From shards into other shards, the same again.
    write_shards(files, PictureFolder(tmp_path / "other"), tmp_path / "third", SHARD_BYTES, seed=0)
    first = read_shards(tmp_path / "first")
    assert first == read_shards(tmp_path / "second") == read_shards(tmp_path / "third")
    assert first != read_shards(tmp_path / "other")


def test_a_picture_larger_than_a_shard_has_one_to_itself(tmp_path: Path) -> None:
    sizes = {"a": 1000, "b": 5000, "c": 512, "d": 513, "e": 1}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    plan = plan_shards(list(sizes), PictureFolder(tmp_path), 3 * 1024)
    assert plan == [[("a", 1000)], [("b", 5000)], [("c", 512), ("d", 513)], [("e", 1)]]


def test_an_interrupted_run_goes_on_with_the_shard_that_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_pictures(tmp_path / "images")
    pictures = PictureFolder(tmp_path / "images")
    write_shards(files, pictures, tmp_path / "whole", SHARD_BYTES, seed=0)
    whole = read_shards(tmp_path / "whole")

    class Broken(PictureFolder):
        def read(self, name: str) -> bytes:
            if name == list(list_members(tmp_path / "whole/00002.tar"))[-1][0]:
                raise OSError("the network is gone")
            return super().read(name)

    with pytest.raises(OSError, match="the network is gone"):
        write_shards(files, Broken(tmp_path / "images"), tmp_path / "shards", SHARD_BYTES, seed=0)
    assert sorted(os.listdir(tmp_path / "shards")) == ["00000.tar", "00001.tar"]
    finished = (tmp_path / "shards/00001.tar").stat()
    write_shards(files, pictures, tmp_path / "shards", SHARD_BYTES, seed=0)
    assert read_shards(tmp_path / "shards") == whole
    again = (tmp_path / "shards/00001.tar").stat()
    assert (again.st_ino, again.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)


def test_a_killed_run_leaves_nothing_half_under_a_shards_name(tmp_path: Path) -> None:
    """Its last picture takes so long to come that the killing finds the shard half written."""
    files = {"a.jpg": b"a" * 9000, "b.jpg": b"b" * 9000}
    images = tmp_path / "images"
    images.mkdir()
    for name, content in files.items():
        (images / name).write_bytes(content)
    code = (
        "import sys, time; from pathlib import Path; import data.shards as shards; from data.pictures import *\n"
        "class Slow(PictureFolder):\n"
        "    def read(self, name):\n"
        "        if name == sys.argv[3]: print('half', flush=True); time.sleep(600)\n"
        "        return super().read(name)\n"
        "shards.write_shards(['a.jpg', 'b.jpg'], Slow(Path(sys.argv[1])), Path(sys.argv[2]), 10 ** 6, 0)\n"
    )
    write_shards(files, PictureFolder(images), tmp_path / "whole", 10**6, seed=0)
    last = list(list_members(tmp_path / "whole/00000.tar"))[-1][0]
    command = [sys.executable, "-c", code, str(images), str(tmp_path / "shards"), last]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path / "shards") == ["00000.tar.partial"]
    write_shards(files, PictureFolder(images), tmp_path / "shards", 10**6, seed=0)
    assert read_shards(tmp_path / "shards") == read_shards(tmp_path / "whole")
    assert os.listdir(tmp_path / "shards") == ["00000.tar"]


def test_a_full_disk_leaves_no_shard(tmp_path: Path) -> None:
    files = make_pictures(tmp_path / "images")
    rows = write_rows(tmp_path / "rows.json", list(files))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = run_command(rows, "--images", tmp_path / "images", "--out", tmp_path / "shards", preexec_fn=limit)
    assert done.returncode == 1
    assert "error: [Errno 27] File too large" in done.stderr
    assert os.listdir(tmp_path / "shards") == []


def test_missing_pictures_are_an_error_before_anything_is_written(tmp_path: Path) -> None:
    files = make_pictures(tmp_path / "images")
    rows = write_rows(tmp_path / "rows.json", [*files, "gone/1.jpg", "gone/2.jpg"])
    done = run_command(rows, "--images", tmp_path / "images", "--out", tmp_path / "shards")
    assert done.returncode == 1
    assert f"error: 2 of {NUM_PICTURES + 2} pictures are missing in" in done.stderr
    assert "gone/1.jpg" in done.stderr
    assert "data.check" in done.stderr
    assert not (tmp_path / "shards").exists()
    (tmp_path / "bad.jsonl").write_text('{"image": "gone/1.jpg"}\n{"image": "gone/2.jpg"}\n', encoding="utf-8")
    without = ("--bad-list", tmp_path / "bad.jsonl")
    done = run_command(rows, "--images", tmp_path / "images", "--out", tmp_path / "shards", *without)
    assert done.returncode == 0, done.stderr
    assert f"{NUM_PICTURES} pictures in 1 shards" in done.stdout


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    files = make_pictures(tmp_path / "images")
    pictures = PictureFolder(tmp_path / "images")
    with pytest.raises(ValueError, match="no row has a picture"):
        write_shards([], pictures, tmp_path / "empty", SHARD_BYTES, seed=0)
    with pytest.raises(ValueError, match="is no part of this set: choose an empty folder"):
        write_shards(files, pictures, tmp_path / "images", SHARD_BYTES, seed=0)
    write_shards(files, pictures, tmp_path / "shards", SHARD_BYTES, seed=0)
    before = read_shards(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"00000\.tar holds other pictures than it should"):
        write_shards(files, pictures, tmp_path / "shards", SHARD_BYTES, seed=1)
    with pytest.raises(ValueError, match=r"holds 0000\d\.tar, which is no part of this set"):
        write_shards(files, pictures, tmp_path / "shards", SHARD_BYTES * 100, seed=0)
    assert read_shards(tmp_path / "shards") == before


def make_places(num_rows: int, num_shards: int, share_of_text: float) -> tuple[np.ndarray, np.ndarray]:
    """Return shards and offsets of rows, several rows about some pictures, shards of different sizes."""
    random = np.random.default_rng(7)
    shards = (num_shards * random.random(num_rows) ** 1.5).astype(np.int32)
    offsets = 512 * random.integers(1, num_rows // 2, num_rows)
    is_text = random.random(num_rows) < share_of_text
    return np.where(is_text, -1, shards), np.where(is_text, -1, offsets)


@pytest.mark.parametrize(("num_shards", "side_by_side"), [(50, 16), (16, 16), (17, 16), (5, 1), (3, 16)])
def test_an_epoch_reads_every_shard_once_from_front_to_back(num_shards: int, side_by_side: int) -> None:
    shards, offsets = make_places(4000, num_shards, share_of_text=0.2)
    order = order_by_shard(shards, offsets, epoch=2, seed=3, side_by_side=side_by_side)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(4000))
    first, last = {}, {}
    entries = []
    for shard in range(num_shards):
        places = np.flatnonzero(shards[order] == shard)
        read = offsets[order][places]
        wraps = np.flatnonzero(np.diff(read) < 0)
        assert len(wraps) <= 1
        assert len(wraps) == 0 or read[-1] <= read[0]
        entries.append(len(read) - 1 - wraps[0] if len(wraps) else 0)
        first[shard], last[shard] = places[0], places[-1]
    assert len(set(entries)) > num_shards // 2, "each is entered at a place of its own"
    for place in range(4000):
        assert sum(first[shard] <= place <= last[shard] for shard in range(num_shards)) <= side_by_side


def test_shards_read_side_by_side_are_mixed() -> None:
    """Any stretch of the epoch sees all the open shards, in proportion."""
    shards, offsets = np.repeat(np.arange(32), 500), np.tile(np.arange(500), 32)
    read = shards[order_by_shard(shards, offsets, epoch=0, seed=0)]
    for start in range(0, len(read), 2000):
        counts = np.unique(read[start : start + 2000], return_counts=True)[1]
        assert len(counts) == 16
        assert counts.min() > 2000 / 16 / 2
        assert counts.max() < 2000 / 16 * 2


def test_rows_without_picture_lie_evenly_among_the_others() -> None:
    """Else some steps would be all text, and the vision tower would idle."""
    shards, offsets = make_places(6000, 40, share_of_text=0.0)
    shards[1000:2000] = -1
    order = order_by_shard(shards, offsets, epoch=0, seed=0)
    is_text = shards[order] < 0
    assert {int(is_text[start : start + 120].sum()) for start in range(5880)} <= {19, 20, 21}
    text = order[is_text]
    assert abs(np.corrcoef(text, np.arange(1000))[0, 1]) < 0.1, "shuffled"


def test_the_order_depends_on_epoch_and_seed_alone() -> None:
    shards, offsets = make_places(3000, 20, share_of_text=0.1)
    order = order_by_shard(shards, offsets, epoch=1, seed=5)
    assert np.array_equal(order, order_by_shard(shards, offsets, epoch=1, seed=5))
    for epoch, seed in ((0, 5), (2, 5), (1, 4), (5, 1)):
        other = order_by_shard(shards, offsets, epoch=epoch, seed=seed)
        assert np.mean(order == other) < 0.05
        assert {*shards[order[:1000]]} != {*shards[other[:1000]]}, "the shards come in another order"


def test_epochs_of_nothing_but_text_or_pictures_and_of_few_rows() -> None:
    for shards in ([], [-1], [-1, -1, -1], [0], [7, 7, 9]):
        offsets = np.arange(len(shards))
        assert sorted(order_by_shard(np.array(shards, dtype=np.int32), offsets, epoch=0, seed=0)) == offsets.tolist()


def test_the_order_of_665_thousand_rows_takes_no_time() -> None:
    shards, offsets = make_places(665_000, 60, share_of_text=0.06)
    start = time.process_time()
    order_by_shard(shards, offsets, epoch=0, seed=0)
    assert time.process_time() - start < 3


def test_members_follow_webdatasets_convention(tmp_path: Path) -> None:
    """One file per key, plain members, of no time and nobody."""
    files = make_pictures(tmp_path / "images")
    write_shards(files, PictureFolder(tmp_path / "images"), tmp_path / "shards", SHARD_BYTES, seed=0)
    for shard in (tmp_path / "shards").glob("*.tar"):
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
        keys = [os.path.join(os.path.dirname(m.name), os.path.basename(m.name).split(".")[0]) for m in members]
        assert len(set(keys)) == len(keys)
        assert {(m.type, m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {
            (tarfile.REGTYPE, 0, 0, 0, "", 0o644)
        }
