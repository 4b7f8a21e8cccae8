"""A LLaVA small enough for tests: no two of its sizes are equal, so that a swapped axis cannot pass.

Shapes: T tokens, N images, P patches per image (9), S image size in pixels (21), V vocabulary (131).
"""

import torch
from torch import Tensor, nn

from model.config import LlavaConfig
from model.llama import LlamaConfig
from model.llava import Llava
from model.vision import VisionConfig

IMAGE_TOKEN_ID = -200
FIRST_WORD_ID = 3  # ids below are left to padding, BOS and EOS
LAST_WORD_ID = 129  # the id behind is Hugging Face's image token

# The epsilons are thousands of times the usual ones, so that a wrong or misplaced one shows.
CONFIG = LlavaConfig(
    vision=VisionConfig(
        image_size=21, patch_size=7, hidden_size=32, intermediate_size=80,
        num_hidden_layers=3, num_attention_heads=2, layer_norm_eps=0.02, select_layer=-2,
    ),
    text=LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, rms_norm_eps=0.01, rope_theta=500.0,
    ),
)  # fmt: skip


def make_llava(seed: int = 0) -> Llava:
    """Make the small model with random weights."""
    model = Llava(CONFIG)
    randomize_weights(model, seed)
    return model.eval()


@torch.no_grad()
def randomize_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter with noise. Biases at 0 or norms at 1 would hide that one is not applied."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # This scale keeps activations near 1 at any width, so that attention is neither flat nor one-hot.
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            is_norm = "norm" in name and name.endswith("weight")
            parameter.normal_(mean=1.0 if is_norm else 0.0, std=0.3, generator=generator)


def make_prompt(layout: str, seed: int) -> Tensor:
    """Make token ids (T,): every "t" of the layout is a random word, every "I" the P placeholders of an image."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((CONFIG.vision.num_patches,), IMAGE_TOKEN_ID)
    words = torch.randint(FIRST_WORD_ID, LAST_WORD_ID + 1, (len(layout),), generator=generator)
    return torch.cat([image if letter == "I" else word[None] for letter, word in zip(layout, words, strict=True)])


def make_pixels(num_images: int, seed: int = 0) -> Tensor:
    """Make random images (N, 3, S, S)."""
    size = CONFIG.vision.image_size
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed))


def read_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients by name, of the parameters that have one."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return max|ours - theirs| / max|theirs|."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())
