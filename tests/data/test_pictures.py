"""Folders and tar shards as people have them: other letter cases, other Unicode forms, other tools, damage."""

import io
import multiprocessing
import os
import pickle
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.pictures import INDEX_NAME, Names, PictureFolder

ACCENT = unicodedata.normalize("NFC", "café/Bücher.jpg")
ACCENT_OF_MAC = unicodedata.normalize("NFD", ACCENT)
CHINESE = "图片/红色的圆形.png"
LONG = "/".join(["a" * 60, "b" * 60, "c" * 90 + ".jpg"])
FILES = {
    "coco/train2017/000000000009.jpg": b"nine",
    "coco/train2017/000000000025.JPG": b"twenty-five",
    "VG_100K_2/1.jpg": b"",
    "top.png": b"top" * 1000,
    CHINESE: b"red circle",
    ACCENT_OF_MAC: b"books",
    LONG: b"far down",
    "two.dots.jpg": b"..",
}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(file: Path, files: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=kind) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def run_tar(folder: Path, file: Path, *options: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", *options, "-C", str(folder), "-cf", str(file), "."], check=True, capture_output=True)


@pytest.fixture(params=["folder", "gnu", "pax", "ustar", "python", "several"])
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> PictureFolder:
    """The same files lying in a folder, in tars that the `tar` command made, and in several that Python made."""
    kind, shards = request.param, tmp_path / "shards"
    folder = write_files(tmp_path / "folder", FILES)
    if kind == "folder":
        return PictureFolder(folder)
    if kind in ("gnu", "pax", "ustar"):
        run_tar(folder, shards / "all.tar", f"--format={kind}")
    elif kind == "python":
        write_tar(shards / "all.tar", FILES, tarfile.GNU_FORMAT)
    else:
        for number, (name, content) in enumerate(FILES.items()):
            write_tar(shards / f"{number % 3}.tar" if number < 3 else shards / f"{number}.tar", {name: content})
    return PictureFolder(shards)


def test_every_file_is_found_and_read(pictures: PictureFolder) -> None:
    for name, content in FILES.items():
        assert pictures.find(name) == name
        assert pictures.read(name) == content
        assert pictures.measure(name) == len(content)


def test_other_letter_cases_and_unicode_forms(pictures: PictureFolder) -> None:
    """What the row says is not always what the zip unpacked to."""
    assert ACCENT != ACCENT_OF_MAC
    for asked, stored in (
        ("coco/train2017/000000000009.JPG", "coco/train2017/000000000009.jpg"),
        ("COCO/Train2017/000000000025.jpg", "coco/train2017/000000000025.JPG"),
        ("vg_100k_2/1.JPG", "VG_100K_2/1.jpg"),
        (ACCENT, ACCENT_OF_MAC),
        (ACCENT.upper(), ACCENT_OF_MAC),
        ("./coco//train2017/./000000000009.jpg", "coco/train2017/000000000009.jpg"),
    ):
        assert pictures.find(asked) == stored
        assert pictures.read(asked) == FILES[stored]


def test_what_is_missing(pictures: PictureFolder) -> None:
    for name in (
        "coco/train2017/1.jpg",
        "nowhere/1.jpg",
        "top.jpg",
        "coco",
        "coco/",
        "",
        "top.png/1.jpg",
        "\udcff\ud800",
    ):
        assert pictures.find(name) is None
        with pytest.raises(FileNotFoundError, match="missing"):
            pictures.read(name)


def test_names_that_lead_out_are_refused(pictures: PictureFolder) -> None:
    (pictures.folder.parent / "secret.jpg").write_bytes(b"secret")
    for name in ("../secret.jpg", "coco/../../secret.jpg", str(pictures.folder / "top.png"), "top.png\0", ".."):
        for function in (pictures.find, pictures.read, pictures.measure):
            with pytest.raises(ValueError, match="leads out of the image folder"):
                function(name)


def read_all(pictures: PictureFolder) -> list[bytes]:
    return [pictures.read(name) for name in FILES]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_on_their_own(tmp_path: Path, method: str) -> None:
    """Loader workers get a copy, of what is open already too."""
    folder = write_files(tmp_path / "folder", FILES)
    run_tar(folder, tmp_path / "shards/0.tar")
    both = [PictureFolder(folder), PictureFolder(tmp_path / "shards")]
    expected = [read_all(pictures) for pictures in both]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, both * 4, chunksize=1) == expected * 4
    assert [read_all(pictures) for pictures in both] == expected


