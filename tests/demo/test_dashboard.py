"""The dashboard shows what the runs' files say, as they grow, and nothing that it was not meant to show."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from data.runs import Run
from demo import dashboard_compare, dashboard_runs
from demo.dashboard import TEXTS, Choice, Dashboard, build_dashboard
from demo.dashboard_compare import Comparer
from demo.dashboard_runs import Drawn, Look, Shelf
from demo.words import Words
from tests.eval.test_page import Page
from tests.eval.test_report import AFTER, BEFORE, make_data, write_result

PARTS = ("table", "runs", "curves", "scores", "tasks", "details", "first", "second", "seen")
NOTHING = Choice([], 0, True, None, None, None)
LOOK = Look("en", None, True)
ENGLISH = Words(TEXTS, "en")


@pytest.fixture(autouse=True)
def _always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at, and curves drawn, as often as somebody asks."""
    monkeypatch.setattr(dashboard_runs, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(dashboard_runs, "REDRAW_EVERY_S", 0.0)


def append_steps(run: Path, steps: Sequence[int], **recorded: Any) -> None:
    rows = [{"step": step, "loss": 2.0, "tokens_per_s": 1000.0 + step, "step_s": 2.0} | recorded for step in steps]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, num_steps: int = 40, train: str = "full") -> Path:
    folder.mkdir(parents=True)
    append_steps(folder, range(1, num_steps + 1))
    (folder / "config.toml").write_text(f'train = "{train}"\nlora_rank = 7\n', encoding="utf-8")
    (folder / "sessions.jsonl").write_text('{"num_steps": 1234}\n', encoding="utf-8")
    return folder


def write_scores(run: Path, task: str, score: float | None, **more: Any) -> None:
    (run / "eval" / task).mkdir(parents=True, exist_ok=True)
    interval = None if score is None else [score - 0.01, score + 0.01]
    scores = {"n": 4321, "score": score, "interval": interval} | more
    (run / "eval" / task / "scores.json").write_text(json.dumps(scores), encoding="utf-8")


