"""The page as a stranger on the network meets it: what is asked over HTTP, hostile or not, of a server that runs."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from PIL import ExifTags, Image

from demo.pictures import MAX_BYTES
from tests.demo.serve import ROOT, serve
from tests.demo.visitor import Visitor, encode, name_file

SECRET = "the-secret-of-this-machine"
PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
# Every connection of the page's process to another machine, and every name that it looks up, becomes a line.
RECORDER = """
import os, socket
connect, find = socket.socket.connect, socket.getaddrinfo
def note(kind, host):
    if str(host) not in ("127.0.0.1", "localhost", "::1"):
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{kind} {host}\\n")
def connect_and_note(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        note("connect", address[0])
    return connect(self, address)
def find_and_note(host, *rest, **options):
    note("look up", host)
    return find(host, *rest, **options)
socket.socket.connect, socket.getaddrinfo = connect_and_note, find_and_note
note("works", "yes")
"""


@dataclass(frozen=True)
class Page:
    """A page that runs."""

    address: str
    folder: Path  # where it was started

    @property
    def uploads(self) -> Path:
        return self.folder / "uploads"

    def visit(self, session: str = "visitor") -> Visitor:
        return Visitor(self.address, session)


@pytest.fixture(scope="module")
def page(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "runs/first").mkdir(parents=True)
    (folder / "recorder").mkdir()
    (folder / "recorder/sitecustomize.py").write_text(RECORDER)
    (folder / "connections").touch()
    (folder / "secret.txt").write_text(SECRET)
    (folder / "runs/first/metrics.jsonl").write_text(json.dumps({"note": SECRET}))
    (folder / "uploads").mkdir()
    Image.new("RGB", (5, 5)).save(folder / "secret.png")
    environment = {
        "GRADIO_TEMP_DIR": str(folder / "uploads"), "PYTHONPATH": str(folder / "recorder"),
        "CONNECTIONS": str(folder / "connections"),
    }  # fmt: skip
    options = ["--compare", str(tiny_model_folder), "--log-dir", str(folder / "votes")]
    with serve(tiny_model_folder, folder / "runs", *options, environment=environment) as (address, _):
        yield Page(address, folder)


def assert_silent(page: Page, text: str) -> None:
    """Nothing of the machine is in an answer, no secret, place or code, besides a visitor's own upload and words."""
    rest = text.replace(str(page.uploads), "").replace(str(page.folder / "secret.png"), "")
    for told in (SECRET, str(page.folder), str(ROOT), str(Path.home()), "Traceback", "site-packages"):
        assert told not in rest, rest[:2000]


def test_files_of_the_machine_stay_there(page: Page, tiny_model_folder: Path) -> None:
    visitor = page.visit()
    path = visitor.upload(encode(PICTURE)).json()[0]
    assert visitor.get_raw(f"/gradio_api/file={quote(path)}")[0] == 200
    (page.uploads / "link").symlink_to(page.folder / "secret.txt")
    files = [
        "/etc/passwd", "/proc/self/environ", "/proc/self/cwd/secret.txt", page.folder / "secret.txt", "secret.txt",
        "runs/first/metrics.jsonl", page.folder / "runs/first/metrics.jsonl", page.folder / "votes/votes.jsonl",
        tiny_model_folder / "config.json", ROOT / "demo/app.py", page.folder / "page.log",
        page.uploads / "../secret.txt", f"{path}/../../../secret.txt", f"{page.uploads}/..\\secret.txt",
        "..\\..\\secret.txt", "C:\\Windows\\win.ini", f"/{page.folder}/secret.txt", f"//{page.folder}/secret.txt",
        "file:///etc/passwd", f"{page.folder}/secret.txt\0.png", page.uploads, "", "~/.bashrc", f"{path}\0",
        f"{page.uploads}/./../secret.txt", page.uploads / "link",
    ]  # fmt: skip
    for file in map(str, files):
        for written in (file, quote(file), quote(file, safe=""), quote(quote(file, safe=""), safe="")):
            if re.search(r"[^\x21-\x7e]", written):
                continue  # no request line has it
            for place in (
                "/gradio_api/file=",
                "/gradio_api/file/",
                "/file=",
                "/static/",
                "/assets/",
                "/gradio_api/proxy=",
            ):
                status, headers, body = visitor.get_raw(place + written)
                assert status in (400, 403, 404), (place + written, status)
                assert SECRET.encode() not in body
                assert b"root:" not in body
                assert "nosniff" in headers["x-content-type-options"]


def test_only_what_the_page_needs_is_there(page: Page) -> None:
    visitor = page.visit()
    for path in (
        "/config", "/config?deep_link=x", "/docs", "/redoc", "/openapi.json", "/monitoring", "/monitoring/summary",
        "/monitoring/x", "/gradio_api/info", "/gradio_api/info?all_endpoints=true", "/gradio_api/openapi.json",
        "/gradio_api/app_id", "/gradio_api/dev/reload", "/gradio_api/deep_link?session_hash=x",
        "/gradio_api/queue/status", "/gradio_api/heartbeat/x", "/gradio_api/vibe-code", "/gradio_api/runs",
        "/gradio_api/token", "/pwa_icon/9999", "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/file=http://127.0.0.1/", "/gradio_api/call/ask/x", "/gradio_api/custom_component/x/client/y/z",
        "/gradio_api/stream/a/b/1/playlist.m3u8", "/svelte/x", "/v2",
    ):  # fmt: skip
        assert visitor.get_raw(path)[0] == 404, path
    for path in (
        "component_server", "call/ask", "call/v2/ask", "api/ask", "run/ask", "process_recording", "vibe-edit",
        "run-history/connect", "stream/x", "queue/data",
    ):  # fmt: skip
        assert visitor.client.post(f"/gradio_api/{path}", json={"data": []}).status_code == 404, path
    assert "all_endpoints" not in visitor.get_raw("/?all_endpoints=true")[2].decode()
    assert visitor.get_raw("/?all_endpoints=true")[2] == visitor.get_raw("/")[2]


def test_page_names_no_place_of_the_machine(page: Page) -> None:
    _, headers, body = page.visit().get_raw("/")
    assert_silent(page, body.decode())
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "http:" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "name",
    ["../../x.png", "/etc/cron.d/x", "..\\..\\x.png", "a\0b.png", "x" * 3000, ".", "..", "", "a/b/c.html", "画.svg"],
)  # fmt: skip
def test_an_upload_lies_where_uploads_lie(page: Page, name: str) -> None:
    before = {file for file in page.folder.rglob("*") if page.uploads not in file.parents}
    answer = page.visit().upload(encode(PICTURE), name or "\u00a0")
    (path,) = answer.json()
    assert page.uploads in Path(path).resolve().parents
    assert Path(path).suffix == ".png"
    assert {file for file in page.folder.rglob("*") if page.uploads not in file.parents} == before


