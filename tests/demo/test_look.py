"""The view into the model, in a real browser and as files: it shows the numbers, and nothing typed becomes code.

Shapes: A tokens of the answer, L layers, H heads, P patches.
"""

import base64
import html
import io
import json
import re
import string
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.conversation import IMAGE_TOKEN_ID, Turn, render_conversation
from data.tokenizer import Tokenizer
from demo import look_picture
from demo.look_page import group_tokens, make_look_page
from demo.look_picture import make_look_picture
from demo.look_words import LOOK_TEXTS
from model.inside import Inside
from tests.conftest import TINY_TOKENIZER
from tests.launch import run_script

HOSTILE = "</script ><img src=x onerror='document.title=1'><!--<script {{data}} {{script}} &amp; </title>"
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
NUM_LAYERS, NUM_HEADS, GRID = 2, 3, 4
NUM_PATCHES = GRID**2
TIMEOUT_MS = 60_000

Spoken = tuple[Inside, list[int], int]  # what was seen, prompt and answer, how many tokens are the answer's


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY_TOKENIZER)


@pytest.fixture
def picture() -> Image.Image:
    return Image.effect_noise((60, 40), 90).convert("RGB")


def find_peak(word: int, layer: int, head: int) -> int:
    """Return where a head looks in what `speak` makes up: no two of them look at the same patch."""
    return (5 * word + 3 * layer + head) % NUM_PATCHES


def speak(tokenizer: Tokenizer, answer: str, num_patches: int = NUM_PATCHES, max_tokens: int = 64) -> Spoken:
    """Make up what a model did: half of a head's attention goes to one patch, a tenth to the others together."""
    turns = [Turn("human", "what is this?", num_patches > 0), Turn("gpt", answer)]
    rendered = render_conversation(turns, tokenizer, num_patches)
    ids = torch.tensor(rendered.input_ids[-rendered.num_supervised :])[:max_tokens]
    attention = torch.full((len(ids), NUM_LAYERS, NUM_HEADS, num_patches), 0.1 / max(num_patches - 1, 1))
    for word, layer, head in np.ndindex(attention.shape[:3]) if num_patches else ():
        attention[word, layer, head, find_peak(word, layer, head)] = 0.5 / (1 + layer + head)
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(num_patches, 7, generator=generator), dim=-1)
    candidates = torch.stack([ids, ids + 1, ids + 2], dim=1) % tokenizer.vocab_size
    inside = Inside(
        attention=attention.half(),
        picture_share=attention.sum(-1),
        chosen_ids=ids,
        chosen_probabilities=torch.full((len(ids),), 0.625),
        chosen_ranks=torch.ones(len(ids), dtype=torch.long),
        candidate_ids=candidates,
        candidate_probabilities=torch.tensor([0.625, 0.25, 0.0625]).expand(len(ids), -1),
        patch_similarity=(features @ features.T).half(),
    )
    return inside, rendered.input_ids, rendered.num_supervised


def make_page(
    tokenizer: Tokenizer, answer: str, picture: Image.Image | None, question: str = "what is this?", **kwargs: Any
) -> str:
    inside, input_ids, num_answer = speak(tokenizer, answer, 0 if picture is None else NUM_PATCHES)
    return make_look_page(inside, picture, input_ids, num_answer, tokenizer, question, **kwargs)


def draw(tokenizer: Tokenizer, answer: str, picture: Image.Image, question: str = "what?") -> Image.Image:
    inside, input_ids, num_answer = speak(tokenizer, answer)
    return make_look_picture(inside, picture, input_ids, num_answer, tokenizer, question)


def read_script(page: str, name: str) -> str:
    (found,) = re.findall(rf'<script type="[^"]*" id="{name}">(.*?)</script>', page, flags=re.DOTALL)
    return found


def test_names_stand_for_whole_characters(tokenizer: Tokenizer) -> None:
    """A character that the vocabulary lacks is one name, three tokens; halves and line ends are bytes."""
    ids = [*tokenizer.encode("red 龘龘\n"), IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, *tokenizer.encode("龘", continues=True)[:2]]
    groups = group_tokens(ids, tokenizer)
    names = ["▁red", "▁", "龘", "龘", "<0x0A>", "<image> x 2", "<0xE9>", "<0xBE>"]
    assert groups == list(zip(names, [1, 1, 3, 3, 1, 2, 1, 1], strict=True))


