"""The layouts LLaVA-1.5's weights come in: what each calls a tensor, and what its `config.json` says.

    ours                     official                                    llava-hf, on disk
    language_model.          model.                                      language_model.model.
    language_model.lm_head.  lm_head.                                    language_model.lm_head.
    projector.linear_1.      model.mm_projector.0.                       multi_modal_projector.linear_1.
    vision_tower.            model.vision_tower.vision_tower.vision_model. ...  vision_tower.vision_model. ...

transformers 4.52 and later call the same tensors `model.language_model.`, `model.multi_modal_projector.` and
`model.vision_tower.` in memory; CLIP's own repository writes `vision_model.`, LLaMA's and Vicuna's are the official
names without projector and tower. No name means two things, so one table reads every layout, whatever a folder is
called.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from model.config import MODEL_TYPE, LlavaConfig, read_sizes
from model.files import StoredTensor
from model.llama import LlamaConfig
from model.vision import VisionConfig

Layout = Literal["official", "hf"]

# Patterns of names (a full match) -> ours; the first that fits counts.
_TOWER = r"(?:model\.)?(?:vision_tower\.){0,2}(?:vision_model\.)?"
_INTO_OURS = (
    (rf"{_TOWER}embeddings\.(class_embedding|patch_embedding\.weight|position_embedding\.weight)", r"vision_tower.\1"),
    (rf"{_TOWER}encoder\.(layers\..+)", r"vision_tower.\1"),
    (rf"{_TOWER}((?:pre_layrnorm|post_layernorm)\..+)", r"vision_tower.\1"),
    (r"(?:.*\.)?mm_projector\.0\.(weight|bias)", r"projector.linear_1.\1"),
    (r"(?:.*\.)?mm_projector\.2\.(weight|bias)", r"projector.linear_2.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"projector.\1"),
    (
        r"(?:model\.language_model|language_model\.model|model)\.((?:embed_tokens|layers|norm)\..+)",
        r"language_model.\1",
    ),
    (r"(?:language_model\.)?lm_head\.(.+)", r"language_model.lm_head.\1"),
    (r"((?:vision_tower|projector|language_model)\..+)", r"\1"),
)

# Tensors that checkpoints carry and no LLaVA reads: tables that are computed, and the half of CLIP that reads text.
NOT_READ = (
    r".*\.rotary_emb\.inv_freq",
    r".*\bembeddings\.position_ids",
    r"text_model\..+",
    r"(?:visual|text)_projection\.weight",
    r"logit_scale",
)

_OUT_OF_OURS: dict[Layout, tuple[tuple[str, str], ...]] = {
    "official": (
        (r"vision_tower\.(layers\..+)", r"model.vision_tower.vision_tower.vision_model.encoder.\1"),
        (
            r"vision_tower\.((?:pre_layrnorm|post_layernorm)\..+)",
            r"model.vision_tower.vision_tower.vision_model.\1",
        ),
        (r"vision_tower\.(.+)", r"model.vision_tower.vision_tower.vision_model.embeddings.\1"),
        (r"projector\.linear_1\.(.+)", r"model.mm_projector.0.\1"),
        (r"projector\.linear_2\.(.+)", r"model.mm_projector.2.\1"),
        (r"language_model\.(lm_head\..+)", r"\1"),
        (r"language_model\.(.+)", r"model.\1"),
    ),
    "hf": (
        (r"vision_tower\.(layers\..+)", r"vision_tower.vision_model.encoder.\1"),
        (r"vision_tower\.((?:pre_layrnorm|post_layernorm)\..+)", r"vision_tower.vision_model.\1"),
        (r"vision_tower\.(.+)", r"vision_tower.vision_model.embeddings.\1"),
        (r"projector\.(.+)", r"multi_modal_projector.\1"),
        (r"language_model\.(lm_head\..+)", r"language_model.\1"),
        (r"language_model\.(.+)", r"language_model.model.\1"),
    ),
}


def to_our_name(name: str) -> str | None:
    """Translate a name of any layout; None for what no LLaVA reads. A name of no layout stays as it is."""
    if any(re.fullmatch(pattern, name) for pattern in NOT_READ):
        return None
    return _translate(name, _INTO_OURS)


def to_layout(name: str, layout: Layout) -> str:
    """Translate one of our names into a layout's."""
    return _translate(name, _OUT_OF_OURS[layout])


def _translate(name: str, table: Iterable[tuple[str, str]]) -> str:
    for pattern, ours in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return name


CLIP_NAME = "openai/clip-vit-large-patch14-336"
CLIP_HEAD_SIZE = 64  # of every CLIP ViT
OFFICIAL_CHAT = "llava_v1"  # what the official command line and demo talk to LLaVA-1.5 with

# What transformers assumes where a config.json is silent; llava-hf's 7B names hardly any of its sizes.
_LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
_CLIP_DEFAULTS = {
    "image_size": 224, "patch_size": 32, "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-5,
}  # fmt: skip

