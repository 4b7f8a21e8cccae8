"""Differences are the plain ones, only what can be compared is compared, and answers show as they are."""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from eval import compare
from eval.answers import describe_scores, hash_files, load_result
from eval.benchmarks import BENCHMARKS
from eval.compare import compare_results, describe_comparison, pair_results, print_comparison, show_changes
from eval.comparison import Line, adjust, list_changes, split_changes
from eval.tally import Part, compare_parts, divide
from eval.task import Question

KINDS = ("shape", "color", "yes/no")
RIGHT = ("circle", "red", "yes")
FIRST = ["circle", "blue", "no", "square", "red", "no"]  # right: 1 0 0 0 1 0
SECOND = ["circle", "red", "yes", "circle", "Red", "nein"]  # right: 1 1 1 1 1 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six pictures with a question each, as `data.prepare` writes them."""
    folder = tmp_path / "sets/easy_vqa"
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(folder / f"images/{number}.png")
        row = {"question_id": f"q{number}", "image": f"{number}.png", "question": "what is <b>it</b>?"}
        rows.append(json.dumps(row | {"answer": RIGHT[number % 3], "type": KINDS[number % 3]}) + "\n")
    (folder / "test.jsonl").write_text("".join(rows), encoding="utf-8")
    turns = [{"from": "human", "value": "<image>\nwhat is <b>it</b>?"}, {"from": "gpt", "value": "red"}]
    for split in ("train", "held_out"):
        (folder / f"vqa_{split}.json").write_text(json.dumps([{"conversations": turns}]), encoding="utf-8")
    return folder.parent


def write_result(folder: Path, data: Path, predictions: Sequence[str], **settings: object) -> Path:
    """Write a results folder as `eval/main.py` does."""
    task = BENCHMARKS["easy_vqa"].open(data, "official", None)
    scored = BENCHMARKS["easy_vqa"].count(task.questions, predictions, "official")
    values = {
        "task": "easy_vqa", "rule": "official", "data": str(data), "image_folder": None, "model": str(folder),
        "data_hash": hash_files(task.files), "template": task.template, "prompt": task.prompt, "max_new_tokens": 12,
        "dtype": "float32", "limit": None, "sessions": [{"batch_size": 32, "torch": "2.13", "started": folder.name}],
    } | settings  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(describe_scores(scored)), encoding="utf-8")
    rows = [
        dataclasses.asdict(question) | {"prediction": prediction, "credit": credit}
        for question, prediction, credit in zip(task.questions, predictions, scored.credits, strict=True)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path: Path, data: Path) -> tuple[Path, Path]:
    """Two runs that have answered the six questions."""
    first = write_result(tmp_path / "runs/base/eval/easy_vqa", data, FIRST)
    second = write_result(tmp_path / "runs/tuned/eval/easy_vqa", data, SECOND, dtype="bfloat16")
    return first.parents[1], second.parents[1]


def compare_runs(first: Path, second: Path) -> compare.Comparison:
    return compare_results(*(load_result(run / "eval/easy_vqa") for run in (first, second)))


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    compare.main()


def test_a_comparison_by_hand(runs: tuple[Path, Path]) -> None:
    """Two and five of six are right: 33.3 and 83.3 %; three changed for the better, by chance in 2 of 8 cases."""
    comparison = compare_runs(*runs)
    (line,) = comparison.tables["all"]
    assert (line.first.score, line.second.score) == pytest.approx((2 / 6, 5 / 6))
    assert line.found.difference == pytest.approx(3 / 6)
    assert line.changes == (0, 3, pytest.approx(2 / 8))
    by_type = {one.name: one for one in comparison.tables["type"]}
    assert {name: one.changes and one.changes[:2] for name, one in by_type.items()} == {
        "shape": (0, 1),
        "color": (0, 1),
        "yes/no": (0, 1),
    }
    # Number 4 says Red for red, number 5 nein for no.
    assert split_changes(comparison) == ([], [1, 2, 3], [4, 5])
    assert [(row["question_id"], row["change"], row["first"], row["second"]) for row in list_changes(comparison)] == [
        ("q1", "better", "blue", "red"),
        ("q2", "better", "no", "yes"),
        ("q3", "better", "square", "circle"),
        ("q4", "worth the same", "red", "Red"),
        ("q5", "worth the same", "no", "nein"),
    ]
    text = describe_comparison(comparison, "en").replace("\N{NO-BREAK SPACE}", " ")
    assert re.search(
        r"\| all \| 6 \| 33\.3 \| 83\.3 \| \+50\.0 \| .* … \+83\.3 \| 0\.2\d\d \| no \| 0 : 3 \| 0\.250 \|", text
    )
    assert "| dtype | float32 | bfloat16 |" in text
    assert "torch" not in text
    assert text.endswith(
        "Answers: right in A, wrong in B: 0; wrong in A, right in B: 3; other words, worth the same: 2; unchanged: 1.\n"
    )


