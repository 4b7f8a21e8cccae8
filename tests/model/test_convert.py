"""Writers: what we write is read by transformers and PEFT, gives our logits, and comes back bit for bit."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import PeftModel
from PIL import Image
from torch import Tensor

from data.conversation import Turn, render_conversation
from data.image import preprocess_image
from data.tokenizer import Tokenizer
from model.adapter_files import load_adapter
from model.convert import export, export_peft
from model.files import open_folder
from model.llava import Llava
from model.weights import load_llava, open_checkpoint, save_llava
from tests.conftest import ROOT, TINY_TOKENIZER
from tests.model.checkpoints import (
    CONFIG,
    make_model,
    make_peft_model,
    official_names,
    our_logits,
    their_logits,
    write_clip,
    write_hf,
    write_official,
    write_official_lora,
)
from tests.model.small_llava import relative_difference

TOLERANCE = 3e-6  # fp32; measured: at most 8e-7


@pytest.fixture(scope="module")
def llava() -> Llava:
    return make_model(seed=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, llava: Llava) -> Path:
    folder = tmp_path_factory.mktemp("own") / "final"
    save_llava(folder, CONFIG, llava.state_dict(), TINY_TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, llava: Llava) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip", llava)


def load_strictly(folder: Path) -> Any:
    """Load with transformers; a tensor that is missing or left over is an error."""
    loaded: Any = hf.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.load() for name, tensor in open_folder(folder).items()}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("shard_bytes", [50_000, 5_000_000_000])
def test_transformers_loads_what_we_write(tmp_path: Path, llava: Llava, own: Path, shard_bytes: int) -> None:
    export(open_checkpoint(own), "hf", tmp_path / "hf", shard_bytes)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard_bytes == 50_000)
    theirs = their_logits(load_strictly(tmp_path / "hf"))
    assert theirs.shape[-1] == 192  # 131 words, <image>, <pad>, rounded up to a multiple of 64
    assert relative_difference(our_logits(llava), theirs[..., :131]) < TOLERANCE
    assert relative_difference(our_logits(load_llava(tmp_path / "hf")), theirs) < TOLERANCE
    # The mean row: its logit is the mean of all, so that no padding row can ever be the likeliest.
    assert torch.allclose(theirs[..., 131:], theirs[..., :131].mean(-1, keepdim=True).expand(-1, -1, 61), atol=1e-5)


def test_the_processor_we_write_gives_our_pixels_and_ids(tmp_path: Path) -> None:
    """Official ids and padding to a square, which llava-hf's own processor does not give."""
    tokenizer = Tokenizer(TINY_TOKENIZER)
    config = replace(CONFIG, text=replace(CONFIG.text, vocab_size=tokenizer.vocab_size))
    save_llava(tmp_path / "own", config, Llava(config).half().state_dict(), TINY_TOKENIZER)
    export(open_checkpoint(tmp_path / "own"), "hf", tmp_path / "hf")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "hf")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What shape is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]},
        {"role": "user", "content": [{"type": "text", "text": "\u5b83\u662f\u7ea2\u8272\u7684 \U0001f600"}]},
    ]
    inputs = processor(
        images=picture, text=processor.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt"
    )
    assert torch.equal(inputs["pixel_values"][0], preprocess_image(picture, CONFIG.vision.image_size))
    turns = [
        Turn("human", "What shape is this?", has_image=True), Turn("gpt", "A circle."),
        Turn("human", "\u5b83\u662f\u7ea2\u8272\u7684 \U0001f600"),
    ]  # fmt: skip
    rendered = render_conversation(turns, tokenizer, CONFIG.vision.num_patches)
    ours = [tokenizer.vocab_size if token < 0 else token for token in rendered.input_ids]
    assert inputs["input_ids"][0].tolist() == ours


def test_official_to_ours_to_official_is_identical(tmp_path: Path) -> None:
    model = make_model(seed=4)
    folder = write_official(tmp_path / "model", model, "openai/clip-vit-large-patch14-336", True, TINY_TOKENIZER)
    export(open_checkpoint(folder), "official", tmp_path / "again", shard_bytes=50_000)
    assert_identical(read_tensors(tmp_path / "again"), official_names(model, with_tower=True))
    values = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Where the tower's weights are inside, the official code has to be told; it calls its own type llava_llama today.
    changed = {"unfreeze_mm_vision_tower": True, "model_type": "llava_llama"}
    assert {**{name: before[name] for name in before.keys() & values.keys()}, **changed} == {
        name: values[name] for name in before.keys() & values.keys()
    }
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == TINY_TOKENIZER.read_bytes()


@pytest.mark.parametrize("names", ["disk", "hub"])
def test_hugging_face_to_ours_to_hugging_face_is_identical(tmp_path: Path, names: str) -> None:
    """Its padding rows are kept as they are, not made anew."""
    model = make_model(seed=4)
    folder = write_hf(tmp_path / "model", model, 61, names)
    (folder / "tokenizer.model").write_bytes(TINY_TOKENIZER.read_bytes())
    export(open_checkpoint(folder), "hf", tmp_path / "again")
    before = {name.replace("vision_model.", ""): tensor for name, tensor in read_tensors(folder).items()}
    after = {name.replace("vision_model.", ""): tensor for name, tensor in read_tensors(tmp_path / "again").items()}
    assert_identical(after, before)


