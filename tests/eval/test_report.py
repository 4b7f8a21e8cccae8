"""A report says what the runs' files say: all of it, nothing else, and nothing where they are silent."""

import dataclasses
import json
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data import charts
from data.fonts import find_chinese_font
from data.run_words import show_interval, show_score, show_size, show_time
from eval import report, report_charts, report_cv
from eval.answers import describe_scores, hash_files
from eval.benchmarks import BENCHMARKS
from eval.page import find_browser
from eval.report import write_report
from eval.report_facts import describe_training
from eval.report_runs import open_run, open_runs
from eval.report_text import CHINESE, ENGLISH, WORDS, fill, join_names
from tests.eval.test_page import Page

RIGHT = ("circle", "red", "yes")
BEFORE = ["circle", "<b>blue</b> | **x**", "no", "square", "green", "no"]  # one of six is right
AFTER = ["circle", "red", "yes", "circle", "[red](http://example.com)", "yes"]  # five of six
CONFIG = {
    "name": "base", "train": "full", "data": "sets/train.json", "held_out": "sets/held.json", "model": "start/final",
    "bits": 16, "batch_size": 12, "epochs": 2.5, "learning_rate": 0.001, "projector_learning_rate": 0.0,
    "vision_learning_rate": 0.0, "dtype": "bfloat16", "parallel": "fsdp", "lora_rank": 7, "lora_vocabulary": False,
}  # fmt: skip
NUM_STEPS = 40
needs_chinese_font = pytest.mark.skipif(find_chinese_font() is None, reason="no font with Chinese is installed")


def make_rows() -> list[dict[str, Any]]:
    """What a GPU run of two ranks records; the loss is 2 in the first 15 steps and 1 in the last 25."""
    return [
        {
            "step": step, "loss": 2.0 if step <= 15 else 1.0, "learning_rates": [0.001, 0.001, 0.0005], "mfu": 0.375,
            "tokens_per_s": 1234.5 if step > 5 else 100.0, "tokens": 1000, "supervised_tokens": 111, "step_s": 2.0,
            "data_wait_s": 0.1, "rank_wait_s": 0.2, "peak_memory_bytes": [2.5 * 2**30, 2.25 * 2**30],
            "reserved_memory_bytes": [3 * 2**30, 3 * 2**30], "gpu_utilization": [97.0, None],
            "gpu_power_w": [450.0, 440.0],
        } | ({"held_out_loss": 0.5678, "exact_match": 0.654} if step == NUM_STEPS else {})
        for step in range(1, NUM_STEPS + 1)
    ]  # fmt: skip


