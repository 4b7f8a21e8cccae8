"""A server that is busy in every way that MediaWiki knows, and in some that only networks know."""

import socket
import time
from collections.abc import Iterator

import pytest

import data.zh.mediawiki
from data.zh.mediawiki import MAX_TRIES, MediaWiki
from tests.data.broken_pictures import draw_scene, encode
from tests.data.zh.mediawiki_server import API, File, Page, Wiki

AGENT = "tests/1.0 (https://example.org/about)"
QUESTION = {"prop": "info", "titles": "故宫"}
PASSING = ["maxlag", "ratelimited", "readonly", "internal", "429", "503 until", "500", "cut", "silent", "cut in gzip",
    "broken", "page", "list"]  # fmt: skip


@pytest.fixture
def wiki() -> Iterator[Wiki]:
    server = Wiki([Page("故宫", file="A.jpg")], {"A.jpg": File(encode(draw_scene(1), "JPEG"))})
    yield server
    server.stop()


def open_wiki(wiki: Wiki, pause_s: float = 0) -> MediaWiki:
    return MediaWiki(wiki.address + API, AGENT, pause_s, 0.002)


@pytest.mark.parametrize("fault", PASSING)
def test_faults_that_pass(wiki: Wiki, fault: str) -> None:
    """A question and a picture are asked for again, until they are whole."""
    wiki.faults = {0: fault, 1: fault}
    assert open_wiki(wiki).query(QUESTION)["query"]["pages"][0]["title"] == "故宫"
    assert wiki.num_requests == 3
    assert wiki.queries[0].items() >= {"action": "query", "maxlag": "5"}.items()
    if fault not in ("maxlag", "ratelimited", "readonly", "internal"):
        wiki.faults = {3: fault}
        url = wiki.describe_file("File:A.jpg")["imageinfo"][0]["thumburl"]
        assert open_wiki(wiki).fetch(url) == wiki.files["A.jpg"].content
        assert wiki.num_requests == 5


@pytest.mark.parametrize("fault", ["maxlag of 1 s", "429 of 1 s"])
def test_server_names_the_wait(wiki: Wiki, fault: str) -> None:
    """Retry-After holds for an error that comes as 200, too."""
    wiki.faults = {0: fault}
    open_wiki(wiki).query(QUESTION)
    assert 1 <= wiki.times[1] - wiki.times[0] < 3


@pytest.mark.parametrize("fault", ["429 of 1 h", "cut", "500", "page"])
def test_server_that_stays_busy(wiki: Wiki, fault: str) -> None:
    """It is not asked for ever, and not at all before the hour that it wants."""
    wiki.faults = dict.fromkeys(range(99), fault)
    num_tries = 1 if fault == "429 of 1 h" else MAX_TRIES
    with pytest.raises(ConnectionError, match="the same command goes on from here"):
        open_wiki(wiki).query(QUESTION)
    assert wiki.num_requests == num_tries
    gives_up_picture = fault in ("500", "page")  # others may be had while this one cannot
    with pytest.raises(ValueError if gives_up_picture else ConnectionError, match=f"{wiki.address}/x.jpg"):
        open_wiki(wiki).fetch(f"{wiki.address}/x.jpg")
    assert wiki.num_requests == 2 * num_tries


def test_what_does_not_pass(wiki: Wiki) -> None:
    """A question that the API does not understand, a picture that is gone: asking again is of no use."""
    wiki.faults = {0: "refused", 1: "404"}
    with pytest.raises(ValueError, match=r"w/api.php: badvalue, This is badvalue"):
        open_wiki(wiki).query(QUESTION)
    with pytest.raises(ValueError, match="the server answers 404"):
        open_wiki(wiki).query(QUESTION)
    with pytest.raises(ValueError, match=r"gone.jpg: the server answers 404"):
        open_wiki(wiki).fetch(f"{wiki.address}/gone.jpg")
    assert wiki.num_requests == 3


def test_redirects(wiki: Wiki) -> None:
    """They are followed on the web, not into files."""
    wiki.faults = {0: "moved"}
    assert "query" in open_wiki(wiki).query(QUESTION)
    wiki.faults = {2: "to a file"}
    with pytest.raises(ValueError, match=r"the server answers 302"):
        open_wiki(wiki).query(QUESTION)


@pytest.mark.parametrize("agent", ["", "tests/1.0", "Mozilla/5.0 (X11; Linux)", "测试/1 (a@b.org)", "a@b.org\nX: y"])
def test_user_agent_without_a_contact(agent: str) -> None:
    with pytest.raises(ValueError, match="name your program and an address or mail to write to"):
        MediaWiki("https://zh.wikipedia.org/w/api.php", agent, 0, 0)


def test_user_agent_that_is_refused(wiki: Wiki) -> None:
    """That is no property of one picture: it stops the run."""
    client = open_wiki(wiki)
    client.headers["User-Agent"] = "anonymous"
    for ask in (lambda: client.query(QUESTION), lambda: client.fetch(f"{wiki.address}/x.jpg")):
        with pytest.raises(PermissionError, match=r"403.*does it refuse your user agent"):
            ask()
    assert wiki.num_requests == 2


def test_long_questions(wiki: Wiki) -> None:
    """Fifty titles in Chinese do not fit into an address."""
    titles = [f"一個很長的中文條目名稱{number}" for number in range(50)]
    answer = open_wiki(wiki).query({"prop": "info", "titles": "|".join(titles)})
    assert [page["title"] for page in answer["query"]["pages"]] == titles[: wiki.batch_size]


def test_sizes_have_limits(wiki: Wiki, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed answers count as what they unpack to."""
    monkeypatch.setattr(data.zh.mediawiki, "MAX_ANSWER_BYTES", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        open_wiki(wiki).query(QUESTION)
    monkeypatch.setattr(data.zh.mediawiki, "MAX_PICTURE_BYTES", 99)
    with pytest.raises(ValueError, match="larger than 99 bytes"):
        open_wiki(wiki).fetch(wiki.describe_file("File:A.jpg")["imageinfo"][0]["thumburl"])


def test_pause(wiki: Wiki) -> None:
    """It lies between the end of a request and the next one, whatever they ask for."""
    client = open_wiki(wiki, pause_s=0.2)
    client.query(QUESTION)
    client.fetch(wiki.describe_file("File:A.jpg")["imageinfo"][0]["thumburl"])
    assert wiki.times[1] - wiki.times[0] >= 0.19


def test_absent_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="Connection refused"):
        MediaWiki(f"http://127.0.0.1:{port}/api", AGENT, 0, 0.002).query(QUESTION)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a.png", "//a/b.png", "a.png", "http://甲/"])
def test_only_web_addresses(wiki: Wiki, url: str) -> None:
    with pytest.raises(ValueError, match="is no address that starts with http:// or https://"):
        open_wiki(wiki).fetch(url)
    with pytest.raises(ValueError, match="is no address"):
        MediaWiki(url, AGENT, 0, 0)
    assert wiki.num_requests == 0
