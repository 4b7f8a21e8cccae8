"""What stands beside the weights in the other layouts: `config.json`, and what tokenizer and pictures are read with.

Everything is spelled out, also what is a default today: transformers' defaults have changed between its versions.
"""

from typing import Any

from model.config import LlavaConfig
from model.layouts import CLIP_NAME

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"  # the two ids behind the words in llava-hf's vocabulary
# CLIP's, which every LLaVA reads its pictures with.
IMAGE_MEAN, IMAGE_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
BICUBIC = 3

# vicuna_v1, as data/conversation.py has it, in the language transformers renders chats with; the tokenizer puts <s> in
# front. The official code tokenises what follows a picture by itself, which puts a space before its newline.
CHAT_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image> \n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

Files = dict[str, dict[str, Any]]  # contents by name


def hf_files(config: LlavaConfig, num_rows: int, dtype: str) -> Files:
    """Return the JSON files of the llava-hf layout.

    Args:
        num_rows: of the vocabulary's tables, padding included.
        dtype: of the weights, as PyTorch calls it.
    """
    size, num_words = config.vision.image_size, config.text.num_words
    model = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": dtype,
        "image_token_index": num_words,
        "image_seq_length": config.vision.num_patches,
        "pad_token_id": num_words + 1,
        "ignore_index": -100,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {"model_type": "llama", **_llama_fields(config, num_rows)},
        "vision_config": _vision_fields(config),
    }
    tokenizer = {
        **_TOKENIZER,
        "pad_token": PAD_TOKEN,
        "image_token": IMAGE_TOKEN,
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
    }
    pictures = {
        # Not CLIPImageProcessor: it cuts the picture's sides off, LLaVA-1.5 pads it to a square.
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_pad": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": 1,  # CLIP's class token; without it the image counts one token too few
        "vision_feature_select_strategy": "default",
    }
    return {
        "config.json": model,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": num_words + 1},
        "tokenizer_config.json": tokenizer,
        "preprocessor_config.json": pictures,
        "processor_config.json": processor,
    }


def official_files(config: LlavaConfig, dtype: str) -> Files:
    """Return the JSON files of the official layout, for a model that holds its vision tower.

    Args:
        dtype: of the weights, as PyTorch calls it.
    """
    model = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": dtype,
        **_llama_fields(config, config.text.num_words),
        "pad_token_id": 0,
        "use_cache": True,
        "use_mm_proj": True,
        "mm_vision_tower": CLIP_NAME,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        # Without this the official code reads the tower from its repository and passes the one in the files over.
        "unfreeze_mm_vision_tower": True,
        # For our own reader: the official code knows no tower but CLIP's ViT-L/14-336.
        "vision_config": _vision_fields(config),
    }
    tokenizer = {**_TOKENIZER, "pad_token": "<unk>", "model_max_length": 2048, "padding_side": "right"}
    return {
        "config.json": model,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "tokenizer_config.json": tokenizer,
    }


_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def _llama_fields(config: LlavaConfig, num_rows: int) -> dict[str, Any]:
    text = config.text
    return {
        "vocab_size": num_rows,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _vision_fields(config: LlavaConfig) -> dict[str, Any]:
    sizes = {name: value for name, value in vars(config.vision).items() if name != "select_layer"}
    return {"model_type": "clip_vision_model", **sizes, "hidden_act": "quick_gelu", "num_channels": 3}