def test_the_document_holds_the_numbers(tokenizer: Tokenizer, picture: Image.Image) -> None:
    """Half of a step of 255 is the most that a weight may be off."""
    inside, input_ids, num_answer = speak(tokenizer, "red 龘 shape")
    page = make_look_page(inside, picture, input_ids, num_answer, tokenizer, "what?")
    packed = zlib.decompress(base64.b64decode(read_script(page, "numbers")))
    num_looked = len(inside.chosen_ids)
    shape, rows = (num_looked, NUM_LAYERS, NUM_HEADS), num_looked * NUM_LAYERS * NUM_HEADS
    shares, scales = np.frombuffer(packed, "<f4", 2 * rows).reshape(2, *shape)
    levels = np.frombuffer(packed, np.uint8, rows * NUM_PATCHES, 8 * rows).reshape(*shape, NUM_PATCHES)
    similarity = np.frombuffer(packed, np.uint8, offset=8 * rows + levels.size).reshape(NUM_PATCHES, NUM_PATCHES)
    np.testing.assert_array_equal(shares, inside.picture_share.numpy())
    off = np.abs(levels / 255 * scales[..., None] - inside.attention.float().numpy())
    assert (off <= scales[..., None] * (0.5 / 255 + 1e-6)).all()
    low, high = json.loads(read_script(page, "data"))["similarityRange"]
    expected = inside.patch_similarity.float().numpy()
    np.testing.assert_allclose(low + similarity / 255 * (high - low), expected, atol=(high - low) * 0.51 / 255)
    (uri,) = re.findall(r"data:image/png;base64,([\w+/=]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(uri))).size == (60, 60)  # padded, as the model sees it


def test_nothing_typed_ends_a_script(tokenizer: Tokenizer, picture: Image.Image) -> None:
    page = make_page(tokenizer, HOSTILE, picture, HOSTILE)
    assert page.count("</script") == page.count("<script") == 3
    data = json.loads(read_script(page, "data"))
    assert data["question"] == HOSTILE
    said = "".join(token["name"] for token in data["tokens"] if token["isAnswer"])
    assert said.replace("▁", " ").strip() == f"{HOSTILE}</s>"


def test_texts_have_the_same_places_in_both_languages() -> None:
    for key, pair in LOOK_TEXTS.items():
        english, chinese = ({name for _, name, *_ in string.Formatter().parse(text) if name} for text in pair)
        assert english == chinese, key


def test_texts_are_those_that_the_document_says() -> None:
    folder = Path(look_picture.__file__).parent
    source = "".join((folder / name).read_text(encoding="utf-8") for name in ("look.html", "look.js"))
    source += "".join((folder / name).read_text(encoding="utf-8") for name in ("look_page.py", "look_picture.py"))
    said = set(re.findall(r'(?:data-text="|say\("|texts\[")(\w+)"', source))
    assert said == set(LOOK_TEXTS)


def open_document(browser: Any, folder: Path, page: str, width: int = 1280) -> tuple[Any, list[str]]:
    """Open the document as a file; return it, and what it asks of the network or complains about."""
    file = folder / "look.html"
    file.write_text(page, encoding="utf-8")
    return open_file(browser, file, width)


def open_file(browser: Any, file: Path, width: int = 1280) -> tuple[Any, list[str]]:
    opened = browser.new_page(viewport={"width": width, "height": 800})
    opened.set_default_timeout(TIMEOUT_MS)
    heard: list[str] = []
    opened.on("request", lambda request: heard.append(request.url) if not request.url.startswith("data:") else None)
    opened.on("pageerror", lambda error: heard.append(str(error)))
    opened.on("console", lambda message: heard.append(message.text))
    opened.goto(file.resolve().as_uri())
    assert heard.pop(0) == file.resolve().as_uri()
    return opened, heard


def find_brightest(opened: Any) -> int:
    """Return the patch whose colour over the picture is the brightest; the canvas has a pixel for each."""
    script = """canvas => {
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
        copy.drawImage(canvas, 0, 0);
        const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
        const sums = Array.from({ length: data.length / 4 }, (_, i) => data[4 * i] + data[4 * i + 1] + data[4 * i + 2]);
        return sums.indexOf(Math.max(...sums));
    }"""
    return opened.locator("#heat").evaluate(script)


def read_bars(opened: Any) -> list[str]:
    return [" ".join(bar.inner_text().split()) for bar in opened.locator(".bar").all()]


def test_words_layers_and_patches(browser: Any, tokenizer: Tokenizer, picture: Image.Image, tmp_path: Path) -> None:
    """By mouse and keyboard: each word, layer and head shows what it looked at."""
    opened, heard = open_document(browser, tmp_path, make_page(tokenizer, "red 龘 shape", picture))
    words = opened.locator(".word")
    assert words.all_inner_texts() == ["red", "␣", "龘", "shape", "</s>"]
    opened.locator("#smooth").uncheck()
    assert find_brightest(opened) == find_peak(0, 0, 0)
    assert (
        opened.locator("#share").inner_text()
        == f"{100 * (0.1 + 0.5 * np.mean([1, 1 / 2, 1 / 3, 1 / 2, 1 / 3, 1 / 4])):.1f} %"
    )

    words.nth(2).click()  # three bytes: 2, 3 and 4 of the answer
    assert "3 byte tokens" in opened.locator("#parts").inner_text()
    assert find_brightest(opened) == find_peak(2, 0, 0)
    assert read_bars(opened)[0] == "<0xE9> 62.5 %"
    opened.locator(".part").nth(1).click()
    assert find_brightest(opened) == find_peak(3, 0, 0)
    assert read_bars(opened)[0] == "<0xBE> 62.5 %"

    words.nth(2).press("ArrowRight")
    assert words.nth(3).get_attribute("aria-selected") == "true"
    assert not opened.locator("#parts").is_visible()
    assert read_bars(opened)[0] == "▁shape 62.5 %"
    opened.locator("#layer").press("End")
    assert opened.locator("#layer-said").inner_text() == "2 of 2"
    assert find_brightest(opened) == find_peak(5, 1, 0)
    box = opened.locator("#table").bounding_box()
    opened.locator("#table").click(
        position={"x": box["width"] * 2.5 / NUM_HEADS, "y": box["height"] * 1.5 / NUM_LAYERS}
    )
    assert find_brightest(opened) == find_peak(5, 1, 2)
    assert opened.locator("#cell").inner_text() == f"layer 2, head 3: {100 * (0.5 / 4 + 0.1 * 15 / 15):.1f} %"
    opened.locator("#table").press("ArrowUp")
    opened.locator("#table").press("ArrowLeft")
    assert find_brightest(opened) == find_peak(5, 0, 1)
    opened.locator("#reset").click()
    assert opened.locator("#head-said").inner_text() == "all, averaged"

    box = opened.locator("#patches").bounding_box()
    opened.locator("#patches").click(position={"x": box["width"] * 0.6, "y": box["height"] * 0.3})
    place = speak(tokenizer, "red")[1].index(IMAGE_TOKEN_ID) + 7  # counted from 1
    assert opened.locator("#patch").inner_text() == f"Patch 7: row 2, column 3, place {place} in the sequence"
    opened.locator("#patches").press("ArrowDown")
    assert opened.locator("#patch").inner_text().startswith("Patch 11: row 3, column 3, place ")
    similarity = speak(tokenizer, "red")[0].patch_similarity[10].float()
    nearest = int(similarity.argsort(descending=True)[1])
    told = opened.locator("#alike").inner_text()
    assert f"row {nearest // GRID + 1}, column {nearest % GRID + 1} ({similarity[nearest]:.2f})" in told
    assert heard == []


def test_what_the_others_looked_at_is_taken_away(
    browser: Any, tokenizer: Tokenizer, picture: Image.Image, tmp_path: Path
) -> None:
    inside, input_ids, num_answer = speak(tokenizer, "red blue")
    inside.attention[:, :, :, 13] = 0.9  # a spot that every word looks at
    page = make_look_page(inside, picture, input_ids, num_answer, tokenizer, "what?")
    opened, _ = open_document(browser, tmp_path, page)
    opened.locator("#smooth").uncheck()
    assert find_brightest(opened) == 13
    opened.locator("#compare").check()
    assert find_brightest(opened) == find_peak(0, 0, 0)


def test_the_sequence_is_shown(browser: Any, tokenizer: Tokenizer, picture: Image.Image, tmp_path: Path) -> None:
    opened, _ = open_document(browser, tmp_path, make_page(tokenizer, "red", picture))
    names = opened.locator(".token").all_inner_texts()
    assert names[0] == "<s>"
    assert names[-2:] == ["▁red", "</s>"]
    opened.locator(".token.image").click()
    assert "16 patches of 4 x 4" in opened.locator("#token").inner_text()
    opened.locator(".token").first.click()
    assert "a control token" in opened.locator("#token").inner_text()
    opened.locator(".token.answer").last.click()
    assert opened.locator(".word").last.get_attribute("aria-selected") == "true"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_phone_and_desk(
    browser: Any, tokenizer: Tokenizer, picture: Image.Image, tmp_path: Path, language: str, width: int
) -> None:
    page = make_page(tokenizer, "red " * 12 + "x" * 40, picture, "w" * 200, language=language)
    opened, heard = open_document(browser, tmp_path, page, width)
    opened.wait_for_selector("html[data-ready]")
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    assert ("看向哪里" in opened.locator("h2").first.inner_text()) == (language == "zh")
    assert heard == []


def test_it_works_in_a_frame_that_may_do_nothing_else(
    browser: Any, tokenizer: Tokenizer, picture: Image.Image, tmp_path: Path
) -> None:
    """As the page shows it: sandboxed, under its policy; it says how high it is, and takes the page's colours."""
    page = make_page(tokenizer, HOSTILE, picture, HOSTILE, theme="light")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<!doctype html><meta http-equiv="Content-Security-Policy" content="{POLICY}"><script>'
        'addEventListener("message", e => { window.told = e.data.lookHeight; });</script>'
        f'<iframe sandbox="allow-scripts" width="600" srcdoc="{html.escape(page)}"></iframe>',
        encoding="utf-8",
    )
    opened, heard = open_file(browser, outer)
    opened.wait_for_function("window.told > 600")
    (_, frame) = opened.frames
    assert frame.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 246, 243)"
    opened.evaluate('frames[0].postMessage({ theme: "dark" }, "*")')
    frame.wait_for_function('document.documentElement.dataset.theme === "dark"')
    assert frame.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 23)"
    assert frame.locator("h1").inner_text() == HOSTILE
    assert frame.locator("#words img").count() == 0
    assert frame.title() == "Look inside"
    assert [line for line in heard if not line.startswith("about:srcdoc")] == []


