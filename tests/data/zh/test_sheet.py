"""The sheet that people judge, in a real browser, and the tally of their marks."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.zh.record import DIALOGUES, RECORDS, as_row
from data.zh.sheet import KINDS, REASONS, choose, find_interval, main, make_sheet, tally
from tests.data.zh import work_folder
from tests.data.zh.work_folder import make_reply, write_rows, write_work

HOSTILE = '<img src=x onerror="document.title=1"></dd><script>document.title=2</script>'
KEYS = {"good": "1", "wrong": "2", "unclear": "3"}


def test_choice() -> None:
    """Every kind has its share, whatever the seed; the seed decides which of them."""
    kinds = ["short"] * 60 + ["reasoning"] * 20 + ["text"] * 10
    replies = [(make_reply(f"{number:064x}", kind), "") for number, kind in enumerate(kinds)]
    chosen = [{reply.key for reply, _ in choose(replies, 18, seed)} for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    for keys in chosen:
        assert Counter(key.split(":")[1] for key in keys) == {"short": 12, "reasoning": 4, "text": 2}
    assert {reply.key for reply, _ in choose(replies, 200, 0)} == {reply.key for reply, _ in replies}
    assert choose([], 5, 0) == []


def test_every_kind_has_a_chinese_name() -> None:
    """A judge reads Chinese."""
    assert set(KINDS) == set(work_folder.KINDS)
    assert all(ord(text[0]) > 0x4E00 for text in (*KINDS.values(), *(text for _, text in REASONS.values())))


def write_hostile_work(work: Path) -> str:
    """Write a folder whose first record and its dialogue mean ill; return that dialogue's key."""
    records, replies = write_work(work, num_pictures=7)
    record = replace(
        records[0],
        title=HOSTILE,
        section=HOSTILE,
        text=HOSTILE,
        topic=HOSTILE,
        author=HOSTILE,
        license=HOSTILE,
        license_url="javascript:alert(1)",
        image_url=f'https://example.org/"{HOSTILE}',
    )
    reply = replace(
        replies[0], model=HOSTILE, turns=((HOSTILE, HOSTILE), ("{{items}} ${place} {{sheet}}", "</article>"))
    )
    write_rows(work / RECORDS, [record, *records[1:]])
    write_rows(work / DIALOGUES, [reply, *replies[1:]])
    (work / records[1].image).write_bytes(b"no picture")
    return reply.key


def open_sheet(context: Any, work: Path) -> tuple[Any, list[str]]:
    """Return the page, and a list of all that it will ask of the network or complain about."""
    page = context.new_page()
    heard: list[str] = []
    page.on("request", lambda request: heard.append(request.url) if not request.url.startswith("data:") else None)
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("console", lambda message: heard.append(message.text))
    page.goto((work / "sheet.html").as_uri())
    return page, heard


def test_judging(browser: Any, tmp_path: Path) -> None:
    """A judge marks all by keyboard, comes back, downloads the marks, and they are counted; nothing is fetched."""
    hostile = write_hostile_work(tmp_path)
    sheet = make_sheet(tmp_path, number=12, seed=3, num_dropped=0)
    ids = [item["id"] for item in sheet["items"]]
    assert len(ids) == 12
    context = browser.new_context(accept_downloads=True, viewport={"width": 1200, "height": 800})
    page, heard = open_sheet(context, tmp_path)
    given = {name: ("good", "wrong", "unclear")[number % 3] for number, name in enumerate(ids[:-1])}
    for name, mark in given.items():
        (shown,) = page.locator("article:visible").all()
        assert shown.get_attribute("data-id") == name
        page.keyboard.press(KEYS[mark])
        assert page.locator("#reasons").is_visible() == (mark != "good")
        if mark == "wrong":
            page.keyboard.press("q")
            page.keyboard.press("w")
            page.keyboard.press("w")  # taken back
            page.keyboard.press("a")
        if mark != "good":
            page.keyboard.press("j" if mark == "wrong" else "ArrowRight")
    assert "已评 11 / 12：好 4，错 4，不清楚 3" in page.locator("#counts").inner_text()
    page.keyboard.press("k")
    page.keyboard.press("n")
    assert page.locator("article:visible").get_attribute("data-id") == ids[-1]  # the only one without a mark
    page.reload()
    assert page.locator("article:visible").get_attribute("data-id") == ids[-1]
    with page.expect_download() as download:
        page.keyboard.press("d")
    assert download.value.suggested_filename == "marks.json"
    download.value.save_as(tmp_path / "marks.json")
    assert heard == [(tmp_path / "sheet.html").as_uri()] * 2
    assert page.title() == "抽样评判"  # no text of others has run
    assert hostile in ids
    context.close()

    marks = json.loads((tmp_path / "marks.json").read_text(encoding="utf-8"))
    assert {mark["id"]: mark["mark"] for mark in marks["marks"]} == given
    (judge,) = tally(tmp_path, [tmp_path / "marks.json"])["judges"]
    assert judge["kinds"]["all"] | {"share": 0, "low": 0, "high": 0} == {
        "judged": 11, "good": 4, "wrong": 4, "unclear": 3, "share": 0, "low": 0, "high": 0,
    }  # fmt: skip
    assert judge["reasons"] == {"bad_chinese": 4, "not_in_picture": 4}


