"""Checkpoints in the layouts that LLaVA-1.5's users have, written without the product's tables.

Where a library writes a layout, that library writes it here; official ones follow the names and files that the released
repositories have.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import LlavaConfig
from model.llama import LlamaConfig
from model.llava import Llava
from model.vision import VisionConfig
from tests.model.hugging_face import LLAVA_PREFIXES, copy_to_oracle, make_llava_oracle
from tests.model.small_llava import make_pixels, make_prompt, randomize_weights
from tests.model.test_parity import run_ours

# Two heads of 64 as every CLIP has: an official config.json does not say how many.
CONFIG = LlavaConfig(
    vision=VisionConfig(
        image_size=21, patch_size=7, hidden_size=128, intermediate_size=80,
        num_hidden_layers=3, num_attention_heads=2, layer_norm_eps=1e-5, select_layer=-2,
    ),
    text=LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, rms_norm_eps=1e-5, rope_theta=10000.0,
    ),
    chat_template="llava_v1",
)  # fmt: skip


def make_model(seed: int = 0, dtype: torch.dtype = torch.float16) -> Llava:
    """Make a small model with random weights."""
    model = Llava(CONFIG)
    randomize_weights(model, seed)
    return model.to(dtype).eval()


def official_names(model: Llava, with_tower: bool) -> dict[str, Tensor]:
    """Return the tensors under the names that official checkpoints use."""
    named = {}
    for name, tensor in model.state_dict().items():
        room, rest = name.split(".", maxsplit=1)
        if room == "projector":
            named["model.mm_projector." + rest.replace("linear_1", "0").replace("linear_2", "2")] = tensor
        elif room == "language_model":
            named[rest if rest.startswith("lm_head") else f"model.{rest}"] = tensor
        elif with_tower:
            named[f"model.vision_tower.vision_tower.vision_model.{clip_name(rest)}"] = tensor
    return named


def clip_name(name: str) -> str:
    """Return CLIP's name, within its vision model, of one of our tower's tensors."""
    if name.startswith("layers."):
        return f"encoder.{name}"
    return name if "norm" in name else f"embeddings.{name}"


def official_config(config: LlavaConfig, tower: str, **changes: Any) -> dict[str, Any]:
    """Return what the released config.json holds."""
    text = config.text
    return {
        "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "hidden_act": "silu",
        "hidden_size": text.hidden_size, "image_aspect_ratio": "pad", "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size, "max_length": 4096,
        "max_position_embeddings": text.max_position_embeddings, "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": tower, "model_type": "llava", "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers, "num_key_value_heads": text.num_key_value_heads,
        "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": text.rms_norm_eps, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False,
        "use_cache": True, "use_mm_proj": True, "vocab_size": text.vocab_size, **changes,
    }  # fmt: skip


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values), encoding="utf-8")


def write_bin_shards(folder: Path, tensors: Mapping[str, Tensor], num_shards: int) -> None:
    """Write `.bin` files as transformers 4.31 did: an index when there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    if num_shards == 1:
        torch.save(dict(tensors), folder / "pytorch_model.bin")
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        file = f"pytorch_model-{number + 1:05d}-of-{num_shards:05d}.bin"
        part = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        torch.save({name: tensors[name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})


def write_official(
    folder: Path, model: Llava, tower: str, with_tower: bool, tokenizer: Path, num_shards: int = 2, **changes: Any
) -> Path:
    """Write an official model: `.bin` shards, computed tables left in, the tower inside or only named."""
    tensors = official_names(model, with_tower)
    for layer in range(model.config.text.num_hidden_layers):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(model.config.text.head_size // 2)
    write_bin_shards(folder, tensors, num_shards)
    write_json(folder / "config.json", official_config(model.config, tower, **changes))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


def write_clip(folder: Path, model: Llava) -> Path:
    """Write CLIP's own repository around the tower: the text half and an old buffer are in it."""
    tensors = {f"vision_model.{clip_name(name)}": t for name, t in model.vision_tower.state_dict().items()}
    tensors |= {
        "text_model.embeddings.token_embedding.weight": torch.rand(7, 5),
        "text_model.embeddings.position_ids": torch.arange(7)[None],
        "vision_model.embeddings.position_ids": torch.arange(10)[None],
        "visual_projection.weight": torch.rand(5, 128),
        "text_projection.weight": torch.rand(5, 5),
        "logit_scale": torch.tensor(2.6),
    }
    write_bin_shards(folder, tensors, num_shards=1)
    vision = {name: value for name, value in vars(model.config.vision).items() if name != "select_layer"}
    del vision["layer_norm_eps"]  # a default, which the repositories leave out
    write_json(folder / "config.json", {"model_type": "clip", "text_config": {}, "vision_config": vision})
    return folder


def write_vicuna(folder: Path, model: Llava, tokenizer: Path) -> Path:
    """Write the language model alone."""
    tensors = {name: t for name, t in official_names(model, False).items() if "mm_projector" not in name}
    write_bin_shards(folder, tensors, num_shards=2)
    config = official_config(model.config, "")
    config = {name: value for name, value in config.items() if "mm_" not in name}
    write_json(folder / "config.json", {**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


def write_projector(folder: Path, model: Llava, tower: str, prefix: str) -> Path:
    """Write what stage 1 leaves: `mm_projector.bin` and a config.json."""
    folder.mkdir(parents=True)
    tensors = {name: tensor for name, tensor in official_names(model, False).items() if "mm_projector" in name}
    torch.save(
        {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}, folder / "mm_projector.bin"
    )
    write_json(folder / "config.json", official_config(model.config, tower))
    return folder


def make_hf_model(model: Llava, num_padding_rows: int) -> Any:
    """Return transformers' model with our weights and a padded vocabulary, as llava-hf has it."""
    oracle: Any = make_llava_oracle(model.config)  # type checkers misread its `to`
    copy_to_oracle(model, oracle, LLAVA_PREFIXES)
    rows = model.config.text.vocab_size + num_padding_rows
    oracle.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for table in (oracle.get_input_embeddings(), oracle.get_output_embeddings()):
            table.weight[model.config.text.vocab_size :].normal_(generator=generator)
    oracle.config.image_token_index = oracle.config.image_token_id = model.config.text.vocab_size
    return oracle.to(model.projector.linear_1.weight.dtype)


def write_hf(folder: Path, model: Llava, num_padding_rows: int, names: str) -> Path:
    """Write transformers' layout: `disk` as its save_pretrained does, `memory` under the names since 4.52,
    `hub` with the level `vision_model` that the hub's files have.
    """
    oracle = make_hf_model(model, num_padding_rows)
    oracle.save_pretrained(folder, max_shard_size="60KB")
    if names != "disk":
        tensors = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
        if names == "hub":
            tensors = {_hub_name(name): tensor for name, tensor in tensors.items()}
        for file in folder.glob("model*"):
            file.unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _hub_name(name: str) -> str:
    for memory, hub in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ):
        if name.startswith(memory):
            return hub + name.removeprefix(memory).removeprefix("vision_model.")
    raise AssertionError(name)


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.05}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_peft_model(model: Llava, num_padding_rows: int, seed: int = 7, **changes: Any) -> Any:
    """Return PEFT's adapter on transformers' model, matrices and projector as training would leave them."""
    targets = rf".*language_model.*\.({'|'.join(LINEARS)})"
    settings = {**LORA, "target_modules": targets, "modules_to_save": ["multi_modal_projector"], **changes}
    adapted = get_peft_model(make_hf_model(model, num_padding_rows), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
                assert "lora_" in name or "modules_to_save" in name
    return adapted.eval()


def write_official_lora(folder: Path, model: Llava, tower: str, seed: int = 7) -> dict[str, tuple[Tensor, Tensor]]:
    """Write the official pair of `.bin` files; return the factors (A, B) by the layer's official name."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.language_model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] in LINEARS:
            outputs, inputs = module.weight.shape
            lora_A = torch.randn(LORA["r"], inputs, generator=generator) * 0.1
            lora_B = torch.randn(outputs, LORA["r"], generator=generator) * 0.1
            factors[f"model.{name}"] = (lora_A.half(), lora_B.half())
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B
    torch.save(tensors, folder / "adapter_model.bin")
    projector = {name: t for name, t in official_names(model, False).items() if "mm_projector" in name}
    rest = {
        f"base_model.model.{name}": torch.randn(t.shape, generator=generator).half() for name, t in projector.items()
    }
    torch.save(rest, folder / "non_lora_trainables.bin")
    write_json(folder / "config.json", official_config(model.config, tower))
    settings = {
        "base_model_name_or_path": "./checkpoints/vicuna-7b-v1-5", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "modules_to_save": None, "peft_type": "LORA", "revision": None, "target_modules": LINEARS,
        "task_type": "CAUSAL_LM", **LORA,
    }  # fmt: skip
    write_json(folder / "adapter_config.json", settings)
    return factors


@torch.no_grad()
def our_logits(model: Llava) -> Tensor:
    """Return what our model says to a prompt with a picture. (1, T, V)"""
    return run_ours(model, make_prompt("tIttttt", seed=2)[None], make_pixels(1))


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    """Return what transformers' or PEFT's model says to the same prompt."""
    prompt = make_prompt("tIttttt", seed=2)[None]
    ids = prompt.masked_fill(prompt < 0, model.config.image_token_id)
    return model(input_ids=ids, pixel_values=make_pixels(1)).logits
