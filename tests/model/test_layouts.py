"""Every layout of LLaVA-1.5's weights loads to the same model, bit for bit; what does not fit is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.files import open_folder
from model.layouts import NOT_READ, to_layout, to_our_name
from model.llava import Llava
from model.weights import load_llava, open_checkpoint, save_llava
from tests.model.checkpoints import (
    CONFIG,
    make_model,
    official_names,
    write_bin_shards,
    write_clip,
    write_hf,
    write_json,
    write_official,
    write_projector,
    write_vicuna,
)


@pytest.fixture(scope="module")
def llava() -> Llava:
    return make_model(seed=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only copied here."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(b"not a tokenizer")
    return file


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, llava: Llava) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "any-name", llava)


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory, llava: Llava, tokenizer: Path) -> Path:
    return write_vicuna(tmp_path_factory.mktemp("vicuna") / "llava-lora-13b", llava, tokenizer)


def assert_same(loaded: Llava, llava: Llava, num_padding_rows: int = 0) -> None:
    """Every tensor is bit for bit the model's; padding of the vocabulary stands behind it."""
    assert loaded.config.text.num_words == llava.config.text.vocab_size
    assert loaded.config.text.num_padding_rows == num_padding_rows
    expected = llava.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        rows = tensor[: len(expected[name])] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else tensor
        assert rows.dtype == torch.float16
        assert torch.equal(rows, expected[name]), name
    assert loaded.config.vision == llava.config.vision


@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
@pytest.mark.parametrize("with_tower", [True, False])
def test_official(
    tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path, num_shards: int, model_type: str, with_tower: bool
) -> None:
    """With the tower inside, nothing says how large it is: its tensors do. Without, the config names a CLIP."""
    tower = "openai/clip-vit-large-patch14-336" if with_tower else str(clip)
    folder = tmp_path / "vicuna-lora"  # the official code would take this for something else
    write_official(folder, llava, tower, with_tower, tokenizer, num_shards, model_type=model_type)
    loaded = load_llava(folder)
    assert_same(loaded, llava)
    assert loaded.config.chat_template == "llava_v1"


def test_a_tower_that_is_given_replaces_the_models(tmp_path: Path, llava: Llava, tokenizer: Path) -> None:
    other = make_model(seed=2)
    folder = write_official(tmp_path / "model", llava, "nowhere/at-all", True, tokenizer)
    loaded = load_llava(folder, vision_tower=write_clip(tmp_path / "clip", other))
    assert torch.equal(loaded.vision_tower.pre_layrnorm.weight, other.vision_tower.pre_layrnorm.weight)
    assert torch.equal(loaded.projector.linear_1.weight, llava.projector.linear_1.weight)


@pytest.mark.parametrize("names", ["disk", "memory", "hub"])
@pytest.mark.parametrize("num_padding_rows", [5, 61])
def test_hugging_face(tmp_path: Path, llava: Llava, names: str, num_padding_rows: int) -> None:
    """All generations of names, and shards; the rows from the image token on are no words."""
    folder = write_hf(tmp_path / "any", llava, num_padding_rows, names)
    assert_same(load_llava(folder), llava, num_padding_rows)


def test_the_7b_of_llava_hf_names_hardly_any_size(tmp_path: Path, llava: Llava) -> None:
    """Its text_config leaves out what equals LLaMA's defaults; those are 4096, 11008, 32 and 32."""
    folder = write_hf(tmp_path / "any", llava, 5, "hub")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["text_config"] = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
        "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    }  # fmt: skip
    write_json(folder / "config.json", values)
    with pytest.raises(ValueError, match=re.escape("config.json says (11008, 4096)")) as error:
        load_llava(folder)
    assert "embed_tokens.weight is (136, 48), config.json says (32064, 4096)" in str(error.value)


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model.", "module.model."])
def test_vicuna_with_a_projector(tmp_path: Path, llava: Llava, clip: Path, vicuna: Path, prefix: str) -> None:
    folder = write_projector(tmp_path / "pretrain", llava, str(clip), prefix)
    assert_same(load_llava(folder, base=vicuna), llava)
    assert open_checkpoint(folder, base=vicuna).folders == (folder, vicuna)


def test_a_stage_1_projector_replaces_the_one_of_its_base(
    tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path
) -> None:
    other = make_model(seed=3)
    base = write_official(tmp_path / "base", llava, str(clip), False, tokenizer)
    loaded = load_llava(write_projector(tmp_path / "pretrain", other, str(clip), "model."), base=base)
    assert torch.equal(loaded.projector.linear_2.bias, other.projector.linear_2.bias)
    assert torch.equal(loaded.language_model.norm.weight, llava.language_model.norm.weight)


