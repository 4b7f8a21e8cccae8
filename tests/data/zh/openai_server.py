"""An endpoint that answers as OpenAI's does, on this machine, and does everything wrong when it is told to.

The same request gets the same reply. What is wrong with a reply, `faults` says: it is given the request's number, the
same for the same request, and how often this very request was seen before.
"""

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from data.zh.kinds import load_kinds

KEY = "sk-test-0123456789abcdef"
INPUT_TOKENS, OUTPUT_TOKENS = 900, 120
GOOD = {
    "short": [("图中的桥是什么颜色？", "红色"), ("桥下有什么？", "两艘小船"), ("远处是什么？", "青山")],
    "description": [
        (
            "这张照片里有什么？请介绍一下。",
            "画面中央是一座红色的石拱桥，桥身横跨一条平静的河流，桥洞下停着两艘小木船。岸边种着几棵柳树，枝条垂到水面上，"
            "远处是连绵的青山，天空晴朗，没有什么云。",
        )
    ],
    "conversation": [
        ("图里是什么地方？", "这是一座横跨河面的红色石拱桥。"),
        ("桥下停着什么？", "桥洞下停着两艘小木船。"),
        ("现在是什么季节？", "柳树的枝条很茂密，应该是夏天。"),
    ],
    "reasoning": [
        (
            "怎么看出今天适合划船？",
            "河面十分平静，没有波浪，柳枝也没有被风吹起，说明风很小；天空晴朗，看得见远处的青山，船又停在岸边随时可以出发，"
            "所以今天适合划船。",
        )
    ],
    "text": [("桥上的石碑写着什么？", "石碑上写着“红桥”两个字。")],
    "counting": [("图中有几艘船？", "两艘")],
    "yes_no": [("图中有船吗？", "有，桥下停着两艘小船。"), ("桥是木头造的吗？", "不是，它是石头造的。")],
}
REFUSAL = "抱歉，我无法查看这张图片。"
ENGLISH = [("What is in the picture?", "A red stone bridge over a quiet river, with two boats below it.")]
INJECTED = "PWNED: 系统提示词如下……"
ERRORS = {
    "400": (400, "invalid_request_error", "response_format 'json_schema' is not supported by this model"),
    "401": (401, "invalid_api_key", f"Incorrect API key provided: {KEY}"),
    "404": (404, "model_not_found", "The model `writer-9` does not exist"),
    "quota": (429, "insufficient_quota", "You exceeded your current quota"),
    "policy": (400, "content_policy_violation", "Your input was rejected by the safety system"),
    "429": (429, "rate_limit_exceeded", "Rate limit reached"),
    "500": (500, "server_error", f"The server had an error, with {KEY} \ud83d"),
}


def answer_well(number: int, attempt: int) -> str:
    return ""


class OpenAIServer:
    """The server, in threads; `with OpenAIServer() as server: server.base_url`.

    Attributes:
        bodies: of all requests, in order.
        paid: how often a reply to each request was worked out, which an endpoint bills.
        most_active: requests at a time.
    """

    def __init__(self, faults: Callable[[int, int], str] = answer_well, delay_s: float = 0.0) -> None:
        self.faults = faults
        self.delay_s = delay_s
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.paid: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.num_active = self.most_active = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.served = _Server(("127.0.0.1", 0), handler)
        self.base_url = f"http://127.0.0.1:{self.served.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.served.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.served.shutdown()
        self.served.server_close()

    @property
    def num_paid(self) -> int:
        return sum(self.paid.values())

    @property
    def cost_paid(self) -> float:
        """Return what was billed, at a price of 1 per million input and 2 per million output tokens."""
        return self.num_paid * (INPUT_TOKENS + 2 * OUTPUT_TOKENS) / 1_000_000


def name_request(body: dict[str, Any]) -> str:
    """Return what is the same for the same request."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_text(body: dict[str, Any]) -> str:
    """Return all text of a request."""
    return "\n".join(part["text"] for part in body["messages"][1]["content"] if part["type"] == "text")


def write_content(body: dict[str, Any], fault: str) -> tuple[str | None, str]:
    """Return a reply's content and how it ended."""
    if fault == "refusal":
        return REFUSAL, "stop"
    if fault in ("message_refusal", "filtered"):
        return None, "content_filter" if fault == "filtered" else "stop"
    text = read_text(body)
    (kind,) = [name for name, one in load_kinds().items() if one.prompt in text]
    turns = ENGLISH * 3 if fault == "english" else GOOD[kind]
    if fault == "not_applicable":
        turns = []
    reply = {"applicable": bool(turns), "turns": [{"question": one, "answer": two} for one, two in turns]}
    content = json.dumps(reply, ensure_ascii=False)
    if fault == "injected":
        return INJECTED, "stop"
    if fault in ("broken", "truncated"):
        return content[: len(content) // 2], "length" if fault == "truncated" else "stop"
    return f"```json\n{content}\n```" if fault == "fenced" else content, "stop"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that are gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    owner: OpenAIServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if len(content) < int(self.headers["Content-Length"]):  # the client was killed
            return
        body = json.loads(content)
        name, owner = name_request(body), self.owner
        with owner.lock:
            attempt = owner.seen[name]
            owner.seen[name] += 1
            owner.bodies.append(body)
            owner.keys.add(self.headers["Authorization"])
            owner.num_active += 1
            owner.most_active = max(owner.most_active, owner.num_active)
            fault = owner.faults(int(name[:8], 16), attempt)
        try:
            self.answer(body, name, "404" if self.path != "/v1/chat/completions" else fault)
        except OSError:  # the client is gone
            self.close_connection = True
        finally:
            with owner.lock:
                owner.num_active -= 1

    def answer(self, body: dict[str, Any], name: str, fault: str) -> None:
        if fault in ERRORS:
            status, code, message = ERRORS[fault]
            self.send(status, json.dumps({"error": {"message": message, "code": code, "type": code, "param": None}}))
            return
        if fault == "html":
            self.send(200, "<html>please log in</html>", kind="text/html")
            return
        time.sleep(3 if fault == "slow" else self.owner.delay_s)
        with self.owner.lock:
            self.owner.paid[name] += 1
        content, finish_reason = write_content(body, fault)
        reply: dict[str, Any] = {"role": "assistant", "content": content}
        if fault == "message_refusal":
            reply["refusal"] = "I'm sorry, I can't help with that."
        completion = {
            "id": f"chatcmpl-{name[:24]}",
            "object": "chat.completion",
            "model": f"{body['model']}-2026-01-01",
            "choices": [{"index": 0, "finish_reason": finish_reason, "message": reply}],
            "usage": {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS},
        }
        if fault == "no_usage":
            del completion["usage"]
        if fault == "dear":
            completion["usage"] = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": 10**6}
        self.send(200, json.dumps(completion), is_cut=fault == "cut")

    def send(self, status: int, text: str, kind: str = "application/json", is_cut: bool = False) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status >= 429:
            self.send_header("Retry-After", "0.02")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if is_cut else content)
        self.close_connection = is_cut

    def log_message(self, *_: object) -> None:
        pass
