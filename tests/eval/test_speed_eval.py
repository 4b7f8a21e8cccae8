"""The eval suite asks all contestants the same, and what it reports follows from what it measured."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval import speed_eval
from eval.speed_eval import ALONE, BATCHED, PEER, WordTokenizer, Workload, count_operations, list_goals, make_questions
from eval.speed_weights import SIZES
from tests.launch import run_script


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What one run wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("speed")
    arguments = ["--suite", "eval", "--size", "tiny", "--repeats", "1", "--device", "cpu", "--dtype", "float32"]
    ended = run_script(
        folder, "eval/speed.py", *arguments, "--questions", "13", "--rows-at-once", "4", "--out", "speed.jsonl"
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = (folder / "speed.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(line), ended.stdout


def test_every_contestant_gives_the_same_answers(measured: tuple[dict[str, Any], str]) -> None:
    """In fp32, 13 of 13."""
    result, printed = measured
    assert result["agreeing_answers"] == {
        name: {"as transformers": 1, "as one by one": 1} for name in (PEER, ALONE, BATCHED)
    }
    for name in (PEER, ALONE, BATCHED):
        assert f"\n{name} " in printed
    assert {goal["goal"] for goal in result["goals"] if goal["reached"]} == {
        f"{BATCHED}: answers as transformers",
        f"{BATCHED}: answers as one by one",
    }


def test_ratios_follow_from_the_medians(measured: tuple[dict[str, Any], str]) -> None:
    result = measured[0]
    speeds = {name: row["questions_per_s"] for name, row in result["median"].items()}
    assert min(speeds.values()) > 0
    for name, ratio in result["ratio"].items():
        assert ratio["questions_to_transformers"] == pytest.approx(speeds[name] / speeds[PEER])
    assert (result["questions"], result["pictures"], result["batch"], result["new_tokens"]) == (13, 3, 4, 3)
    assert {"device", "threads", "torch", "transformers", "commit"} <= result["environment"].keys()


def test_questions_are_like_vqa_v2s() -> None:
    questions, pictures = make_questions(270)
    assert len(questions) == len({question.text for question in questions}) == 270
    assert len(pictures) == 50  # 5.4 to each
    assert [sum(question.image == name for question in questions) for name in list(pictures)[:5]] == [5, 5, 6, 5, 6]
    assert questions == make_questions(270)[0]
    sizes = [len(jpeg) for jpeg in pictures.values()]
    assert 40_000 < min(sizes) < max(sizes) < 300_000
    assert len(set(pictures.values())) == 50
    with Image.open(io.BytesIO(pictures["0.jpg"])) as picture:
        assert (picture.format, picture.size) == ("JPEG", (640, 480))
    tokenizer = WordTokenizer(32000)
    lengths = [len(tokenizer.encode(question.text)) for question in questions]
    assert 17 <= min(lengths) < max(lengths) <= 23  # 5 to 11 words, "?" and the 11 of the suffix


def test_operations_by_hand() -> None:
    """Two questions about one picture: the tower and the trunk are shared, and with them nearly everything."""
    config = SIZES["7b"]
    questions, pictures = make_questions(2)
    work = Workload(Path(), config, questions, pictures, "cpu", torch.float32, 4)
    operations = count_operations(work)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # of the language model's layers
    tower = 2 * 23 * (4 * 1024**2 + 2 * 1024 * 4096) * 577
    trunk, prompts = 36 + 576, [len(speed_eval.render(q, work, WordTokenizer(32000))) for q in questions]
    rest = sum(prompts) - 2 * trunk + 2 * 2
    head = 2 * 32000 * 4096 * 3 * 2
    alone = 2 * tower + 2 * weights * (sum(prompts) + 2 * 2) + head
    shared = tower + 2 * weights * (trunk + rest) + head
    # Attention comes on top: 1 to 3 % here.
    assert 1 < operations["one by one"] / alone < 1.05
    assert 1 < operations["shared"] / shared < 1.05


def test_goals_are_of_one_size_and_exactness_of_fp32() -> None:
    ratio, agreeing = {"questions_to_transformers": 6.0}, {"as transformers": 0.9, "as one by one": 1.0}
    (goal,) = list_goals(ratio, agreeing, "cpu", "1b", "bfloat16")
    assert (goal["at_least"], goal["reached"]) == (5.0, True)
    (goal,) = list_goals(ratio, agreeing, "cuda", "7b", "bfloat16")
    assert (goal["at_least"], goal["reached"]) == (20.0, False)
    assert list_goals(ratio, agreeing, "cuda", "1b", "bfloat16") == []
    assert [goal["reached"] for goal in list_goals(ratio, agreeing, "cpu", "1b", "float32")] == [True, False, True]
