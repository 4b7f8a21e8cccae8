"""Take the page's pictures, from a real run in a real browser: `python demo/record.py --adapter runs/tiny-zh/final`.

Starts the page with the options of `demo/app.py` that are given, asks, compares and looks inside as a visitor would,
and writes `page_*.png` (desktop and phone, light and dark) and `page.gif`. Wants the Chromium of the system and
Playwright (`pip install -r tests/requirements.txt`).
"""

import argparse
import contextlib
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from PIL import Image  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

START_TIMEOUT_S = 600  # a 13B is read from a slow disk
ANSWER_TIMEOUT_MS = 600_000  # by a 13B without a GPU
DESKTOP, PHONE = (1280, 860), (390, 844)
GIF_WIDTH = 760
NUM_COLORS = 128


@dataclass(frozen=True)
class Scene:
    """What is asked about which picture."""

    picture: Path
    first: str
    second: str


@dataclass
class Film:
    """Frames of an animation, each with the time it is shown."""

    frames: list[Image.Image] = field(default_factory=list)
    durations_ms: list[int] = field(default_factory=list)

    def take(self, page: "Page", duration_ms: int) -> None:
        frame = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        frame = frame.resize((GIF_WIDTH, GIF_WIDTH * frame.height // frame.width), Image.Resampling.LANCZOS)
        self.frames.append(frame)
        self.durations_ms.append(duration_ms)

    def save(self, file: Path) -> None:
        """Write the GIF, each frame with colours of its own."""
        first, *others = [frame.quantize(NUM_COLORS, dither=Image.Dither.NONE) for frame in self.frames]
        first.save(file, save_all=True, append_images=others, duration=self.durations_ms, loop=0, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further options are those of demo/app.py.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("recorded"), help="folder of the pictures")
    parser.add_argument("--picture", type=Path, default=Path("runs/easy_vqa/images/test/3.png"))
    parser.add_argument("--question", nargs=2, default=["图中是什么形状？", "what color is it?"], metavar="TEXT")
    parser.add_argument("--model-path", default="runs/tiny/final", help="as demo/app.py takes it")
    parser.add_argument("--adapter", help="as demo/app.py takes it: what the model is compared with")
    arguments, others = parser.parse_known_args()
    options = ["--model-path", arguments.model_path, *others]
    options += [] if arguments.adapter is None else ["--adapter", arguments.adapter]
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("error: Playwright is missing: pip install -r tests/requirements.txt")
    if chromium is None:
        sys.exit("error: no Chromium on this system: apt install chromium")
    if not arguments.picture.is_file():
        sys.exit(f"error: {arguments.picture} is missing: --picture names another")
    arguments.out.mkdir(parents=True, exist_ok=True)
    scene = Scene(arguments.picture, *arguments.question)
    try:
        with serve(options) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            film = Film()
            record_desktop(browser, address, scene, arguments.out, film)
            film.save(arguments.out / "page.gif")
            record_phone(browser, address, scene, arguments.out)
            browser.close()
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {', '.join(sorted(file.name for file in arguments.out.glob('page*')))} in {arguments.out}")


@contextlib.contextmanager
def serve(options: Sequence[str]) -> Iterator[str]:
    """Run the page in a process of its own; give its address, and end it afterwards.

    Raises: RuntimeError with what it said where it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "demo/app.py"), *options, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"the page did not start:\n{process.communicate()[0]}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def open_page(browser: "Browser", address: str, size: tuple[int, int], language: str, is_dark: bool) -> "Page":
    """Open the page in a browser of its own, as a visitor of that language."""
    context = browser.new_context(
        locale=language, viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if is_dark else "light"
    )
    page = context.new_page()
    page.goto(f"{address}/?__theme={'dark' if is_dark else 'light'}")
    page.wait_for_selector("#chat-send")
    return page


def show_picture(page: "Page", file: Path, tab: str) -> None:
    """Upload a picture into a tab, and wait until it is there."""
    page.set_input_files(f"#{tab}-picture input[type=file]", file)
    page.wait_for_selector(f"#{tab}-picture img")
    page.wait_for_timeout(500)  # the conversation before it goes away


def wait_for_answer(page: "Page", tab: str) -> None:
    """Wait until what was asked is answered: Stop, which has come, goes away."""
    page.wait_for_selector(f"#{tab}-stop", state="hidden", timeout=ANSWER_TIMEOUT_MS)
    page.wait_for_timeout(300)


def ask(page: "Page", question: str, film: Film | None = None) -> None:
    """Type a question, letter by letter where it is filmed, and wait for the answer."""
    box = page.locator("#chat-question textarea")
    if film is None:
        box.fill(question)
    else:
        for number in range(1, len(question) + 1, max(1, len(question) // 8)):
            box.fill(question[:number])
            film.take(page, 90)
        box.fill(question)
        film.take(page, 500)
    box.press("Enter")
    page.wait_for_function("document.querySelector('#chat-question textarea').value === ''")
    if film is not None:
        film.take(page, 150)
        film.take(page, 150)
    wait_for_answer(page, "chat")
    if film is not None:
        film.take(page, 1400)


def look_inside(page: "Page") -> Any:
    """Open the look inside the last answer; return its frame."""
    page.click("#chat-look")
    page.wait_for_selector("iframe.look", timeout=ANSWER_TIMEOUT_MS)
    page.locator("iframe.look").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('iframe.look').scrollIntoView({block: 'start'})")
    page.wait_for_timeout(1500)
    return page.frame_locator("iframe.look")


def open_tab(page: "Page", number: int) -> None:
    page.evaluate("window.scrollTo(0, 0)")
    page.locator("button[role=tab]").nth(number).click()
    page.wait_for_timeout(600)


def record_desktop(browser: "Browser", address: str, scene: Scene, out: Path, film: Film) -> None:
    """Take the pictures of all tabs, and the film."""
    page = open_page(browser, address, DESKTOP, "en-US", is_dark=False)
    page.wait_for_timeout(500)
    film.take(page, 900)
    show_picture(page, scene.picture, "chat")
    film.take(page, 700)
    ask(page, scene.first, film)
    ask(page, scene.second, film)
    page.screenshot(path=out / "page_chat.png")
    frame = look_inside(page)
    page.screenshot(path=out / "page_look.png")
    film.take(page, 1500)
    for word in frame.locator("#words .word").all()[:2]:
        word.click()
        page.wait_for_timeout(300)
        film.take(page, 900)
    table = frame.locator("#table")  # layers by heads: three of its cells
    box = table.bounding_box()
    for x, y in ((0.2, 0.2), (0.6, 0.6), (0.9, 0.9)) if box else ():
        table.click(position={"x": x * box["width"], "y": y * box["height"]})
        page.wait_for_timeout(300)
        film.take(page, 900)
    open_tab(page, 1)
    if page.locator("#compare-ask").count():
        show_picture(page, scene.picture, "compare")
        page.fill("#compare-question textarea", scene.first)
        film.take(page, 700)
        page.click("#compare-ask")
        page.wait_for_selector(".compare-verdict", timeout=ANSWER_TIMEOUT_MS)
        wait_for_answer(page, "compare")
        film.take(page, 2000)
        page.screenshot(path=out / "page_compare.png")
    open_tab(page, 2)
    page.wait_for_timeout(3000)
    film.take(page, 1800)
    page.screenshot(path=out / "page_runs.png", full_page=True)


def record_phone(browser: "Browser", address: str, scene: Scene, out: Path) -> None:
    """Take the chat and the look inside as a phone shows them, in Chinese, light and dark, side by side."""
    shots = []
    for is_dark in (False, True):
        page = open_page(browser, address, PHONE, "zh-CN", is_dark)
        show_picture(page, scene.picture, "chat")
        ask(page, scene.first)
        page.evaluate("document.querySelector('#chat').scrollIntoView({block: 'start'})")
        shots.append(page.screenshot())
        look_inside(page)
        shots.append(page.screenshot())
        page.context.close()
    images = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    gap = 16
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    row.save(out / "page_phone.png", optimize=True)


if __name__ == "__main__":
    main()
