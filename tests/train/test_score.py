"""The small Chinese recipes as they are shipped, two steps of each: all of them answer the same tests."""

import json
import shutil
from pathlib import Path

from tests.launch import ROOT, run_training

RECIPES = ("tiny_zh_lora", "tiny_zh_alone", "tiny_zh_plain")
RUNS = ("tiny-zh", "tiny-zh-alone", "tiny-zh-plain")
NUM_PICTURES = 4


def test_chinese_recipes_are_scored_beside_their_start(
    tiny_zh_folder: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """One line trains all three from the same model; the table shows it and each of them, in both languages."""
    runs = tmp_path / "runs"
    shutil.copytree(tiny_model_folder, runs / "tiny/final")
    for folder in (tiny_zh_folder, tiny_zh_folder.with_name("easy_vqa")):
        (runs / folder.name).mkdir()
        for file in folder.iterdir():
            (runs / folder.name / file.name).symlink_to(file)
        keep_first_pictures(runs / folder.name / "test.jsonl")
    files = [str(ROOT / f"train/configs/{recipe}.toml") for recipe in RECIPES]
    ended = run_training(tmp_path, 1, *files, "max_steps=2", "held_out=")
    assert ended.returncode == 0, ended.stderr
    starts = json.loads((runs / "tiny-zh/final/adapter_config.json").read_text(encoding="utf-8"))
    assert starts["base_model_name_or_path"] == "runs/tiny/final"
    models = ["runs/tiny/final", *(f"runs/{run}/final" for run in RUNS)]
    legend = "\n".join(f"[{number}] {model}" for number, model in enumerate(models, start=3))  # behind the two bars
    assert ended.stdout.count(f"\n{legend}\n") == 2
    for task in ("tiny_zh", "easy_vqa"):
        assert f"\n{task}: exact match, rule official" in ended.stdout
        for run in ("tiny", *RUNS):
            scores = json.loads((runs / run / f"eval/{task}/scores.json").read_text(encoding="utf-8"))
            assert scores["task"] == task
            assert scores["n"] >= NUM_PICTURES
    trained = {run: (runs / run / "final/adapter_model.safetensors").stat().st_size for run in RUNS}
    assert trained["tiny-zh"] == trained["tiny-zh-alone"] > trained["tiny-zh-plain"]


def keep_first_pictures(file: Path) -> None:
    """Leave in a file the questions about its first pictures only."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    images = list(dict.fromkeys(row["image"] for row in rows))[:NUM_PICTURES]
    file.unlink()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["image"] in images), encoding="utf-8")
