"""What reports are made of: Markdown that shows untrusted text as it is, and from it one page and its print.

The page holds its pictures and its style; it has no script and asks nothing of the network.
"""

import base64
import html
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from markdown import markdown as render_markdown  # type: ignore[import-untyped]
from PIL import Image

MAX_CHARACTERS = 400  # of an answer; more would push the others off the page
PICTURES = "pictures"
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
BROWSERS_ELSEWHERE = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
PRINT_LIMIT_S = 120

# What Markdown, HTML or GitHub would make something of. An underscore inside a word is only an underscore.
MARKUP = re.compile(
    r"[\\`*\[\]<>&|~$@{}\"']|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=/)|(?<=www)\.|^[-+#=]",
    re.IGNORECASE,
)
MARKS = {"\r\n": "↵", "\n": "↵", "\r": "↵", "\t": "⇥"}

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1f21; --faint: #5c6166; --line: #d9d9d4; --band: #f5f5f2;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17191b; --ink: #e6e6e3; --faint: #a3a8ad; --line: #3a3e42; --band: #212427; --link: #7db7ef; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", "Noto Sans", "PingFang SC", "Microsoft YaHei",
  "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.8rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 0.6rem; padding-bottom: 0.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 0.4rem; }
a { color: var(--link); }
small { color: var(--faint); font-size: 0.8em; }
code { font: 0.88em/1.5 ui-monospace, "DejaVu Sans Mono", Consolas, "Noto Sans Mono CJK SC", monospace;
  background: var(--band); border-radius: 3px; padding: 0.1em 0.25em; overflow-wrap: anywhere; }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 6px; padding: 0.7rem 0.9rem;
  white-space: pre-wrap; }
pre code { background: none; padding: 0; }
.table { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; max-width: 24rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--band); }
th:first-child, td:first-child { padding-left: 0.3rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
td img { max-width: 12rem; display: block; }
@media screen and (max-width: 44rem) { .picture { overflow-x: auto; } .picture img { max-width: none; width: 44rem; } }
@page { size: A4; margin: 15mm 14mm; }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --faint: #444; --line: #bbb; --band: #f3f3f0;
    --link: #0b5cad; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h1, h2, h3, h4 { break-after: avoid; }
  .table { overflow: visible; }
  .table:not(:has(img, tr:nth-child(13))) { break-inside: avoid; }
  table { font-size: 8pt; max-width: 100%; }
  table:has(th:nth-child(8)) { font-size: 7pt; }
  th, td { padding: 0.2rem 0.4rem; max-width: 60mm; overflow-wrap: break-word; }
  thead { display: table-header-group; }
  tr, img, li { break-inside: avoid; }
  p { orphans: 3; widows: 3; }
  img { max-height: 220mm; }
  td img { max-width: 30mm; }
}
"""


def escape(text: str) -> str:
    """Return untrusted text as one line of Markdown that shows it literally, in a table too; long text is cut with "…".

    Line ends and tabs become visible marks; so do characters that cannot be seen or change the direction of reading.
    """
    if len(text) > MAX_CHARACTERS:
        text = text[: MAX_CHARACTERS - 1] + "…"
    text = re.sub(r"\r\n|[\r\n\t]", lambda found: MARKS[found[0]], text)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    text = MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)
    text = re.sub(r"^([0-9]+)([.)])(?= |$)", lambda found: f"{found[1]}&#{ord(found[2])};", text)  # a numbered list
    return re.sub(r"^ | $|(?<= ) ", "&nbsp;", text)  # blanks that Markdown or HTML would swallow


def make_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already: the first column to the left, the others to the right."""
    assert all(len(row) == len(header) for row in rows), f"a row is not as long as the header {header}"
    alignment = [":---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, alignment, *rows))


def save_picture(image: Image.Image, folder: Path, name: str, max_side: int = 320) -> str:
    """Write a picture, at most `max_side` pixels a side, below `folder` without metadata; return what shows it.

    Args:
        name: a file name; its ending (.png, .jpg) decides the format.
    """
    assert Path(name).name == name, f"{name} is not a file's name"
    assert Path(name).suffix in MIME, f"{name} is not the name of a PNG or JPEG file"
    picture = Image.new("RGB", image.size, "white")
    picture.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    picture.save(folder / PICTURES / name, quality=88, optimize=True)
    return f"![]({PICTURES}/{name})"


def to_html(markdown: str, folder: Path, title: str, language: str) -> str:
    """Return one self-contained page: pictures of `folder` are inside, light and dark, for desk, phone and print.

    Raises: FileNotFoundError for a picture that is not there.
    """
    body = render_markdown(markdown, extensions=["tables", "fenced_code", "sane_lists"])
    body = re.sub(r'(<img\b[^>]*\bsrc=")([^"]*)', lambda found: found[1] + _inline(folder, found[2]), body)
    body = re.sub(r"(?<=\d) %", "&nbsp;%", body)
    body = body.replace("<p><img ", '<p class="picture"><img ')
    body = re.sub(r"(?<=>)[^<>]+(?=</t[dh]>|<br />|<small>)", _soften, body)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    tag = "zh-Hans" if language == "zh" else language  # decides how characters that China and Japan share look
    return (
        f'<!doctype html>\n<html lang="{tag}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _inline(folder: Path, source: str) -> str:
    file = folder / html.unescape(source)
    if "://" in source or not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the picture {source} is not inside {folder}, where the page's pictures are")
    return f"data:{MIME[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"


def _soften(found: re.Match[str]) -> str:
    """Let long words of a table's cell, hashes and paths, be broken where the table would be wider than the page."""
    return re.sub(r"[^\s&;]{17,}", lambda word: "<wbr>".join(re.findall(".{1,12}", word[0])), found[0])


def find_browser() -> str | None:
    """Return the Chromium or Chrome of this machine, None where it has none."""
    found = (shutil.which(name) for name in BROWSERS)
    return next((path for path in found if path), next(filter(os.path.exists, BROWSERS_ELSEWHERE), None))


def print_pdf(html_file: Path, pdf_file: Path) -> bool:
    """Print a page by the Chromium or Chrome that is installed; return False where none is.

    Raises: OSError with the browser's words when it fails.
    """
    pdf_file.unlink(missing_ok=True)  # an older one must not pass for this page's
    browser = find_browser()
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as profile:  # the user's own may be in use
        command = [browser, "--headless", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={profile}"]
        command += ["--no-sandbox"] * (os.name == "posix" and os.geteuid() == 0)  # which root may not have
        command += [f"--print-to-pdf={pdf_file.resolve()}", html_file.resolve().as_uri()]
        try:
            printed = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, timeout=PRINT_LIMIT_S
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{browser} took more than {PRINT_LIMIT_S} s to print {html_file}") from error
    if printed.returncode or not pdf_file.is_file():
        raise OSError(f"{browser} did not print {html_file} (exit code {printed.returncode}): {printed.stderr[-500:]}")
    return True
