"""A results folder: nothing is answered twice or lost, and other settings' answers are not taken for these."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import answers
from eval.answers import Ranks, ResultsFolder, describe_scores, hash_files, hash_tensors, load_result, reopen_task
from eval.benchmarks import BENCHMARKS
from eval.tally import mean_part
from eval.task import Question, Scored
from model.files import StoredTensor

QUESTIONS = [
    Question(
        f"{picture}/{number}", f"{picture}.png" if picture else "", "what?", ("what?",), ("red",), {"type": "color"}
    )
    for picture, count in (("a", 3), ("b", 1), ("c", 2), ("", 2), ("d", 4))
    for number in range(count)
]
SETTINGS: dict[str, Any] = dict.fromkeys(answers.DECISIVE, "same") | {
    "task": "easy_vqa",
    "rule": "official",
    "data": "nowhere",
    "image_folder": None,
}


def open_folder(folder: Path, rank: int = 0, size: int = 1, changes: Mapping[str, str] | None = None) -> ResultsFolder:
    return ResultsFolder(folder, SETTINGS | dict(changes or {}), QUESTIONS, Ranks(rank, size))


def answer(results: ResultsFolder, at_most: int = 99, text: str = "red") -> None:
    """Answer some of what remains, and leave the folder as a kill would."""
    results.start({"batch_size": 32})
    for number in results.remaining[:at_most]:
        row = {"question_id": QUESTIONS[number].question_id, "prediction": text}
        results.add([row | {"num_prompt_tokens": 70, "num_tokens": 2}])
    results.close()


def finish(results: ResultsFolder) -> dict[str, Any]:
    scored = BENCHMARKS["easy_vqa"].count(QUESTIONS, results.predictions, "official")
    return results.finish(scored, {"task": "easy_vqa"} | describe_scores(scored))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_whole_pictures_and_together_everything(size: int) -> None:
    shares = [Ranks(rank, size).share(QUESTIONS) for rank in range(size)]
    assert sorted(number for share in shares for number in share) == list(range(len(QUESTIONS)))
    homes = [
        {rank for rank in range(size) for n in shares[rank] if QUESTIONS[n].image == name}
        for name in ("a.png", "d.png")
    ]
    assert [len(home) for home in homes] == [1, 1]
    if size == 8:
        assert sum(bool(share) for share in shares) == 6  # four pictures, and two questions without one


def test_stopped_on_three_ranks_goes_on_with_two(tmp_path: Path) -> None:
    """Every question is answered by exactly one session, whichever ranks did it."""
    for rank in range(3):
        answer(open_folder(tmp_path, rank, 3), at_most=2, text="first")
    begun = open_folder(tmp_path, 0, 2)
    assert len(begun.rows) == 6
    assert not begun.is_complete
    for rank in range(2):
        answer(open_folder(tmp_path, rank, 2), text="second")
    results = open_folder(tmp_path)
    assert results.is_complete
    assert results.remaining == []
    assert sorted(results.predictions) == ["first"] * 6 + ["second"] * (len(QUESTIONS) - 6)
    finish(results)
    assert not (tmp_path / answers.ANSWERS).exists()
    assert open_folder(tmp_path, 1, 4).predictions == results.predictions


def test_killed_at_any_byte(tmp_path: Path) -> None:
    """A torn line is asked again; the lines before it are kept."""
    answer(open_folder(tmp_path))
    (journal,) = (tmp_path / answers.ANSWERS).iterdir()
    content = journal.read_bytes()
    for length in range(0, len(content), 37):
        journal.write_bytes(content[:length])
        results = open_folder(tmp_path)
        num_whole = max(0, content[:length].count(b"\n") - 1)  # the first line is about settings
        assert len(results.rows) == num_whole
        assert len(results.remaining) == len(QUESTIONS) - num_whole
        answer(results)
        assert open_folder(tmp_path).is_complete


def test_the_first_rank_waits_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LOOK_EVERY_S", 0.01)
    first = open_folder(tmp_path, 0, 2)
    answer(first)
    assert not first.is_complete
    other = threading.Thread(target=lambda: answer(open_folder(tmp_path, 1, 2)))
    other.start()
    first.wait_for_others()
    other.join()
    assert first.is_complete


def test_a_missing_share_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(answers, "GIVE_UP_AFTER_S", 0.05)
    first = open_folder(tmp_path, 0, 2)
    answer(first)
    with pytest.raises(ValueError, match=r"\d of 12 questions have no answer, those of rank 1 of 2, and none came for"):
        first.wait_for_others()
    with pytest.raises(AssertionError):
        first.finish(Scored([], {}), {})
    assert not (tmp_path / answers.SCORES).exists()


def test_scores_and_predictions_read_back(tmp_path: Path) -> None:
    texts = ["red", "a\tb\nc", "", "</s> | <b>", "红", "Red"]
    results = open_folder(tmp_path)
    results.start({"batch_size": 4})
    for number in results.remaining:
        row = {"question_id": QUESTIONS[number].question_id, "prediction": texts[number % len(texts)]}
        results.add([row | {"num_prompt_tokens": 70, "num_tokens": 2}])
    results.close()
    written = finish(results)
    result = load_result(tmp_path)
    assert result.questions == QUESTIONS
    assert result.predictions == [texts[number % len(texts)] for number in range(len(QUESTIONS))]
    assert result.credits == [float(text.lower() == "red") for text in result.predictions]
    assert result.scores == json.loads(json.dumps(written))
    assert (written["n"], written["score"], written["headline"]) == (12, 4 / 12, "all")
    assert written["parts"]["type"]["color"]["n"] == 12
    assert result.settings["sessions"] == [{"batch_size": 4}]
    again = describe_scores(result.count())
    assert json.loads(json.dumps(again))["parts"] == result.scores["parts"]
    assert reopen_task(result) is None  # there are no such files


def test_sessions_are_kept_beside_each_other(tmp_path: Path) -> None:
    answer(open_folder(tmp_path), at_most=2)
    answer(open_folder(tmp_path))
    finish(open_folder(tmp_path))
    assert len(load_result(tmp_path).settings["sessions"]) == 2


@pytest.mark.parametrize("name", answers.DECISIVE)
def test_other_settings_are_another_folder(tmp_path: Path, name: str) -> None:
    answer(open_folder(tmp_path), at_most=2)
    with pytest.raises(ValueError, match=f"holds answers that were given with {name} = .*, now it is {name} = other"):
        open_folder(tmp_path, changes={name: "other"})
    (tmp_path / answers.SETTINGS).unlink()  # another rank's journal still tells
    with pytest.raises(ValueError, match="line 1: answers from here on are of other settings"):
        open_folder(tmp_path, changes={name: "other"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": "z/9", "prediction": "red"}', "line 14: 'z/9' with no answer, or no question of this task"),
        ('{"question_id": "a/0", "prediction": null}', "line 14: 'a/0' with no answer, or no question of this task"),
        ('{"question_id": "a/0", "prediction": "blue"}', "line 14: question a/0 is answered twice"),
        ("[1]", "line 14 is no JSON object"),
        ("{", "line 14 is not JSON"),
    ],
)
def test_damaged_journals(tmp_path: Path, line: str, message: str) -> None:
    answer(open_folder(tmp_path))
    (journal,) = (tmp_path / answers.ANSWERS).iterdir()
    journal.write_text(journal.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path)


def test_answers_of_unknown_origin(tmp_path: Path) -> None:
    (tmp_path / answers.PREDICTIONS).write_text('{"question_id": 1, "prediction": "red"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"predictions.jsonl but no settings.json, .* move the folder aside"):
        open_folder(tmp_path)


def test_two_ranks_with_the_same_answer(tmp_path: Path) -> None:
    answer(open_folder(tmp_path), at_most=1)
    (journal,) = (tmp_path / answers.ANSWERS).iterdir()
    journal.with_name("rank-1-of-2.jsonl").write_bytes(journal.read_bytes())
    with pytest.raises(ValueError, match=r"rank-1-of-2.jsonl: question a/0 is answered in another rank's file, too"):
        open_folder(tmp_path)


def test_damaged_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no scores.json and predictions.jsonl: eval/main.py writes them"):
        load_result(tmp_path)
    answer(open_folder(tmp_path))
    finish(open_folder(tmp_path))
    file = tmp_path / answers.PREDICTIONS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"predictions.jsonl has 11 rows, scores.json is about 12 questions"):
        load_result(tmp_path)
    file.write_text("".join([*lines[:-1], lines[0]]), encoding="utf-8")
    with pytest.raises(ValueError, match="question a/0 is answered twice"):
        load_result(tmp_path)
    file.write_text("".join(lines[:-1]) + '{"question_id": "d/3"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 12: 'image' is missing or of another kind"):
        load_result(tmp_path)
    (tmp_path / answers.SETTINGS).write_text('{"task": "easy_vqa"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"settings.json lacks rule, data, image_folder, data_hash"):
        load_result(tmp_path)


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    first = hash_files([tmp_path / "a", tmp_path / "b"])
    assert first == hash_files([tmp_path / "a", tmp_path / "b"]) != hash_files([tmp_path / "b", tmp_path / "a"])
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.zeros(2, dtype=torch.bfloat16)}
    stored = {name: StoredTensor.wrap(tensor, "file") for name, tensor in tensors.items()}
    hashed = hash_tensors(stored, "sizes")
    assert hashed == hash_tensors(dict(reversed(stored.items())), "sizes") != hash_tensors(stored, "other sizes")
    tensors["y"][1] = 1
    assert hashed != hash_tensors(stored, "sizes")


def test_a_task_without_references_has_no_score(tmp_path: Path) -> None:
    assert describe_scores(Scored([None, None], {})) == {"n": 2, "parts": {}}
    part = mean_part(["a", "a", "b"], [1, 0, 1])
    described = describe_scores(Scored([1, 0, 1], {"all": {"all": part}}))
    assert (described["score"], described["best"], described["interval"]) == (2 / 3, 1.0, part.interval())
