"""From a prompt to an answer: one prefill, then one token at a time against a static key/value cache.

A `KVCache` says what a token may look at (see `model/attention.py`), so generation runs the very layers that
training runs. Rows of a batch may differ in length: each row's keys lie at slots equal to their positions, and a
token sees the slots up to its own, so what padding wrote behind a row's end is never seen and soon overwritten.

Shapes: B rows, T tokens, L layers, K key/value heads, d head size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.llama import LlamaConfig
from model.llava import Llava


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # 0 takes the likeliest; above, probabilities are those of logits / temperature
    top_p: float = 1.0  # sample from the most probable tokens that hold this much of the probability
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"{self}: temperature is at least 0, top_p above 0 and at most 1")


GREEDY = Sampling()


class KVCache:
    """Keys and values of every layer for `num_rows` rows.

    `capacity` is the longest row, in tokens, plus the width of what is added to it: padding takes room, too.
    """

    def __init__(
        self, config: LlamaConfig, num_rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        shape = (config.num_hidden_layers, num_rows, config.num_key_value_heads, capacity, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)  # tokens each row holds
        self.used = 0  # no row has written a slot from here on, so none needs to be read

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def repeat(self, counts: Tensor, capacity: int) -> "KVCache":
        """Return a cache in which row i stands counts[i] times, with room for `capacity` tokens."""
        assert capacity >= self.used, "what the rows hold must fit"
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        new = KVCache(self.config, len(rows), capacity, self.keys.dtype, self.keys.device)
        new.keys[:, :, :, : self.used] = self.keys[:, :, :, : self.used].index_select(1, rows)
        new.values[:, :, :, : self.used] = self.values[:, :, :, : self.used].index_select(1, rows)
        new.lengths = self.lengths[rows]
        new.used = self.used
        return new

    def advance(self, num_tokens: Tensor, width: int) -> Tensor:
        """Make room for `num_tokens[i]` more tokens in row i, written `width` wide; return their positions (B, width).

        Raises: ValueError when the cache is full.
        """
        positions = self.lengths[:, None] + torch.arange(width, device=self.lengths.device)
        used = max(self.used, int(positions.max()) + 1)
        if used > self.capacity:
            raise ValueError(f"{used} tokens do not fit a cache of {self.capacity}: shorten the prompt or answer")
        self.positions, self.used = positions, used
        self.mask = (torch.arange(self.used, device=self.lengths.device) <= self.positions[:, :, None])[:, None]
        self.lengths = self.lengths + num_tokens
        return self.positions

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, K, T, d) at their positions; attend from q to all that came before."""
        keys, values = self.keys[layer_index], self.values[layer_index]
        slots = self.positions[:, None, :, None].expand_as(k)
        keys.scatter_(2, slots, k)
        values.scatter_(2, slots, v)
        return F.scaled_dot_product_attention(
            q, keys[:, :, : self.used], values[:, :, : self.used], attn_mask=self.mask, enable_gqa=True
        )


@torch.inference_mode()
def prefill(model: Llava, cache: KVCache, prompts: Sequence[Tensor], image_features: Tensor | None = None) -> Tensor:
    """Run the prompts behind what the cache holds already; return the logits of each row's next token.

    Shapes: prompts B x (T_i,), image_features (N, P, D) in reading order -> (B, V).
    Raises: ValueError for an empty prompt.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: it needs at least one token")
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=cache.lengths.device)
    input_ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(cache.lengths.device)
    position_ids = cache.advance(lengths, input_ids.shape[1])
    hidden_states = model(input_ids, position_ids, cache, image_features)
    last = hidden_states[torch.arange(len(prompts), device=lengths.device), lengths - 1]  # (B, T, D) -> (B, D)
    return model.language_model.lm_head(last)


@torch.inference_mode()
def decode(
    model: Llava,
    cache: KVCache,
    logits: Tensor,
    eos_token_id: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[Tensor]:
    """Yield the next token of every row (B,) until all rows have ended; a row that has ended yields EOS.

    Args:
        logits: what `prefill` returned, (B, V).
    """
    generator = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for step in range(max_new_tokens):
        tokens = sample(logits, sampling, generator).masked_fill(ended, eos_token_id)
        yield tokens
        ended |= tokens == eos_token_id
        if ended.all() or step + 1 == max_new_tokens:
            return
        position_ids = cache.advance(torch.ones_like(cache.lengths), 1)
        logits = model.language_model.lm_head(model(tokens[:, None], position_ids, cache)[:, -1])


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose one token per row. (B, V) -> (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / sampling.temperature).softmax(dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    # A token stays while the mass before it is below top_p; before the likeliest there is none.
    outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
    choice = ordered.masked_fill(outside, 0).multinomial(1, generator=generator)
    return order.gather(-1, choice).squeeze(-1)


def generate(
    model: Llava,
    prompts: Sequence[Tensor],
    pixel_values: Tensor | None,
    eos_token_id: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Answer a batch of prompts of any lengths; return each answer's token ids without EOS.

    Shapes: prompts B x (T_i,), pixel_values (N, 3, S, S) in reading order.
    """
    steps = generate_stream(model, prompts, pixel_values, eos_token_id, max_new_tokens, sampling)
    return collect(steps, eos_token_id)


def generate_stream(
    model: Llava,
    prompts: Sequence[Tensor],
    pixel_values: Tensor | None,
    eos_token_id: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[Tensor]:
    """Like `generate`, but yield (B,) tokens as they come.

    Raises: ValueError when there is nothing to answer, or prompt and answer do not fit the model's positions.
    """
    if max_new_tokens < 1 or not prompts:
        raise ValueError(f"{len(prompts)} prompts and max_new_tokens = {max_new_tokens}, expected at least 1 of each")
    weight = model.language_model.lm_head.weight
    capacity = max(len(prompt) for prompt in prompts) + max_new_tokens
    limit = model.config.text.max_position_embeddings
    if capacity > limit:
        raise ValueError(
            f"a prompt of {capacity - max_new_tokens} tokens and an answer of {max_new_tokens} exceed the model's "
            f"{limit} positions: shorten one of them"
        )
    cache = KVCache(model.config.text, len(prompts), capacity, weight.dtype, weight.device)
    with torch.inference_mode():
        image_features = None if pixel_values is None else model.encode_images(pixel_values)
        logits = prefill(model, cache, prompts, image_features)
    yield from decode(model, cache, logits, eos_token_id, max_new_tokens, sampling)


def collect(steps: Iterator[Tensor], eos_token_id: int) -> list[list[int]]:
    """Turn (B,) tokens step by step into one list of token ids per row, cut before EOS."""
    rows = torch.stack(list(steps), dim=1).tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in rows]
