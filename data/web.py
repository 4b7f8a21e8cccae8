"""A picture from the web, for whoever names an address instead of a file.

Whoever runs the other end decides what it sends: only http and https, few redirects, a limit on bytes and on seconds.
"""

import contextlib
import http.client
import io
import ipaddress
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote, urlsplit

MAX_BYTES = 20_000_000
MAX_REDIRECTS = 5
TIMEOUT_S = 20.0
CHUNK_BYTES = 65_536
HEADERS = {"User-Agent": "plain-llava/1.5 (fetches a picture that its user named)"}
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_url(text: str) -> bool:
    """Tell an address from a file's name; which addresses are fetched, `fetch_picture` decides."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def fetch_picture(
    url: str, max_bytes: int = MAX_BYTES, timeout_s: float = TIMEOUT_S, allow_private: bool = True
) -> io.BytesIO:
    """Return what lies at `url`; whether it is a picture, `open_image` finds out.

    Args:
        timeout_s: for all of it, redirects included; only the system's look-up of names has a limit of its own.
        allow_private: whether addresses inside the own network are fetched. A server that fetches for strangers must
            refuse them; no proxy is used then, and the connection goes to the very address that was checked.
    Raises: ValueError for an address that is refused or wrong, and for one that sends too much or too slowly.
    """
    connector = _Connector(time.monotonic() + timeout_s, allow_private)
    proxies = [] if allow_private else [urllib.request.ProxyHandler({})]
    opener = urllib.request.build_opener(connector, _Redirects(), *proxies)
    timer = threading.Timer(timeout_s, connector.cut)
    timer.daemon = True
    timer.start()
    try:
        request = urllib.request.Request(_check_url(url), headers=HEADERS)
        with opener.open(request, timeout=timeout_s) as response:
            content = _read(response, max_bytes)
        if time.monotonic() > connector.deadline:  # a connection that was cut looks like the end of the file
            raise TimeoutError
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(f"cannot fetch {url}: the server answers {error.code}, {error.reason}: check it") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else str(error) or repr(error)
        if time.monotonic() > connector.deadline:
            reason = f"it took longer than {timeout_s:g} s"
        raise ValueError(f"cannot fetch {url}: {reason}; if a browser can, save it to a file") from error
    finally:
        timer.cancel()
        connector.cut()
    return io.BytesIO(content)


def _check_url(url: str) -> str:
    """Return an address as it is sent; Chinese characters in it are written as the web does."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url} is not an address that starts with http:// or https://")
    place = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(text, safe="%/:;=@!$&'()*+,?~[]") for text in (parts.path, parts.query))
    return parts._replace(netloc=place, path=path, query=query, fragment="").geturl()


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Read to the end, whatever length the server promised."""
    content = bytearray()
    while chunk := response.read1(CHUNK_BYTES):
        content += chunk
        if len(content) > max_bytes:
            raise ValueError(f"it is larger than {max_bytes} bytes")
    return bytes(content)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow a few redirects, to web addresses only."""

    max_repeats = max_redirections = MAX_REDIRECTS + 1  # ours is reached first
    num_redirects = 0

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        fp.close()  # a redirect's body is of no use and has no limit
        self.num_redirects += 1
        if self.num_redirects > MAX_REDIRECTS:
            raise ValueError(f"it redirects more than {MAX_REDIRECTS} times")
        return super().redirect_request(req, fp, code, msg, headers, _check_url(newurl))


class _Connector(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Open connections that can be cut from another thread, if need be to public addresses only."""

    def __init__(self, deadline: float, allow_private: bool) -> None:
        super().__init__()
        self.deadline = deadline
        self.allow_private = allow_private
        self.twins: list[socket.socket] = []

    def do_open(self, http_class: Any, req: urllib.request.Request, **options: Any) -> http.client.HTTPResponse:
        def make_connection(host: str, **options: Any) -> http.client.HTTPConnection:
            connection = http_class(host, **options)
            connection._create_connection = self.connect
            return connection

        return super().do_open(make_connection, req, **options)

    def connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """Look up the name once, check every address it has, connect to the first that answers."""
        host, port = address
        places = [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not self.allow_private and not all(is_public(place) for place in places):
            raise ValueError(f"{host} is an address inside a private network ({', '.join(places)})")
        for number, place in enumerate(places):
            share_s = (self.deadline - time.monotonic()) / (len(places) - number)
            try:
                connection = socket.create_connection((place, port), max(share_s, 0.001))
            except OSError:
                if number == len(places) - 1:
                    raise
                continue
            self.twins.append(connection.dup())  # encryption takes the first one over
            return connection
        raise OSError(f"{host} has no address")

    def cut(self) -> None:
        """End all connections: whoever reads from one sees its end."""
        for twin in self.twins:
            with contextlib.suppress(OSError):
                twin.shutdown(socket.SHUT_RDWR)
            twin.close()


def is_public(address: str) -> bool:
    """Tell a public address, also one that carries an IPv4 address inside IPv6, from those of own networks."""
    place: Any = ipaddress.ip_address(address)
    if place.version == 6:
        inner = ipaddress.IPv4Address(int(place) & 0xFFFF_FFFF) if place in NAT64 else None
        place = place.ipv4_mapped or place.sixtofour or inner or place
    return bool(place.is_global and not place.is_multicast)
