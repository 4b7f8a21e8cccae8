"""Pictures from strangers: how large one may be is known before it is decoded, and few are decoded at a time.

Those that somebody names at his own terminal have the limits of `data/image.py` alone.

What is kept of a picture are pixels: its notes (EXIF: place, time, camera) end here.
"""

import base64
import binascii
import ctypes
import io
import re
import sys
import threading
from pathlib import Path
from typing import IO

from PIL import Image

from data.image import open_image
from data.web import fetch_picture, is_url

MAX_BYTES = 10_000_000
MAX_PIXELS = 40_000_000  # decoded with transparency: about 0.8 GB
MAX_SIDE = 1344  # pixels of a picture that is kept: four times what CLIP sees
FETCH_TIMEOUT_S = 10.0
LARGE_PIXELS = 4_000_000

# Memory for two: 200 people who send the largest picture at once would need 160 GB.
_decoders = threading.BoundedSemaphore(2)


def read_picture(file: Path | IO[bytes]) -> Image.Image:
    """Return a picture, upright, RGB, at most MAX_SIDE large.

    Raises: FileNotFoundError, or ValueError for what is too large or no picture, whatever its name says.
    """
    size = file.stat().st_size if isinstance(file, Path) else file.seek(0, io.SEEK_END)
    if size > MAX_BYTES:
        raise ValueError(f"the picture has {size} bytes, the limit is {MAX_BYTES}: make it smaller")
    content = io.BytesIO(file.read_bytes()) if isinstance(file, Path) else file
    content.seek(0)
    with _decoders:
        image = open_image(content, MAX_PIXELS)
        num_pixels = image.width * image.height
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        if num_pixels > LARGE_PIXELS:
            give_memory_back()
    return Image.frombytes("RGB", image.size, image.tobytes())  # only the pixels


def give_memory_back() -> None:
    """Have the C library give the system what large pictures took: by itself it keeps that, for every thread anew."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it; others give memory back at once
        if trim is not None:
            trim(0)


def open_picture(name: str) -> Image.Image:
    """Read a picture from a file or the web, for whoever started the program.

    Raises: FileNotFoundError or ValueError.
    """
    return open_image(fetch_picture(name) if is_url(name) else Path(name))


def fetch(url: str) -> Image.Image:
    """Read a picture from the web, never from inside the own network.

    Raises: ValueError for an address that is refused, or sends something else than a picture.
    """
    return read_picture(fetch_picture(url, MAX_BYTES, FETCH_TIMEOUT_S, allow_private=False))


def read_data_uri(text: str) -> Image.Image:
    """Read a picture that is part of a text: `data:image/png;base64,...`. Raises: ValueError."""
    match = re.match(r"data:[\w/+.-]*;base64,", text[:100])
    if match is None:
        raise ValueError("expected a picture as data:image/...;base64,...")
    try:
        content = base64.b64decode(text[match.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"the picture is not base64: {error}") from error
    return read_picture(io.BytesIO(content))
