"""The benchmark compares like with like: the same weights and documents give both contestants the same loss."""

import json
from pathlib import Path

import pytest

from tests.launch import run_script


def test_contestants_do_the_same_work(easy_vqa_folder: Path, tmp_path: Path) -> None:
    arguments = ("--suite", "tiny", "--data", str(easy_vqa_folder), "--repeats", "1", "--out", "speed.jsonl")
    ended = run_script(tmp_path, "eval/speed.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    (result,) = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert result["first_loss"]["plain-llava"] == pytest.approx(result["first_loss"]["transformers"], rel=1e-5)
    assert result["real_tokens"] < result["padded_tokens"]
    assert all(value > 0 for kind in ("median_s", "peak_memory_bytes") for value in result[kind].values())
    assert {"device", "torch", "transformers", "commit"} <= result["environment"].keys()
    assert "real tokens/s" in ended.stdout