def write_rows(run: Path, rows: Sequence[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_sessions(run: Path, sessions: Sequence[dict[str, Any]]) -> None:
    (run / "sessions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sessions), encoding="utf-8")


def write_config(run: Path, **settings: Any) -> None:
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in (CONFIG | settings).items())
    (run / "config.toml").write_text("".join(lines), encoding="utf-8")


def write_result(folder: Path, data: Path, predictions: Sequence[str], **settings: Any) -> None:
    """Write a results folder as `eval/main.py` does."""
    benchmark = BENCHMARKS["easy_vqa"]
    task = benchmark.open(data, "official", None)
    scored = benchmark.count(task.questions, predictions, "official")
    session = {"batch_size": 32, "world_size": 1, "device": "a GPU", "torch": "2.13.0", "commit": "abc1234"}
    values = {
        "task": "easy_vqa", "rule": "official", "data": str(data), "image_folder": None, "model": "runs/m/final",
        "model_base": None, "adapter": None, "data_hash": hash_files(task.files), "template": "vicuna_v1",
        "prompt": task.prompt, "max_new_tokens": 12, "dtype": "bfloat16", "bits": 16, "limit": None, "seed": 0,
        "sessions": [session],
    } | settings  # fmt: skip
    scores = {"metric": benchmark.metric} | describe_scores(scored)
    scores["bars"] = {"always yes": {"n": 6, "score": 0.3333, "interval": [0.1, 0.6], "best": 1.0}}
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    rows = [
        dataclasses.asdict(question) | {"prediction": prediction, "credit": credit}
        for question, prediction, credit in zip(task.questions, predictions, scored.credits, strict=True)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(sets: Path) -> None:
    """Six pictures with a question each, as `data.prepare` writes them."""
    (sets / "easy_vqa/images").mkdir(parents=True)
    rows = []
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(sets / f"easy_vqa/images/{number}.png")
        row = {"question_id": f"q{number}", "image": f"{number}.png", "question": "what is <i>it</i>?"}
        rows.append(json.dumps(row | {"answer": RIGHT[number % 3], "type": RIGHT[number % 3]}) + "\n")
    (sets / "easy_vqa/test.jsonl").write_text("".join(rows), encoding="utf-8")
    turns = [{"from": "human", "value": "<image>\nwhat is <i>it</i>?"}, {"from": "gpt", "value": "red"}]
    for split in ("train", "held_out"):
        (sets / f"easy_vqa/vqa_{split}.json").write_text(json.dumps([{"conversations": turns}]), encoding="utf-8")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `base` and `tuned`, and the data they were asked about; read only."""
    folder = tmp_path_factory.mktemp("story")
    make_data(folder / "sets")
    for name, predictions, settings in (
        ("base", BEFORE, {}),
        ("tuned", AFTER, {"name": "tuned", "train": "lora", "model": str(folder / "base/final")}),
    ):
        (folder / name).mkdir()
        write_config(folder / name, **settings)
        write_rows(folder / name, make_rows())
        write_result(folder / name / "eval/easy_vqa", folder / "sets", predictions)
    for name, num_trained in (("base", 2077), ("tuned", 371)):
        write_sessions(folder / name, [{"trained_parameters": num_trained, "parameters": 2377, "rows": 4321}])
    return folder


@pytest.fixture
def runs(story: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy that a test may change."""
    for name in ("base", "tuned"):
        shutil.copytree(story / name, tmp_path / name)
    return tmp_path / "base", tmp_path / "tuned"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither charts nor PDF."""
    monkeypatch.setattr(report, "draw_charts", lambda *_: {})
    monkeypatch.setattr(report, "print_pdf", lambda *_: False)


def write(runs: Sequence[Path], out: Path, language: str = "en") -> str:
    write_report(runs, out, language)
    return (out / "report.md").read_text(encoding="utf-8")


def find_row(text: str, name: str) -> list[str]:
    """Return the other cells of the table's row that begins so."""
    (found,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, flags=re.MULTILINE)
    return found.split(" | ")


def test_the_table_of_trainings_by_hand(quick: None, story: Path, tmp_path: Path) -> None:
    text = write([story / "base", story / "tuned"], tmp_path)
    for name, base, tuned in (
        ("started from", "start/final", str(story / "base/final")),
        ("trained numbers", "2,077", "371"),
        ("numbers in the model", "2,377", "2,377"),
        ("conversations in it", "4,321", "4,321"),
        ("optimizer steps", "40", "40"),
        ("tokens seen", "40,000", "40,000"),
        ("of these learned from", "4,440", "4,440"),
        ("time in steps", "1 min 20 s", "1 min 20 s"),
        ("tokens/s, median", "1,234", "1,234"),
        ("MFU, median", "37.5 %", "37.5 %"),
        ("memory of a rank, peak", "2.50 GiB", "2.50 GiB"),
        ("training loss, last 25 steps", "1.0000", "1.0000"),
        ("held-out loss, last", "0.5678", "0.5678"),
        ("held-out exact match, last", "65.4 %", "65.4 %"),
        ("parallelism", "FSDP", "FSDP"),
        ("processes", "2", "2"),
        ("conversations a step", "12", "12"),
    ):
        assert find_row(text, name) == [base, tuned], name


def test_scores_are_those_of_the_files(quick: None, story: Path, tmp_path: Path) -> None:
    text = write([story / "base", story / "tuned"], tmp_path)
    for name in ("base", "tuned"):
        scores = json.loads((story / name / "eval/easy_vqa/scores.json").read_text(encoding="utf-8"))
        low, high = (f"{100 * end:.1f}" for end in scores["interval"])
        cells = {"base": "16.7 %", "tuned": "83.3 %"}  # 1/6, 5/6
        assert f"| {name} | 6 | {cells[name]} | {low} to {high} % |" in text
    assert find_row(text, "always yes") == ["6", "33.3 %", "10.0 to 60.0 %"]
    assert "its exact match is **83.3 %**" in text
    assert "that of base is 16.7 %" in text
    for setting in ("rule official", "template vicuna_v1", "max_new_tokens 12", "dtype bfloat16", "batch_size 32",
                    "torch 2.13.0", "commit abc1234", "data_hash ", "bits 16"):  # fmt: skip
        assert setting in text
    assert "right in A, wrong in B: none" in text  # compare.py's tables and examples
    assert "wrong in A, right in B: all 4" in text


def test_another_number_in_a_file_is_another_number_in_the_report(
    quick: None, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = make_rows()
    for row in rows:
        row |= {"tokens_per_s": 98765.0, "mfu": 0.111}
    write_rows(runs[1], rows)
    write_config(runs[1], train="lora", batch_size=96)
    scores_file = runs[0] / "eval/easy_vqa/scores.json"
    scores_file.write_text(scores_file.read_text(encoding="utf-8").replace("0.3333", "0.4321"), encoding="utf-8")
    shutil.rmtree(runs[1] / "eval")
    write_result(runs[1] / "eval/easy_vqa", Path(json.loads(
        (runs[0] / "eval/easy_vqa/settings.json").read_text(encoding="utf-8"))["data"]), RIGHT * 2)  # fmt: skip
    text = write(runs, tmp_path / "out")
    assert find_row(text, "tokens/s, median") == ["1,234", "98,765"]
    assert find_row(text, "MFU, median") == ["37.5 %", "11.1 %"]
    assert find_row(text, "tuned")[:2] == ["6", "100.0 %"]
    cv = (tmp_path / "out/cv.md").read_text(encoding="utf-8")
    for number in ("98,765 tokens/s", "MFU 11.1 %", "at a global batch of 96", "16.7 % -> 100.0 %"):
        assert number in cv


def test_an_old_runs_missing_records_are_left_out(runs: tuple[Path, Path], tmp_path: Path, quick: None) -> None:
    for run in runs:
        write_rows(run, [{key: row[key] for key in ("step", "loss", "learning_rates")} for row in make_rows()])
        (run / "sessions.jsonl").unlink()
        shutil.rmtree(run / "eval")
    write_config(runs[1], train="lora", model="owner/name")
    text = write(runs, tmp_path / "out")
    unknown = ("MFU", "tokens/s", "GiB", "trained numbers", "processes", "held-out loss", "Base beside")
    for absent in (*unknown, "None", "nan"):
        assert absent not in text, absent
    assert find_row(text, "optimizer steps") == ["40", "40"]
    assert "No benchmark has been answered yet" in text
    assert "The training of base and tuned did not record its machine, versions and commit." in text
    cv = (tmp_path / "out/cv.md").read_text(encoding="utf-8")
    assert "LoRA-tuned a vision-language model, at a global batch of 12, for 40 steps." in cv
    assert cv.count("\n- ") == 4  # in each language what was written, and what was trained


def test_a_model_that_was_only_asked(quick: None, runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("config.toml", "metrics.jsonl"):
        (runs[0] / name).unlink()
    text = write(runs, tmp_path / "out")
    assert text.count("| run | tuned |\n") == 2  # the table of trainings, and the configuration
    assert "base: not trained here" in text
    assert find_row(text, "base")[:2] == ["6", "16.7 %"]


def test_charts_of_what_was_recorded(story: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    """All kinds for a GPU run; for an old one those that it has; all of one size, on white."""
    old = [{key: row[key] for key in ("step", "loss", "learning_rates")} for row in make_rows()]
    write_rows(runs[0], [row | {"mfu": None, "gpu_utilization": [None, None]} for row in old])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = report_charts.draw_charts(open_runs([story / "base", story / "tuned"]), tmp_path / "all", ENGLISH)
        few = report_charts.draw_charts(open_runs([runs[0]]), tmp_path / "few", ENGLISH)
    assert list(every) == list(charts.CHARTS)
    assert list(few) == ["loss", "learning_rates"]
    for kind, shown in every.items():
        assert shown == f"![{ENGLISH[f'{kind} chart']}](pictures/{kind}.png)"
        with Image.open(tmp_path / f"all/pictures/{kind}.png") as image:
            assert image.width == 1200
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.fixture(scope="module")
def chinese(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole report in Chinese, as the command writes it; a glyph that a chart lacks is an error."""
    out = tmp_path_factory.mktemp("chinese")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        write_report([story / "base", story / "tuned"], out, "zh")
    return out


@needs_chinese_font
def test_chinese(chinese: Path) -> None:
    text = (chinese / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# base 与 tuned：训练与评测报告\n")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    names = ("training", "curves", "evaluation", "compared", "examples", "environment", "reproduce", "configuration")
    assert headings == [CHINESE[name] for name in (*names, "cv")]
    assert find_row(text, "token/s，中位数") == ["1,234", "1,234"]
    assert "完全匹配率为 **83.3 %**" in text
    assert "|  | 题数 | 完全匹配率 | 95 % 置信区间 |" in text


@needs_chinese_font
def test_the_page_is_self_contained_and_shows_answers_literally(chinese: Path) -> None:
    html = (chinese / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "i", "b", "a"}
    sources = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == len(charts.CHARTS) + 4  # and four answers that changed
    assert all(source.startswith("data:image/") for source in sources)
    assert "http" not in "".join(str(value) for _, attributes in page.tags for value in attributes.values()).replace(
        "http-equiv", ""
    )
    shown = page.text_of()
    for text in ("what is <i>it</i>?", BEFORE[1]):
        assert text in shown
    assert {file.name for file in chinese.iterdir()} >= {"report.md", "report.html", "cv.md", "pictures"}


@needs_chinese_font
@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium on this machine to print with")
def test_the_pdf_has_pages_and_a_chinese_font(chinese: Path) -> None:
    printed = (chinese / "report.pdf").read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 4
    assert re.search(rb"/FontName\s*/\w*\+?[^/]*(CJK|Hei|Sun|Song|Ming|YaHei|PingFang|SourceHan|NotoSansSC)", printed)


def test_chinese_without_a_font(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "find_chinese_font", lambda: None)
    with pytest.raises(ValueError, match=r"no font with Chinese .* apt install fonts-noto-cjk"):
        write_report([story / "tuned"], tmp_path, "zh")


def test_both_languages_say_the_same() -> None:
    translated = {key for key in CHINESE if key.endswith((" metric", " kind"))}  # benchmarks' own English words
    assert CHINESE.keys() - translated == ENGLISH.keys()
    pairs = [(ENGLISH[key], CHINESE[key]) for key in ENGLISH]
    pairs += [(report_cv.ENGLISH[key], report_cv.CHINESE[key]) for key in report_cv.ENGLISH]
    assert report_cv.ENGLISH.keys() == report_cv.CHINESE.keys()
    for english, chinese in pairs:
        assert set(re.findall(r"{\w+}", english)) == set(re.findall(r"{\w+}", chinese)), english


def list_clauses() -> list[tuple[str, str]]:
    """Return every template of the CV and of the summary with each of its clauses."""
    templates = [text for table in report_cv.TEMPLATES.values() for text in table.values()]
    templates += [words[key] for words in WORDS.values() for key in ("summary trained", "summary change", "rates of")]
    return [(text, clause) for text in templates for clause in re.findall(r"\[([^\]]*)\]", text)]


@pytest.mark.parametrize(("template", "clause"), list_clauses())
def test_a_clause_whose_number_is_absent_is_left_out(template: str, clause: str) -> None:
    facts: dict[str, str | None] = {name: f"<{name}>" for name in re.findall(r"{(\w+)}", template)}
    whole, names = fill(template, facts), re.findall(r"{(\w+)}", clause)
    filled_clause = fill(clause, facts)
    assert whole is not None
    assert filled_clause is not None
    assert filled_clause in whole
    for name in names:
        only_there = re.findall(r"{(\w+)}", template).count(name) == 1
        without = fill(template, facts | {name: None})
        assert without == fill(template, {key: value for key, value in facts.items() if key != name})
        if only_there:
            assert without == whole.replace(filled_clause, "", 1)


def test_a_line_that_says_nothing_without_its_number_is_left_out() -> None:
    assert fill("{task}: {before} -> {after}[ on {n}]", {"task": "t", "after": "2", "n": "3"}) is None
    assert fill("{a}[ {b}]", {"a": "[{b}]", "b": None}) == "[{b}]"  # what is filled in is no template
    assert fill("{a} {b}", {"a": "{b}", "b": "{a}"}) == "{b} {a}"


def test_every_number_of_the_cv_is_one_of_the_report(quick: None, story: Path, tmp_path: Path) -> None:
    text = write([story / "base", story / "tuned"], tmp_path)
    cv = (tmp_path / "cv.md").read_text(encoding="utf-8")
    assert text.split("## For a CV\n\n")[1].startswith(cv)
    before = text.split("## For a CV")[0]
    numbers = set(re.findall(r"\d[\d.,]*\d|\d", cv.replace("LLaVA-1.5", "")))
    answered = {"12"}  # two runs, 6 questions each
    assert numbers - answered <= set(re.findall(r"\d[\d.,]*\d|\d", before))
    english, chinese = cv.split("\n\n**")
    of_english, of_chinese = (set(re.findall(r"\d[\d.,]*\d|\d", entry)) for entry in (english, chinese))
    assert of_english == of_chinese
    assert len(re.findall("^- ", english, flags=re.MULTILINE)) == 4
    assert "easy_vqa: exact match 16.7 % -> 83.3 % on 6 questions (95 % interval " in english
    assert "GPU" not in cv  # the training did not record it


def test_what_a_training_recorded_of_its_machine(quick: None, runs: tuple[Path, Path], tmp_path: Path) -> None:
    session = {
        "started": "2030-01-02 03:04:05", "device": "NVIDIA <b>5090</b>", "ranks": 2, "torch": "2.13.0",
        "commit": "feed123", "command": ["main.py", "my stage.toml", "x=1\n```\n<script>"],
        "trained_parameters": 13_015_864_320, "parameters": 26_000_000,
    }  # fmt: skip
    write_sessions(runs[0], [])
    write_sessions(runs[1], [{"device": "an old card"}, session])
    text = write(runs, tmp_path / "out")
    rows = re.findall(r"^\| training of tuned \| (.*) \|$", text, flags=re.MULTILINE)
    name = "NVIDIA &#60;b&#62;5090&#60;/b&#62;"
    assert rows == [" | an old card |  |  | ", f"2030-01-02 03:04:05 | {name} | 2 | 2.13.0 | feed123"]
    assert find_row(text, "trained numbers") == ["", "13.02 B"]
    assert find_row(text, "numbers in the model") == ["", "26.0 M"]
    assert "The training of base did not record" in text
    assert "\ntorchrun --nproc_per_node=2 train/main.py 'my stage.toml' 'x=1\\n```\\n<script>'\n" in text
    html = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in html.tags}
    cv = (tmp_path / "out/cv.md").read_text(encoding="utf-8")
    assert f", with FSDP on 2 x {name}, at a global batch of 12" in cv


def test_commands_do_the_same_again(quick: None, runs: tuple[Path, Path], tmp_path: Path, story: Path) -> None:
    shutil.rmtree(runs[1] / "eval")
    write_result(
        runs[1] / "eval/easy_vqa", story / "sets", AFTER, model="a b/final", adapter="my; adapter", bits=4, limit=6,
        seed=3, sessions=[{"world_size": 8}],
    )  # fmt: skip
    write_config(runs[1], train="full", model="")
    text = write([runs[1]], tmp_path / "out")
    assert f"torchrun --nproc_per_node=2 train/main.py {runs[1]}/config.toml" in text
    assert "tuned starts from what the stage before it left" in text
    assert (
        "torchrun --nproc_per_node=8 eval/main.py --task easy_vqa --model-path 'a b/final' --adapter 'my; adapter' "
        f"--data {story}/sets --rule official --conv-mode vicuna_v1 --max-new-tokens 12 --dtype bfloat16 --limit 6 "
        "--seed 3 --load-4bit" in text
    )


def test_scores_without_an_owner_and_of_other_scales(quick: None, runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A benchmark's own scale is not percent; answers that only a server can judge have no score."""
    folder = runs[1] / "eval/easy_vqa"
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    part = {"n": 6, "score": 1482.06, "interval": [1400.0, 1500.0], "best": 2000.0}
    scores |= part | {"metric": "MME perception", "bars": {}}
    scores["parts"] = {"all": {"perception": part, "cognition": part | {"score": 300.5, "best": 800.0}}}
    scores["parts"]["subtask"] = {f"s{number}": part for number in range(21)}
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    text = write([runs[1]], tmp_path / "out")
    assert find_row(text, "tuned")[:3] == ["6", "1,482.1", "1,400.0 to 1,500.0"]
    assert find_row(text, "cognition") == ["6", "300.5 <small>1,400.0 to 1,500.0</small>"]
    assert "subtask: 21 names, too many for a page" in text
    (folder / "scores.json").write_text(json.dumps({"metric": "VQA accuracy", "n": 6, "parts": {}}), encoding="utf-8")
    text = write(runs, tmp_path / "out")
    assert "tuned: answered, and scored by its owner's server." in text
    assert "Base beside tuned" not in text
    assert "None" not in text


def test_names_that_are_markup(quick: None, story: Path, tmp_path: Path) -> None:
    run = tmp_path / "<i>$x_1$|`y`"
    shutil.copytree(story / "tuned", run)
    write_config(run, data="</table><script>", dtype="![](http://example.com)")
    page = report_charts.draw_charts(open_runs([run]), tmp_path / "charts", ENGLISH)
    assert "loss" in page
    write([run], tmp_path / "out")
    html = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert not {tag for tag, _ in html.tags} & {"i", "script", "a"}
    assert run.name in html.text_of("h1")
    assert "</table><script>" in html.text_of("td")


def test_runs_of_one_name_are_told_apart(story: Path, runs: tuple[Path, Path]) -> None:
    folders = [story / "base", runs[0]]
    assert [run.name for run in open_runs(folders)] == [str(folder) for folder in folders]
    with pytest.raises(ValueError, match="is given twice"):
        open_runs([runs[0], runs[0]])


def test_numbers_as_they_are_written() -> None:
    assert [show_size(number) for number in (346_752, 9_999_999, 10_000_000, 7_062_902_784)] == [
        "346,752", "9,999,999", "10.0 M", "7.06 B",
    ]  # fmt: skip
    times = [show_time(seconds, ENGLISH) for seconds in (59.9, 3599, 38_160)]
    assert times == ["59 s", "59 min 59 s", "10 h 36 min"]
    assert [join_names(["a", "b", "c"][:n], ENGLISH) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert show_time(283, CHINESE) == "4 分 43 秒"
    assert [show_score(0.98649), show_score(1531.26, 2000.0), show_score(None)] == ["98.6 %", "1,531.3", None]
    assert show_interval([0.5, 0.75], 1.0, ENGLISH) == "50.0 to 75.0 %"
    assert show_interval([0.5, 0.75], 1.0, CHINESE) == "50.0 至 75.0 %"


def test_what_was_trained_in_words(runs: tuple[Path, Path]) -> None:
    lora = "LoRA of rank 7 beside the language model's linears"
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"train": "vision"}, "the vision tower"),
        ({"train": "full", "vision_learning_rate": 1e-5}, f"{ENGLISH['full']}, gently the vision tower"),
        ({"train": "lora"}, f"{lora} and the projector"),
        ({"train": "lora", "lora_vocabulary": True}, f"{lora}, the projector, embeddings and lm_head"),
    )
    for settings, told in cases:
        write_config(runs[1], **settings)
        assert describe_training(open_run(runs[1], "tuned"), ENGLISH)["train"] == told
    write_config(runs[1], train="lora", bits=4, projector_learning_rate=2e-5)
    facts = describe_training(open_run(runs[1], "tuned"), ENGLISH)
    assert facts["precision"] == "bfloat16, frozen linears in 4 bits"
    assert facts["learning_rate"] == "0.001, projector 2e-05"


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval/report.py", *map(str, arguments)])
    report.main()


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (shutil.rmtree, r"error: run folder .*tuned is missing"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"has config.toml but no metrics.jsonl"),
        (lambda run: (run / "config.toml").unlink(), r"has metrics.jsonl but no config.toml"),
        (empty_folder, r"tuned is no run: it has neither config.toml, metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text(""), r"metrics.jsonl holds no step"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo\n{"step": 3}\n'),
            r"metrics.jsonl, line 2 is not JSON",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": "low"}\n'),
            r"metrics.jsonl, line 1: expected numbers as its step and loss",
        ),
        (lambda run: (run / "config.toml").write_text("train = \n"), r"config.toml is not TOML"),
        (lambda run: (run / "config.toml").write_text('"<b>" = 1\n'), r"'<b>' = 1 is no setting"),
        (lambda run: (run / "sessions.jsonl").write_text("[]\n"), r"sessions.jsonl, line 1 is no JSON object"),
        (lambda run: (run / "eval/easy_vqa/scores.json").write_text("{"), r"scores.json"),
    ],
)
def test_bad_runs(
    quick: None, runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, told: str
) -> None:
    change(runs[1])
    with pytest.raises(SystemExit, match=told):
        run_main(monkeypatch, *runs, "--out", tmp_path / "out")


def test_a_line_cut_short_by_a_kill_is_left_out(runs: tuple[Path, Path]) -> None:
    with (runs[0] / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 41, "lo')
    assert len(open_run(runs[0], "base").rows) == NUM_STEPS


def test_results_of_other_data_are_an_error(
    quick: None, runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = runs[1] / "eval/easy_vqa/settings.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"data_hash": "another"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="cannot be compared, they differ in data_hash"):
        run_main(monkeypatch, *runs, "--out", tmp_path / "out")


def test_the_command(
    quick: None, runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_main(monkeypatch, *runs, "--out", tmp_path / "out")
    told = capsys.readouterr().out
    assert f"wrote {tmp_path}/out/report.md" in told
    assert "no report.pdf: it takes Chromium or Chrome" in told
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *runs, "--out", tmp_path / "out", "--language", "fr")
    assert stopped.value.code == 2
    assert "invalid choice: 'fr'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="language 'fr', expected one of en, zh"):
        write_report(runs, tmp_path / "out", "fr")
