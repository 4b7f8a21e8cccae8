"""From a prompt to an answer: one prefill, then one token at a time against a static key/value cache.

What a token may look at is an object (see `model/attention.py`), so generation runs the very layers that training
runs. Rows of a batch may differ in length: each row's keys lie at slots equal to their positions, and a token sees
the slots up to its own, so what padding wrote behind a row's end is never seen and soon overwritten.

Many questions about one picture share what they begin with: that is `BranchedCache`, and `eval/predict.py` decides
which question grows where.

Shapes: B rows, T tokens, N images of P patches, C slots of the cache, K key/value heads, d head size,
V words of the vocabulary.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import BranchedAttention, CachedAttention, TrunkAttention
from model.llama import Llama
from model.llava import Llava
from model.sampling import GREEDY, Sampling, choose_tokens, make_draws

COMPILED_SLOTS = 256  # compiled steps look at a multiple of this many slots, so that few shapes are compiled
BRANCH_SLOTS = 64  # a cache of branches grows by a multiple of this many slots


class KVCache:
    """Keys and values of every layer for `num_rows` rows, and which words each row has seen.

    `capacity` is the longest row, in tokens, plus the width of what is added to it: padding takes room, too.
    """

    def __init__(self, llama: Llama, num_rows: int, capacity: int) -> None:
        self.capacity, self.device = capacity, llama.lm_head.weight.device
        # One slot more than is ever looked at: "all of the slots" would be another case to compile.
        self.keys, self.values = (make_slots(llama, num_rows, capacity + 1) for _ in range(2))
        self.seen = torch.zeros(num_rows, llama.config.num_words, dtype=torch.bool, device=self.device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long)  # tokens each row holds; on the CPU, so nothing waits
        self.used = 0  # no row has written a slot from here on, so none needs to be read

    def advance(self, num_tokens: Tensor, width: int, fixed_shapes: bool = False) -> CachedAttention:
        """Make room for `num_tokens[i]` more tokens in row i, written `width` wide; return how they attend.

        Raises: ValueError when the cache is full.
        """
        positions = self.lengths[:, None] + torch.arange(width)
        used = max(self.used, int(positions.max()) + 1)
        if used > self.capacity:
            raise ValueError(f"{used} tokens do not fit a cache of {self.capacity}: shorten the prompt or answer")
        start, num_slots = None, used
        if fixed_shapes:
            num_slots = min(round_up(used, COMPILED_SLOTS), self.capacity)
        elif (self.lengths == self.lengths[0]).all():
            start = int(self.lengths[0])
            num_slots = start + width  # behind that, padding of earlier calls may lie
        self.lengths, self.used = self.lengths + num_tokens, used
        return CachedAttention(self.keys, self.values, positions.to(self.device), num_slots, start)


class BranchedCache:
    """Keys and values of trunks, each stored once, and of the branches that grow on them; for greedy answers.

    G trunks have J branches each, numbered g * J + j. A branch holds what follows its trunk; there is always room.
    """

    def __init__(self, llama: Llama, num_trunks: int, num_branches: int, trunk_length: int) -> None:
        self.num_branches, self.device = num_branches, llama.lm_head.weight.device
        self.trunk_keys, self.trunk_values = (make_slots(llama, num_trunks, trunk_length) for _ in range(2))
        self.keys, self.values = (
            [
                slots.unflatten(0, (num_trunks, num_branches))
                for slots in make_slots(llama, num_trunks * num_branches, 0)
            ]
            for _ in range(2)
        )
        self.lengths = [0] * (num_trunks * num_branches)  # tokens each branch holds

    def advance(self, rows: Sequence[int], num_tokens: Sequence[int]) -> BranchedAttention:
        """Make room for `num_tokens[i]` more tokens in branch `rows[i]`; return how they attend."""
        starts = [self.lengths[row] for row in rows]
        for row, count in zip(rows, num_tokens, strict=True):
            self.lengths[row] += count
        missing = max(self.lengths[row] for row in rows) - self.keys[0].shape[-2]
        if missing > 0:
            room = (0, 0, 0, round_up(missing, BRANCH_SLOTS))
            for tensors in (self.keys, self.values):
                tensors[:] = [F.pad(tensor, room) for tensor in tensors]
        trunks, branches = (self.trunk_keys, self.trunk_values), (self.keys, self.values)
        return BranchedAttention(trunks, branches, rows, starts, num_tokens)


@torch.inference_mode()  # or these would be views, and who compiles them looks at what they are views of
def make_slots(llama: Llama, num_rows: int, num_slots: int) -> list[Tensor]:
    """Return zeros (num_rows, K, num_slots, d) for every layer."""
    config, weight = llama.config, llama.lm_head.weight
    # CPUs without bf16 arithmetic attend 3 to 7 times faster in fp32, and have the memory.
    dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
    shape = (config.num_hidden_layers, num_rows, config.num_key_value_heads, num_slots, config.head_size)
    # In one piece: the C library gives many small ones back to the system after an answer, and faults them in again.
    return list(torch.zeros(shape, dtype=dtype, device=weight.device))


@torch.inference_mode()
def prefill_trunks(
    model: Llava, cache: BranchedCache, places: Sequence[int], trunk: Tensor, image_features: Tensor | None = None
) -> None:
    """Run the same words with other pictures, and store what comes of it as the trunks `places`.

    Shapes: trunk (T,), image_features (N, P, D), N the number of places, or None where the trunk has no placeholders.
    """
    position_ids = torch.arange(len(trunk), device=cache.device).expand(len(places), -1)
    input_ids = trunk.to(cache.device).expand(len(places), -1)
    attend = TrunkAttention(cache.trunk_keys, cache.trunk_values, torch.tensor(places, device=cache.device))
    model(input_ids, position_ids, attend, image_features)


@torch.inference_mode()
def extend_branches(model: Llava, cache: BranchedCache, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Run more tokens of the branches `rows`; return the logits of each one's next token. -> (rows, V)."""
    llama, lengths = model.language_model, [len(piece) for piece in tokens]
    attend = cache.advance(rows, lengths)
    input_ids = torch.tensor([[token for piece in tokens for token in piece]], device=cache.device)
    hidden_states = llama(llama.embed_tokens(input_ids), attend.position_ids, attend)
    last = hidden_states[0, torch.tensor(lengths).cumsum(0) - 1]  # (1, N, D) -> (rows, D)
    return llama.lm_head(last)[:, : llama.config.num_words]