# Settings that would make it another architecture: what they must be, where they are there at all.
_LLAMA_IS = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
    "tie_word_embeddings": False,
}  # fmt: skip
_CLIP_IS = {"hidden_act": "quick_gelu", "num_channels": 3}
_HF_IS = {
    "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default", "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}  # fmt: skip
_OFFICIAL_IS = {
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "mm_patch_merge_type": "flat",
}  # fmt: skip


def is_llava(values: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a LLaVA of any layout, not a language model or a tower alone."""
    return values.get("model_type") == MODEL_TYPE or "text_config" in values or _is_official(values)


def _is_official(values: Mapping[str, Any]) -> bool:
    return any(key.startswith("mm_") for key in values)


def vision_tower_name(values: Mapping[str, Any]) -> str:
    """Return where an official config.json says that its tower is: a repository or a folder."""
    return str(values.get("mm_vision_tower") or CLIP_NAME)


def read_llama_config(values: Mapping[str, Any]) -> LlamaConfig:
    """Read the language model's sizes from a config.json: ours, official, llava-hf's, LLaMA's or Vicuna's.

    Raises: ValueError for sizes that are missing or wrong, or another architecture.
    """
    if values.get("model_type") == MODEL_TYPE:
        return LlavaConfig.from_dict(dict(values)).text
    part, padding = values, 0
    if "text_config" in values:
        part = _require_object(values, "text_config")
        padding = part.get("vocab_size", _LLAMA_DEFAULTS["vocab_size"]) - values.get("image_token_index", 32000)
    elif "hidden_size" not in values:
        raise ValueError("config.json has neither a text_config nor a hidden_size: it describes no LLaMA")
    rope = part.get("rope_parameters") or {}
    _check_settings(part, _LLAMA_IS, "the language model")
    _check_settings(rope, {"rope_type": "default"}, "the language model")
    sizes = {name: part.get(name, default) for name, default in _LLAMA_DEFAULTS.items()}
    sizes["rope_theta"] = rope.get("rope_theta", sizes["rope_theta"])
    sizes["num_key_value_heads"] = part.get("num_key_value_heads") or sizes["num_attention_heads"]
    # The rows from the image token on are no words: <image>, <pad>, and what rounds the number up.
    sizes["num_padding_rows"] = max(padding, 0)
    config = read_sizes(LlamaConfig, sizes, "text_config")
    _check_settings(part, {"head_dim": config.head_size}, "the language model")
    return config


def read_vision_config(values: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> VisionConfig:
    """Read the tower's sizes from the config.json of a LLaVA or of CLIP, or where it has none from the tensors.

    Args:
        tensors: the tower's, by our names.
    Raises: ValueError for sizes that are wrong, or another architecture.
    """
    if values.get("model_type") == MODEL_TYPE:
        return LlavaConfig.from_dict(dict(values)).vision
    part: Mapping[str, Any]
    if "vision_config" in values:
        part = _require_object(values, "vision_config")
    elif str(values.get("model_type", "")).startswith("clip"):
        part = values
    else:
        part = _measure_tower(tensors)
    _check_settings(part, _CLIP_IS, "the vision tower")
    sizes = {name: part.get(name, default) for name, default in _CLIP_DEFAULTS.items()}
    layer = values.get("vision_feature_layer", values.get("mm_vision_select_layer", -2))
    return read_sizes(VisionConfig, {**sizes, "select_layer": layer}, "vision_config")


def check_llava_settings(values: Mapping[str, Any]) -> None:
    """Raises: ValueError where a config.json asks for more than LLaVA-1.5 has."""
    if values.get("model_type") == MODEL_TYPE:
        return
    _check_settings(values, _OFFICIAL_IS if _is_official(values) else _HF_IS, "this LLaVA")
    if "anyres" in str(values.get("image_aspect_ratio")):
        raise ValueError(f"image_aspect_ratio is {values['image_aspect_ratio']!r}: that is LLaVA-1.6, not LLaVA-1.5")


def _measure_tower(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Tell a tower's sizes from its tensors, for official checkpoints that hold one without saying how large it is."""
    hidden_size, _, patch_size, _ = tensors["vision_tower.patch_embedding.weight"].shape
    num_patches = tensors["vision_tower.position_embedding.weight"].shape[0] - 1
    layers = {name.split(".")[2] for name in tensors if name.startswith("vision_tower.layers.")}
    return {
        "image_size": patch_size * round(num_patches**0.5),
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "intermediate_size": tensors["vision_tower.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": hidden_size // CLIP_HEAD_SIZE,
    }


def _require_object(values: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    if not isinstance(values[part], dict):
        raise ValueError(f"config.json has no object '{part}'")
    return values[part]


def _check_settings(values: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    for name, wanted in expected.items():
        if values.get(name, wanted) != wanted:
            raise ValueError(
                f"config.json has {name} = {values[name]!r}, {what} must have {wanted!r}: it is another architecture "
                "than LLaVA-1.5's"
            )