def test_without_a_picture_there_are_still_words(browser: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    opened, heard = open_document(browser, tmp_path, make_page(tokenizer, "red blue", None))
    opened.locator(".word").nth(1).click()
    assert read_bars(opened)[0] == "▁blue 62.5 %"
    assert "has no picture" in opened.locator("#where").inner_text()
    assert not opened.locator("#tower").is_visible()
    assert heard == []


def test_an_unlikely_word_has_a_bar_behind_the_likely_ones(
    browser: Any, tokenizer: Tokenizer, picture: Image.Image, tmp_path: Path
) -> None:
    inside, input_ids, num_answer = speak(tokenizer, "red")
    probabilities, ranks = torch.tensor([0.002, 1e-9]), torch.tensor([40, 900])
    inside = replace(
        inside, chosen_probabilities=probabilities, chosen_ranks=ranks, candidate_ids=inside.candidate_ids + 3
    )
    page = make_look_page(inside, picture, input_ids, num_answer, tokenizer, "what?")
    opened, _ = open_document(browser, tmp_path, page)
    assert read_bars(opened)[3:] == ["▁red 0.20 %"]
    assert opened.locator("#rank").inner_text() == "Chosen was “▁red” with 0.20 %, number 40 by likelihood."
    opened.locator(".word").last.click()
    assert read_bars(opened)[3:] == ["</s> <0.001 %"]


def test_a_long_answer_says_that_it_is_cut(
    browser: Any, tokenizer: Tokenizer, picture: Image.Image, tmp_path: Path
) -> None:
    inside, input_ids, num_answer = speak(tokenizer, "red blue green", max_tokens=2)
    page = make_look_page(inside, picture, input_ids, num_answer, tokenizer, "what?")
    opened, _ = open_document(browser, tmp_path, page)
    assert opened.locator(".word").all_inner_texts() == ["red", "blue"]
    assert "first 2 of the answer's 4 tokens" in opened.locator("#cut").inner_text()
    assert opened.locator(".token.answer").count() == 4


def test_picture_for_a_report(tokenizer: Tokenizer, picture: Image.Image) -> None:
    """A view for each word, more words more rows; a "$" is no formula."""
    few, many = (
        draw(tokenizer, answer, picture, "what $\\color$ is it?") for answer in ("red", "red $^$ blue green gray")
    )
    assert few.height < many.height
    assert len(few.convert("RGB").getcolors(few.width * few.height) or []) > 500


def test_chinese_needs_a_font(tokenizer: Tokenizer, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_picture, "find_chinese_font", lambda: None)
    draw(tokenizer, "red", picture)
    with pytest.raises(ValueError, match="no font of this system has them: install one"):
        draw(tokenizer, "红色", picture)


@pytest.fixture
def picture_file(tmp_path: Path, picture: Image.Image) -> Path:
    file = tmp_path / "picture.png"
    picture.save(file)
    return file


def test_command_writes_page_and_picture(tiny_model_folder: Path, picture_file: Path, tmp_path: Path) -> None:
    """The page holds the answer that it prints, with the end of a given one."""
    arguments = ("--model-path", str(tiny_model_folder), "--image", str(picture_file), "--prompt", "what color?")
    own = run_script(tmp_path, "demo/look.py", *arguments, "--out", "own.html", "--max-new-tokens", "5")
    assert own.returncode == 0, own.stderr
    data = json.loads(read_script((tmp_path / "own.html").read_text(encoding="utf-8"), "data"))
    assert data["sizes"] == [data["numAnswer"], 3, 4, 64]
    assert data["numAnswer"] == 5
    assert [word["rank"] for word in data["words"]] == [1] * 5
    tokenizer = Tokenizer(TINY_TOKENIZER)
    assert own.stdout == tokenizer.decode([word["id"] for word in data["words"]]) + "\n"

    given = ("--answer", "red", "--out", "given.html", "--load-4bit", "--language", "zh")
    assert run_script(tmp_path, "demo/look.py", *arguments, *given).stdout == "red\n"
    data = json.loads(read_script((tmp_path / "given.html").read_text(encoding="utf-8"), "data"))
    assert [word["name"] for word in data["words"]] == ["▁red", "</s>"]

    drawn = run_script(tmp_path, "demo/look.py", *arguments, "--answer", "red", "--out", "look.png")
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(tmp_path / "look.png").format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "look.pdf"), "error: --out look.pdf: its name should end in .html or .png"),
        (("--out", "nowhere/look.html"), "error: --out nowhere/look.html: there is no folder nowhere"),
        (("--out", "look.png"), "error: --out look.png: without --image there is no picture"),
        (("--out", "look.html", "--image", "none.png"), "error: image none.png is missing"),
        (("--out", "look.html", "--model-path", "nowhere/"), "error: 'nowhere/' does not exist"),
        (("--out", "look.html", "--max-new-tokens", "0"), "--max-new-tokens 0: at least 1"),
        (("--out", "look.html", "--prompt", "red " * 2000), "no room is left for an answer: shorten it"),
        (("--out", "look.html", "--prompt", "red " * 2000, "--answer", "a"), "exceed the model's 1024 positions"),
    ],
)
def test_mistakes(tiny_model_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    ended = run_script(tmp_path, "demo/look.py", "--model-path", str(tiny_model_folder), "--prompt", "red?", *arguments)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