@pytest.mark.parametrize("way", [["hf", "official"], ["official", "hf", "official"], ["hf", "hf", "official", "hf"]])
def test_any_way_through_the_layouts_changes_nothing(tmp_path: Path, llava: Llava, own: Path, way: list[Any]) -> None:
    folder = own
    for number, layout in enumerate(way):
        export(open_checkpoint(folder), layout, tmp_path / str(number))
        folder = tmp_path / str(number)
    loaded = load_llava(folder)
    expected = llava.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor[: len(expected[name])], expected[name]), name
    assert loaded.config.vision == CONFIG.vision
    assert loaded.config.text.num_words == CONFIG.text.vocab_size


def test_peft_loads_the_adapter_we_write(tmp_path: Path, llava: Llava, clip: Path) -> None:
    """From the official pair of .bin files to PEFT: the projector rides along, the vision tower is left alone."""
    write_official_lora(tmp_path / "lora", llava, str(clip))
    base = write_hf(tmp_path / "base", llava, 5, "disk")
    export_peft(load_adapter(tmp_path / "lora"), str(base), tmp_path / "peft")
    adapted = PeftModel.from_pretrained(load_strictly(base), tmp_path / "peft").eval()
    theirs = their_logits(adapted)
    merged = load_llava(base, adapter=tmp_path / "lora")
    assert relative_difference(our_logits(merged), theirs) < TOLERANCE
    assert relative_difference(our_logits(load_llava(base)), theirs) > 0.05
    assert not [name for name, _ in adapted.named_modules() if "vision_tower" in name and name.endswith("lora_A")]
    # And back: ours reads its own.
    assert torch.equal(our_logits(load_llava(base, adapter=tmp_path / "peft")), our_logits(merged))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "modules_to_save": None},
        {"rank_pattern": {"mlp.up_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 9}},
    ],
    ids=["plain", "rsLoRA", "patterns"],
)
def test_peft_to_ours_to_peft_is_identical(tmp_path: Path, llava: Llava, changes: dict[str, Any]) -> None:
    adapted = make_peft_model(llava, 5, **changes)
    adapted.save_pretrained(tmp_path / "before")
    export_peft(load_adapter(tmp_path / "before"), None, tmp_path / "after")
    before, after = (read_adapter(folder) for folder in (tmp_path / "before", tmp_path / "after"))
    assert_identical(after, before)
    base = write_hf(tmp_path / "base", llava, 5, "disk")
    theirs = their_logits(PeftModel.from_pretrained(load_strictly(base), tmp_path / "after").eval())
    assert relative_difference(theirs, their_logits(adapted)) < 1e-6


def read_adapter(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", ["hf", "official"])
def test_merged_model_answers_as_the_adapter_does(tmp_path: Path, llava: Llava, clip: Path, layout: Any) -> None:
    write_official_lora(tmp_path / "lora", llava, str(clip))
    base = write_official(tmp_path / "base", llava, str(clip), False, TINY_TOKENIZER)
    export(open_checkpoint(tmp_path / "lora", base=base), layout, tmp_path / "merged")
    expected = our_logits(load_llava(base, adapter=tmp_path / "lora"))
    assert torch.equal(our_logits(load_llava(tmp_path / "merged"))[..., :131], expected)


def test_an_adapter_that_learned_nothing_is_refused(tmp_path: Path, llava: Llava) -> None:
    """Under some shardings the matrices are saved as zeros (LLaVA#1734): the model is the base, and nobody sees it."""
    adapted = make_peft_model(llava, 5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    adapted.save_pretrained(tmp_path / "lora")
    base = write_hf(tmp_path / "base", llava, 5, "disk")
    with pytest.raises(ValueError, match="every lora_B is zero"):
        export_peft(load_adapter(tmp_path / "lora"), None, tmp_path / "peft")
    with pytest.raises(ValueError, match="every lora_B is zero"):
        export(open_checkpoint(tmp_path / "lora", base=base), "hf", tmp_path / "merged")
    assert not (tmp_path / "peft").exists()


def test_a_write_that_reads_back_wrong_is_an_error(tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    def save_wrongly(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        damaged = {name: tensor.clone() for name, tensor in tensors.items()}
        name = next(name for name in damaged if name.endswith("norm.weight"))
        damaged[name][3] += 1
        save_file(damaged, file, metadata=metadata)

    monkeypatch.setattr("model.files.save_file", save_wrongly)
    with pytest.raises(OSError, match="reads back otherwise than it was written"):
        export(open_checkpoint(own), "hf", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "model.convert", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_command(tmp_path: Path, llava: Llava, own: Path) -> None:
    done = run_command(str(own), "--to", "hf", "--out", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    assert torch.equal(our_logits(load_llava(tmp_path / "hf"))[..., :131], our_logits(llava))

    again = run_command(str(own), "--to", "official", "--out", str(tmp_path / "hf"))
    assert again.returncode == 1
    assert re.fullmatch(r"error: .*hf is there already: remove it, or choose another --out\n", again.stderr)
    wrong = run_command(str(own), "--to", "peft", "--out", str(tmp_path / "peft"))
    assert wrong.returncode == 1
    assert re.fullmatch(r"error: .* is no adapter, it lacks adapter_config\.json: give .*\n", wrong.stderr)
