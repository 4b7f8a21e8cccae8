"""Folders and repositories, against a hub of a few files on this machine; each call in a process of its own.

huggingface_hub reads its variables when it is imported, so nothing could be changed in this process.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from model.adapter_files import ADAPTER_CONFIG, ADAPTER_FILES, OFFICIAL_REST
from model.files import WEIGHT_FILES
from model.hub import OTHERS, WEIGHTS, choose_files, resolve_folder
from tests.conftest import ROOT

COMMIT, OLD_COMMIT = "a" * 40, "b" * 40
TOKEN = "hf_thisIsASecret"
FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
SHARDS = {FIRST: b"\1" * 300_000, SECOND: b"\2" * 300_000}
INDEX = json.dumps({"weight_map": {"x": FIRST, "y": FIRST, "z": SECOND}}).encode()
OFFICIAL = {
    "config.json": b'{"model_type": "llava"}',
    "tokenizer.model": b"pieces",
    "pytorch_model.bin.index.json": INDEX,
    **SHARDS,
}
UNWANTED = {
    "README.md": b"words",
    "tf_model.h5": b"h" * 99,
    "model.gguf": b"g" * 99,
    "pytorch_model-00001-of-00003.bin": b"left over",
    "original/consolidated.00.pth": b"c" * 99,
    "mm_projector.bin": b"also in the shards",
}


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download needs."""

    repositories: dict[str, dict[str, bytes]]
    requests: list[str]
    sent: list[str]
    cut: dict[str, int]  # after so many bytes of a file the connection ends, once
    sent_instead: dict[str, bytes]
    broken: set[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path = unquote(self.path.split("?", maxsplit=1)[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            self.describe(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(match[1], match[2], match[3])
        elif path.removeprefix("/large/") in self.broken:
            time.sleep(0.5)  # the others arrive first
            self.send_empty(500)
        elif match := re.fullmatch("/large/(.+)", path):
            self.send(self.sent_instead.get(match[1], OFFICIAL[match[1]]), {}, match[1])
        else:
            self.send_empty(404)

    def describe(self, name: str, what: str, revision: str) -> None:
        if name == "some/private":
            return self.send_empty(401, "RepoNotFound")
        if self.headers.get("Authorization") and name != "some/gated":
            return self.send_empty(401)
        if name not in self.repositories:
            return self.send_empty(404, "RepoNotFound")
        if revision not in ("main", "old/version", COMMIT, OLD_COMMIT):
            return self.send_empty(404, "RevisionNotFound")
        commit = OLD_COMMIT if revision in ("old/version", OLD_COMMIT) else COMMIT
        files = [self.describe_file(path, content) for path, content in self.repositories[name].items()]
        siblings = [{"rfilename": file["path"], "blobId": file["oid"], **file} for file in files]
        answer = files if what == "tree" else {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        return self.send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def describe_file(self, path: str, content: bytes) -> dict:
        file = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith(".bin"):
            sha256 = hashlib.sha256(content).hexdigest()
            file["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 134}
        return file

    def send_file(self, name: str, revision: str, path: str) -> None:
        if name == "some/gated":
            return self.send_empty(403, "GatedRepo")
        file = self.describe_file(path, self.repositories[name][path])
        content = self.sent_instead.get(path, self.repositories[name][path])
        headers = {"ETag": f'"{file["oid"]}"', "X-Repo-Commit": OLD_COMMIT if revision == OLD_COMMIT else COMMIT}
        if "lfs" not in file:
            return self.send(content, headers, path)
        port = self.headers["Host"].split(":")[1]
        # Large files lie elsewhere; the chunk store that is offered beside them cannot be reached through a mirror.
        headers |= {
            "Location": f"http://localhost:{port}/large/{path}",
            "X-Linked-Size": str(len(content)),
            "X-Xet-Hash": "c" * 64,
        }
        headers |= {"X-Linked-Etag": f'"{file["lfs"]["oid"]}"', "Link": '<http://127.0.0.1:1/x>; rel="xet-auth"'}
        return self.send_empty(302, **headers)

    def send(self, content: bytes, headers: dict[str, str], path: str = "") -> None:
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.sent.append(path)
            self.wfile.write(content[start : self.cut.pop(path, len(content))])

    def send_empty(self, status: int, code: str = "", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    FakeHub.repositories = {
        "some/model": OFFICIAL | UNWANTED,
        "some/gated": OFFICIAL,
        "some/words": {"README.md": b"x"},
    }
    FakeHub.requests, FakeHub.sent, FakeHub.cut, FakeHub.sent_instead = [], [], {}, {}
    FakeHub.broken = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


Resolve = Callable[..., str]


@pytest.fixture
def resolve(hub: str, tmp_path: Path) -> Resolve:
    """Run `resolve_folder` and return its folder or its error: `resolve("some/model", HF_HUB_OFFLINE="1")`."""

    def run(name: str, setup: str = "", **variables: str) -> str:
        code = f"{setup}\nimport sys\nfrom model.hub import resolve_folder\n"
        code += "try:\n    print(resolve_folder(sys.argv[1]))\n"
        code += "except (OSError, ValueError) as error:\n    print(type(error).__name__, error)"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub, "NO_PROXY": "*"} | variables
        finished = subprocess.run(
            [sys.executable, "-c", code, name], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr
        assert TOKEN not in finished.stdout + finished.stderr
        return finished.stdout.strip()

    return run


def files_of(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def sent_files() -> list[str]:
    return sorted(path for path in FakeHub.sent if path)


def test_download_and_what_is_left_of_it(resolve: Resolve, tmp_path: Path) -> None:
    """Only what is needed is sent, once; then neither the hub nor its files are asked again when offline."""
    folder = resolve("some/model")
    assert folder == str(tmp_path / f"home/hub/models--some--model/snapshots/{COMMIT}")
    assert files_of(folder) == OFFICIAL
    assert sent_files() == sorted(OFFICIAL)
    assert resolve("some/model") == folder
    assert sent_files() == sorted(OFFICIAL)
    FakeHub.requests.clear()
    assert resolve("some/model", HF_HUB_OFFLINE="1") == folder
    assert resolve("some/model", HF_ENDPOINT="http://127.0.0.1:1") == folder
    assert resolve(f"some/model@{COMMIT}", HF_HUB_OFFLINE="1") == folder
    assert FakeHub.requests == []
    # A copy that lacks a shard is no copy.
    (Path(folder) / SECOND).unlink()
    assert "no whole copy in" in resolve("some/model", HF_HUB_OFFLINE="1")
    assert files_of(resolve("some/model")) == OFFICIAL


def test_revision(resolve: Resolve) -> None:
    """A branch, a tag or a commit after the @."""
    assert resolve("some/model@old/version").endswith(f"snapshots/{OLD_COMMIT}")
    assert resolve(f"some/model@{COMMIT}").endswith(f"snapshots/{COMMIT}")
    assert sent_files() == sorted(OFFICIAL)  # the same contents are not sent again
    assert re.search("FileNotFoundError .*/some/model has no revision nothing", resolve("some/model@nothing"))


def test_cut_connection(resolve: Resolve) -> None:
    """The rest is asked for, not the whole."""

    FakeHub.cut = {FIRST: 100_000}
    assert files_of(resolve("some/model")) == OFFICIAL
    assert sent_files() == sorted([*OFFICIAL, FIRST])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\1" * 200_000, "has 200000 bytes, the hub says 300000: run this again"),
        (b"\3" * 300_000, "has another SHA-256 than the hub says: run this again"),
    ],
)
def test_file_that_arrives_damaged(resolve: Resolve, content: bytes, message: str) -> None:
    """It is named and removed, so that running it again helps."""
    FakeHub.sent_instead = {FIRST: content, SECOND: content}
    answer = resolve("some/model")
    assert all(re.search(rf"OSError .*{shard} {message}", answer) for shard in SHARDS)
    FakeHub.sent_instead = {}
    assert files_of(resolve("some/model")) == OFFICIAL


def test_file_that_arrives_damaged_before_a_failure(resolve: Resolve) -> None:
    """Else it would be there, and trusted, when the rest is fetched."""
    FakeHub.sent_instead = {FIRST: b"\3" * 300_000}
    FakeHub.broken = {SECOND}
    assert re.search("OSError .* did not send one .*500", resolve("some/model", HF_HUB_DOWNLOAD_TIMEOUT="1"))
    FakeHub.sent_instead, FakeHub.broken = {}, set()
    assert files_of(resolve("some/model")) == OFFICIAL


def test_file_that_was_damaged_later(resolve: Resolve) -> None:
    """What lies in the cache is not ours to delete."""
    shard = Path(resolve("some/model")) / FIRST
    shard.resolve().write_bytes(b"short")
    message = resolve("some/model")
    assert f"{FIRST} has 5 bytes, the hub says 300000: delete {shard.resolve()} and run this again" in message
    shard.resolve().unlink()
    assert files_of(resolve("some/model")) == OFFICIAL


def test_full_disk(resolve: Resolve, tmp_path: Path) -> None:
    """It is noticed before the shards are sent, and counts only what is not there yet."""
    setup = "import collections, shutil\nshutil.disk_usage = lambda path: collections.namedtuple('x', 'free')(590_000)"
    message = resolve("some/model", setup)
    assert re.search(r"OSError some/model needs 0.00 GB more and .*home.* has 0.00 GB left: .*HF_HOME", message)
    assert sent_files() == ["pytorch_model.bin.index.json"]
    resolve("some/model")
    assert files_of(resolve("some/model", setup)) == OFFICIAL
    assert files_of(resolve("some/model@old/version", setup)) == OFFICIAL  # the same contents under another commit


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        (
            "some/typo",
            {},
            "FileNotFoundError there is no folder some/typo here and no repository http.*/some/typo: check",
        ),
        ("some/private", {}, "FileNotFoundError there is no folder .* a private one needs HF_TOKEN"),
        ("some/gated", {"HF_TOKEN": TOKEN}, "PermissionError http.*/some/gated is gated: accept its licence there"),
        ("some/model", {"HF_TOKEN": TOKEN}, "PermissionError http.* does not know your token: correct HF_TOKEN"),
        ("some/model", {"HF_TOKEN": TOKEN + "é"}, "(OS|Permission)Error"),
        ("some/words", {}, "ValueError some/words holds no weights in a known format: none of model.safetensors.index"),
        ("some/model", {"HF_HUB_OFFLINE": "1"}, "OSError .*HF_ENDPOINT.*hf-mirror.com.*ModelScope.*HF_HUB_OFFLINE"),
        ("some/model", {"HF_ENDPOINT": "http://me:hf_thisIsASecret@127.0.0.1:1"}, "OSError .* http://127.0.0.1:1 did"),
    ],
)
def test_errors(resolve: Resolve, name: str, variables: dict[str, str], message: str) -> None:
    """Each says what to do, and none shows a token."""
    assert re.match(message, resolve(name, **variables))


def test_without_huggingface_hub(resolve: Resolve, tmp_path: Path) -> None:
    """It is needed for downloads only."""
    setup = "import sys; sys.modules['huggingface_hub'] = None"
    assert "pip install huggingface_hub" in resolve("some/model", setup)
    assert resolve(str(tmp_path), setup) == str(tmp_path)


def test_folders_are_returned_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is called like a repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path, Path("some/model"), "some/model", "./some", "some"):
        assert resolve_folder(path) == Path(path)
    assert resolve_folder("~/some") == tmp_path / "some"


@pytest.mark.parametrize(
    "text", ["", "runs/tiny/final", "/no/where", "./model", "../some/model", "~/model", "model", "a/b@"]
)
def test_paths_that_do_not_exist(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked for what cannot be a repository."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"{text!r} does not exist: give a model's folder, or owner/")
    ):
        resolve_folder(text)


def test_file_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some/model.bin").touch()
    with pytest.raises(FileNotFoundError, match=re.escape("'some/model.bin' is a file: give a model's folder")):
        resolve_folder("some/model.bin")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pytorch_model.bin", "model.safetensors", "flax_model.msgpack"], ["model.safetensors"]),
        (["adapter_model.bin", "adapter_config.json"], ["adapter_model.bin", "adapter_config.json"]),
        (["mm_projector.bin", "config.json"], ["mm_projector.bin", "config.json"]),
        (["pytorch_model.bin", "tf_model.h5", "model.onnx"], ["pytorch_model.bin"]),
    ],
)
def test_choice_of_files(names: list[str], expected: list[str]) -> None:
    """One format of the weights, safetensors if there are any."""
    assert choose_files(names, "some/model") == expected


def test_what_is_downloaded_is_what_is_read() -> None:
    """Of two formats the loader takes the one that came."""
    assert WEIGHTS == (WEIGHT_FILES, ADAPTER_FILES)
    assert {ADAPTER_CONFIG, OFFICIAL_REST} < set(OTHERS)
