"""Untrusted text shows as it is, pages hold all they need and ask for nothing, and print whole."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from eval import page
from eval.page import MAX_CHARACTERS, escape, find_browser, make_table, print_pdf, save_picture, to_html

VOID = {"meta", "img", "br", "wbr", "hr"}
HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</td></tr></table><h1>", "<!-- ", "]]>", "a|b||c",
    "**bold** *x* _y_ __z__ `code` ~~gone~~ $x$", "[link](http://example.com)", "![picture](http://example.com/x.png)",
    "- item", "+ item", "* item", "1. item", "12) item", "# title", "> quote", "    code", "====", "---", "```", "~~~",
    "http://example.com www.example.com me@example.com", "&lt;b&gt; &#42; &amp;", "\\*not\\* \\| \\", "{: .x} {{x}}",
    "'\"", "easy_vqa snake_case_name", "2.13.0 3.5 %", "[x]: http://example.com", "[^1]", ":-) :tada:",
    "答案：红色|蓝色",
]  # fmt: skip


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and text by the tag it is in."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag not in VOID and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text_of(self, *tags: str) -> str:
        return "".join(text for tag, text in self.texts if not tags or tag in tags)


def body(markdown: str) -> Page:
    html = to_html(markdown, Path("nowhere"), "title", "en")
    return Page(html[html.index("<body>") : html.index("</html>")])


@pytest.mark.parametrize("text", HOSTILE)
def test_text_shows_literally(text: str) -> None:
    """In a paragraph of its own and in a table's cell: the same characters, and no tag made of them."""
    shown = body(escape(text))
    assert {tag for tag, _ in shown.tags} <= {"body", "p"}
    assert shown.text_of("p").replace("\xa0", " ") == text
    shown = body(make_table(["a", "b"], [["x", escape(text)], ["y", "z"]]))
    assert {tag for tag, _ in shown.tags} <= {"body", "div", "table", "thead", "tbody", "tr", "th", "td", "wbr"}
    assert shown.text_of("td").replace("\xa0", " ") == f"x{text}yz"


def test_every_character_shows_or_has_a_visible_mark() -> None:
    for code in [*range(0x300), *range(0x2000, 0x2100), 0x3000, 0xD800, 0xFEFF, 0xFFFF, 0x1F600, 0xE0001]:
        character = chr(code)
        shown = body(f"x{escape(f'a{character}b')}y").text_of("p")
        marks = {"\n": "↵", "\r": "↵", "\t": "⇥"}
        seen = character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        assert shown == f"xa{marks.get(character, seen)}by", hex(code)


def test_one_line_of_limited_length() -> None:
    assert escape("a\nb\r\nc\td") == "a↵b↵c⇥d"
    assert escape("\u202egnp.exe") == "&#92;u202egnp.exe"  # would be read from right to left
    assert escape("x" * MAX_CHARACTERS) == "x" * MAX_CHARACTERS
    assert escape("y" * 10_000) == "y" * (MAX_CHARACTERS - 1) + "…"
    assert escape("") == ""
    assert body(escape(" a  b ")).text_of("p") == "\xa0a \xa0b\xa0"


def test_a_table() -> None:
    assert make_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| :--- | ---: |\n| 1 | 2 |\n"
    with pytest.raises(AssertionError, match="not as long as the header"):
        make_table(["a", "b"], [["1"]])


def test_pictures_are_small_and_without_metadata(tmp_path: Path) -> None:
    secret = PngImagePlugin.PngInfo()
    secret.add_text("GPS", "where it was taken")
    Image.new("RGBA", (1000, 500), (255, 0, 0, 0)).save(tmp_path / "from.png", pnginfo=secret)
    with Image.open(tmp_path / "from.png") as image:
        image.info["comment"] = b"a secret"
        for name in ("a.png", "b.jpg"):
            assert save_picture(image, tmp_path, name) == f"![](pictures/{name})"
            with Image.open(tmp_path / "pictures" / name) as saved:
                assert saved.size == (320, 160)
                assert saved.getpixel((5, 5)) == (255, 255, 255)  # what is transparent is white
            stored = (tmp_path / "pictures" / name).read_bytes()
            assert b"taken" not in stored
            assert b"secret" not in stored
    with pytest.raises(AssertionError, match="not a file's name"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path, "../x.png")


def test_a_page_holds_its_pictures_and_asks_for_nothing(tmp_path: Path) -> None:
    shown = save_picture(Image.new("RGB", (8, 8)), tmp_path, "x.png")
    html = to_html(f"# Title\n\n{shown}\n\n| a |\n|---|\n| {shown} |\n", tmp_path, "<T> & more", "zh")
    parsed = Page(html)
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == 2
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert "@import" not in html
    assert "url(" not in html
    assert parsed.text_of("title") == "<T> & more"
    assert ("html", {"lang": "zh-Hans"}) in parsed.tags
    policy = next(a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_pictures_from_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    for source in ("../outside.png", "https://example.com/x.png"):
        with pytest.raises(ValueError, match="is not inside"):
            to_html(f"![]({source})", tmp_path / "report", "title", "en")
    with pytest.raises(FileNotFoundError, match="gone"):
        to_html("![](pictures/gone.png)", tmp_path, "title", "en")


@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium on this machine to print with")
def test_printing(tmp_path: Path) -> None:
    """A table longer than a page is printed over several."""
    rows = [[str(number), "中文 " * 30] for number in range(120)]
    (tmp_path / "a.html").write_text(to_html(make_table(["a", "b"], rows), tmp_path, "t", "zh"), encoding="utf-8")
    assert print_pdf(tmp_path / "a.html", tmp_path / "a.pdf")
    printed = (tmp_path / "a.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 2


def test_printing_without_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "find_browser", lambda: None)
    (tmp_path / "a.pdf").write_text("an older one", encoding="utf-8")
    assert not print_pdf(tmp_path / "a.html", tmp_path / "a.pdf")
    assert not (tmp_path / "a.pdf").exists()


def test_a_browser_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\necho no display >&2\nexit 3\n", encoding="utf-8")
    browser.chmod(0o755)
    monkeypatch.setattr(page, "find_browser", lambda: str(browser))
    (tmp_path / "a.pdf").write_text("an older one", encoding="utf-8")
    with pytest.raises(OSError, match=r"exit code 3\): no display"):
        print_pdf(tmp_path / "a.html", tmp_path / "a.pdf")
    assert not (tmp_path / "a.pdf").exists()