def test_swapping_the_runs_changes_the_signs(runs: tuple[Path, Path]) -> None:
    forth, back = compare_runs(*runs), compare_runs(*reversed(runs))
    for breakdown, lines in forth.tables.items():
        for one, other in zip(lines, back.tables[breakdown], strict=True):
            assert other.found.difference == -one.found.difference
            assert other.found.interval == pytest.approx((-one.found.interval[1], -one.found.interval[0]))
            assert (other.found.p_value, other.adjusted_p) == (one.found.p_value, one.adjusted_p)
            assert one.changes is not None
            assert other.changes == (one.changes[1], one.changes[0], one.changes[2])
    assert split_changes(back)[:2] == split_changes(forth)[1::-1]
    assert back.differing["dtype"] == forth.differing["dtype"][::-1]


def test_a_run_does_not_differ_from_itself(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(runs[0], runs[0])
    for lines in comparison.tables.values():
        for line in lines:
            assert (line.found.difference, line.found.interval, line.found.p_value) == (0, (0, 0), 1)
            assert line.changes == (0, 0, 1)
    assert comparison.differing == {}
    assert list(list_changes(comparison)) == []
    assert "#### right in A, wrong in B: none" in show_changes(comparison, None, runs[0], "en", 6)


def test_the_order_of_answers_does_not_matter(runs: tuple[Path, Path]) -> None:
    before = compare_runs(*runs)
    file = runs[1] / "eval/easy_vqa/predictions.jsonl"
    file.write_text("\n".join(reversed(file.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")
    after = compare_runs(*runs)
    assert list(list_changes(after)) == list(list_changes(before))
    assert after.tables["all"][0].found == before.tables["all"][0].found


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("data_hash", "0123", r"data_hash: '\w{16}' and '0123'"),
        ("template", "llava_v1", "template: 'vicuna_v1' and 'llava_v1'"),
        ("prompt", "{question}?", r"prompt: '\{question\}' and '\{question\}\?'"),
        ("max_new_tokens", 3, "max_new_tokens: 12 and 3"),
        ("limit", 6, "limit: None and 6"),
        ("rule", "lmms-eval", "rule: 'official' and 'lmms-eval'"),
        ("task", "tiny_zh", "task: 'easy_vqa' and 'tiny_zh'"),
    ],
)
def test_what_must_agree(tmp_path: Path, data: Path, runs: tuple[Path, Path], name: str, value: str, told: str) -> None:
    other = write_result(tmp_path / "runs/other/eval/easy_vqa", data, SECOND, **{name: value})
    with pytest.raises(ValueError, match=rf"base/eval/easy_vqa and .* cannot be compared, they differ in {told}$"):
        compare_runs(runs[0], other.parents[1])


def change_file(file: Path, old: str, new: str, times: int = 1) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, times), encoding="utf-8")


def test_other_questions_cannot_be_compared(runs: tuple[Path, Path]) -> None:
    change_file(runs[1] / "eval/easy_vqa/predictions.jsonl", '"q2"', '"q7"')
    with pytest.raises(
        ValueError, match=r"2 questions are only in one of them, q2 is the first: was it another --seed\?"
    ):
        compare_runs(*runs)


def test_answers_that_do_not_fit_their_score(runs: tuple[Path, Path]) -> None:
    change_file(runs[1] / "eval/easy_vqa/predictions.jsonl", '"prediction": "yes"', '"prediction": "no"')
    with pytest.raises(
        ValueError, match=r"tuned/eval/easy_vqa: the answers count to 0\.666667, scores\.json says 0\.83"
    ):
        compare_runs(*runs)


@pytest.mark.parametrize("break_it", ["twice", "torn", "no scores"])
def test_damaged_results_are_an_error(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, break_it: str
) -> None:
    folder = runs[1] / "eval/easy_vqa"
    file = folder / "predictions.jsonl"
    if break_it == "twice":
        change_file(file, '"q2"', '"q1"')
        told = r"question q1 is answered twice"
    elif break_it == "torn":
        file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
        told = r"has 5 rows, scores.json is about 6 questions"
    else:
        (folder / "scores.json").unlink()
        told = r"no finished results of any task in both runs: .*base has easy_vqa; .*tuned has none"
    with pytest.raises(SystemExit, match=rf"^error: .*{told}"):
        run_main(monkeypatch, *runs)
    assert "wrote" not in capsys.readouterr().out
    assert not (runs[1] / "compare-base").exists()