def set_age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs `old` and, trained later, `new`."""
    folder = tmp_path / "runs"
    for name, age, train, score in (("old", 900, "full", 0.25), ("new", 600, "lora", 0.75)):
        run = make_run(folder / name, train=train)
        write_scores(run, "easy_vqa", score, parts={"type": {"shape": {"n": 9, "score": score / 2, "interval": None}}})
        (run / "final").mkdir()
        set_age(run, age)
    return folder


def refresh(board: Dashboard, choice: Choice = NOTHING, seen: Any = "", request: Any = None) -> dict[str, Any]:
    updates = board.refresh(choice, seen, request, is_patient=True)
    return {part: update for part, update in zip(PARTS, updates, strict=True) if update != gr.skip()}


def read_table(html: str) -> list[str]:
    """Return the texts of the cells."""
    return [text.strip() for text in Page(html).text_of("td").split("\n")]


def test_the_table_says_what_the_files_say(runs: Path) -> None:
    append_steps(runs / "new", [41], held_out_loss=0.56789)
    shown = refresh(Dashboard(runs, ENGLISH))
    text = Page(shown["table"]).text_of()
    for cell in ("LoRA, rank 7", "41 / 1,234", "0.5679", "2.0000", "1,021", "1 min 22 s", "easy_vqa 75.0 %"):
        assert cell in text, cell
    for cell in ("language model + projector", "40 / 1,234", "1,020", "1 min 20 s", "easy_vqa 25.0 %"):
        assert cell in text, cell
    assert text.index("new") < text.index("old")
    assert shown["runs"]["choices"] == ["new", "old"]
    assert shown["runs"]["value"] == ["new"]
    assert (shown["first"]["value"], shown["second"]["value"]) == ("old", "new")


def test_the_state_of_a_run(runs: Path) -> None:
    def list_states() -> dict[str, str]:
        return {name: run.state for name, run in Shelf(runs).list_runs().items()}

    write_scores(runs / "asked", "mme", 0.5)
    (runs / "new/final").rmdir()
    assert list_states() == {"asked": "asked", "new": "stopped", "old": "finished"}
    append_steps(runs / "new", [41])
    append_steps(runs / "old", [41])
    assert list_states() == {"asked": "asked", "new": "training", "old": "training"}
    table = refresh(Dashboard(runs, ENGLISH))["table"]
    assert "training now" in table
    assert "about 39 min 46 s left" in table
    (runs / "old/final/model").mkdir()  # training is over: its result was written after its last step
    assert list_states()["old"] == "finished"


def test_curves_grow_with_their_file_and_are_sent_only_then(runs: Path) -> None:
    board = Dashboard(runs, ENGLISH)
    first = refresh(board)
    choice = Choice(["new"], 0, True, "easy_vqa", "old", "new")
    assert refresh(board, choice, first["seen"]) == {}
    append_steps(runs / "new", [41, 42])
    second = refresh(board, choice, first["seen"])
    assert set(second) == {"table", "curves", "seen"}
    assert second["curves"] != first["curves"]
    assert "42 / 1,234" in second["table"]
    append_steps(runs / "old", [41])  # which is not looked at
    third = refresh(board, choice, second["seen"])
    assert set(third) == {"table", "seen"}
    assert refresh(board, choice, third["seen"]) == {}


def test_a_new_run_and_one_that_is_gone(runs: Path) -> None:
    board = Dashboard(runs, ENGLISH)
    choice = Choice(["old", "new"], 0, True, "easy_vqa", "old", "new")
    seen = refresh(board, choice)["seen"]
    write_scores(runs / "third", "mme", 0.5)
    shown = refresh(board, choice, seen)
    assert shown["runs"] == gr.update(choices=["third", "new", "old"], visible=True)  # what is picked is left alone
    assert shown["tasks"]["choices"] == ["easy_vqa", "mme"]
    (runs / "old").rename(runs / ".old")
    shown = refresh(board, choice, shown["seen"])
    assert shown["runs"]["value"] == ["new"]
    assert shown["first"]["value"] is None
    assert "value" not in shown["second"]


def test_the_oldest_of_very_many_runs_are_told_of(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard_runs, "MAX_RUNS", 1)
    shown = refresh(Dashboard(runs, ENGLISH))
    assert shown["runs"]["choices"] == ["new"]
    assert "Older runs that are not shown: 1." in shown["table"]


def test_several_runs_are_drawn_together(runs: Path) -> None:
    curves = Page(refresh(Dashboard(runs, ENGLISH), Choice(["old", "new"], 0, True, None, None, None))["curves"])
    pictures = [str(attributes["alt"]) for tag, attributes in curves.tags if tag == "img"]
    assert pictures == ["Losses of old, new", "Loss", "Speed", "Loss", "Speed"]


def count_drawings(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    drawn: list[int] = []
    original = shelf._draw

    def draw(runs: Any, look: Look) -> Any:
        drawn.append(len(runs))
        return original(runs, look)

    monkeypatch.setattr(shelf, "_draw", draw)
    return drawn


def draw_new(shelf: Shelf, is_patient: bool = True) -> Drawn | None:
    return shelf.draw([shelf.list_runs()["new"]], LOOK, is_patient)


def test_many_look_and_one_picture_is_drawn(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(runs)
    drawn = count_drawings(shelf, monkeypatch)
    threads = [threading.Thread(target=draw_new, args=(shelf,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == [1]
    monkeypatch.setattr(dashboard_runs, "REDRAW_EVERY_S", 3600.0)
    append_steps(runs / "new", [41])  # so soon, what was drawn will do
    draw_new(shelf)
    assert drawn == [1]
    monkeypatch.setattr(dashboard_runs, "REDRAW_EVERY_S", 0.0)
    draw_new(shelf)
    assert drawn == [1, 1]


def test_a_tick_does_not_wait_for_others_pictures(runs: Path) -> None:
    shelf = Shelf(runs)
    seen: list[Drawn | None] = []

    def tick() -> None:
        thread = threading.Thread(target=lambda: seen.append(draw_new(shelf, is_patient=False)), daemon=True)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive(), "it waits"

    with shelf.drawing:  # somebody's are being drawn
        tick()
    tick()
    append_steps(runs / "new", [41])
    with shelf.drawing:
        tick()
    assert seen[0] is None
    assert seen[1] is not None
    assert seen[2] is seen[1]


def test_few_pictures_are_kept(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard_runs, "MAX_DRAWN", 3)
    monkeypatch.setattr(dashboard_runs, "draw_panels", lambda *_: None)
    shelf = Shelf(runs)
    for window in range(1, 9):
        shelf.draw([shelf.list_runs()["new"]], Look("en", window, True), True)
    assert [look.window for _, look in shelf.drawn] == [6, 7, 8]


HOSTILE = ("../secret", "..", ".", "", "/etc", "new/../../secret", "secret", ".hidden", "NEW", "new\0", "x" * 10_000)


def test_names_that_the_server_did_not_list(runs: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "secret")
    write_scores(tmp_path / "secret", "mme", 0.123)
    make_run(runs / ".hidden")
    (runs / "secret").symlink_to(tmp_path / "secret")
    (runs / "linked").mkdir()
    (runs / "linked/metrics.jsonl").symlink_to(tmp_path / "secret/metrics.jsonl")
    (runs / "linked/eval").symlink_to(tmp_path / "secret/eval")
    (runs / "linked/config.toml").write_text("", encoding="utf-8")
    board = Dashboard(runs, ENGLISH)
    assert set(board.shelf.list_runs()) == {"linked", "new", "old"}
    for name in HOSTILE:
        shown = refresh(board, Choice([name], 0, True, name, name, name))
        everything = json.dumps(shown)
        assert "0.123" not in everything
        assert "12.3 %" not in everything
        assert shown["runs"]["value"] == ["new"]  # as if nothing had been picked
        assert "Choose two different runs" in board.compare(name, "new", None)
        assert "Choose two different runs" in board.compare("new", name, None)
    shown = refresh(board, Choice(["linked"], 0, True, None, None, None))
    assert "linked/metrics.jsonl is a link to somewhere else" in shown["curves"]
    assert "linked/eval/mme/scores.json is a link to somewhere else" in shown["table"]
    assert str(tmp_path) not in json.dumps(shown)
    numbers = Choice(["new"] * 50, -(10**9), "<script>", None, None, None)  # type: ignore[arg-type]
    assert refresh(board, numbers)["curves"].count("<img") == 2
    strange: Any = [{"a": 1}, ["new"], 3, None, "new"]
    assert refresh(board, Choice(strange, strange, strange, strange, strange, strange))["runs"]["value"] == ["new"]
    assert "Choose two different runs" in board.compare(strange, "new", None)
    for nonsense in ("[", "[1]", "null", "[" * 900, '"' * 5000, None, [1], {"a": 1}):
        assert "table" in refresh(board, NOTHING, nonsense)


def test_names_and_files_that_are_markup(runs: Path) -> None:
    name = "<img src=x onerror=alert(1)>${1+1}{{value}}\u202e"
    run = make_run(runs / name, train="<script>")
    write_scores(run, "<b>t</b>", 0.5, bars={"<i>{{bar}}": {"n": 1, "score": 0.5}})
    (run / "sessions.jsonl").write_text("<u>\n", encoding="utf-8")
    choice = Choice([name, "new"], 0, True, "<b>t</b>", None, None)
    shown = refresh(Dashboard(runs, ENGLISH), choice)
    for part in ("table", "curves", "scores", "details"):
        page = Page(shown[part])
        assert not {tag for tag, _ in page.tags} & {"script", "i", "u"}, part
        assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
        assert "${" not in shown[part], part
        assert "{{" not in shown[part], part
    assert "{{value}}\\u202e" in Page(shown["table"]).text_of()


def test_of_a_hundred_thousand_steps_some_are_drawn(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    append_steps(runs / "new", range(41, 100_001))
    drawn: list[Run] = []
    original = dashboard_runs.draw_panels

    def draw(kind: str, read: Sequence[Run], style: Any) -> bytes | None:
        drawn.extend(read)
        return original(kind, read, style) if kind == "loss" else None

    monkeypatch.setattr(dashboard_runs, "draw_panels", draw)
    shown = refresh(Dashboard(runs, ENGLISH))
    assert "100,000 / 1,234" in shown["table"]
    assert "2 d" not in shown["table"]
    assert "55 h 33 min" in shown["table"]
    assert "<img" in shown["curves"]
    assert 1000 < len(drawn[0].rows) <= dashboard_runs.NUM_DRAWN_ROWS + 1
    assert drawn[0].rows[-1]["step"] == 100_000


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("metrics.jsonl", '{"step": 1, "lo\n{"step": 2}\n', "metrics.jsonl, line 1 is not JSON"),
        ("metrics.jsonl", '{"step": 1, "loss": 1, "tokens_per_s": {"a": 1}, "step_s": "x"}\n', None),
        ("metrics.jsonl", '{"step": 1, "loss": NaN}\n', None),
        ("metrics.jsonl", "[" * 100_000 + "\n", "maximum recursion depth"),
        ("metrics.jsonl", "\0" * 100_000, None),  # not one whole line
        ("metrics.jsonl", "", None),
        ("config.toml", "train = ", "config.toml is not TOML"),
        ("config.toml", "x" * 2_000_000, "config.toml has 2,000,000 bytes, at most 1,048,576 are read"),
        ("sessions.jsonl", "[]\n", "sessions.jsonl, line 1 is no JSON object"),
        ("eval/easy_vqa/scores.json", "{", "scores.json is not JSON"),
        ("eval/easy_vqa/scores.json", '{"score": "high", "n": 3}', "these are not scores as eval/main.py writes them"),
        ("eval/easy_vqa/scores.json", '{"score": 1, "n": 3, "parts": [1]}', "these are not scores"),
        ("eval/easy_vqa/scores.json", '{"score": 1, "n": 3, "interval": [0]}', "these are not scores"),
    ],
)
def test_broken_files_are_told_of(runs: Path, file: str, content: str, told: str | None) -> None:
    (runs / "new" / file).write_text(content, encoding="utf-8")
    choice = Choice(["new", "old"], 0, True, "easy_vqa", None, None)
    shown = refresh(Dashboard(runs, ENGLISH), choice)
    problems = Page(shown["table"]).text_of()
    assert "old" in problems
    if told is not None:
        assert told in problems
        assert str(runs.parent) not in problems
    assert shown["curves"].count("<img") >= 2  # of the other run


def test_scores_and_their_details(runs: Path) -> None:
    bars = {"always yes": {"n": 4321, "score": 0.333, "interval": None}}
    write_scores(runs / "new", "mme", 1482.06, interval=[1400, 1500], best=2000, bars=bars)
    write_scores(runs / "old", "vqav2_test_dev", None)
    board = Dashboard(runs, ENGLISH)
    shown = refresh(board, Choice(["new", "old"], 0, True, "easy_vqa", None, None))
    scores = Page(shown["scores"]).text_of()
    for cell in ("75.0 %", "74.0 to 76.0 % · n 4,321", "1,482.1", "1,400.0 to 1,500.0", "its owner scores it"):
        assert cell in scores, cell
    details = Page(shown["details"]).text_of()
    for cell in ("shape", "37.5 %", "12.5 %", "n 9"):
        assert cell in details, cell
    details = Page(refresh(board, Choice(["old"], 0, True, "mme", None, None))["details"]).text_of()
    assert "1,482.1" in details  # none of those picked has answered it
    assert "always yes" in details


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing/runs", tmp_path):
        board = Dashboard(folder, ENGLISH)
        shown = refresh(board)
        assert "torchrun --nproc_per_node=2 train/main.py" in shown["table"]
        assert refresh(board, NOTHING, shown["seen"]) == {}
    make_run(tmp_path / "first")
    assert refresh(board, NOTHING, shown["seen"])["runs"]["value"] == ["first"]


def test_the_readers_language(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Dashboard(runs, Words(TEXTS))
    reader = SimpleNamespace(headers={"accept-language": "zh-CN,zh;q=0.9"})
    monkeypatch.setattr(dashboard_runs, "find_chinese_font", lambda: None)
    shown = refresh(board, request=reader)
    assert "已完成" in shown["table"]
    assert "图表为英文" in shown["curves"]
    assert "得分" in shown["table"]
    assert "图表为英文" not in refresh(board)["curves"]
    assert all(english and chinese for english, chinese in TEXTS.values())


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were asked the same questions; read only."""
    folder = tmp_path_factory.mktemp("asked")
    make_data(folder / "sets")
    for name, predictions in (("base", BEFORE), ("tuned", AFTER)):
        write_result(folder / "runs" / name / "eval/easy_vqa", folder / "sets", predictions)
    return folder / "runs"


