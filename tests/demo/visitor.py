"""Speaks to the page as its scripts do in a browser, and as they would not."""

import http.client
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

WAIT_S = 120.0  # of a busy machine


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def find_events(page: str) -> dict[str, Mapping[str, Any]]:
    """Return the events of a page's HTML by the names of what they call."""
    found = re.search(r"window\.gradio_config = (\{.*?\});?\s*</script>", page, re.DOTALL)
    assert found is not None
    return {event["api_name"]: event for event in json.loads(found[1])["dependencies"]}


def name_file(path: str, **fields: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **fields}


class Visitor:
    """One open page."""

    def __init__(self, address: str, session: str = "visitor") -> None:
        self.address, self.session = address, session
        self.client = httpx.Client(base_url=address, timeout=WAIT_S, trust_env=False)

    def find_events(self) -> dict[str, Mapping[str, Any]]:
        return find_events(self.client.get("/").text)

    def upload(self, content: bytes, name: str = "picture.png") -> httpx.Response:
        return self.client.post("/gradio_api/upload", files={"files": (name, content)})

    def join(self, number: int, data: Sequence[Any], **fields: Any) -> httpx.Response:
        event = {"fn_index": number, "data": data, "session_hash": self.session, **fields}
        # Not httpx's own JSON, which refuses what a stranger would send.
        content = json.dumps(event).encode()
        return self.client.post("/gradio_api/queue/join", content=content, headers={"content-type": "application/json"})

    def follow(self) -> list[dict[str, Any]]:
        """Return the messages until all events of the session are over."""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def run(self, name: str, *data: Any) -> dict[str, Any]:
        """Return the last message about an event."""
        answer = self.join(self.find_events()[name]["id"], data)
        assert answer.status_code == 200, answer.text
        (*_, last) = [message for message in self.follow() if message["msg"] == "process_completed"]
        return last

    def chat(self, question: str, path: str, voice: str, length: int = 8) -> str:
        """Return the answer to a first question."""
        done = self.run("ask", question, [], name_file(path), voice, 0, 1, length)
        return done["output"]["data"][1][-1]["content"][0]["text"]

    def get_raw(self, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """Send a path as it is; httpx would put it in order."""
        place = urlsplit(self.address)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=WAIT_S)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()
