"""Pictures from a server that does everything wrong, on this machine."""

import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

import data.web
from data.image import open_image
from data.web import fetch_picture, is_public, is_url


def encode_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (7, 5), (250, 10, 20)).save(file, "PNG")
    return file.getvalue()


PICTURE = encode_picture()
REDIRECTS = {
    "/once": "/picture.png",
    "/loop": "/loop",
    "/ping": "/pong",
    "/pong": "/ping",
    "/to-file": "file:///etc/hostname",
    "/to-ftp": "ftp://127.0.0.1/picture.png",
    **{f"/chain{number}": f"/chain{number - 1}" for number in range(1, 8)},
    "/chain0": "/picture.png",
}


class Handler(BaseHTTPRequestHandler):
    """Answers by path."""

    agents: list[str]

    def do_GET(self) -> None:
        self.agents.append(self.headers["User-Agent"])
        if self.path in REDIRECTS:
            self.send_response(302)
            self.send_header("Location", REDIRECTS[self.path])
            self.end_headers()
        elif self.path in ("/picture.png", "/%E7%8C%AB.png?q=%E7%8B%97"):
            self.answer(PICTURE)
        elif self.path == "/page":
            self.answer(b"<html>sold out</html>")
        elif self.path == "/promises-much":
            self.answer(b"", length=10**12)
        elif self.path == "/no-length":
            self.answer(b"x" * 200_000, length=None)
        elif self.path == "/drips-body":
            self.answer(b"", length=1000)
            self.drip(b"x" * 1000)
        elif self.path == "/drips-headers":
            self.drip(b"HTTP/1.0 200 OK\r\nX: " + b"x" * 1000)
        elif self.path == "/redirects-with-endless-body":
            self.send_response(302)
            self.send_header("Location", "/picture.png")
            self.end_headers()
            self.drip(b"x" * 1000)
        elif self.path == "/nonsense":
            self.wfile.write(b"\x00\x01 what?\r\n\r\n")
        else:
            self.send_error(404)

    def answer(self, content: bytes, length: int | None = -1) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(len(content) if length < 0 else length))
        self.end_headers()
        self.wfile.write(content)

    def drip(self, content: bytes) -> None:
        """Send a byte now and then: no single read takes long."""
        try:
            for number in range(len(content)):
                self.wfile.write(content[number : number + 1])
                time.sleep(0.02)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    Handler.agents = []
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize(
    "path", ["/picture.png", "/once", "/猫.png?q=狗#part", "/chain4", "/redirects-with-endless-body"]
)
def test_picture(server: str, path: str) -> None:
    """Straight, after redirects, and under a Chinese name."""
    began = time.monotonic()
    assert open_image(fetch_picture(server + path)).size == (7, 5)
    assert time.monotonic() - began < 5
    assert Handler.agents[-1].startswith("plain-llava")


def test_page_instead_of_a_picture(server: str) -> None:
    """What came is judged by the one who opens it."""
    with pytest.raises(ValueError, match="cannot read the picture: it is none of JPEG, PNG"):
        open_image(fetch_picture(server + "/page"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "the server answers 404, Not Found"),
        ("/loop", "redirects more than 5 times"),
        ("/ping", "redirects more than 5 times"),
        ("/chain5", "redirects more than 5 times"),
        ("/to-file", "not allowed"),
        ("/to-ftp", "ftp://127.0.0.1/picture.png is not an address that starts with http"),
        ("/nonsense", "what"),
    ],
)
def test_answers_that_are_refused(server: str, path: str, message: str) -> None:
    """Each is named, with the address."""
    with pytest.raises(ValueError, match=f"cannot fetch {server}{path}: .*{message}"):
        fetch_picture(server + path)


@pytest.mark.parametrize("path", ["/no-length", "/picture.png"])
def test_size_limit(server: str, path: str) -> None:
    """It counts what comes, since a server need not say how much that will be."""
    size = 200_000 if path == "/no-length" else len(PICTURE)
    assert len(fetch_picture(server + path, max_bytes=size).getvalue()) == size
    with pytest.raises(ValueError, match=f"{path}: it is larger than {size - 1} bytes"):
        fetch_picture(server + path, max_bytes=size - 1)


@pytest.mark.parametrize("path", ["/drips-body", "/drips-headers"])
def test_time_limit(server: str, path: str) -> None:
    """It holds for the whole, however often a byte arrives."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"cannot fetch {server}{path}: it took longer than 0.5 s"):
        fetch_picture(server + path, timeout_s=0.5)
    assert time.monotonic() - began < 2


def test_server_that_is_silent_or_absent() -> None:
    """Neither is waited for longer than the limit."""
    silent = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.png"
    with pytest.raises(ValueError, match=r"it took longer than 0.3 s"):
        fetch_picture(url, timeout_s=0.3)
    silent.close()
    with pytest.raises(ValueError, match="Connection refused"):
        fetch_picture(url)


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://127.0.0.1/x.png", "data:image/png;base64,AAAA", "http://", "picture.png"]
)
def test_only_web_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="is not an address that starts with http:// or https://"):
        fetch_picture(url)


def test_private_addresses(server: str) -> None:
    """A server must not fetch from its own network for a stranger."""
    for url in (server, server.replace("127.0.0.1", "localhost")):
        assert fetch_picture(url + "/picture.png", allow_private=True).getvalue() == PICTURE
        with pytest.raises(ValueError, match="is an address inside a private network"):
            fetch_picture(url + "/picture.png", allow_private=False)


def test_name_that_changes_its_address(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up once: what was checked is what is connected to."""
    looked_up = []

    def look_up(host: str, port: int, *_: object, **__: object) -> list:
        looked_up.append(host)
        place = host if host[0].isdigit() else f"127.0.0.{looked_up.count(host)}"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(data.web, "is_public", lambda place: place == "127.0.0.1")
    url = server.replace("127.0.0.1", "changing.example")
    assert fetch_picture(url + "/picture.png", allow_private=False).getvalue() == PICTURE
    assert looked_up == ["changing.example", "127.0.0.1"]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
    ],
)
def test_public_addresses(place: str, expected: bool) -> None:
    """Cloud machines keep their keys at 169.254.169.254."""
    assert is_public(place) is expected


def test_redirect_into_the_private_network(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is checked again after every redirect."""
    monkeypatch.setitem(REDIRECTS, "/to-inside", server.replace("127.0.0.1", "localhost") + "/picture.png")
    assert fetch_picture(server + "/to-inside").getvalue() == PICTURE
    seen = iter([True, False, False])
    monkeypatch.setattr(data.web, "is_public", lambda place: next(seen))
    with pytest.raises(ValueError, match="localhost is an address inside a private network"):
        fetch_picture(server + "/to-inside", allow_private=False)


def test_what_is_an_address() -> None:
    """A file whose name holds a colon is a file."""
    assert all(is_url(text) for text in ("http://a/b", "HTTPS://a", "ftp://x", "file:///etc/hostname"))
    assert not any(
        is_url(text) for text in ("picture.png", "/a/b.png", "C:\\a.png", "a:b.png", "http:/a", "./http://a")
    )
