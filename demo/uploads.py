"""Pictures that are uploaded to the page: before one lies on the disk, it is known to be one, small, and only pixels.

Gradio would store whatever comes, under any name, with the place and the time that a phone writes into its pictures.
"""

import io
import threading
import time
from collections import OrderedDict
from pathlib import Path

import anyio.to_thread
import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from PIL.Image import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from demo.pictures import read_picture
from demo.words import Words

KEPT_S = 3600.0
MAX_KEPT_BYTES = 4_000_000_000
MAX_FILES = 4  # of one request; the page sends one
MAX_NAME = 60  # characters
KINDS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")

TEXTS = {
    "upload_full": (
        "Many pictures were uploaded within the last hour, and there is no room for more. Try again later.",
        "过去一小时内上传的图片太多，已没有空间，请稍后再试。",
    ),
}


class Uploads:
    """Answers the two requests that the page makes for an upload, in Gradio's place."""

    def __init__(self, words: Words, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        self.words, self.max_kept_bytes = words, max_kept_bytes
        self.kept: OrderedDict[str, tuple[float, int]] = OrderedDict()  # files: when they came, the oldest first, bytes
        self.kept_bytes, self.lock = 0, threading.Lock()

    def make_routes(self) -> list[Route]:
        return [
            Route("/gradio_api/upload", self.store, methods=["POST"]),
            Route("/gradio_api/upload_progress", self.show_progress),
        ]

    async def store(self, request: Request) -> Response:
        """Store pictures; say where they lie, as the page will name them."""
        try:
            async with request.form(max_files=MAX_FILES, max_fields=MAX_FILES) as form:
                files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
                paths = [await anyio.to_thread.run_sync(self.keep, file, request) for file in files]
        except HTTPException as error:  # no form that can be read
            return PlainTextResponse(error.detail, error.status_code)
        except ValueError as error:
            return PlainTextResponse(self.words.say("page_bad_picture", gr.Request(request), reason=error), 415)
        except FullError:
            return PlainTextResponse(self.words.say("upload_full", gr.Request(request)), 503)
        return JSONResponse(paths)

    async def show_progress(self, _: Request) -> Response:
        """Say that an upload is done: it was read as a whole, and is about to be answered."""
        return Response(b'data: {"msg":"done"}\n\n', media_type="text/event-stream")

    def keep(self, file: UploadFile, request: Request) -> str:
        """Write a picture. Raises: ValueError for what is none, FullError."""
        content = encode(read_picture(file.file))
        with self.lock:
            now = time.monotonic()
            while self.kept and next(iter(self.kept.values()))[0] < now - KEPT_S:
                oldest, (_, num_bytes) = self.kept.popitem(last=False)
                self.kept_bytes -= num_bytes
                Path(oldest).unlink(missing_ok=True)
            if self.kept_bytes + len(content) > self.max_kept_bytes:
                raise FullError
            path = save_bytes_to_cache(content, choose_name(file.filename or ""), request.app.uploaded_file_dir)
            _, replaced = self.kept.pop(path, (now, 0))
            self.kept[path] = now, len(content)
            self.kept_bytes += len(content) - replaced
        return path


class FullError(RuntimeError):
    """There is no room for another picture."""


def encode(image: Image) -> bytes:
    """Return a picture as it is, so that the answer is the one to the file that was sent."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def choose_name(name: str) -> str:
    """Return a file's name, which a downloaded conversation has in it; browsers know a picture by its content."""
    path = Path(name.replace("\\", "/"))
    stem = "".join(letter for letter in path.stem if letter.isalnum() or letter in "-_ ()")[:MAX_NAME].strip()
    kind = path.suffix.lower() if path.suffix.lower() in KINDS else ".png"
    return f"{stem or 'picture'}{kind}"
