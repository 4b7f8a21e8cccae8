"""Training on what was encoded ahead: the same losses, and no vision tower."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.dataset import RenderOptions
from data.features import feature_key
from data.runs import read_metrics
from model.config import CONFIGS
from model.llava import Llava, initialize_weights
from model.weights import load_llava, save_llava
from tests.conftest import ROOT, TINY_TOKENIZER
from tests.launch import environment, run_training
from train.config import make_config
from train.stage import build_objective, open_stores
from train.start import open_start

IMAGES = "images"  # beside the data file
SETTINGS = {
    "name": "short",
    "train": "full",
    "data": "rows.json",
    "held_out": "few.json",
    "image_folder": IMAGES,
    "branched": True,
    "max_tokens": 200,
    "micro_batch_tokens": 600,
    "batch_size": 8,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "dtype": "float32",
}


def encode(workplace: Path, model: Path, file: str) -> None:
    """Run the command a user would run."""
    command = [sys.executable, "-m", "data.features", str(workplace / file), "--images", str(workplace / IMAGES)]
    command += ["--model-path", str(model), "--out", str(workplace / f"{file}.features"), "--branched"]
    command += ["--max-tokens", "200", "--workers", "1"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def workplace(easy_vqa_folder: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 16 rows about pictures and 8 without any, encoded ahead, and a stage's file."""
    folder = tmp_path_factory.mktemp("encoded")
    rows = json.loads((easy_vqa_folder / "vqa_train.json").read_text(encoding="utf-8"))[:16]
    texts = json.loads((easy_vqa_folder / "text_train.json").read_text(encoding="utf-8"))
    rows += [row for row in texts if "template" not in row][:8]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "few.json").write_text(json.dumps(rows[:4]), encoding="utf-8")
    (folder / IMAGES).symlink_to(easy_vqa_folder / "images")
    for file in ("rows.json", "few.json"):
        encode(folder, tiny_model_folder, file)
    settings = {**SETTINGS, "model": str(tiny_model_folder)}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "short.toml").write_text(text, encoding="utf-8")
    return folder


def train(workplace: Path, name: str, *changes: str) -> list[dict]:
    """Return the metrics of a short run of two ranks."""
    finished = run_training(workplace, 2, "short.toml", f"name={name}", *changes)
    assert finished.returncode == 0, finished.stderr
    return read_metrics(workplace / "runs" / name / "metrics.jsonl")


def test_losses_are_those_of_encoding_on_the_way(workplace: Path, tiny_model_folder: Path) -> None:
    """Features are rounded to bf16, which moves losses by 7e-6 here; some micro-batches are text alone."""
    ahead = train(workplace, "ahead", "features=rows.json.features", "held_out_features=few.json.features")
    pixels = train(workplace, "pixels")
    for one, other in zip(ahead, pixels, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-4)
        assert (one["tokens"], one["supervised_tokens"]) == (other["tokens"], other["supervised_tokens"])
    assert ahead[-1]["held_out_loss"] == pytest.approx(pixels[-1]["held_out_loss"], rel=5e-5)
    finals = [load_llava(workplace / f"runs/{name}/final").state_dict() for name in ("ahead", "pixels")]
    before = load_llava(tiny_model_folder).state_dict()
    for name, tensor in finals[0].items():
        torch.testing.assert_close(tensor, finals[1][name], rtol=0, atol=2e-3, msg=name)
        assert torch.equal(tensor, before[name]) == name.startswith("vision_tower."), name


def test_features_of_another_model_or_file_are_refused(workplace: Path, tiny_model_folder: Path) -> None:
    """They would be learned from without a sign that anything is wrong."""
    llava = Llava(CONFIGS["tiny"])
    initialize_weights(llava, 0.09, seed=8)
    save_llava(workplace / "other", llava.config, llava.state_dict(), TINY_TOKENIZER)
    options = RenderOptions(tokens_per_image=64, image_size=64, branched=True, max_tokens=200)
    folder, rows = workplace / "rows.json.features", workplace / "rows.json"

    def open_with(model: Path, file: Path, options: RenderOptions) -> None:
        config = make_config({"name": "x", "train": "full", "data": str(file), "model": str(model)}, "the test")
        start = open_start(config, None)
        key = feature_key(start.tensors, start.config.vision, options.aspect)
        open_stores(folder, key, file, start.tokenizer, options)

    open_with(tiny_model_folder, rows, options)
    for model, file, change, message in (
        (workplace / "other", rows, {}, "tower is"),
        (tiny_model_folder, rows, {"max_tokens": 210}, "max_tokens is 200 there, 210 here"),
        (tiny_model_folder, rows, {"aspect": "square"}, "aspect is 'pad' there, 'square' here"),
        (tiny_model_folder, workplace / "few.json", {}, "data is"),
    ):
        with pytest.raises(ValueError, match=rf"rows\.json\.features was made otherwise: {message}"):
            open_with(model, file, replace(options, **change))


def test_the_objective_has_no_tower() -> None:
    config = make_config({"name": "x", "data": "x.json", "train": "lora", "features": "f"}, "the test")
    llava, objective = build_objective(config, CONFIGS["tiny"])
    assert not [name for name, _ in llava.named_parameters() if name.startswith("vision_tower")]
    assert len(objective.blocks()) == 2 + CONFIGS["tiny"].text.num_hidden_layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "full", "vision_learning_rate": 1e-5}, "features come from a frozen tower"),
        ({"train": "vision"}, "features come from a frozen tower, train = 'vision' does not have one"),
        ({"train": "lora", "augment_pixels": 2}, "augment_pixels = 2 changes pictures"),
        ({"train": "lora", "held_out": "h.json"}, "features and held_out_features go together"),
        ({"train": "lora", "features": "", "held_out": "h.json", "held_out_features": "f"}, "go together"),
    ],
)
def test_settings_that_do_not_go_with_features(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config({"name": "x", "data": "x.json", "features": "f", **changes}, "the test")
