"""What strangers send as a picture is known to be small, and to be one, before it is decoded."""

import base64
import io
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import ExifTags, Image, ImageFile

import demo.pictures
from demo.pictures import MAX_BYTES, MAX_SIDE, fetch, read_data_uri, read_picture
from tests.conftest import ROOT

WAIT_S = 60.0  # of a busy machine


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def claim_size(width: int, height: int, content: bytes = b"") -> bytes:
    """Return a PNG, RGB, that says it has this size, whatever it has."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pieces = [(b"IHDR", header), (b"IDAT", zlib.compress(content)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(make_chunk(kind, piece) for kind, piece in pieces)


SMALL = Image.new("RGB", (7, 5), (250, 10, 20))


def test_a_picture_by_its_content(tmp_path: Path) -> None:
    """Names say nothing: not .jpg of a PNG, and none at all is as good."""
    for name in ("a.jpg", "a.svg", "a"):
        (tmp_path / name).write_bytes(encode(SMALL))
        assert read_picture(tmp_path / name).tobytes() == SMALL.tobytes()
    file = io.BytesIO(encode(SMALL))
    file.seek(3)  # whoever wrote it left the place behind it
    assert read_picture(file).size == (7, 5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_formats(kind: str) -> None:
    image = read_picture(io.BytesIO(encode(SMALL, kind)))
    assert (image.size, image.mode) == ((7, 5), "RGB")


PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\nshowpage\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    "content",
    [
        SVG, EPS, PDF, b"<html><script>alert(1)</script></html>", b"", b"\x00" * 100, b"PK\x03\x04", encode(SMALL)[:8],
        encode(SMALL, "ICO"), encode(SMALL, "PCX"), encode(SMALL, "EPS"), encode(SMALL, "PDF"),
    ],
    ids=["svg", "eps", "pdf", "html", "empty", "zeros", "zip", "head", "ico", "pcx", "real eps", "real pdf"],
)  # fmt: skip
def test_what_is_no_picture(tmp_path: Path, content: bytes) -> None:
    """Also formats that Pillow would open are refused, one of which starts Ghostscript."""
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read the picture: "):
        read_picture(tmp_path / "a.png")


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "none.png")


def test_bytes_are_counted_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is larger than memory, if it were there."""
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="the picture has 1000000000000 bytes, the limit is 10000000"):
        read_picture(tmp_path / "a.png")
    assert MAX_BYTES == 10_000_000
    monkeypatch.setattr(demo.pictures, "MAX_BYTES", len(encode(SMALL)))
    assert read_picture(io.BytesIO(encode(SMALL))).size == (7, 5)
    with pytest.raises(ValueError, match="the limit is"):
        read_picture(io.BytesIO(encode(SMALL) + b"\x00"))


@pytest.mark.parametrize(
    "content",
    [
        claim_size(30_000, 30_000),
        claim_size(7000, 7000),
        claim_size(20_000, 10),
        claim_size(2**31 - 1, 2**31 - 1),
        encode(Image.new("1", (30_000, 30_000))),  # 111 KB, 2.7 GB as RGB
        encode(Image.new("1", (8000, 8000)), "TIFF", compression="group4"),
    ],
    ids=["header", "more than the limit", "long", "huge", "bomb", "tiff"],
)
def test_pixels_are_counted_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"pixels, the limits are 40000000|decompression bomb"):
        read_picture(io.BytesIO(content))
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_picture_that_ends_early() -> None:
    with pytest.raises(ValueError, match="cannot read the picture: "):
        read_picture(io.BytesIO(claim_size(300, 300, b"\x00" * 1000)))