def test_our_own_with_a_tokenizer_json(tmp_path: Path, llava: Llava) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}", encoding="utf-8")
    save_llava(tmp_path / "final", CONFIG, llava.state_dict(), file)
    assert_same(load_llava(tmp_path / "final"), llava)
    assert (tmp_path / "final" / "tokenizer.json").read_text(encoding="utf-8") == "{}"


def test_sharded_own_folder_is_read_as_one(tmp_path: Path, llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"-")
    monkeypatch.setattr("model.files.write_shards.__defaults__", (50_000,))
    save_llava(tmp_path / "final", CONFIG, llava.state_dict(), file)
    shards = sorted(tmp_path.glob("final/*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < 60_000 for shard in shards)
    assert_same(load_llava(tmp_path / "final"), llava)


def test_every_name_has_one_meaning(llava: Llava) -> None:
    """Each layout's names map to ours and back, and the table takes our own names as they are."""
    for name in llava.state_dict():
        assert to_our_name(name) == name
        assert to_our_name(to_layout(name, "official")) == name
        assert to_our_name(to_layout(name, "hf")) == name
    assert {to_layout(name, "official") for name in llava.state_dict()} == set(official_names(llava, True))
    unknown = "model.layers.0.self_attn.q_proj.weight_scale.extra.rotary"
    assert to_our_name(unknown) == f"language_model.{unknown.removeprefix('model.')}"  # strict loading refuses it


@pytest.mark.parametrize("pattern", NOT_READ)
def test_what_is_not_read_is_not_read(pattern: str) -> None:
    name = pattern.replace(r".*\.", "model.layers.3.self_attn.").replace(r".*\b", "vision_model.").replace(r"\.", ".")
    name = name.replace(".+", ".layers.0.x").replace("(?:visual|text)", "visual").replace("..", ".")
    assert re.fullmatch(pattern, name)
    assert to_our_name(name) is None


Damage = Callable[[dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            ["missing language_model.layers.1.mlp.up_proj.weight (112, 48)"],
        ),
        (
            lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 3)}),
            ["unknown language_model.layers.7.mlp.up_proj.weight (2, 3)"],
        ),
        (
            lambda tensors: [tensors.pop(f"model.mm_projector.{n}.{p}") for n in (0, 2) for p in ("weight", "bias")],
            ["missing projector.linear_1.bias", "missing projector.linear_2.weight", "give its projector as the model"],
        ),
        (
            lambda tensors: tensors.update({"model.mm_projector.2.weight": torch.zeros(56, 56)}),
            ["projector.linear_2.weight is (56, 56), config.json says (48, 48)", "of another size"],
        ),
        (
            lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(133, 48)}),
            ["embed_tokens.weight is (133, 48)", "tokens were added to the vocabulary"],
        ),
    ],
)
def test_wrong_tensors_are_listed_with_their_cause(
    tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path, damage: Damage, messages: list[str]
) -> None:
    folder = write_official(tmp_path / "model", llava, str(clip), False, tokenizer)
    tensors = official_names(llava, with_tower=False)
    damage(tensors)
    write_bin_shards(folder, tensors, num_shards=2)
    with pytest.raises(ValueError, match="does not fit its") as error:
        load_llava(folder)
    for message in messages:
        assert message in str(error.value)


def test_a_language_model_alone_is_no_llava(vicuna: Path, clip: Path) -> None:
    with pytest.raises(ValueError, match="give its projector as the model and it as the base"):
        load_llava(vicuna, vision_tower=clip)


def test_a_projector_needs_a_base(tmp_path: Path, llava: Llava, clip: Path) -> None:
    folder = write_projector(tmp_path / "pretrain", llava, str(clip), "model.")
    with pytest.raises(
        ValueError, match=re.escape(f"{folder} is a projector without a language model: say with --model")
    ):
        load_llava(folder)


