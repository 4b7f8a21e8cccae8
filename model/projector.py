"""The projector: image features become vectors the language model reads as if they were words.

Source: Liu et al. 2023 (LLaVA-1.5), "mlp2x_gelu"; names as in Hugging Face's LlavaMultiModalProjector.
"""

from torch import Tensor, nn


class Projector(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        """Shapes: (N, P, vision_size) -> (N, P, text_size)."""
        return self.linear_2(self.act(self.linear_1(features)))
