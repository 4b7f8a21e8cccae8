"""The benchmark compares like with like, and what it reports follows from what it measured."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.launch import run_script

CONTESTANTS = {
    "load": {
        "reading the files",
        "ours",
        "transformers",
        "ours, fp16 to bf16",
        "transformers, fp16 to bf16",
        "ours, official .bin",
        "ours, one rank of 8",
        "ours, 8 bits",
        "ours, 4 bits",
    },
    "generate": {
        "transformers",
        "transformers, static cache",
        "ours, bf16",
        "ours, bf16, compiled",
        "ours, 8 bits",
        "ours, 8 bits, compiled",
        "ours, 4 bits",
        "ours, 4 bits, compiled",
    },
}


@pytest.fixture(scope="module")
def measured(easy_vqa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What one run of all suites wrote, by suite, and what it printed."""
    folder = tmp_path_factory.mktemp("speed")
    arguments = ["--suite", "tiny,load,generate", "--size", "tiny", "--repeats", "1", "--device", "cpu"]
    arguments += ["--batch-sizes", "2", "--new-tokens", "4", "--data", str(easy_vqa_folder), "--out", "speed.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")  # it would take most of the time; test_generate.py compiles
        ended = run_script(folder, "eval/speed.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in (folder / "speed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [result["suite"] for result in results] == ["tiny", "load", "generate"]
    return {result["suite"]: result for result in results}, ended.stdout


def test_training_steps_do_the_same_work(measured: tuple[dict[str, Any], str]) -> None:
    result, printed = measured[0]["tiny"], measured[1]
    assert result["first_loss"]["plain-llava"] == pytest.approx(result["first_loss"]["transformers"], rel=1e-5)
    assert result["real_tokens"] < result["padded_tokens"]
    kinds = ("median_s", "peak_memory_bytes", "kept_for_backward_bytes", "operations")
    assert all(value > 0 for kind in kinds for value in result[kind].values())
    assert "real tokens/s" in printed


@pytest.mark.parametrize("suite", ["load", "generate"])
def test_every_contestant_is_measured(measured: tuple[dict[str, Any], str], suite: str) -> None:
    result, printed = measured[0][suite], measured[1]
    assert result["median"].keys() == result["ratio"].keys() == CONTESTANTS[suite]
    for name in CONTESTANTS[suite]:
        assert f"\n{name} " in printed
        figures = result["median"][name]
        # A process's memory may rise by nothing, and plain reading leaves no model behind.
        memory = {"private_peak_bytes", "file_pages_bytes", "model_bytes"}
        assert all(value >= 0 if key in memory else 0 < value < math.inf for key, value in figures.items())
        for figure, value in figures.items():
            low, high = result["spread"][name][figure]
            assert low <= value <= high
    assert {"device", "threads", "load_average", "torch", "transformers", "commit"} <= result["environment"].keys()
    for goal in result["goals"]:
        reached = goal["value"] <= goal["at_most"] if "at_most" in goal else goal["value"] >= goal["at_least"]
        assert goal["reached"] == reached
        assert goal["goal"] in printed


def test_loading_ratios_follow_from_the_medians(measured: tuple[dict[str, Any], str]) -> None:
    result = measured[0]["load"]
    median, ratio = result["median"], result["ratio"]
    for name, row in median.items():
        seconds = median["reading the files"]["touched_s"]
        assert ratio[name]["time_to_reading"] == pytest.approx(row["touched_s"] / seconds)
        peer = "transformers, fp16 to bf16" if "fp16" in name else "transformers"
        assert ratio[name]["time_to_transformers"] == pytest.approx(row["touched_s"] / median[peer]["touched_s"])
        assert row["loaded_s"] <= row["touched_s"]
    sizes = {name: row["model_bytes"] for name, row in median.items()}
    assert sizes["ours, 4 bits"] < sizes["ours, 8 bits"] < sizes["ours"] == sizes["ours, fp16 to bf16"]
    assert sizes["ours"] / 9 < sizes["ours, one rank of 8"] < sizes["ours"] / 7
    assert sizes["transformers"] == pytest.approx(sizes["ours"], rel=0.01)


def test_generation_ratios_follow_from_the_medians(measured: tuple[dict[str, Any], str]) -> None:
    result = measured[0]["generate"]
    median, peer = result["median"], result["median"]["transformers"]
    for name, row in median.items():
        ratio = result["ratio"][name]
        assert ratio["first_token_to_transformers"] == pytest.approx(row["first_token_s"] / peer["first_token_s"])
        decoded = row["decoded_tokens_per_s"]
        assert ratio["decode_to_transformers"] == pytest.approx(decoded / peer["decoded_tokens_per_s"])
        bytes_per_s = row["weights_per_step_bytes"] * decoded / result["batch"]
        assert ratio["share_of_bandwidth"] == pytest.approx(bytes_per_s / result["read_bandwidth_bytes_per_s"])
    steps = {name: row["weights_per_step_bytes"] for name, row in median.items()}
    assert steps["ours, 4 bits"] < steps["ours, 8 bits"] < steps["ours, bf16"] == steps["transformers"]


def test_contestants_answer_the_same(measured: tuple[dict[str, Any], str]) -> None:
    """The first token at least: bf16 rounds differently, and what follows another token is another answer."""
    result = measured[0]["generate"]
    assert result["agreeing_tokens"].keys() == {name for name in CONTESTANTS["generate"] if "bits" not in name}
    assert result["agreeing_tokens"]["transformers"] == result["new_tokens"]
    assert result["agreeing_tokens"]["ours, bf16"] >= 1


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "eval/speed.py", "--suite", "load,train")
    assert ended.returncode == 2
    assert "--suite train: expected one or several of tiny,load,generate" in ended.stderr
