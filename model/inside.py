"""What the model did while it answered: where in the picture it looked, and what it nearly said.

One forward pass over prompt and answer, whose attention is recorded (`RecordingAttention`); generation itself knows
nothing of it. Which adapter answers is the caller's: wrap the call in `use_adapters`.

Shapes: T tokens, A tokens of the answer, L layers, H heads, P patches per image (0 without one), S image size in
pixels, k candidates, V words of the vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import RecordingAttention
from model.llava import Llava


@dataclass(frozen=True)
class Inside:
    """All on the CPU. A counts the tokens that were looked at, the first of the answer.

    A token is chosen at the position before it, so "its" attention is the attention from there.
    """

    attention: Tensor  # (A, L, H, P) float16, fractions of 1
    picture_share: Tensor  # (A, L, H) float32, what went to the picture as a whole
    chosen_ids: Tensor  # (A,) the tokens of the answer
    chosen_probabilities: Tensor  # (A,) float32
    chosen_ranks: Tensor  # (A,) 1 for the likeliest; those that tie share the better rank
    candidate_ids: Tensor  # (A, k) the likeliest tokens, best first
    candidate_probabilities: Tensor  # (A, k) float32, of a softmax over all V words at temperature 1
    patch_similarity: Tensor  # (P, P) float16, cosines between the patches' features as the vision tower hands them on


@torch.inference_mode()
def look_inside(
    model: Llava,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    num_answer_tokens: int,
    max_tokens: int = 64,
    num_candidates: int = 10,
) -> Inside:
    """Run prompt and answer once more, and keep what the answer's tokens looked at.

    Args:
        input_ids: (T,) the prompt with its placeholders, then the answer, with EOS where the model ended it.
        pixel_values: (1, 3, S, S), or None for a conversation without a picture.
        max_tokens: of a longer answer the first so many tokens are looked at. At 64, a 13B model's weights (40 layers
            of 40 heads, 576 patches) take 118 MB of memory.
    Raises: ValueError for an answer that is empty or all there is, more than one picture, placeholders that do not
        match it, or a conversation longer than the model's positions.
    """
    config, device = model.config, model.language_model.lm_head.weight.device
    prompt_length = len(input_ids) - num_answer_tokens
    if num_answer_tokens < 1 or prompt_length < 1:
        raise ValueError(
            f"an answer of {num_answer_tokens} tokens in {len(input_ids)}, expected at least one, behind a prompt"
        )
    if pixel_values is not None and len(pixel_values) != 1:
        raise ValueError(f"{len(pixel_values)} pictures, expected one")
    chosen = input_ids[prompt_length:][:max_tokens]
    if (chosen < 0).any():
        raise ValueError("the answer holds image placeholders: they belong to the prompt")
    # Behind the position that chooses the last of these tokens nothing is of interest.
    seen = input_ids[: prompt_length + len(chosen) - 1].to(device)
    limit = config.text.max_position_embeddings
    if len(seen) > limit:
        raise ValueError(f"{len(seen)} tokens exceed the model's {limit} positions: shorten the conversation")
    features = image_features = None
    if pixel_values is not None:
        features = model.vision_tower(pixel_values.to(model.projector.linear_1.weight))
        image_features = model.projector(features)
    watched = torch.arange(prompt_length - 1, len(seen), device=device)
    attend = RecordingAttention(watched, (seen < 0).nonzero()[:, 0])
    hidden_states = model(seen[None], torch.arange(len(seen), device=device)[None], attend, image_features)
    logits = model.language_model.lm_head(hidden_states[0, watched])[:, : config.text.num_words].float().cpu()
    probabilities = logits.softmax(dim=-1)  # (A, V)
    candidates = probabilities.topk(min(num_candidates, config.text.num_words), dim=-1)
    chosen = chosen.cpu()
    chosen_logits = logits.gather(1, chosen[:, None])
    return Inside(
        attention=torch.stack([weights[0] for weights in attend.weights]).permute(2, 0, 1, 3).contiguous(),
        picture_share=torch.stack([shares[0] for shares in attend.shares]).permute(2, 0, 1).contiguous(),
        chosen_ids=chosen,
        chosen_probabilities=probabilities.gather(1, chosen[:, None])[:, 0],
        chosen_ranks=1 + (logits > chosen_logits).sum(dim=-1),
        candidate_ids=candidates.indices,
        candidate_probabilities=candidates.values,
        patch_similarity=compare_patches(features),
    )


def compare_patches(features: Tensor | None) -> Tensor:
    """Return the cosines between all patches. (1, P, D) -> (P, P) float16."""
    if features is None:
        return torch.zeros(0, 0, dtype=torch.float16)
    directions = F.normalize(features[0].float(), dim=-1)
    return (directions @ directions.T).to("cpu", torch.float16)