@pytest.mark.parametrize(
    "content",
    [b"<html><script>alert(1)</script></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"", b"GIF89a"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.png", "x.html", "x.svg"])
def test_only_pictures_are_stored(page: Page, content: bytes, name: str) -> None:
    before = set(page.uploads.rglob("*"))
    answer = page.visit().upload(content, name)
    assert answer.status_code == 415
    assert_silent(page, answer.text)
    assert set(page.uploads.rglob("*")) == before


def test_a_file_can_run_nothing(page: Page) -> None:
    """Even where a picture is a script besides."""
    (path,) = page.visit().upload(encode(PICTURE) + b"<script>alert(1)</script>", "x.html").json()
    _, headers, body = page.visit().get_raw(f"/gradio_api/file={quote(path)}")
    assert b"script" not in body
    assert headers["content-security-policy"].startswith("sandbox;")
    assert headers["content-type"] == "image/png"


def test_large_uploads_are_refused_before_the_disk(page: Page) -> None:
    before = set(page.uploads.rglob("*"))

    def stream() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n'
        for _ in range(64):
            yield bytes(1_000_000)

    visitor = page.visit()
    try:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        assert visitor.client.post("/gradio_api/upload", content=stream(), headers=headers).status_code == 413
    except httpx.TransportError:
        pass  # it hung up in the middle of what it does not want
    assert visitor.upload(bytes(MAX_BYTES + 200_000)).status_code == 413
    assert visitor.upload(bytes(MAX_BYTES + 1)).status_code == 415
    assert set(page.uploads.rglob("*")) == before


def test_half_an_upload_leaves_nothing(page: Page) -> None:
    before = set(page.uploads.rglob("*"))
    port = int(page.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n'
        connection.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + head + bytes(1_000_000)
        )
    assert page.visit().upload(b"no picture").status_code == 415
    assert set(page.uploads.rglob("*")) == before


def make_photograph() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Secretcam"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 15.0)
    return encode(PICTURE, "JPEG", exif=exif)


