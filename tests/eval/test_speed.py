"""The benchmark compares like with like, and what it reports follows from what it measured."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.speed_generate import count_new_tokens, count_step_bytes
from eval.speed_weights import SIZES
from model.quantize import pack_for_decoding, quantize_linears
from tests.launch import run_script
from tests.model.small_llava import make_llava

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
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What one run of the suites wrote, by suite, and what it printed; of generate batch 1, which has goals."""
    folder = tmp_path_factory.mktemp("speed")
    arguments = ["--suite", "load,generate", "--size", "tiny", "--repeats", "1", "--device", "cpu"]
    arguments += ["--batch-sizes", "2", "1", "--new-tokens", "4", "--out", "speed.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")  # it would take most of the time; test_generate.py compiles
        ended = run_script(folder, "eval/speed.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in (folder / "speed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [result["suite"] for result in results] == ["load", "generate", "generate"]
    assert [(result["batch"], bool(result["goals"])) for result in results[1:]] == [(2, False), (1, True)]
    return {result["suite"]: result for result in results}, ended.stdout


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
        bytes_per_s = row["read_per_step_bytes"] * decoded / result["batch"]
        assert ratio["share_of_bandwidth"] == pytest.approx(bytes_per_s / result["read_bandwidth_bytes_per_s"])
    steps = {name: row["weights_per_step_bytes"] for name, row in median.items()}
    assert steps["ours, 4 bits"] < steps["ours, 8 bits"] < steps["ours, bf16"] == steps["transformers"]
    text = SIZES["tiny"].text
    for name, row in median.items():
        numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_size
        num_tokens = result["prompt_tokens"] + result["new_tokens"] / 2
        itemsize = 4 if name.startswith("ours") else 2  # fp32 on a CPU, bf16
        caches = row["read_per_step_bytes"] - row["weights_per_step_bytes"]
        assert caches == result["batch"] * num_tokens * numbers * itemsize


def test_many_rows_answer_with_fewer_tokens_on_a_cpu() -> None:
    assert [count_new_tokens(64, batch, "cpu") for batch in (1, 8, 32, 1024)] == [64, 64, 16, 2]
    assert count_new_tokens(64, 32, "cuda") == 64


def test_packed_weights_are_counted_once() -> None:
    """What a step of few rows reads, though for many rows another layout may lie beside it."""
    model = make_llava().bfloat16()
    quantize_linears(model, 4)
    pack_for_decoding(model)
    llama = model.language_model
    packed = sum(tensor.nbytes for name, tensor in llama.named_parameters() if "packed_" in name)
    others = sum(tensor.nbytes for name, tensor in llama.named_parameters() if "norm" in name or "lm_head" in name)
    assert count_step_bytes(llama) == packed + others


def test_contestants_answer_the_same(measured: tuple[dict[str, Any], str]) -> None:
    """The first token at least: bf16 rounds differently, and what follows another token is another answer."""
    result = measured[0]["generate"]
    assert result["agreeing_tokens"].keys() == {name for name in CONTESTANTS["generate"] if "bits" not in name}
    assert result["agreeing_tokens"]["transformers"] == result["new_tokens"]
    assert result["agreeing_tokens"]["ours, bf16"] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["load,tests"], "--suite tests: expected one or several of train,generate"),
        (["train", "--documents", "0"], "--documents 0: expected at least 1"),
        (["generate", "--batch-sizes", "1", "-8"], "--batch-sizes -8: expected at least 1"),
        (["generate", "--new-tokens", "1"], "--new-tokens 1: expected at least 2"),
        (["growth", "--rows", "3"], "--rows 3: expected at least 8"),
        (["data", "--tokenizer", "nowhere"], "--tokenizer nowhere: expected a file"),
        (["load", "--checkpoint-dir", "taken"], "--checkpoint-dir taken: expected a folder"),
        pytest.param(
            ["load", "--device", "cuda"],
            "--device cuda: this PyTorch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is wrong"),
        ),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "taken").touch()
    ended = run_script(tmp_path, "eval/speed.py", "--suite", *arguments)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("{broken\n", encoding="utf-8")
    ended = run_script(tmp_path, "eval/speed.py", "--table", "--out", "other.jsonl")
    assert ended.returncode == 1
    assert "error: other.jsonl holds something else" in ended.stderr
    assert "Traceback" not in ended.stderr