def test_text_of_others_stays_text(browser: Any, tmp_path: Path) -> None:
    """Whatever titles and answers hold, a reader sees it letter by letter."""
    hostile = write_hostile_work(tmp_path)
    sheet = make_sheet(tmp_path, number=100, seed=0, num_dropped=0)
    context = browser.new_context()
    page, heard = open_sheet(context, tmp_path)
    assert page.locator("article").count() == len(sheet["items"]) == 14
    (article,) = [one for one in page.locator("article").all() if one.get_attribute("data-id") == hostile]
    assert [one.text_content() for one in article.locator("dd").all()] == [
        HOSTILE, HOSTILE, "{{items}} ${place} {{sheet}}", "</article>",
    ]  # fmt: skip
    assert article.locator("h2").text_content() == f"{HOSTILE} {HOSTILE}"
    assert article.locator("details p").text_content() == HOSTILE
    assert article.locator("img").count() == 1
    assert not [one for one in page.locator("a").all() if not one.get_attribute("href").startswith("https://")]
    assert page.locator("article .missing").count() == 2  # of the picture that is none
    assert heard == [(tmp_path / "sheet.html").as_uri()]
    # Even what was not escaped would not act: the browser is told which script and style are the page's own.
    page.evaluate(
        "document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=x onerror=document.title=3>')"
    )
    page.wait_for_timeout(100)
    assert page.title() == "抽样评判"
    assert "Content Security Policy" in " ".join(heard)
    context.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_sizes_and_colours(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    """Nothing is wider than a phone's screen, buttons do what keys do, and the dark is dark."""
    write_hostile_work(tmp_path)
    make_sheet(tmp_path, number=100, seed=0, num_dropped=0)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, _ = open_sheet(context, tmp_path)
    page.click("[data-mark=wrong]")
    page.click("[data-reason=bad_question]")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for _ in range(3):
        page.click("#next")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click("[data-mark=good]")
    assert "第 5 条，已评 2 / 14：好 1，错 1，不清楚 0" in page.locator("#counts").inner_text()
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(colour.removeprefix("rgb(").split(",")[0]) < 60) == (scheme == "dark")
    context.close()


def test_dropped_ones(tmp_path: Path) -> None:
    """They are shown with the reason, and counted apart from what is kept; not those that have nothing to show."""
    records, replies = write_work(tmp_path, num_pictures=6)
    empty = [replace(make_reply(records[0].sha256, "text"), turns=()), make_reply("12ab", "text")]
    rows = [
        as_row(make_reply(record.sha256, "text")) | {"reason": "answer: too <long>", "detail": "9"}
        for record in records
    ]
    rows += [as_row(reply) | {"reason": "of no use", "detail": ""} for reply in empty]
    (tmp_path / "dropped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_rows(tmp_path / DIALOGUES, [reply for reply in replies if reply.kind != "text"])
    assert len(make_sheet(tmp_path, number=5, seed=0, num_dropped=99)["items"]) == 5 + 6
    sheet = make_sheet(tmp_path, number=5, seed=0, num_dropped=2)
    assert [item.get("dropped") for item in sheet["items"]].count("answer: too <long> (9)") == 2
    assert len(sheet["items"]) == 7
    assert (tmp_path / "sheet.html").read_text(encoding="utf-8").count("已被筛除：answer: too &lt;long&gt; (9)") == 2
    write_marks(tmp_path / "marks.json", sheet, ["good"] * 7)
    (judge,) = tally(tmp_path, [tmp_path / "marks.json"])["judges"]
    assert (judge["kinds"]["all"]["good"], judge["kinds"]["dropped"]["good"]) == (5, 2)
    with (tmp_path / "dropped.jsonl").open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(as_row(replies[0])) + "\n")
    with pytest.raises(ValueError, match=r"dropped.jsonl, row 9: reason = None, expected a text"):
        make_sheet(tmp_path, number=5, seed=0, num_dropped=2)