def test_names_that_differ_only_by_case_are_told_apart(tmp_path: Path) -> None:
    files = {"A.jpg": b"large", "a.JPG": b"small", "D/1.jpg": b"D", "d/1.jpg": b"d", "b.jpg": b"b"}
    write_files(tmp_path / "folder", files)
    write_tar(tmp_path / "shards/0.tar", files)
    for pictures in (PictureFolder(tmp_path / "folder"), PictureFolder(tmp_path / "shards")):
        assert {name: pictures.read(name) for name in files} == files
        assert [pictures.find(name) for name in ("a.jpg", "A.JPG", "B.JPG")] == [None, None, "b.jpg"]
        assert pictures.find("D/1.JPG") == ("D/1.jpg" if pictures.shards is None else None)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Old Chinese zips unpack to GBK: such a name cannot stand in a JSON file, but must not stop the others."""
    name = os.fsdecode("图.jpg".encode("gbk"))
    folder = write_files(tmp_path / "folder", {name: b"gbk", "a.jpg": b"a"})
    run_tar(folder, tmp_path / "shards/0.tar")
    for pictures in (PictureFolder(folder), PictureFolder(tmp_path / "shards")):
        assert [pictures.read(stored) for stored in ("a.JPG", name)] == [b"a", b"gbk"]
        assert pictures.find(name.replace("jpg", "JPG")) == name


def test_links_lead_where_they_lead(tmp_path: Path) -> None:
    """Data sets are often put together from links to where they really lie."""
    write_files(tmp_path / "disk", {"x/1.jpg": b"1"})
    folder = write_files(tmp_path / "folder", {"2.jpg": b"2"})
    (folder / "coco").symlink_to(tmp_path / "disk/x")
    (folder / "one.jpg").symlink_to(tmp_path / "disk/x/1.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "disk/x/3.jpg")
    pictures = PictureFolder(folder)
    assert pictures.read("coco/1.jpg") == pictures.read("one.jpg") == b"1"
    assert pictures.find("gone.jpg") is None


def test_pictures_are_opened_and_named_when_they_cannot_be(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("L", (7, 5), 200).save(content, "PNG")
    files = {"x/grey.png": content.getvalue(), "x/page.jpg": b"<html>not found</html>"}
    write_files(tmp_path / "folder", files)
    write_tar(tmp_path / "shards/0.tar", files)
    for folder in (tmp_path / "folder", tmp_path / "shards"):
        picture = PictureFolder(folder).open("x/grey.png")
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (7, 5), (200, 200, 200))
        with pytest.raises(ValueError, match=re.escape(f"{folder}/x/page.jpg: cannot read")):
            PictureFolder(folder).open("x/page.jpg")


def test_names_with_equal_checksums_are_told_apart() -> None:
    """CRC-32 is short: of 665 thousand names, some fifty pairs share one. These two do."""
    first, second, names = "plumless", "buckeroo", ["other", "buckeroo"]
    assert Names.of([first, second]).keys[0] == Names.of([first, second]).keys[1]
    assert [Names.of(names).find(name) is None for name in (first, second)] == [True, False]
    both = Names.of([first, "other", second])
    for name in (first, second):
        place = both.find(name.upper())
        assert place is not None
        assert both[place] == name
    assert both.find_repeated() == {}


def test_where_pictures_lie_in_the_shards(tmp_path: Path) -> None:
    """What an order that reads shards from front to back is made of."""
    write_tar(tmp_path / "1.tar", {"c.jpg": b"3" * 600, "d.jpg": b"4"})
    write_tar(tmp_path / "0.tar", {"a.jpg": b"1"})
    located = PictureFolder(tmp_path).locate(["d.jpg", None, "C.jpg", "missing.jpg", "a.jpg"])
    assert located is not None
    assert located[0].tolist() == [1, -1, 1, -1, 0]
    assert located[1].tolist() == [512 + 1024 + 512, -1, 512, -1, 512]
    assert located[1].dtype == np.int64
    assert PictureFolder(write_files(tmp_path / "plain", FILES)).locate(["a.jpg"]) is None


def test_shards_of_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture, its text and its JSON side by side, under a key; other files beside the shards."""
    for shard in range(2):
        files: dict[str, bytes] = {}
        for key in range(shard * 3, shard * 3 + 3):
            files |= {f"{key:06d}.jpg": b"jpg%d" % key, f"{key:06d}.json": b"{}", f"{key:06d}.txt": b"a caption"}
        write_tar(tmp_path / f"cc3m-{shard:04d}.tar", files)
    write_files(tmp_path, {"sizes.json": b"{}", "000009.jpg": b"beside"})
    pictures = PictureFolder(tmp_path)
    assert [pictures.read(f"{key:06d}.jpg") for key in range(6)] == [b"jpg%d" % key for key in range(6)]
    assert pictures.find("000009.jpg") is None
    assert "from its 2 tars, not from 2 others" in capsys.readouterr().err