@torch.inference_mode()
def prefill(model: Llava, cache: KVCache, prompts: Sequence[Tensor], image_features: Tensor | None = None) -> Tensor:
    """Run the prompts behind what the cache holds already; return the logits of each row's next token.

    Shapes: prompts B x (T_i,), image_features (N, P, D) in reading order -> (B, V).
    Raises: ValueError for an empty prompt.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: it needs at least one token")
    for row, prompt in enumerate(prompts):
        cache.seen[row, prompt[prompt >= 0].to(cache.device)] = True
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    input_ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(cache.device)
    attend = cache.advance(lengths, input_ids.shape[1])
    hidden_states = model(input_ids, attend.position_ids, attend, image_features)
    last = hidden_states[torch.arange(len(prompts)), lengths - 1]  # (B, T, D) -> (B, D)
    return model.language_model.lm_head(last)[:, : model.config.text.num_words]


@torch.inference_mode()
def decode(
    model: Llava,
    cache: KVCache,
    logits: Tensor,
    eos_token_id: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    compile: bool = False,
    has_ended: Callable[[list[int]], bool] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row (B,) until all rows have ended; a row that has ended yields EOS.

    Args:
        logits: what `prefill` returned, (B, V).
        compile: run the steps through `torch.compile`: once per process it takes a minute, then each is faster.
        has_ended: called with a row's answer so far, in tokens; True ends the row behind it, as EOS would.
    """
    run_step = compile_step(logits.device.type) if compile else step
    draws = make_draws(sampling, len(logits), max_new_tokens, logits.device)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    answers: list[list[int]] = [[] for _ in logits]
    for index in range(max_new_tokens):
        tokens = choose_tokens(logits, sampling, cache.seen, draws[index]).masked_fill(ended, eos_token_id)
        yield tokens
        if has_ended is not None:
            for row, (token, is_over) in enumerate(zip(tokens.tolist(), ended.tolist(), strict=True)):
                if not is_over:
                    answers[row].append(token)
                    ended[row] = has_ended(answers[row])
        ended |= tokens == eos_token_id
        if ended.all() or index + 1 == max_new_tokens:
            return
        cache.seen.scatter_(1, tokens[:, None], True)
        attend = cache.advance(torch.ones_like(cache.lengths), 1, fixed_shapes=compile)
        logits = run_step(model.language_model, tokens, attend)