def write_marks(file: Path, sheet: dict[str, Any], marks: list[str]) -> None:
    given = [
        {"id": item["id"], "mark": mark, "reasons": ["wrong_fact"] if mark == "wrong" else []}
        for item, mark in zip(sheet["items"], marks, strict=False)
    ]
    file.write_text(json.dumps({"sheet": sheet["sheet"], "marks": given}), encoding="utf-8")


def test_two_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a table; where both have judged, they are compared."""
    write_work(tmp_path, num_pictures=7)
    sheet = make_sheet(tmp_path, number=14, seed=0, num_dropped=0)
    first, second = tmp_path / "marks.json", tmp_path / "marks.2.json"
    write_marks(first, sheet, ["good"] * 10 + ["wrong", "unclear"])
    write_marks(second, sheet, ["good"] * 8 + ["wrong"])
    monkeypatch.setattr("sys.argv", ["sheet", "--work", str(tmp_path), "--tally", str(first), str(second)])
    main()
    output = capsys.readouterr().out
    assert "marks.json: 12 of 14 judged" in output
    assert "  all                 12    10      1        1      83.3%   55.2% to 95.3%" in output
    assert "judged by several: 9, differing: 1 (11.1%)" in output
    assert f"  {sheet['items'][8]['id']}: good, wrong" in output
    result = tally(tmp_path, [first, second])
    assert sum(found["judged"] for kind, found in result["judges"][0]["kinds"].items() if kind != "all") == 12
    assert result["judges"][1]["reasons"] == {"wrong_fact": 1}


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(0, 10, (0.0, 0.27754)), (10, 10, (0.72246, 1.0)), (95, 100, (0.88825, 0.97846)), (1, 2, (0.09453, 0.90547))],
)
def test_interval(count: int, total: int, expected: tuple[float, float]) -> None:
    """The values are those of statsmodels' proportion_confint(method="wilson")."""
    assert find_interval(count, total) == pytest.approx(expected, abs=1e-4)


def test_marks_that_cannot_be_counted(tmp_path: Path) -> None:
    """Each is an error that says what and where."""
    write_work(tmp_path, num_pictures=3)
    file = tmp_path / "marks.json"
    with pytest.raises(FileNotFoundError, match=r"sheet.json is missing"):
        tally(tmp_path, [file])
    sheet = make_sheet(tmp_path, number=6, seed=0, num_dropped=0)
    with pytest.raises(FileNotFoundError, match=r"marks.json is missing: sheet.html's button downloads it"):
        tally(tmp_path, [file])
    known = {"id": sheet["items"][0]["id"], "mark": "good", "reasons": []}
    cases: list[tuple[Any, str]] = [
        ([], "holds no marks"),
        ({"sheet": "other", "marks": []}, f"judges the sheet 'other', the work folder's is '{sheet['sheet']}'"),
        ({"sheet": sheet["sheet"], "marks": [known, known]}, "mark 1: id .* is marked twice"),
        ({"sheet": sheet["sheet"], "marks": [known | {"id": "x"}]}, "mark 0: id 'x' is not on the sheet"),
        ({"sheet": sheet["sheet"], "marks": [7]}, "mark 0: id 7 is not on the sheet"),
        ({"sheet": sheet["sheet"], "marks": [known | {"mark": "fine"}]}, "mark 0: .*fine.*expected one of"),
        ({"sheet": sheet["sheet"], "marks": [known | {"reasons": ["ugly"]}]}, "mark 0: .*ugly.*expected one of"),
    ]
    for content, message in cases:
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            tally(tmp_path, [file])
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"marks.json is not JSON"):
        tally(tmp_path, [file])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--number", "0"], "error: --number 0 --dropped 0: expected at least 1 and 0"),
        ([], "error: .*records.jsonl is missing: `python -m data.zh.collect` writes it"),
    ],
)
def test_command_that_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["sheet", "--work", str(tmp_path), *options])
    with pytest.raises(SystemExit, match=message):
        main()