def test_place_and_time_of_a_photograph_go_nowhere(page: Page) -> None:
    visitor = page.visit("photographer")
    photograph = make_photograph()
    assert b"Secretcam" in photograph
    (path,) = visitor.upload(photograph, "garden.jpg").json()
    assert Path(path).name == "garden.jpg"
    voices = [model["id"] for model in visitor.client.get("/v1/models").json()["data"]]
    done = visitor.run("ask_4", "What is it?", name_file(path), *voices, 0, 1, 4)
    assert visitor.run("vote", done["output"]["data"][2])["success"]
    assert visitor.chat("What is it?", path, voices[0])
    saved = visitor.run("save", [message("user", "?"), message("assistant", "!")], name_file(path), voices[0])
    assert json.loads(saved["output"]["data"][0])[0]["image"] == "garden.jpg"
    assert "Secretcam" not in json.dumps(saved)
    assert len(list(page.folder.glob("votes/pictures/*.jpg"))) == 1
    stored = [file for file in [*page.uploads.rglob("*"), *page.folder.glob("votes/**/*")] if file.is_file()]
    assert stored
    for file in stored:
        assert b"Secretcam" not in file.read_bytes(), file
        assert b"Exif" not in file.read_bytes(), file


def message(role: str, *texts: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts], **fields}


class Trap(BaseHTTPRequestHandler):
    """A server of the own network, which nobody must be able to reach through the page."""

    visits: list[str]

    def do_GET(self) -> None:
        self.visits.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def trap() -> Iterator[tuple[str, list[str]]]:
    visits: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneTrap", (Trap,), {"visits": visits}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x.png", visits
    server.shutdown()
    server.server_close()


def list_hostile_values(page: Page, url: str) -> list[Any]:
    deep: Any = "x"
    for _ in range(400):
        deep = [deep]
    secret = str(page.folder / "secret.png")
    component = {"component": "image", "value": name_file(secret), "constructor_args": {"value": secret}, "props": {}}
    return [
        None, True, -1, 0, 1e308, 2**53, "", "x" * 50_000, "\0\u202e\ufffe😀" * 50, [], {}, [[]], [None],
        {"a": {"b": None}}, deep, name_file(secret), name_file("/etc/passwd"), name_file("secret.png"),
        name_file(f"{page.uploads}/../secret.png"), name_file(secret, url=url, orig_name="x.svg"),
        name_file(secret, is_stream=True), name_file(""), name_file("\0"), {"path": secret},
        {"path": 7, "meta": {"_type": "gradio.FileData"}}, {"url": url}, name_file(str(page.uploads)),
        [message("user", "hello")], [message("system", "x")], [message("user")],
        [{"role": "user", "content": component}], [{"role": "user", "content": [component]}],
        [{"role": "assistant", "content": [{"type": "file", "file": name_file(secret)}]}],
        [message("user", "x", options=[{"value": "x"}], metadata={"title": secret})],
        {"value": secret, "__type__": "update"},
    ]  # fmt: skip


def test_hostile_events_harm_nobody(page: Page, trap: tuple[str, list[str]]) -> None:
    url, visits = trap
    visitor = page.visit("hostile")
    events = visitor.find_events()
    before = set(page.uploads.rglob("*"))
    for event in events.values():
        num_inputs = len(event["inputs"])
        for value in list_hostile_values(page, url):
            answer = visitor.join(event["id"], [value] * num_inputs, trigger_id=-5, event_data=value)
            assert answer.status_code in (200, 400, 404), (event["api_name"], value, answer.text)
            assert_silent(page, answer.text)
            if answer.status_code == 200:
                told = json.dumps([one for one in visitor.follow() if one["msg"] != "process_generating"])
                assert_silent(page, told)
                assert len(told) < 2_000_000
            if not event["queue"]:
                fields = {"fn_index": event["id"], "data": [value] * num_inputs, "session_hash": "hostile"}
                answer = visitor.client.post("/gradio_api/run/predict", json=fields)
                assert_silent(page, answer.text)
    assert visits == []
    assert set(page.uploads.rglob("*")) == before
    assert visitor.chat("?", visitor.upload(encode(PICTURE)).json()[0], find_voice(visitor))


def find_voice(visitor: Visitor) -> str:
    return visitor.client.get("/v1/models").json()["data"][0]["id"]


@pytest.mark.parametrize("body", [
    b"", b"x", b"[]", b"null", b"{}", b'{"fn_index": 1}', b'{"fn_index": 1, "data": [], "session_hash": "x"}',
    b'{"fn_index": 99, "data": [], "session_hash": "x"}', b'{"fn_index": true, "data": [], "session_hash": "x"}',
    b'{"fn_index": NaN, "data": [], "session_hash": "x"}', b'{"fn_index": 1, "data": {}, "session_hash": "x"}',
    b'{"fn_index": 1, "data": [1,2,3,4,5,6,7], "session_hash": "../../x"}', b"[" * 400_000, b"\xff\xfe", b'"\\ud800"',
    b'{"fn_index": 1, "data": [1,2,3,4,5,6,7], "session_hash": ["x"]}', b'{"a": ' * 100_000,
])  # fmt: skip
@pytest.mark.parametrize("path", ["queue/join", "run/predict", "cancel", "reset"])
def test_malformed_events_are_refused(page: Page, body: bytes, path: str) -> None:
    headers = {"content-type": "application/json"}
    answer = page.visit().client.post(f"/gradio_api/{path}", content=body, headers=headers)
    assert 400 <= answer.status_code < 500
    assert_silent(page, answer.text.replace(str(body), ""))


