"""LLaVA-1.5: a picture is cut into patches, each patch becomes a vector the language model reads like a word.

    pixel_values -> vision_tower -> projector -> image_features
    input_ids -> embed_tokens -> image_features put where the placeholders are -> language_model -> hidden_states

Source: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning".
Read this file first, then `vision.py`, `projector.py`, `llama.py`, `attention.py`.
Shapes: B rows, T tokens, N images, S image size in pixels, P patches per image, D hidden size.
"""

import torch
from torch import Tensor, nn

from model.attention import Attend
from model.config import LlavaConfig
from model.llama import Llama
from model.projector import Projector
from model.vision import VisionTower


class Llava(nn.Module):
    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = Llama(config.text)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attend: Attend, image_features: Tensor | None = None
    ) -> Tensor:
        """Return hidden states; `language_model.lm_head` turns those that are wanted into logits.

        A negative id is a placeholder: P in a row stand for one image (official LLaVA's sentinel is -200).
        Shapes: input_ids and position_ids (B, T), image_features (N, P, D) in reading order -> (B, T, D).
        Raises: ValueError when images and placeholders do not match.
        """
        return self.language_model(self.embed(input_ids, image_features), position_ids, attend)

    def embed(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """Return what the language model reads: words looked up, image features in their places. -> (B, T, D)."""
        inputs_embeds = self.language_model.embed_tokens(input_ids.clamp(min=0))
        if image_features is None:
            image_features = inputs_embeds.new_empty(0, self.config.vision.num_patches, inputs_embeds.shape[-1])
        return merge_image_features(inputs_embeds, input_ids < 0, image_features)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Shapes: (N, 3, S, S) -> (N, P, D). A frozen tower takes no part in the backward pass."""
        return self.projector(self.vision_tower(pixel_values.to(self.projector.linear_1.weight)))


def merge_image_features(inputs_embeds: Tensor, is_placeholder: Tensor, image_features: Tensor) -> Tensor:
    """Put the images' features where the placeholders stand, in order.

    Shapes: inputs_embeds (B, T, D), is_placeholder (B, T), image_features (N, P, D) -> (B, T, D).
    Raises: ValueError unless there are exactly N * P placeholders.
    """
    num_images, num_patches, _ = image_features.shape
    num_placeholders = int(is_placeholder.sum())
    if num_placeholders != num_images * num_patches:
        raise ValueError(
            f"{num_placeholders} image placeholders for {num_images} images of {num_patches} patches each: "
            "every image needs exactly one <image> marker"
        )
    features = image_features.to(inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(is_placeholder[..., None], features)


@torch.no_grad()
def initialize_weights(model: nn.Module, std: float, seed: int) -> None:
    """Fill every parameter with seeded random values, for training from nothing.

    Note: tiny models learn several times faster with std = hidden_size ** -0.5 (0.09 at 128) than with the usual
    0.02; at 4096 the two are the same.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        elif name.endswith(("class_embedding", "position_embedding.weight")):
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.normal_(std=std, generator=generator)
