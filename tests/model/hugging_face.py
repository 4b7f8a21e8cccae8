"""Hugging Face's models as oracles: the same sizes, the same weights, nothing downloaded.

Weights are copied by a table of name prefixes, and strictly: a tensor without a counterpart on the other side is an
error, in both directions. Attention is the "eager" one, matrix products and a softmax: with "sdpa" both sides would
call the same kernel, which proves less.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.initialization import no_init_weights

from model.config import LlavaConfig
from model.llama import LlamaConfig
from model.vision import VisionConfig

HF_IMAGE_TOKEN_ID = 130  # Hugging Face looks the placeholder's embedding up, so it must lie inside the vocabulary

# Prefixes of Hugging Face's names -> ours.
VISION_PREFIXES = {
    "embeddings.": "",
    "pre_layrnorm.": "pre_layrnorm.",
    "encoder.layers.": "layers.",
    "post_layernorm.": "post_layernorm.",
}
PROJECTOR_PREFIXES = {"linear_1.": "linear_1.", "linear_2.": "linear_2."}
LLAMA_PREFIXES = {"model.": "", "lm_head.": "lm_head."}
LLAVA_PREFIXES = {
    **{f"model.vision_tower.{theirs}": f"vision_tower.{ours}" for theirs, ours in VISION_PREFIXES.items()},
    **{f"model.multi_modal_projector.{theirs}": f"projector.{ours}" for theirs, ours in PROJECTOR_PREFIXES.items()},
    "model.language_model.": "language_model.",
    "lm_head.": "language_model.lm_head.",
}


def our_name(hf_name: str, prefixes: dict[str, str]) -> str:
    """Translate one name; a name that no prefix fits, or more than one, is an error."""
    (name,) = [ours + hf_name.removeprefix(theirs) for theirs, ours in prefixes.items() if hf_name.startswith(theirs)]
    return name


def match_names(model: nn.Module, oracle: nn.Module, prefixes: dict[str, str]) -> dict[str, str]:
    """Return {Hugging Face's name: our name} of every tensor, after checking that each side has all of the other's."""
    names = {hf_name: our_name(hf_name, prefixes) for hf_name in oracle.state_dict()}
    assert sorted(names.values()) == sorted(model.state_dict())
    return names


def copy_to_oracle(model: nn.Module, oracle: nn.Module, prefixes: dict[str, str]) -> None:
    """Give Hugging Face's model our weights. It shares their memory, so that a large tower exists once."""
    tensors = model.state_dict()
    renamed = {hf_name: tensors[name] for hf_name, name in match_names(model, oracle, prefixes).items()}
    oracle.load_state_dict(renamed, strict=True, assign=True)


def copy_from_oracle(oracle: nn.Module, model: nn.Module, prefixes: dict[str, str]) -> None:
    """Give our model Hugging Face's weights."""
    names = match_names(model, oracle, prefixes)
    model.load_state_dict({names[hf_name]: tensor for hf_name, tensor in oracle.state_dict().items()}, strict=True)


def make_vision_oracle(config: VisionConfig) -> hf.CLIPVisionModel:
    """Make a vision tower whose weights are still to be filled."""
    with no_init_weights():
        oracle = hf.CLIPVisionModel(_vision_config(config))
    oracle.set_attn_implementation("eager")
    return oracle.eval()


def make_llama_oracle(config: LlamaConfig) -> hf.LlamaForCausalLM:
    """Make a language model whose weights are still to be filled."""
    with no_init_weights():
        oracle = hf.LlamaForCausalLM(_llama_config(config))
    oracle.set_attn_implementation("eager")
    return oracle.eval()


def make_llava_oracle(config: LlavaConfig) -> hf.LlavaForConditionalGeneration:
    """Make the whole model; its weights are still to be filled."""
    sizes = hf.LlavaConfig(
        vision_config=_vision_config(config.vision),
        text_config=_llama_config(config.text),
        image_token_index=HF_IMAGE_TOKEN_ID,
        image_seq_length=config.vision.num_patches,
        vision_feature_layer=config.vision.select_layer,
    )
    with no_init_weights():
        oracle = hf.LlavaForConditionalGeneration(sizes)
    oracle.set_attn_implementation("eager")  # of both towers
    return oracle.eval()


def to_hf_ids(input_ids: Tensor) -> Tensor:
    """Write Hugging Face's image token for our placeholders."""
    return input_ids.masked_fill(input_ids < 0, HF_IMAGE_TOKEN_ID)


def answer_greedily(
    oracle: Any, prompts: Sequence[Tensor], pixel_values: Tensor | None, max_new_tokens: int
) -> list[list[int]]:
    """Return Hugging Face's answers, which no EOS ends. It pads prompts of different lengths on the left."""
    input_ids = pad_sequence(list(prompts), batch_first=True, padding_side="left")
    is_token = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    images = {} if pixel_values is None else {"pixel_values": pixel_values}
    text = oracle.generate(
        input_ids=to_hf_ids(input_ids),
        attention_mask=is_token,
        **images,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return text[:, input_ids.shape[1] :].tolist()


def _vision_config(config: VisionConfig) -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
    )


def _llama_config(config: LlamaConfig) -> hf.LlamaConfig:
    return hf.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