@pytest.mark.parametrize("field", ["path", "url"])
def test_gradio_fetches_nothing(page: Page, trap: tuple[str, list[str]], field: str) -> None:
    url, visits = trap
    visitor = page.visit()
    ask = visitor.find_events()["ask"]["id"]
    file = {**name_file(str(page.folder)), field: url.replace("http", "HTTP")}
    visitor.join(ask, ["?", [], file, find_voice(visitor), 0, 1, 4])
    for wanted in ("https://huggingface.co/x.png", "data:image/png;base64,AAAA", " data:text/html;base64,AAAA"):
        file = {**name_file(str(page.uploads / "x.png")), field: wanted}
        answer = visitor.join(ask, ["?", [], file, find_voice(visitor), 0, 1, 4])
        if wanted.startswith("https") and field == "url":
            continue  # a name that is not used
        assert answer.status_code == 400 or field == "path", (field, wanted)
    visitor.follow()
    assert visits == []


def test_addresses_of_the_own_network_are_not_fetched(page: Page, trap: tuple[str, list[str]]) -> None:
    url, visits = trap
    visitor = page.visit()
    for wanted in (
        url,
        url.replace("127.0.0.1", "localhost"),
        url.replace("127.0.0.1", "0x7f000001"),
        "file:///etc/passwd",
    ):
        assert not visitor.run("load_address", wanted)["success"]
        question = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": wanted}}]
        fields = {"model": find_voice(visitor), "messages": [{"role": "user", "content": question}]}
        assert visitor.client.post("/v1/chat/completions", json=fields).status_code == 400
    assert visits == []


def test_pages_of_other_sites_reach_nothing(page: Page) -> None:
    visitor = page.visit()
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example"):
        for path in ("/", "/v1/models", "/gradio_api/queue/data?session_hash=x"):
            assert visitor.client.get(path, headers={"origin": origin}).status_code == 403
    assert visitor.client.get("/", headers={"origin": page.address}).status_code == 200


def test_nobody_else_is_told(page: Page) -> None:
    """Of all that the page did in this file; it runs last."""
    visitor = page.visit()
    assert visitor.chat("Who hears this?", visitor.upload(encode(PICTURE)).json()[0], find_voice(visitor))
    told = set((page.folder / "connections").read_text().splitlines())
    assert told - {"look up 0x7f000001"} == {"works yes"}  # an address of this machine, in a test above


def test_without_logging_in_there_is_a_form_and_nothing_else(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with serve(tiny_model_folder, tmp_path / "runs", environment={"PLAIN_LLAVA_AUTH": "ada:secret word"}) as (
        address,
        _,
    ):
        visitor = Visitor(address)
        assert '"auth_required":true' in visitor.client.get("/").text
        for path in ("queue/data?session_hash=x", "file=/etc/passwd", "upload_progress?upload_id=x"):
            assert visitor.get_raw(f"/gradio_api/{path}")[0] == 401
        for path in ("queue/join", "run/predict", "upload", "cancel", "reset"):
            assert visitor.client.post(f"/gradio_api/{path}", json={}).status_code == 401
        for key in ("", "Bearer", "Bearer ada:wrong", "Bearer ada", "Basic ada:secret word"):
            assert visitor.client.get("/v1/models", headers={"authorization": key}).status_code == 401
        for word in ("", "secret", "secret word2", "\0"):
            started = time.monotonic()
            answer = visitor.client.post("/login", data={"username": "ada", "password": word})
            assert answer.status_code in (400, 422)
            assert time.monotonic() - started > 0.5 or answer.status_code == 422
        assert '"auth_required":true' in visitor.client.get("/").text
        assert visitor.client.post("/login", data={"username": "ada", "password": "secret word"}).status_code == 200
        assert "ask" in visitor.find_events()
        path = visitor.upload(encode(PICTURE)).json()[0]
        right = {"authorization": "Bearer ada:secret word"}
        voice = visitor.client.get("/v1/models", headers=right).json()["data"][0]["id"]
        assert visitor.chat("?", path, voice)
        assert Visitor(address).get_raw(f"/gradio_api/file={quote(path)}")[0] == 401