def test_large_pictures_are_kept_small() -> None:
    image = read_picture(io.BytesIO(encode(Image.new("RGB", (4000, 1000), "red"))))
    assert image.size == (MAX_SIDE, MAX_SIDE // 4)
    assert image.getpixel((9, 9)) == (255, 0, 0)


def test_notes_of_a_picture_end_here() -> None:
    """Where and when it was taken, and by whom; how the camera was held is obeyed."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "Anna"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 51.0, 30.0)
    content = encode(SMALL, "JPEG", exif=exif, comment=b"secret", icc_profile=b"a profile", quality=95)
    before = Image.open(io.BytesIO(content))
    assert before.getexif()[ExifTags.Base.Artist] == "Anna"
    assert before.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    image = read_picture(io.BytesIO(content))
    assert image.size == (5, 7)
    assert image.info == {}
    assert not image.getexif()
    for kind in ("PNG", "JPEG", "WEBP"):
        saved = encode(image, kind)
        assert not [secret for secret in (b"Anna", b"secret", b"profile", b"Exif", b"GPS") if secret in saved]


def test_few_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve people send one; two are decoded, and the others wait."""
    begun, gate = threading.Semaphore(0), threading.Event()
    running: list[int] = []
    most: list[int] = []

    def decode(*_: object) -> Image.Image:
        running.append(1)
        most.append(len(running))
        begun.release()
        assert gate.wait(WAIT_S)
        running.pop()
        return SMALL.copy()

    monkeypatch.setattr(demo.pictures, "open_image", decode)
    threads = [threading.Thread(target=read_picture, args=(io.BytesIO(b"a"),)) for _ in range(12)]
    for thread in threads:
        thread.start()
    assert all(begun.acquire(timeout=WAIT_S) for _ in range(2))
    assert not begun.acquire(timeout=0.1)
    gate.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert max(most) == 2
    assert len(most) == 12


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/svg+xml", ""])
def test_data_uri(kind: str) -> None:
    """What it says it is means no more than a file's name."""
    text = f"data:{kind};base64," + base64.b64encode(encode(SMALL)).decode()
    assert read_data_uri(text).tobytes() == SMALL.tobytes()


GOOD = base64.b64encode(encode(SMALL)).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a picture as data:image/"),
        (GOOD, "expected a picture as data:image/"),
        ("data:image/png," + GOOD, "expected a picture as data:image/"),
        ("data:image/png;charset=utf-8;base64," + GOOD, "expected a picture as data:image/"),
        ("data:" + "a" * 10_000_000, "expected a picture as data:image/"),
        (" data:image/png;base64," + GOOD, "expected a picture as data:image/"),
        ("data:image/png;base64," + GOOD[:-3], "is not base64"),
        ("data:image/png;base64,%%%%" + GOOD, "is not base64"),
        ("data:image/png;base64,很", "only ASCII"),
        ("data:image/png;base64,", "cannot read the picture"),
        ("data:image/png;base64," + base64.b64encode(SVG).decode(), "cannot read the picture: it is none of JPEG, PNG"),
        ("data:image/png;base64," + base64.b64encode(claim_size(9000, 9000)).decode(), "9000 x 9000 pixels"),
        ("data:image/png;base64," + "A" * 14_000_000, "bytes, the limit is 10000000"),
    ],
)  # fmt: skip
def test_bad_data_uris(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_data_uri(text)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "127.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[::]", "2130706433", "0x7f000001",
        "0177.0.0.1", "[fe80::1]", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    ],
)  # fmt: skip
def test_private_addresses_are_not_even_connected_to(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """The own machine, the own network, and where clouds tell secrets, however it is written."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it was connected to"))
        with pytest.raises(ValueError, match="inside a private network"):
            fetch(f"http://{host}:{server.getsockname()[1]}/secret.png")
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a.png", "http://", "gopher://a", "//a/b.png"])
def test_other_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="not an address that starts with http://"):
        fetch(url)


class Redirecting(BaseHTTPRequestHandler):
    """Sends everybody to the secret, and gives it away."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(302 if self.path == "/public" else 200)
        self.send_header("Location", "/secret")
        self.end_headers()
        self.wfile.write(encode(SMALL))

    def log_message(self, *_: object) -> None:
        pass


def test_a_public_address_cannot_send_to_a_private_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Redirecting.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        checked = iter([True])  # the first look takes the address for a public one
        monkeypatch.setattr("data.web.is_public", lambda _: next(checked, False))
        with pytest.raises(ValueError, match="inside a private network"):
            fetch(f"http://127.0.0.1:{port}/public")
        assert Redirecting.asked == ["/public"]
        monkeypatch.setattr("data.web.is_public", lambda _: True)
        assert fetch(f"http://127.0.0.1:{port}/public").tobytes() == SMALL.tobytes()
        server.shutdown()


FLOOD = """
import io, sys, threading
from pathlib import Path
from PIL import Image
from demo.pictures import read_picture

def count_resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

file = io.BytesIO()
Image.new("RGB", (6000, 6000)).save(file, "JPEG")
read_picture(io.BytesIO(file.getvalue()))
before = count_resident_bytes()
for _ in range(2):
    threads = [threading.Thread(target=read_picture, args=[io.BytesIO(file.getvalue())]) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
print((count_resident_bytes() - before) // 10**6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_large_pictures_returns() -> None:
    """Decoded, each takes 108 MB. In a process of its own, whose memory nobody else fills."""
    ended = subprocess.run([sys.executable, "-c", FLOOD], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 60
