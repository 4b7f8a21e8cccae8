"""Answer many questions about many pictures, fast: what is common to a group of prompts is computed once.

Every question about a picture starts with the same tokens, the picture among them. That trunk runs once per
picture; its keys and values are then repeated for each question, and only the questions' own tokens follow.

Shapes: N images, P placeholders per image.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from data.conversation import Turn, render_conversation
from data.image import open_image, preprocess_image
from data.tokenizer import Tokenizer
from model.generate import KVCache, collect, decode, prefill
from model.llava import Llava


def answer_questions(
    model: Llava,
    tokenizer: Tokenizer,
    groups: Sequence[tuple[Path, Sequence[str]]],
    max_new_tokens: int,
    images_per_batch: int = 32,
) -> Iterator[list[str]]:
    """Yield, picture by picture, the greedy answers to its questions.

    Args:
        groups: (picture, questions about it).
    Raises: ValueError or FileNotFoundError for a picture that cannot be read.
    """
    for start in range(0, len(groups), images_per_batch):
        batch = groups[start : start + images_per_batch]
        answers = iter(_answer_batch(model, tokenizer, batch, max_new_tokens))
        for _, questions in batch:
            yield [next(answers) for _ in questions]


@torch.inference_mode()
def _answer_batch(
    model: Llava, tokenizer: Tokenizer, groups: Sequence[tuple[Path, Sequence[str]]], max_new_tokens: int
) -> list[str]:
    vision = model.config.vision
    pixel_values = torch.stack([preprocess_image(open_image(path), vision.image_size) for path, _ in groups])
    trunks, questions = [], []
    for _, texts in groups:
        for text in texts:
            ids = render_conversation([Turn("human", text, has_image=True)], tokenizer, vision.num_patches).input_ids
            trunk_length = max(place for place, token in enumerate(ids) if token < 0) + 1
            questions.append(torch.tensor(ids[trunk_length:]))
        trunks.append(torch.tensor(ids[:trunk_length]))  # the same for every question about the picture
    trunk_cache = KVCache(model.language_model, len(trunks), len(trunks[0]))
    prefill(model, trunk_cache, trunks, model.encode_images(pixel_values))
    counts = torch.tensor([len(texts) for _, texts in groups])
    capacity = len(trunks[0]) + max(len(ids) for ids in questions) + max_new_tokens
    cache = trunk_cache.repeat(counts, capacity)
    steps = decode(model, cache, prefill(model, cache, questions), tokenizer.eos_token_id, max_new_tokens)
    return [tokenizer.decode(ids).strip() for ids in collect(steps, tokenizer.eos_token_id)]
