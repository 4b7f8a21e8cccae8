"""A wiki with an API, on this machine: pages and pictures in batches, licences in HTML, and every way to be busy."""

import contextlib
import gzip
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

API = "/w/api.php"
JSON = "application/json"
CC_BY_SA = "CC BY-SA 4.0"
TEXT = "是一座位于中国北方的历史建筑，始建于明朝，以木结构和彩绘闻名，每年有许多游客前来参观。"


@dataclass
class Page:
    title: str
    text: str = TEXT
    file: str = ""  # its lead picture
    category: str = "建筑"


@dataclass
class File:
    content: bytes
    license: str = f"<b>{CC_BY_SA}</b>"
    mime: str = "image/jpeg"
    artist: str = '<a href="//commons.wikimedia.org/wiki/User:Li" title="User:Li">李 &amp; 王</a>'
    is_shared: bool = True
    more: dict[str, str] = field(default_factory=dict)  # fields of its description


class Wiki(ThreadingHTTPServer):
    """Holds the pages and files, remembers what it was asked, and fails where it is told to.

    Args:
        batch_size: pages of a generator in one batch.
        num_texts: pages that get their text in one answer; the others get it in further ones.
    """

    daemon_threads = True

    def __init__(self, pages: list[Page], files: dict[str, File], batch_size: int = 5, num_texts: int = 2) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.files = pages, files
        self.batch_size, self.num_texts = batch_size, num_texts
        self.faults: dict[int, str] = {}  # of the request with that number, from 0
        self.fault_of: dict[str, str] = {}  # of every request for a file
        self.num_requests = 0
        self.queries: list[dict[str, str]] = []
        self.fetched: Counter[str] = Counter()  # files
        self.times: list[float] = []
        self.given: set[str] = set()  # continuations
        self.delay_s = 0.0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, query: dict[str, str]) -> dict[str, Any]:
        """Answer as the API does: an error is an answer, too."""
        if (query.get("action"), query.get("format"), query.get("formatversion")) != ("query", "json", "2"):
            return {"error": {"code": "badvalue", "info": "not a query in JSON"}}
        following = {name: query[name] for name in ("continue", "offset", "excontinue") if name in query}
        if following and json.dumps(following, sort_keys=True) not in self.given:
            return {"error": {"code": "badcontinue", "info": "Invalid continue param."}}
        if query["prop"] == "imageinfo":
            names = query["titles"].split("|")
            if len(names) > 50:
                return {"error": {"code": "toomanyvalues", "info": "Too many values supplied for parameter titles"}}
            return {"batchcomplete": True, "query": {"pages": [self.describe_file(name) for name in names]}}
        return self.list_pages(query)

    def list_pages(self, query: dict[str, str]) -> dict[str, Any]:
        start, texts_from = int(query.get("offset", "0")), int(query.get("excontinue", "0"))
        members = self.find(query)
        batch = members[start : start + self.batch_size]
        pages = []
        for number, page in enumerate(batch):
            about: dict[str, Any] = {"ns": 0, "title": page.title}
            if page.text == "missing":
                pages.append(about | {"missing": True})
                continue
            about["pageid"] = 1000 + self.pages.index(page)
            if texts_from == 0:
                address = f"{self.address}/wiki/{quote(page.title)}"
                about |= {"lastrevid": 7000 + self.pages.index(page), "fullurl": address, "canonicalurl": address}
                if page.file and (page.file not in self.files or self.files[page.file].is_shared):
                    about["pageimage"] = page.file.replace(" ", "_")
                elif page.file:
                    about["pageimage"] = page.file  # a local file that its page says is free
            if texts_from <= number < texts_from + self.num_texts:
                about["extract"] = page.text
            pages.append(about)
        answer: dict[str, Any] = {"query": {"pages": pages}}
        if texts_from + self.num_texts < len(batch):
            more = {"excontinue": str(texts_from + self.num_texts), "continue": "||info|pageimages"}
            answer["continue"] = more | ({"offset": str(start)} if start else {})
        else:
            answer["batchcomplete"] = True
            if start + self.batch_size < len(members):
                answer["continue"] = {"offset": str(start + self.batch_size), "continue": "offset||"}
        if "continue" in answer:
            self.given.add(json.dumps(answer["continue"], sort_keys=True))
        return answer

    def find(self, query: dict[str, str]) -> list[Page]:
        generator = query.get("generator")
        if generator == "categorymembers":
            return [page for page in self.pages if f"Category:{page.category}" == query["gcmtitle"]]
        if generator == "search":
            return [page for page in self.pages if query["gsrsearch"] in page.text]
        if generator == "random":
            return self.pages[::-1] * 3
        known = {page.title: page for page in self.pages}
        return [known.get(title, Page(title, "missing")) for title in query["titles"].split("|")]

    def describe_file(self, title: str) -> dict[str, Any]:
        name = title.partition(":")[2].replace("_", " ")
        if name not in self.files:
            return {"title": f"File:{name}", "missing": True, "imagerepository": ""}
        file, place = self.files[name], quote(name.replace(" ", "_"))
        metadata = {"LicenseShortName": file.license, "Artist": file.artist, **file.more}
        about = {
            "mime": file.mime,
            "url": f"{self.address}/commons/{place}",
            "thumburl": f"{self.address}/commons/thumb/{place}/500px-{place}",
            "descriptionurl": f"https://commons.wikimedia.org/wiki/File:{place}",
            "extmetadata": {key: {"value": value, "source": "commons-desc-page"} for key, value in metadata.items()},
        }
        where = {"missing": True, "known": True, "imagerepository": "shared"} if file.is_shared else {}
        return {"title": f"File:{name}", "imagerepository": "local", "imageinfo": [about]} | where


