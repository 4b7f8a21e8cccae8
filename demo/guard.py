"""What stands before every request: bodies have a limit, and answers tell the browser to load nothing from elsewhere."""

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16_000_000  # a picture of the largest size as base64, and the text about it

# Gradio's page has its scripts inline. Whatever a model or a stranger writes into it, nothing is loaded from another
# machine, so nothing is told to one.
PAGE_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
FILE_POLICY = "sandbox; default-src 'none'; img-src 'self'; style-src 'unsafe-inline'"  # what was uploaded is only shown


class BodyTooLargeError(Exception):
    """More came than the limit."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        num_bytes, has_begun = 0, False
        is_file = "/file=" in scope["path"] or "/file/" in scope["path"]

        async def receive_some() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                raise BodyTooLargeError
            return message

        async def send_with_policy(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = FILE_POLICY if is_file else PAGE_POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        try:
            await self.app(scope, receive_some, send_with_policy)
        except BodyTooLargeError:
            if not has_begun:
                text = f"the request is larger than {self.max_body_bytes} bytes: make the picture smaller"
                await PlainTextResponse(text, 413)(scope, receive, send_with_policy)