def test_two_runs_are_compared_once(answered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Dashboard(answered, ENGLISH)
    frame = board.compare("base", "tuned", None)
    ((tag, attributes),) = Page(frame).tags
    assert (tag, attributes["sandbox"]) == ("iframe", "")
    page = Page(str(attributes["srcdoc"]))
    assert "base and tuned" in page.text_of("h1")
    assert "runs/tuned/eval/easy_vqa" in page.text_of()
    assert "script" not in {tag for tag, _ in page.tags}

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it has been compared")

    monkeypatch.setattr(subprocess, "run", fail)
    assert board.compare("base", "tuned", None) == frame
    with pytest.raises(AssertionError, match="it has been compared"):
        board.compare("tuned", "base", None)


def test_what_cannot_be_compared(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Dashboard(runs, ENGLISH)
    for first, second in (("old", "old"), (None, "new"), (None, None)):
        assert "Choose two different runs" in board.compare(first, second, None)

    def answer(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        assert options["cwd"] == runs.parent.resolve()
        assert command[2:4] == ["runs/old", "runs/new"]
        return subprocess.CompletedProcess(command, 1, "", "a warning\nerror: they <differ> in data_hash\n")

    monkeypatch.setattr(subprocess, "run", answer)
    assert "cannot be compared: they &lt;differ&gt; in data_hash" in board.compare("old", "new", None)

    def hang(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert "took more than 180 s" in board.compare("old", "new", None)


def test_pages_are_few_and_of_the_scores_of_now(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    comparer = Comparer(runs)

    def make(*names: str) -> str:
        made.append("+".join(names))
        return made[-1]

    monkeypatch.setattr(comparer, "_make", make)
    monkeypatch.setattr(dashboard_compare, "MAX_PAGES", 2)
    shelf = Shelf(runs)

    def compare(language: str) -> None:
        listed = shelf.list_runs()
        comparer.compare(listed["old"], listed["new"], language)

    for language in ("en", "zh", "en"):
        compare(language)
    assert made == ["old+new+en", "old+new+zh"]
    write_scores(runs / "new", "easy_vqa", 0.5)
    compare("en")
    assert made[2:] == ["old+new+en"]
    assert len(comparer.pages) == 2


def test_the_tab_is_built_and_its_events_are_no_public_api(runs: Path) -> None:
    words = Words(TEXTS)
    with gr.Blocks() as page, gr.Tab("Dashboard") as tab:
        build_dashboard(runs, words, tab)
    config = page.get_config_file()
    assert {one["api_visibility"] for one in config["dependencies"]} == {"private"}
    ticks = [one for one in config["dependencies"] if not one["backend_fn"]]
    assert len(ticks) == 1  # a tick by itself asks the server nothing
    assert "dashboard_refresh" in str(ticks[0]["js"])