class Handler(BaseHTTPRequestHandler):
    server: Wiki

    @property
    def kind(self) -> str:
        """Of a whole answer."""
        return JSON if self.path.startswith(API) else "image/jpeg"

    def do_GET(self) -> None:
        self.handle_request(dict(parse_qsl(urlsplit(self.path).query)))

    def do_POST(self) -> None:
        self.handle_request(dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode())))

    def handle_request(self, query: dict[str, str]) -> None:
        wiki, path = self.server, unquote(urlsplit(self.path).path)
        with wiki.lock:
            fault = wiki.faults.get(wiki.num_requests, "")
            wiki.num_requests += 1
            wiki.times.append(time.monotonic())
        time.sleep(wiki.delay_s)
        name = path.rpartition("/500px-")[2].replace("_", " ")
        fault = fault or wiki.fault_of.get(name, "")
        if not re.search(r"https?://|@", self.headers["User-Agent"]):
            self.send(403, b"Please set a user-agent and respect our robot policy")
        elif fault:
            FAULTS[fault](self)
        elif path == API:
            wiki.queries.append(query)
            self.send(200, json.dumps(wiki.answer(query)).encode(), JSON)
        elif "/500px-" in path and name in wiki.files:
            wiki.fetched[name] += 1
            self.send(200, wiki.files[name].content)
        else:
            self.send(404, b"no such thing")

    def send(self, code: int, content: bytes, kind: str = "image/jpeg", **headers: str) -> None:
        """Send an answer to who may be gone."""
        if kind == JSON and not headers and "gzip" in self.headers.get("Accept-Encoding", ""):
            content, headers = gzip.compress(content), headers | {"Content_Encoding": "gzip"}
        headers = {"Content_Type": kind, "Content_Length": str(len(content))} | headers
        with contextlib.suppress(OSError):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

    def send_error_body(self, code: str, **headers: str) -> None:
        content = {"error": {"code": code, "info": f"This is {code}."}, "docref": "See api.php"}
        self.send(200, json.dumps(content).encode(), JSON, **headers)

    def log_message(self, *_: object) -> None:
        pass


FAULTS: dict[str, Callable[[Handler], Any]] = {
    "maxlag": lambda handler: handler.send_error_body("maxlag", Retry_After="0"),
    "maxlag of 1 s": lambda handler: handler.send_error_body("maxlag", Retry_After="1"),
    "ratelimited": lambda handler: handler.send_error_body("ratelimited"),
    "readonly": lambda handler: handler.send_error_body("readonly"),
    "internal": lambda handler: handler.send_error_body("internal_api_error_DBQueryError"),
    "refused": lambda handler: handler.send_error_body("badvalue"),
    "429": lambda handler: handler.send(429, b"too many requests", Retry_After="0"),
    "429 of 1 s": lambda handler: handler.send(429, b"too many requests", Retry_After="1"),
    "429 of 1 h": lambda handler: handler.send(429, b"too many requests", Retry_After="3600"),
    "503 until": lambda handler: handler.send(503, b"", Retry_After=formatdate(time.time() - 5, usegmt=True)),
    "500": lambda handler: handler.send(500, b"oops"),
    "cut": lambda handler: handler.send(200, b'{"batchcomplete": tr', handler.kind, Content_Length="5000"),
    "silent": lambda handler: handler.close_connection,
    "cut in gzip": lambda handler: handler.send(
        200, gzip.compress(b"{}" * 99)[:-9], handler.kind, Content_Encoding="gzip"
    ),
    "broken": lambda handler: handler.send(200, b'{"batchcomplete": true, "query": {"pa', JSON),
    "page": lambda handler: handler.send(200, b"<html>Wikimedia Error</html>", "text/html"),
    "list": lambda handler: handler.send(200, b"[]", JSON),
    "moved": lambda handler: handler.send(302, b"", Location=f"{handler.path}&moved=1"),
    "to a file": lambda handler: handler.send(302, b"", Location="file:///etc/hostname"),
    "404": lambda handler: handler.send(404, b"no such thing"),
}