def test_a_whole_model_needs_no_base(tmp_path: Path, llava: Llava, clip: Path, vicuna: Path, tokenizer: Path) -> None:
    folder = write_official(tmp_path / "model", llava, str(clip), False, tokenizer)
    with pytest.raises(ValueError, match="holds a language model of its own: leave out the base"):
        load_llava(folder, base=vicuna)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path) -> None:
    folder = write_official(tmp_path / "model", llava, str(clip), False, tokenizer)
    tensors = official_names(llava, with_tower=False)
    tensors["multi_modal_projector.linear_1.bias"] = tensors["model.mm_projector.0.bias"]
    write_bin_shards(folder, tensors, num_shards=1)
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds two tensors for projector\.linear_1\.bias"):
        load_llava(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear', this LLaVA must have 'mlp2x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature = 'cls_patch'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = True"),
        ({"image_aspect_ratio": "anyres"}, "that is LLaVA-1.6, not LLaVA-1.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = {'type': 'linear', 'factor': 2.0}"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', the language model must have 'silu'"),
        ({"num_attention_heads": 5}, "heads do not divide hidden_size"),
        ({"vocab_size": "many"}, "text_config.vocab_size = 'many', expected a whole number above 0"),
        ({"mm_vision_select_layer": -9}, "select_layer is -1 or a layer before"),
    ],
)
def test_another_architecture_is_refused(
    tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path, changes: dict[str, Any], message: str
) -> None:
    folder = write_official(tmp_path / "model", llava, str(clip), False, tokenizer, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_llava(folder)


def test_settings_decide_and_not_our_sizes(tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path) -> None:
    """What is easily hard-coded: LLaMA-1 had another epsilon and fewer positions."""
    changes: dict[str, Any] = {"rms_norm_eps": 1e-6, "max_position_embeddings": 96, "rope_theta": 5e5}
    changes["mm_vision_select_layer"] = -3
    config = load_llava(write_official(tmp_path / "model", llava, str(clip), False, tokenizer, **changes)).config
    assert (config.text.rms_norm_eps, config.text.max_position_embeddings, config.text.rope_theta) == (1e-6, 96, 5e5)
    assert config.vision.select_layer == -3


def test_vicuna_without_a_tower_says_which_one_it_wants(tmp_path: Path, llava: Llava, vicuna: Path) -> None:
    folder = write_projector(tmp_path / "pretrain", llava, str(tmp_path / "lost-clip"), "model.")
    with pytest.raises(FileNotFoundError, match="lost-clip"):
        load_llava(folder, base=vicuna)


def test_a_folder_without_a_tower_inside_is_no_clip(
    tmp_path: Path, llava: Llava, vicuna: Path, tokenizer: Path
) -> None:
    folder = write_official(tmp_path / "model", llava, str(vicuna), False, tokenizer)
    with pytest.raises(ValueError, match="holds no CLIP vision tower"):
        load_llava(folder)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path) -> None:
    """An index is somebody else's file: it could name any file of this machine."""
    folder = write_official(tmp_path / "model", llava, str(clip), False, tokenizer)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"model.norm.weight": "../other/model.bin"}})
    with pytest.raises(ValueError, match=r"names files outside its folder: \.\./other/model\.bin"):
        open_folder(folder)


def test_a_missing_shard_is_named(tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path) -> None:
    folder = write_official(tmp_path / "model", llava, str(clip), False, tokenizer, num_shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks pytorch_model-00002-of-00003\.bin, which pytorch_model"):
        load_llava(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cut", "is cut off: its end, which lists what it holds, is missing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>no such file</html>", "is damaged, or holds more than tensors"),
        (b"", "is damaged, or holds more than tensors"),
    ],
)
def test_a_broken_bin_file_is_recognised(
    tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path, content: bytes | str, message: str
) -> None:
    folder = write_official(tmp_path / "model", llava, str(clip), False, tokenizer)
    file = folder / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-1000] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as error:
        load_llava(folder)
    assert str(file) in str(error.value)
    assert "download" in str(error.value)


class Harm:
    """Pickle runs what __reduce__ names."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm-was-done"),))


def test_code_in_a_bin_file_is_not_run(tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path) -> None:
    folder = write_official(tmp_path / "model", llava, str(clip), False, tokenizer, num_shards=1)
    torch.save({"model.norm.weight": torch.ones(48), "x": Harm()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
        load_llava(folder)
    assert not Path("harm-was-done").exists()


def test_a_bin_file_of_old_pytorch_loads(tmp_path: Path, llava: Llava, clip: Path, tokenizer: Path) -> None:
    """Before 1.6 torch.save wrote no zip archive; such a file cannot be mapped, but read."""
    folder = write_official(tmp_path / "model", llava, str(clip), False, tokenizer, num_shards=1)
    tensors = official_names(llava, with_tower=False)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(load_llava(folder), llava)
