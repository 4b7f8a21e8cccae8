"""Both ways of loading do the same, what is made looks like what it stands for, and reports follow from it."""

import json
import mmap
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from eval.measure import run_in_new_process
from eval.speed_data import count_workers, list_goals, measure_memory
from eval.speed_data_files import TINY, make_conversation, make_files, make_picture
from eval.speed_data_loading import (
    NUM_COMPARED,
    OFFICIAL,
    OURS,
    OURS_ALONE,
    OURS_FEATURES,
    OURS_SHARDS,
    OfficialLoader,
    compare_rows,
    official_loader,
    open_steps,
)
from eval.speed_data_wait import NUM_WORKERS, WITH, WITHOUT, train
from tests.launch import ROOT, run_script

GIVEN = {
    OURS: {"samples_per_s": 8.0},
    OURS_ALONE: {"samples_per_s": 12.0},
    OFFICIAL: {"samples_per_s": 10.0},
    OURS_SHARDS: {"samples_per_s": 14.0},
    WITH: {"wait_share": 0.001, "highest_wait_share": 0.06},
    "again": {"opened_s": 4.0, "rank_private_bytes": 1.5e9, "worker_private_bytes": 0.2e9},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed_data")
    shutil.copyfile(ROOT / "data/tiny/tokenizer.model", folder / "tokenizer.model")
    make_files(folder, TINY, num_rows=TINY.rows)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a run wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["--suite", "data", "--size", "tiny", "--repeats", "1", "--rows", "77", "--out", "speed.jsonl"]
    ended = run_script(folder, "eval/speed.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    (line,) = (folder / "speed.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(line), ended.stdout


def test_suite_writes_what_it_prints(measured: tuple[dict[str, Any], str]) -> None:
    result, printed = measured
    assert (result["suite"], result["sizes"]["rows"], result["repeats"]) == ("data", 77, 1)
    assert result["vocab_size"] == 768
    loaders = {OURS, OURS_ALONE, OFFICIAL, OURS_SHARDS, OURS_FEATURES}
    others = {WITHOUT, WITH, "preparing coco", "preparing visual_genome", "checking", "the first time", "again"}
    assert result["median"].keys() == result["spread"].keys() == loaders | others
    for name, figures in result["median"].items():
        assert f"\n{name} " in printed
        for figure, value in figures.items():
            low, high = result["spread"][name][figure]
            assert low <= value <= high
            assert value > 0 or figure == "private_peak_bytes"
    assert result["median"][WITHOUT]["wait_share"] > 0.001  # a step's pictures are opened in it
    speed = {name: result["median"][name]["samples_per_s"] for name in loaders}
    assert result["ratio"] == {name: speed[name] / speed[OFFICIAL] for name in loaders}
    assert result["feeding"]["13B LoRA"]["workers_per_gpu"] == pytest.approx(16 / 6.9 / speed[OURS])
    assert result["goals"] == list_goals(result["median"])
    assert {"device", "load_average", "commit"} <= result["environment"].keys()


def test_both_ways_give_the_same(folder: Path) -> None:
    """Conversations of several turns, cut ones left out, with pictures and without."""
    dataset = open_steps(OURS_ALONE, folder).dataset
    assert {dataset.image(number) is None for number in range(len(dataset))} == {True, False}
    assert max(len(dataset.rows[number]["conversations"]) for number in range(NUM_COMPARED)) > 4
    compare_rows(folder)


def spoil_ids(official: OfficialLoader, row: dict) -> tuple[list[int], list[int]]:
    input_ids, labels = render(official, row)
    return [*input_ids[:-2], 7, input_ids[-1]], labels


def spoil_labels(official: OfficialLoader, row: dict) -> tuple[list[int], list[int]]:
    input_ids, labels = render(official, row)
    return input_ids, [*labels[:-1], IGNORE_INDEX]


def spoil_pixels(official: OfficialLoader, name: str) -> torch.Tensor:
    return load_pixels(official, name) + 1e-6


render, load_pixels = OfficialLoader.render, OfficialLoader.load_pixels


@pytest.mark.parametrize(
    ("method", "spoil", "what"),
    [("render", spoil_ids, "ids"), ("render", spoil_labels, "labels"), ("load_pixels", spoil_pixels, "pixels")],
)
def test_a_difference_stops_the_suite(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, spoil: Callable[..., object], what: str
) -> None:
    monkeypatch.setattr(OfficialLoader, method, spoil)
    with pytest.raises(AssertionError, match=f"row 0: other {what}"):
        compare_rows(folder)


def test_official_batch_is_padded_to_its_longest_row(folder: Path) -> None:
    official = OfficialLoader(folder)
    without = next(number for number, row in enumerate(official.rows) if "image" not in row)
    input_ids, labels, mask, pixels = official.load_batch([0, without, 1])
    lengths = [len(official.render(official.rows[number])[0]) for number in (0, without, 1)]
    assert mask.sum(dim=1).tolist() == lengths
    assert input_ids.shape == labels.shape == (3, max(lengths))
    assert (input_ids[~mask] == 0).all()
    assert (labels[~mask] == IGNORE_INDEX).all()
    assert (input_ids == IMAGE_TOKEN_ID).sum(dim=1).tolist() == [1, 0, 1]
    assert pixels.shape == (3, 3, 336, 336)
    assert [bool(picture.any()) for picture in pixels] == [True, False, True]


def test_the_only_rank_reads_the_rows_that_the_official_way_reads(folder: Path) -> None:
    """Where none is cut, they count the same tokens."""
    steps, make_share = open_steps(OURS_ALONE, folder), official_loader(folder)
    counts = {step: make_share(step) for step in range(3)}
    ours = {step: steps[step] for step in counts}
    whole = [step for step in ours if ours[step].num_cut == 0]
    assert whole
    for step in whole:
        assert counts[step] == (16, ours[step].num_tokens)


def test_every_rank_of_eight_gets_its_sixteenth(folder: Path) -> None:
    share = open_steps(OURS, folder)[0]
    assert share.num_documents == 128
    assert 12 <= sum(len(batch.rows) for batch in share.micro_batches) <= 20


def test_features_and_shards_take_the_pictures_place(folder: Path) -> None:
    encoded, packed = (open_steps(name, folder)[0].micro_batches[0] for name in (OURS_FEATURES, OURS_SHARDS))
    assert encoded.pixel_values is None
    assert encoded.patch_features is not None
    assert encoded.patch_features.shape[1:] == (576, 1024)
    assert encoded.patch_features.dtype == torch.bfloat16
    plain, tarred = (open_steps(name, folder).dataset for name in (OURS, OURS_SHARDS))
    assert tarred.pictures.shards is not None
    assert len(tarred.pictures.shards.files) > 1
    for number in range(3):
        ours, theirs = plain.load_picture(number), tarred.load_picture(number)
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    assert packed.pixel_values is not None


def test_workers_are_counted() -> None:
    """By hand: 16 rows in 4 s are 4 rows/s, half of what a process makes; 8 x 16 rows of 800 tokens in 4 s."""
    assert count_workers(4.0, samples_per_s=8.0) == {
        "step_s": 4.0,
        "eaten_tokens_per_s": 25_600,
        "workers_per_gpu": 0.5,
        "busy_cores": 4.0,
        "cores": 8,
    }


def test_goals_follow_from_the_medians() -> None:
    goals = {goal["goal"]: (round(goal["value"], 4), goal["reached"]) for goal in list_goals(GIVEN)}
    assert goals == {
        "13B LoRA: loader workers that a GPU needs": (round(16 / 6.9 / 8, 4), True),
        "7B LoRA: loader workers that a GPU needs": (round(16 / 3.7 / 8, 4), True),
        "ours, 1 of 8 ranks: x the official way's samples/s": (0.8, False),
        "ours, the only rank: x the official way's samples/s": (1.2, False),
        "ours, tar shards: x the official way's samples/s": (1.4, True),
        "training with 4 workers: share of a step that waits": (0.001, True),
        "training with 4 workers: the same, the step that waits most": (0.06, False),
        "seconds of opening again": (4.0, True),
        "MB that a rank has alone": (1500.0, False),
        "MB that a worker has alone": (200.0, True),
    }
    slow = GIVEN | {OURS: {"samples_per_s": 0.5}, WITH: {"wait_share": 0.011, "highest_wait_share": 0.04}}
    assert [goal["reached"] for goal in list_goals(slow)[:2]] == [False, False]
    assert [goal["reached"] for goal in list_goals(slow)[5:7]] == [False, True]


def test_pictures_are_files_like_photos(tmp_path: Path) -> None:
    picture = make_picture(640, 480, np.random.default_rng(1))
    assert picture.size == (640, 480)
    picture.save(tmp_path / "picture.jpg", quality=90)
    assert 120_000 < (tmp_path / "picture.jpg").stat().st_size < 180_000


def test_conversations_have_their_words() -> None:
    generator = np.random.default_rng(2)
    for has_image in (True, False):
        turns = make_conversation(100, has_image, generator)
        words = [turn["value"].removeprefix("<image>\n").split() for turn in turns]
        assert sum(map(len, words)) == pytest.approx(100, abs=4)
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].count("<image>") for turn in turns] == [int(has_image)] + [0] * (len(turns) - 1)