def step(llama: Llama, tokens: Tensor, attend: CachedAttention) -> Tensor:
    """Run one token per row; return the logits of the next. (B,) -> (B, V)."""
    hidden_states = llama(llama.embed_tokens(tokens[:, None]), attend.position_ids, attend)
    return llama.lm_head(hidden_states[:, -1])[:, : llama.config.num_words]


def generate(
    model: Llava,
    prompts: Sequence[Tensor],
    pixel_values: Tensor | None,
    eos_token_id: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    compile: bool = False,
    has_ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Answer a batch of prompts of any lengths; return each answer's token ids without EOS.

    Shapes: prompts B x (T_i,), pixel_values (N, 3, S, S) in reading order.
    """
    steps = generate_stream(model, prompts, pixel_values, eos_token_id, max_new_tokens, sampling, compile, has_ended)
    return collect(steps, eos_token_id)


def generate_stream(
    model: Llava,
    prompts: Sequence[Tensor],
    pixel_values: Tensor | None,
    eos_token_id: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    compile: bool = False,
    has_ended: Callable[[list[int]], bool] | None = None,
) -> Iterator[Tensor]:
    """Like `generate`, but yield (B,) tokens as they come. Whoever has read enough stops reading.

    Raises: ValueError when there is nothing to answer, or prompt and answer do not fit the model's positions.
    """
    if max_new_tokens < 1 or not prompts:
        raise ValueError(f"{len(prompts)} prompts and max_new_tokens = {max_new_tokens}, expected at least 1 of each")
    capacity = max(len(prompt) for prompt in prompts) + max_new_tokens
    limit = model.config.text.max_position_embeddings
    if capacity > limit:
        raise ValueError(
            f"a prompt of {capacity - max_new_tokens} tokens and an answer of {max_new_tokens} exceed the model's "
            f"{limit} positions: shorten one of them"
        )
    if compile:
        capacity = round_up(capacity, COMPILED_SLOTS)
    cache = KVCache(model.language_model, len(prompts), capacity)
    with torch.inference_mode():
        image_features = None if pixel_values is None else model.encode_images(pixel_values)
        logits = prefill(model, cache, prompts, image_features)
    yield from decode(model, cache, logits, eos_token_id, max_new_tokens, sampling, compile, has_ended)


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def collect(steps: Iterator[Tensor], eos_token_id: int) -> list[list[int]]:
    """Turn (B,) tokens step by step into one list of token ids per row, cut before EOS."""
    rows = torch.stack(list(steps), dim=1).tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in rows]


@functools.cache
def compile_step(device_type: str) -> Callable[[Llama, Tensor, CachedAttention], Tensor]:
    """Return `step` through `torch.compile`, on GPUs as CUDA graphs; if that fails, warn once and run it as it is."""
    compiled: Callable[..., Tensor] | None = None
    is_possible = True

    def run(llama: Llama, tokens: Tensor, attend: CachedAttention) -> Tensor:
        nonlocal compiled, is_possible
        if is_possible:
            try:
                if compiled is None:
                    # Dynamic: rows and slots of any number are compiled once (and one row once more).
                    compiled = torch.compile(
                        step, dynamic=True, mode="reduce-overhead" if device_type == "cuda" else None
                    )
                for tensor in (*attend.keys, *attend.values):
                    torch._dynamo.mark_static_address(tensor)  # a CUDA graph may write into these, and only these
                    torch._dynamo.mark_static(tensor, [1, 3])  # heads are not rows, even where they are as many
                torch.compiler.cudagraph_mark_step_begin()
                return compiled(llama, tokens, attend).clone()  # the graph's next run writes over its output
            except Exception as error:  # of any kind: no compiler, an operation without translation, an old driver
                is_possible = False
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                print(f"warning: torch.compile failed, generating without it: {reason}", file=sys.stderr)
        return step(llama, tokens, attend)  # what a failed attempt has stored is stored again

    return run