def test_test_answers_that_only_the_owner_can_judge(runs: tuple[Path, Path]) -> None:
    result = load_result(runs[0] / "eval/easy_vqa")
    hidden = dataclasses.replace(result, settings=result.settings | {"task": "vqav2_test_dev"})
    with pytest.raises(ValueError, match="only the owner of vqav2_test_dev can judge these answers"):
        compare_results(hidden, hidden)


def test_the_command_writes_a_page_with_pictures(
    runs: tuple[Path, Path], data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_result(runs[1] / "eval/tiny_zh", data, SECOND)
    run_main(monkeypatch, *runs, "--changes", 2)
    out = runs[1] / "compare-base"
    printed = capsys.readouterr().out
    assert re.search(r"^all +6  33\.3  83\.3  \+50\.0 ", printed, flags=re.MULTILINE)
    assert "Answered by one of the two only: tiny_zh." in printed
    assert f"wrote {out}/compare.html, compare.md and changes.jsonl" in printed
    text = (out / "compare.md").read_text(encoding="utf-8")
    assert text.startswith(
        "# base and tuned\n\n## easy_vqa\n\n6 questions, metric: exact match, rule: official. Asked as: "
    )
    assert "#### wrong in A, right in B: 2 of 3, drawn by lot" in text
    assert "#### right in A, wrong in B: none" in text
    assert len(re.findall(r"!\[\]\(pictures/\w+\.jpg\)", text)) == 2
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert "http" not in re.sub(r"data:image\S+", "", page).replace("http-equiv", "")
    rows = [json.loads(line) for line in (out / "changes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["question_id"] for row in rows] == ["q1", "q2", "q3", "q4", "q5"]
    assert rows[0] | {"image": ""} == {
        "task": "easy_vqa", "question_id": "q1", "change": "better", "image": "", "text": "what is <b>it</b>?",
        "answers": ["red"], "kinds": {"type": "color"}, "first": "blue", "second": "red",
        "first_credit": 0, "second_credit": 1,
    }  # fmt: skip


@pytest.mark.parametrize("gone", ["moved", "changed"])
def test_without_the_benchmarks_files_pictures_are_left_out(
    runs: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture, gone: str,
) -> None:  # fmt: skip
    if gone == "moved":
        data.rename(tmp_path / "elsewhere")
    else:
        change_file(data / "easy_vqa/test.jsonl", "circle", "square")
    run_main(monkeypatch, *runs, "--out", tmp_path / "out")
    text = (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    assert "Without pictures: the benchmark's files were not found, or are of another version; `--data` says" in text
    assert "pictures/" not in text
    assert ("easy_vqa is shown without pictures: " in capsys.readouterr().err) == (gone == "changed")
    if gone == "moved":
        run_main(monkeypatch, *runs, "--out", tmp_path / "out", "--data", tmp_path / "elsewhere")
        assert "pictures/" in (tmp_path / "out/compare.md").read_text(encoding="utf-8")


def test_answers_are_shown_as_they_are(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = ["<script>alert(1)</script>", "a | b\n\n# c\td", "![x](http://evil/x.png)", "**红色**", "", "\x1b[31m"]
    first = write_result(tmp_path / "runs/base/eval/easy_vqa", data, [RIGHT[number % 3] for number in range(6)])
    write_result(tmp_path / "runs/tuned/eval/easy_vqa", data, wild)
    run_main(monkeypatch, first.parents[1], tmp_path / "runs/tuned", "--out", tmp_path / "out")
    page = (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    tags = set(re.findall(r"<(\w+)", body))
    assert tags <= {"body", "h1", "h2", "h3", "h4", "p", "div", "table", "thead", "tbody", "tr", "th", "td", "strong",
                    "br", "wbr", "img", "code"}  # fmt: skip
    assert len(re.findall(r"<img", body)) == 6
    shown = re.sub(r"<[^>]*>", "\n", body.replace("<wbr>", ""))
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        shown = shown.replace(entity, character)
    shown = re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), shown)
    for text in ("<script>alert(1)</script>", "a | b↵↵# c⇥d", "![x](http://evil/x.png)", "**红色**", r"\x1b[31m"):
        assert f"B ✗ {text}\n" in shown
    assert shown.count("what is <b>it</b>?\n") == 6
    changes = (tmp_path / "out/changes.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["second"] for line in changes] == wild


def test_a_kind_cannot_command_the_terminal(runs: tuple[Path, Path]) -> None:
    for run in runs:
        change_file(run / "eval/easy_vqa/predictions.jsonl", '"color"', json.dumps("\x1b[2Jred\n"), times=-1)
    comparison = compare_runs(*runs)
    printed = print_comparison(comparison, "en")
    assert "\x1b" not in printed
    assert re.search(r"^\?\[2Jred\? +2  ", printed, flags=re.MULTILINE)


def test_chinese(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run_main(monkeypatch, *runs, "--language", "zh")
    out = runs[1] / "compare-base"
    text = (out / "compare.md").read_text(encoding="utf-8")
    assert text.startswith("# base 与 tuned 的对比\n")
    assert "| 全部 | 6 | 33.3 | 83.3 | +50.0 |" in text
    assert "#### A 错 B 对：全部 3 题" in text
    assert "#### A 对 B 错：无" in text
    assert "参考答案：red" in text
    assert '<html lang="zh' in (out / "compare.html").read_text(encoding="utf-8")
    printed = capsys.readouterr().out.splitlines()
    header = next(line for line in printed if line.startswith("题型"))
    row = next(line for line in printed if line.startswith("color"))
    assert compare._measure(header) == compare._measure(row)  # columns of a terminal


def test_every_text_is_there_in_both_languages() -> None:
    for key, texts in compare.WORDS.items():
        fields = [set(re.findall(r"\{(\w+)", text)) for text in texts]
        assert len(texts) == len(compare.LANGUAGES)
        assert fields[0] == fields[1], key


def test_folders_of_one_task_are_compared_whatever_their_names(
    tmp_path: Path, data: Path, runs: tuple[Path, Path]
) -> None:
    other = write_result(tmp_path / "answers", data, SECOND)
    pairs, lonely = pair_results(runs[0] / "eval/easy_vqa", other, None)
    assert {name: (first.folder, second.folder) for name, (first, second) in pairs.items()} == {
        "easy_vqa": (runs[0] / "eval/easy_vqa", other)
    }
    assert lonely == []


def test_a_task_that_one_lacks(runs: tuple[Path, Path], data: Path) -> None:
    write_result(runs[1] / "eval/other", data, SECOND)
    assert pair_results(*runs, None)[1] == ["other"]
    with pytest.raises(
        ValueError, match=r"no finished results of other in both runs: .*base has easy_vqa; .*tuned has easy"
    ):
        pair_results(*runs, ["easy_vqa", "other"])
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        pair_results(runs[0], Path("nowhere"), None)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.9: times 4, 3, 2, 1, none below the one before it."""
    assert adjust([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert adjust([0.6, 0.7]) == [1, 1]
    assert adjust([]) == []


def test_credits_between_right_and_wrong(runs: tuple[Path, Path]) -> None:
    """As VQA accuracy gives: answers are worth more or less."""
    questions = [Question(str(number), "", "how many?", ("how many?",), ("3", "2", "3")) for number in range(4)]
    first, second = (load_result(run / "eval/easy_vqa") for run in runs)
    first = dataclasses.replace(first, questions=questions, predictions=["2"] * 4, credits=[0.3, 0.6, 0.9, 1])
    second = dataclasses.replace(second, questions=questions, predictions=["3"] * 4, credits=[1, 1, 1, 1])
    comparison = compare.Comparison(first, second, {}, {})
    assert split_changes(comparison) == ([], [0, 1, 2], [3])
    text = show_changes(comparison, None, runs[0], "en", 6)
    assert "#### worth more in B than in A: all 3" in text
    assert "reference: 3 ×2, 2<br>A 0.3 2<br>B ✓ 3 |" in text


def test_tables_of_points_and_of_many_lines(runs: tuple[Path, Path]) -> None:
    """The benchmark's own points stay points; what is long is left to the file."""
    comparison = compare_runs(*runs)
    (line,) = comparison.tables["all"]
    first, second = (
        Part(6, part.clusters, part.sums, lambda sums: 200 * divide(sums), best=200)
        for part in (line.first, line.second)
    )
    by_points = Line("OCR", first, second, compare_parts(first, second), adjusted_p=0.04, changes=None)
    many = [dataclasses.replace(line, name=f"kind {number}") for number in range(21)]
    comparison = dataclasses.replace(comparison, tables={"subtask": [by_points], "question type": many})
    text = describe_comparison(comparison, "en").replace("\N{NO-BREAK SPACE}", " ")
    assert "| subtask | questions | A | B | B−A | 95 % interval | p | significant |\n" in text
    assert re.search(r"\| OCR \| 6 \| 66\.7 \| 166\.7 \| \+100\.0 \| .* \| yes \|\n", text)
    assert "Scores are in %. The benchmark's own points are of 200 at most." in text
    assert "| kind 20 | 6 | 33.3 |" in text
    printed = print_comparison(comparison, "en")
    assert "question type: 21 lines, in compare.md" in printed
    assert "kind 20" not in printed