def fill_memory(num_bytes: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return what is measured before and after so many bytes are written to."""
    with mmap.mmap(-1, num_bytes) as filled:  # not of the heap, which has room that others left
        before = measure_memory()
        for place in range(0, num_bytes, mmap.PAGESIZE):
            filled[place] = 1
        return before, measure_memory()


def test_memory_that_is_filled_is_seen() -> None:
    """In a process of its own: this one's other tests may be giving memory back."""
    num_bytes = 50_000_000
    before, after = run_in_new_process(fill_memory, num_bytes)
    for figure in ("private_bytes", "pss_bytes"):
        assert after[figure] - before[figure] == pytest.approx(num_bytes, rel=0.1)


def test_workers_of_the_measurement_are_those_of_the_recipes() -> None:
    files = (ROOT / "train/configs").glob("llava_*.toml")
    assert {tomllib.loads(file.read_text(encoding="utf-8"))["num_workers"] for file in files} == {NUM_WORKERS}


def test_waiting_is_read_from_the_metrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: of six steps the first two are left out; half of a second waited in steps of five and ten."""

    def write_metrics(command: list[str], cwd: str, **_: object) -> subprocess.CompletedProcess:
        waits_s, steps_s = (9.0, 8.0, 0.5, 0.5, 0.5, 0.5), (10.0, 10.0, 5.0, 10.0, 10.0, 10.0)
        rows = [
            {"step": number, "loss": 1.0, "data_wait_s": wait_s, "step_s": step_s}
            for number, (wait_s, step_s) in enumerate(zip(waits_s, steps_s, strict=True), start=1)
        ]
        run = Path(cwd) / "runs/waiting"
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = tomllib.loads((Path(cwd) / command[-1]).read_text(encoding="utf-8"))
        assert settings["num_workers"] == 3
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", write_metrics)
    figures = train(3, folder, num_steps=6)
    assert figures["first_wait_s"] == 9
    assert figures["wait_s"] == 0.5
    assert figures["wait_share"] == 0.05
    assert figures["highest_wait_share"] == 0.1
    assert figures["trained_step_s"] == 10


def test_a_training_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rows\.json is missing|model"):
        train(0, tmp_path, num_steps=1)