def test_members_that_are_no_files_are_not_found(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "folder", {"x/1.jpg": b"1"})
    (folder / "link.jpg").symlink_to("x/1.jpg")
    os.mkfifo(folder / "pipe.jpg")
    run_tar(folder, tmp_path / "shards/0.tar")
    pictures = PictureFolder(tmp_path / "shards")
    assert [pictures.find(name) for name in ("x/1.jpg", "x", "link.jpg", "pipe.jpg")] == ["x/1.jpg", None, None, None]


def test_the_index_is_kept_until_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": b"old", "b.jpg": b"b"})
    first = PictureFolder(tmp_path)
    written = (tmp_path / INDEX_NAME).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("data.pictures.list_members", None)  # not needed
        assert PictureFolder(tmp_path).read("a.jpg") == b"old"
    (tmp_path / INDEX_NAME).write_bytes(written[:-20])
    assert PictureFolder(tmp_path).read("a.jpg") == b"old"
    assert (tmp_path / INDEX_NAME).read_bytes() == written

    time = os.stat(shard).st_mtime_ns
    write_tar(shard, {"b.jpg": b"bbb", "a.jpg": b"new"})
    os.utime(shard, ns=(time + 1, time + 1))
    assert PictureFolder(tmp_path).read("a.jpg") == b"new"
    with pytest.raises(ValueError, match=r"0\.tar has changed since it was opened"):
        pickle.loads(pickle.dumps(first)).read("a.jpg")
    write_tar(tmp_path / "1.tar", {"c.jpg": b"c"})
    assert PictureFolder(tmp_path).read("c.jpg") == b"c"


def test_a_folder_that_cannot_be_written_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"a"})

    def refuse(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr("data.pictures.save", refuse)
    assert PictureFolder(tmp_path).read("a.jpg") == b"a"
    assert "cannot be written (read-only file system)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["0.tar"]


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    write_tar(tmp_path / "1.tar", {"./b.jpg": b"3"})
    with pytest.raises(ValueError, match=re.escape("b.jpg is in 0.tar and 1.tar")):
        PictureFolder(tmp_path)


@pytest.mark.parametrize("cut", ["content", "header", "end"])
def test_cut_off_tars_are_refused(tmp_path: Path, cut: str) -> None:
    """A download that broke off: in a picture, in a header, or between two members, which tar itself lets pass."""
    files = {"first.jpg": b"1" * 2000, "second.jpg": b"2" * 2000}
    content = write_tar(tmp_path / "0.tar", files).read_bytes()
    second = 512 + 2048
    size = {"content": second + 512 + 700, "header": second + 100, "end": second}[cut]
    (tmp_path / "0.tar").write_bytes(content[:size])
    named = "second.jpg" if cut == "content" else "first.jpg"
    with pytest.raises(ValueError, match=rf"0\.tar .*cut off or damaged \w+ {named}"):
        PictureFolder(tmp_path)


def test_damaged_and_hostile_headers_are_refused(tmp_path: Path) -> None:
    files = {"first.jpg": b"1" * 2000, "second.jpg": b"2" * 2000}
    good = write_tar(tmp_path / "0.tar", files).read_bytes()
    second = 512 + 2048

    def set_size(field: bytes) -> bytes:
        header = bytearray(good[second : second + 512])
        header[124:136] = field
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return good[:second] + bytes(header) + good[second + 512 :]

    for content in (
        good[: second + 3] + b"?" + good[second + 4 :],  # one letter of a name: the checksum is wrong
        set_size(b"77777777777\0"),  # 8 GB
        set_size(b"\xff" * 12),  # -1
        set_size(b"\x80" + b"\xff" * 11),  # 2**88
        b"<html>not found</html>",
        b"",
    ):
        (tmp_path / "0.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"0\.tar is .*(cut off|damaged)"):
            PictureFolder(tmp_path)


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "folder", {"a.jpg": b"a"})
    run_tar(folder, tmp_path / "renamed/0.tar", "-z")
    with pytest.raises(ValueError, match=r"0\.tar is compressed.*unpack it"):
        PictureFolder(tmp_path / "renamed")
    run_tar(folder, tmp_path / "named/0.tar.gz", "-z")
    with pytest.raises(ValueError, match=r"holds compressed tars.*unpack them"):
        PictureFolder(tmp_path / "named")


def test_a_tar_with_holes_is_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "folder", {"a.jpg": b"a"})
    os.truncate(folder / "a.jpg", 1_000_000)
    run_tar(folder, tmp_path / "shards/0.tar", "--sparse", "--format=gnu")
    with pytest.raises(ValueError, match=r"a\.jpg is stored with its holes left out"):
        PictureFolder(tmp_path / "shards")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere is missing"):
        PictureFolder(tmp_path / "nowhere")
