"""The official recipe in miniature: from a bare language model and CLIP to a projector to an adapter."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.llava import Llava, initialize_weights
from model.weights import load_llava
from tests.conftest import TINY_TOKENIZER
from tests.launch import run_training
from tests.model.checkpoints import CONFIG, write_clip, write_vicuna

LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8, "template": "vicuna_v1", "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def workplace(easy_vqa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, a CLIP, data, and the files of two stages; both stages have been run."""
    folder = tmp_path_factory.mktemp("recipe")
    llava = Llava(replace(CONFIG, text=replace(CONFIG.text, vocab_size=768)))
    initialize_weights(llava, 0.09, seed=1)
    write_vicuna(folder / "vicuna", llava.half(), TINY_TOKENIZER)
    write_clip(folder / "clip", llava)
    rows = json.loads((easy_vqa_folder / "captions_train.json").read_text(encoding="utf-8"))[:16]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    both = {"data": "rows.json", "image_folder": str(easy_vqa_folder / "images"), "max_tokens": 120,
            "batch_size": 4, "max_steps": 3, "save_every": 2, "dtype": "float32"}  # fmt: skip
    first = {"name": "pretrain", "train": "projector", "model": "vicuna", "vision_tower": "clip", "template": "plain"}
    for name, settings in (("first", first), ("second", {"name": "tuned"} | LORA)):
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {**both, **settings}.items())
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    finished = run_training(folder, 1, "first.toml", "second.toml")
    assert finished.returncode == 0, finished.stderr
    return folder


def test_stage_1_starts_from_a_bare_language_model(workplace: Path) -> None:
    """All but its projector is what the files of LLaMA and CLIP hold."""
    final = load_llava(workplace / "runs/pretrain/final")
    checkpoint = load_llava(
        workplace / "runs/pretrain/checkpoints/step-000002", base=workplace / "vicuna", vision_tower=workplace / "clip"
    )
    assert final.config.chat_template != "plain"
    for name, tensor in checkpoint.state_dict().items():
        changed = name.startswith("projector.")
        assert torch.equal(tensor.float(), final.state_dict()[name]) != changed, name


def test_a_bare_language_model_is_no_start_for_other_stages(workplace: Path) -> None:
    refused = run_training(workplace, 1, "second.toml", "name=third", "model=vicuna", "vision_tower=clip")
    assert refused.returncode != 0
    assert "a language model alone is no LLaVA" in refused.stderr


def test_stage_2_goes_on_from_stage_1(workplace: Path) -> None:
    """Its adapter names the model it belongs to, and a stage after it finds both."""
    settings = json.loads((workplace / "runs/tuned/final/adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "runs/pretrain/final"
    base = workplace / "runs/pretrain/final"
    base_weights = load_llava(base).state_dict()
    tuned = load_llava(workplace / "runs/tuned/final", base=base).state_dict()
    for name, tensor in tuned.items():
        is_tuned = name.startswith("projector.") or (name.endswith("_proj.weight") and "language_model" in name)
        assert torch.equal(tensor, base_weights[name]) != is_tuned, name


def test_a_stage_after_lora_starts_from_the_merged_model(workplace: Path) -> None:
    lines = (workplace / "second.toml").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith(("name", "train", "lora", "learning_rate"))]
    lines += ['name = "full"', 'train = "full"', "learning_rate = 1e-30"]
    (workplace / "third.toml").write_text("\n".join(lines), encoding="utf-8")
    finished = run_training(workplace, 1, "first.toml", "second.toml", "third.toml")
    assert finished.returncode == 0, finished.stderr
    full = load_llava(workplace / "runs/full/final").state_dict()
    tuned = load_llava(workplace / "runs/tuned/final", base=workplace / "runs/pretrain/final").state_dict()
    for name, tensor in full.items():
        torch.testing.assert_close(tensor, tuned[name], rtol=0, atol=1e-6, msg=name)
