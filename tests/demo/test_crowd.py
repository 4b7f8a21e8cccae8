"""200 visitors at once, good and hostile, and what is left of them: nothing."""

import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.demo.serve import serve
from tests.demo.visitor import WAIT_S, Visitor, encode, name_file

NUM_VISITORS = 200
MAX_GROWTH_BYTES = 60_000_000
MAX_UPLOADS_BYTES = 20_000_000
MAX_THREADS = 130  # workers that Gradio and the API keep for a while, whoever asked
RIGHT = (408, 413, 415, 429, 499, 503)  # refusals besides the client's own mistakes
TEXTS = (
    "what shape is in the image?", "图中是什么形状？", "", " ", "\0\x1b[2J\x07", "\u202e\ufffe\u200d" * 99, "😀" * 3000,
    "x" * 60_000, "<image>" * 50, "<script>alert(1)</script>", "USER: ASSISTANT: </s>", "{{7*7}} ${7*7} %s %n",
    "\ud83d", "a" * 19_000,
)  # fmt: skip


class Stranger:
    """Sends whatever it likes; a number decides what."""

    def __init__(self, number: int, client: httpx.AsyncClient, events: Mapping[str, Any], voices: list[str]) -> None:
        self.client, self.events, self.voices = client, events, voices
        self.chance, self.session = random.Random(number), f"stranger-{number}"
        self.picture: Any = None
        self.statuses: Counter[int] = Counter()

    async def send(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """Return the answer, or None where the server hung up on what it does not want, which is no answer."""
        try:
            answer = await self.client.request(method, path, **options)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return None
        self.statuses[answer.status_code] += 1
        return answer

    async def live(self, num_deeds: int) -> Counter[int]:
        deeds = (
            self.upload,
            self.chat,
            self.chat,
            self.compare,
            self.ask_api,
            self.ask_api,
            self.cancel,
            self.leave,
            self.look,
        )
        for _ in range(num_deeds):
            await self.chance.choice(deeds)()
        return self.statuses

    def make_picture(self) -> bytes:
        chance, size = self.chance, (self.chance.randint(1, 400), self.chance.randint(1, 400))
        whole = encode(Image.new(chance.choice(["RGB", "L", "RGBA"]), size, chance.randrange(256)), "PNG")
        return chance.choice([whole, whole, whole[: len(whole) // 2], chance.randbytes(3000), b"", b"<svg/>"])

    async def upload(self) -> None:
        answer = await self.send(
            "POST", "/gradio_api/upload", files={"files": (f"{self.session}.png", self.make_picture())}
        )
        if answer is not None and answer.status_code == 200:
            self.picture = name_file(answer.json()[0])

    def make_settings(self) -> list[Any]:
        odd: list[Any] = [None, -1, 1e308, "0", [], True, 0.5]
        return [self.chance.choice([usual] * 6 + odd) for usual in (0, 1, self.chance.randint(1, 6))]

    async def join(self, name: str, data: list[Any]) -> str | None:
        event = {"fn_index": self.events[name]["id"], "data": data, "session_hash": self.session}
        answer = await self.send("POST", "/gradio_api/queue/join", content=json.dumps(event).encode(),
                                 headers={"content-type": "application/json"})  # fmt: skip
        return answer.json()["event_id"] if answer is not None and answer.status_code == 200 else None

    async def listen(self, event: str, num_messages: int = 10**6) -> None:
        """Read until an event is over, or go in the middle."""
        with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):
            options: dict[str, Any] = {"params": {"session_hash": self.session}}
            async with (
                asyncio.timeout(WAIT_S),
                self.client.stream("GET", "/gradio_api/queue/data", **options) as stream,
            ):
                self.statuses[stream.status_code] += 1
                async for line in stream.aiter_lines():
                    num_messages -= line.startswith("data:")
                    if num_messages <= 0 or ("process_completed" in line and event in line):
                        return

    async def follow(self, name: str, data: list[Any], num_messages: int = 10**6) -> None:
        event = await self.join(name, data)
        if event is not None:
            await self.listen(event, num_messages)

    async def chat(self) -> None:
        history = self.chance.choice([[], [], [], None, "x", [{"role": "user", "content": "x"}], [{"role": "root"}]])
        data = [
            self.chance.choice(TEXTS),
            history,
            self.picture,
            self.chance.choice(self.voices),
            *self.make_settings(),
        ]
        await self.follow("ask", data)

    async def compare(self) -> None:
        voices = [self.chance.choice([*self.voices, "nobody"]) for _ in range(2)]
        await self.follow("ask_4", [self.chance.choice(TEXTS), self.picture, *voices, *self.make_settings()])

    async def look(self) -> None:
        said = [
            {"role": role, "content": [{"type": "text", "text": self.chance.choice(TEXTS)}]}
            for role in ("user", "assistant")
        ]
        await self.follow("look", [said, self.picture, self.voices[0]])

    async def leave(self) -> None:
        data = [TEXTS[0], [], self.picture, self.voices[0], 0, 1, 500]
        await self.follow("ask", data, self.chance.randint(0, 4))

    async def cancel(self) -> None:
        event = await self.join("ask", [TEXTS[0], [], self.picture, self.voices[0], 0, 1, 500])
        if event is not None:
            body = {"session_hash": self.session, "fn_index": self.events["ask"]["id"], "event_id": event}
            await self.send("POST", "/gradio_api/cancel", json=body)
            await self.listen(event)

    async def ask_api(self) -> None:
        question = {"role": self.chance.choice(["user", "user", "user", "root"]), "content": self.chance.choice(TEXTS)}
        body = {
            "model": self.chance.choice([*self.voices, "nobody", 7]), "messages": [question],
            "stream": self.chance.random() < 0.5, "max_tokens": self.chance.choice([1, 3, 6, 0, -1, 1e9, "x"]),
        }  # fmt: skip
        content = json.dumps(body).encode()
        await self.send("POST", "/v1/chat/completions", content=content, headers={"content-type": "application/json"})


@contextlib.asynccontextmanager
async def connect(address: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=address, timeout=WAIT_S, limits=limits, trust_env=False, verify=False
    ) as client:
        yield client


async def send_crowd(address: str, round_number: int, num_deeds: int = 3) -> Counter[int]:
    """Let all come at once; return how often which status was answered."""
    visitor = Visitor(address)
    events = visitor.find_events()
    voices = [model["id"] for model in visitor.client.get("/v1/models").json()["data"]]
    async with connect(address) as client:
        crowd = [Stranger(round_number * 10**6 + one, client, events, voices) for one in range(NUM_VISITORS)]
        statuses = await asyncio.gather(*(stranger.live(num_deeds) for stranger in crowd))
    return sum(statuses, Counter())


def measure(process_id: int) -> tuple[int, int, int]:
    """Return a process's memory in bytes, its threads and its open files."""
    folder = Path(f"/proc/{process_id}")
    memory = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return memory, len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir()))


def measure_folder(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def wait_until_idle(address: str, process_id: int, num_files: int) -> None:
    """Wait until connections are closed, and whoever comes is first in line."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and measure(process_id)[2] > num_files:
        time.sleep(0.2)
    assert measure(process_id)[2] <= num_files


@pytest.fixture
def page(tiny_model_folder: Path, tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    (tmp_path / "runs").mkdir()
    (tmp_path / "uploads").mkdir()
    options = ["--compare", str(tiny_model_folder), "--max-new-tokens", "512"]
    environment = {"GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "OMP_NUM_THREADS": "1"}
    with serve(tiny_model_folder, tmp_path / "runs", *options, environment=environment) as (address, process):
        yield address, process.pid, tmp_path / "uploads"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux tells it")
def test_two_hundred_visitors_leave_nothing(page: tuple[str, int, Path]) -> None:
    address, process_id, uploads = page
    visitor = Visitor(address)
    picture = visitor.upload(encode(Image.new("RGB", (64, 64), "blue"))).json()[0]
    voice = visitor.client.get("/v1/models").json()["data"][0]["id"]
    answer = visitor.chat(TEXTS[0], picture, voice)
    assert answer
    visitor.client.close()
    num_files = measure(process_id)[2] + 5

    statuses = asyncio.run(send_crowd(address, 1))
    wait_until_idle(address, process_id, num_files)
    memory, num_threads, _ = measure(process_id)
    statuses += asyncio.run(send_crowd(address, 2))
    wait_until_idle(address, process_id, num_files)
    later_memory, later_num_threads, _ = measure(process_id)

    assert statuses.total() > 2 * NUM_VISITORS
    assert statuses[200] > NUM_VISITORS
    assert {status for status in statuses if status >= 500} <= set(RIGHT), statuses
    assert later_memory - memory < MAX_GROWTH_BYTES
    assert max(num_threads, later_num_threads) < MAX_THREADS
    assert measure_folder(uploads) < MAX_UPLOADS_BYTES
    assert Visitor(address).chat(TEXTS[0], picture, voice) == answer
