"""Ask a MediaWiki API as its owners wish: one request after another, with somebody to write to, and with patience.

Source: mediawiki.org, API:Etiquette, API:Continue and Manual:Maxlag parameter; Wikimedia's user agent policy.
A busy server says so in four ways: 429 or 503, often with Retry-After; 500; and 200 with an error for a body.
"""

import email.utils
import http.client
import json
import re
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

Answer = TypeVar("Answer")

MAX_TRIES = 6
MAX_WAIT_S = 300.0
MAX_LAG_S = 5  # by which the server's databases may differ; with more it is asked later
TIMEOUT_S = 30.0  # without a byte
MAX_ANSWER_S = 300.0  # however it drips
MAX_ANSWER_BYTES = 50_000_000
MAX_PICTURE_BYTES = 20_000_000
MAX_URL_BYTES = 2000  # fifty Chinese titles are more than an address may hold: they are sent as a form
CHUNK_BYTES = 65_536
BUSY = ("maxlag", "ratelimited", "readonly", "internal_api_error")  # how the codes of errors that pass begin
CONTACT = re.compile(r"https?://[^\s/]+\.\w|[^\s@]+@[^\s@]+\.\w")
HANDLERS = (  # no files and no FTP, not even after a redirect
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)


class _BusyError(Exception):
    """What may pass. The server may have said in how many seconds; a picture may be beyond its powers (500)."""

    def __init__(self, reason: str, wait_s: float | None = None, is_failure: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.is_failure = is_failure


class MediaWiki:
    """One API and the pictures that it names.

    Args:
        user_agent: names the program and somebody to write to; Wikimedia refuses others.
        pause_s: between two requests.
        backoff_s: before the second try, twice as long before each further one.
    Raises: ValueError for a user agent without a contact and for what is no address.
    """

    def __init__(self, api: str, user_agent: str, pause_s: float, backoff_s: float) -> None:
        check_user_agent(user_agent)
        self.api = check_url(api)
        self.pause_s = pause_s
        self.backoff_s = backoff_s
        self.headers = {"User-Agent": user_agent, "Accept-Encoding": "gzip"}
        self.opener = urllib.request.OpenerDirector()
        for handler in HANDLERS:
            self.opener.add_handler(handler())
        self.last = -pause_s  # when a request ended

    def query(self, parameters: dict[str, str]) -> dict[str, Any]:
        """Return the answer to `action=query`.

        Raises: ValueError for what the API does not understand; OSError if it refuses, stays busy or out of reach.
        """
        fixed = {"action": "query", "format": "json", "formatversion": "2", "maxlag": str(MAX_LAG_S)}
        form = urlencode(fixed | parameters, errors="replace")
        if len(form) > MAX_URL_BYTES:
            request = urllib.request.Request(self.api, form.encode(), self.headers)
        else:
            request = urllib.request.Request(f"{self.api}?{form}", headers=self.headers)
        return self._persist(
            self.api, lambda: _parse_answer(*self._send(request, MAX_ANSWER_BYTES, "application/json"))
        )

    def fetch(self, url: str) -> bytes:
        """Return the picture at an address that the API named.

        Raises: ValueError if the server has none; OSError if it refuses, stays busy or out of reach.
        """
        request = urllib.request.Request(check_url(url), headers=self.headers)
        return self._persist(url, lambda: self._send(request, MAX_PICTURE_BYTES, "image/")[0], is_picture=True)

    def _persist(self, where: str, attempt: Callable[[], Answer], is_picture: bool = False) -> Answer:
        for number in range(MAX_TRIES):
            try:
                return attempt()
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            except _BusyError as error:
                wait_s = self.backoff_s * 2**number if error.wait_s is None else error.wait_s
                if number < MAX_TRIES - 1 and wait_s <= MAX_WAIT_S:
                    time.sleep(wait_s)
                elif is_picture and error.is_failure:
                    raise ValueError(f"{where}: {error}") from error
                else:
                    text = f"{where}: {error}: the same command goes on from here, try it later"
                    raise ConnectionError(text) from error
        raise AssertionError

    def _send(self, request: urllib.request.Request, max_bytes: int, kind: str) -> tuple[bytes, float | None]:
        """Return an answer's body, if it is whole, and the seconds that its Retry-After names."""
        time.sleep(max(0.0, self.last + self.pause_s - time.monotonic()))
        try:
            with self.opener.open(request, timeout=TIMEOUT_S) as response:
                if not response.headers.get_content_type().startswith(kind):  # a page that says sorry
                    raise _BusyError(f"the answer is {response.headers.get_content_type()}", is_failure=True)
                return _read(response, max_bytes), _parse_wait(response.headers.get("Retry-After"))
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answers {error.code}, {error.reason}"
            if error.code in (429, 503):
                wait_s = _parse_wait(error.headers.get("Retry-After"))
                raise _BusyError(reason if wait_s is None else f"{reason}, wait {wait_s:g} s", wait_s) from error
            if error.code >= 500:
                raise _BusyError(reason, is_failure=True) from error
            if error.code in (401, 403):
                raise PermissionError(f"{request.full_url}: {reason}: does it refuse your user agent?") from error
            raise ValueError(reason) from error
        except (OSError, http.client.HTTPException, zlib.error) as error:
            raise _BusyError(str(error) or repr(error)) from error
        finally:
            self.last = time.monotonic()


def check_user_agent(text: str) -> None:
    """Raises: ValueError for a user agent that names nobody to write to."""
    if not CONTACT.search(text) or not (text.isascii() and text.isprintable()):
        raise ValueError(
            f"user_agent = {text!r}: name your program and an address or mail to write to, as Wikipedia asks of all "
            "who collect from it: 'my-data-set/1.0 (https://example.org/about; me@example.org)'"
        )


def check_url(url: str) -> str:
    """Return an address of the web. Raises: ValueError for others."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii():
        raise ValueError(f"{url!r} is no address that starts with http:// or https://")
    return url


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    unpack = zlib.decompressobj(31) if response.headers.get("Content-Encoding") == "gzip" else None
    deadline = time.monotonic() + MAX_ANSWER_S
    content = bytearray()
    while chunk := response.read1(CHUNK_BYTES):
        content += unpack.decompress(chunk, max_bytes + 1) if unpack else chunk
        if len(content) > max_bytes:
            raise ValueError(f"the answer is larger than {max_bytes} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the answer takes longer than {MAX_ANSWER_S:g} s")
    if response.length or (unpack and not unpack.eof):
        raise ConnectionError("the connection was cut")
    return bytes(content)


def _parse_answer(content: bytes, wait_s: float | None) -> dict[str, Any]:
    """Return an answer that is none of the errors that come as 200."""
    try:
        answer = json.loads(content)
    except ValueError as error:
        raise _BusyError(f"the answer is not JSON ({content[:80]!r})") from error
    if not isinstance(answer, dict):
        raise _BusyError(f"the answer is no JSON object ({content[:80]!r})")
    if refusal := answer.get("error"):
        code, about = str(refusal), ""
        if isinstance(refusal, dict):
            code, about = str(refusal.get("code")), str(refusal.get("info"))
        if code.startswith(BUSY):
            raise _BusyError(f"{code}, {about}", wait_s)
        raise ValueError(f"{code}, {about}")
    return answer


def _parse_wait(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header: a number, or a date."""
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text or "").timestamp() - time.time())
        except (ValueError, TypeError):
            return None
