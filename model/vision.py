"""CLIP's vision transformer, as LLaVA uses it: the patch features of the last layer but one.

Source: Radford et al. 2021 (CLIP), section 2.4; parameter names as in Hugging Face's CLIPVisionModel.
Shapes: N images, S image size in pixels, P patches per image, D hidden size, H heads, d head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionConfig:
    image_size: int  # pixels, both sides
    patch_size: int  # pixels, both sides
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    select_layer: int  # whose output the projector reads; -2 leaves the last layer out, as LLaVA does

    @property
    def num_patches(self) -> int:
        """P, the number of image tokens the language model sees."""
        return (self.image_size // self.patch_size) ** 2


class VisionTower(nn.Module):
    """A ViT with an extra LayerNorm in front (the checkpoints spell it `pre_layrnorm`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the patch features LLaVA projects.

        The layers after `select_layer` and `post_layernorm` are not run: CLIP's checkpoints have them, LLaVA's way
        does not pass them.
        Shapes: pixel_values (N, 3, S, S) -> (N, P, D).
        """
        return self.encode(pixel_values, self.num_used_layers)[:, 1:]

    @property
    def num_used_layers(self) -> int:
        """How many layers lead to the features LLaVA reads."""
        return self.config.num_hidden_layers + 1 + self.config.select_layer

    def encode(self, pixel_values: Tensor, num_layers: int) -> Tensor:
        """Run the first `num_layers` layers. (N, 3, S, S) -> (N, 1 + P, D), the class token first.

        Raises: ValueError for pictures of another size: a convolution would cut them in silence.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pictures are {tuple(pixel_values.shape[1:])}, this tower reads (3, {size}, {size})")
        patches = self.patch_embedding(pixel_values)  # (N, 3, S, S) -> (N, D, rows, columns)
        patches = patches.flatten(2).transpose(1, 2)  # -> (N, P, D)
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding.weight
        x = self.pre_layrnorm(x)
        for layer in self.layers[:num_layers]:
            x = layer(x)
        return x


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # (N, 1 + P, D) -> (N, H, 1 + P, d)
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # quick_gelu, x * sigmoid(1.702 x), which CLIP was trained with instead of GELU; by silu, backward keeps less.
        return self.fc2(F.silu(1.702 * self.fc1(x)) / 1.702)
