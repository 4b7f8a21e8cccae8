"""Time answers: until the first token is known, and tokens per second from there on.

One picture and 64 words per row, the same random weights, greedy, no end of text. The peer is transformers' `generate`
as it comes (dynamic cache, bf16, SDPA), and with its static cache; on a GPU it compiles the latter by itself. Each
contestant is a new process, which answers once to warm up and once for the clock.

The limit of a decoded step is memory: every weight of the language model is read once for all rows, and every row's
keys and values. A share of the limit is (bytes of weights + bytes of keys and values) * (steps per second) / (bytes per
second at which a large tensor is summed), each contestant's bytes in its own dtypes: on CPUs this project's keys are
in fp32 and the peer's in bf16. Goals are set for batch 1.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.conversation import IMAGE_TOKEN_ID
from eval.measure import (
    describe_environment,
    format_median,
    make_goal,
    measure_read_bandwidth,
    print_goals,
    print_table,
    summarize,
    take_turns,
    wait_for,
)
from eval.speed_weights import HF_BF16, SIZES, load_transformers, prepare_checkpoint
from model.config import LlavaConfig
from model.generate import generate_stream, make_slots
from model.llama import LlamaConfig
from model.quantize import pack_for_decoding
from model.weights import load_llava

REPEATS = 3
NUM_WORDS = 64
CPU_ROWS_TIMES_TOKENS = 512  # on a CPU, many rows answer with fewer tokens each: their prefill takes minutes already
NO_END = -1  # no token's id: answers have all the tokens that are asked for


@dataclass(frozen=True)
class Contestant:
    bits: int = 16
    compile: bool = False
    peer_cache: str | None = None  # transformers' cache; None is this project


PEER = "transformers"
CONTESTANTS = {
    PEER: Contestant(peer_cache="dynamic"),
    "transformers, static cache": Contestant(peer_cache="static"),
    "ours, bf16": Contestant(),
    "ours, bf16, compiled": Contestant(compile=True),
    "ours, 8 bits": Contestant(bits=8),
    "ours, 8 bits, compiled": Contestant(bits=8, compile=True),
    "ours, 4 bits": Contestant(bits=4),
    "ours, 4 bits, compiled": Contestant(bits=4, compile=True),
}
CPU_DECODE_GOALS = {16: 1.15, 8: 1.8, 4: 2.3}  # x the peer's tokens per second, the faster of eager and compiled

Answer = Callable[[Tensor, Tensor, int, Callable[[Tensor], None]], None]


@dataclass(frozen=True)
class Measured:
    """One contestant's round at one batch size."""

    figures: dict[str, float]
    tokens: list[list[int]]


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one result per batch size."""
    device, repeats = arguments.device, arguments.repeats or REPEATS
    environment = describe_environment(device)
    folder = prepare_checkpoint(arguments.checkpoint_dir, arguments.size, HF_BF16)
    options = (folder, SIZES[arguments.size], device, arguments.batch_sizes, arguments.new_tokens)
    turns: dict[str, Callable[[], Any]] = {name: functools.partial(measure, name, *options) for name in CONTESTANTS}
    turns["reading memory"] = functools.partial(measure_read_bandwidth, device)
    rounds = take_turns(turns, repeats)
    bandwidth = statistics.median(rounds.pop("reading memory"))
    shared = {
        "suite": "generate",
        "size": arguments.size,
        "repeats": repeats,
        "prompt_tokens": 1 + SIZES[arguments.size].vision.num_patches + NUM_WORDS,
        "read_bandwidth_bytes_per_s": bandwidth,
        "environment": environment,
    }
    results = []
    for batch in arguments.batch_sizes:
        of_batch = {name: [row[batch] for row in rows] for name, rows in rounds.items()}
        summary = summarize({name: [row.figures for row in rows] for name, rows in of_batch.items()})
        ratio = compare_with_peer(summary["median"], batch, bandwidth)
        agreeing = {
            name: statistics.mean(map(count_agreeing, rows[0].tokens, of_batch[PEER][0].tokens))
            for name, rows in of_batch.items()
            if CONTESTANTS[name].bits == 16
        }
        sizes = {"batch": batch, "new_tokens": count_new_tokens(arguments.new_tokens, batch, device)}
        goals = list_goals(ratio, device) if batch == 1 else []
        results.append({**shared, **sizes, **summary, "ratio": ratio, "agreeing_tokens": agreeing, "goals": goals})
    return results


def count_new_tokens(new_tokens: int, batch: int, device: str) -> int:
    """Return how many tokens each of so many rows answers with."""
    return new_tokens if device != "cpu" else max(2, min(new_tokens, CPU_ROWS_TIMES_TOKENS // batch))


def compare_with_peer(median: dict[str, dict[str, float]], batch: int, bandwidth: float) -> dict[str, dict[str, float]]:
    """Return every contestant's figures as parts of the peer's and of the limit."""
    peer, ratio = median[PEER], {}
    for name, row in median.items():
        bytes_per_s = row["read_per_step_bytes"] * row["decoded_tokens_per_s"] / batch
        ratio[name] = {
            "first_token_to_transformers": row["first_token_s"] / peer["first_token_s"],
            "decode_to_transformers": row["decoded_tokens_per_s"] / peer["decoded_tokens_per_s"],
            "share_of_bandwidth": bytes_per_s / bandwidth,
        }
    return ratio


def measure(
    name: str, folder: Path, config: LlavaConfig, device: str, batch_sizes: Sequence[int], most_new_tokens: int
) -> dict[int, Measured]:
    """Load the model and answer one batch of each size; the process is new."""
    contestant = CONTESTANTS[name]
    prepare = prepare_ours if contestant.peer_cache is None else prepare_transformers
    answer, decoder, cache_dtype = prepare(contestant, folder, device)
    results = {}
    for batch in batch_sizes:
        new_tokens = count_new_tokens(most_new_tokens, batch, device)
        ids, pictures = make_prompts(config, batch, device)
        warm_up(answer, ids, pictures, new_tokens)
        tokens: list[Tensor] = []
        seen_at: list[float] = []

        def note(
            token: Tensor, tokens: list[Tensor] = tokens, seen_at: list[float] = seen_at, last: int = new_tokens
        ) -> None:
            tokens.append(token)
            if len(tokens) in (1, last):
                wait_for(device)
                seen_at.append(time.perf_counter())

        wait_for(device)
        started = time.perf_counter()
        answer(ids, pictures, new_tokens, note)
        first, last = seen_at
        weights = count_step_bytes(decoder)
        # A step sees the prompt and the tokens so far; of the steps between the two clocks, the mean.
        caches = count_cache_bytes(config.text, batch, ids.shape[1] + new_tokens / 2, cache_dtype)
        figures = {
            "first_token_s": first - started,
            "decoded_tokens_per_s": batch * (new_tokens - 1) / (last - first),
            "weights_per_step_bytes": weights,
            "read_per_step_bytes": weights + caches,
        }
        results[batch] = Measured(figures, torch.stack(tokens, dim=1).tolist())
    return results


def warm_up(answer: Answer, ids: Tensor, pictures: Tensor, new_tokens: int) -> None:
    """Answer once: a GPU records its graphs for the very shapes, a CPU only reads its files and compiles a step."""
    if ids.device.type == "cpu":
        ids, pictures, new_tokens = ids[:2], pictures[:2], min(new_tokens, 4)
    answer(ids, pictures, new_tokens, lambda _: None)


def make_prompts(config: LlavaConfig, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Return ids (B, 1 + P + 64) with placeholders for the picture, and pictures (B, 3, S, S), other ones each row."""
    generator = torch.Generator().manual_seed(0)
    size, num_patches = config.vision.image_size, config.vision.num_patches
    words = torch.randint(3, config.text.vocab_size, (batch, NUM_WORDS), generator=generator)
    pictures = torch.randn(batch, 3, size, size, generator=generator)
    begin, placeholders = torch.full((batch, 1), 1), torch.full((batch, num_patches), IMAGE_TOKEN_ID)
    return torch.cat([begin, placeholders, words], dim=1).to(device), pictures.to(device, torch.bfloat16)


def prepare_ours(contestant: Contestant, folder: Path, device: str) -> tuple[Answer, nn.Module, torch.dtype]:
    model = load_llava(folder, device=device, bits=contestant.bits)
    if contestant.bits == 4 and device == "cpu":
        pack_for_decoding(model)

    def answer(ids: Tensor, pictures: Tensor, new_tokens: int, note: Callable[[Tensor], None]) -> None:
        for tokens in generate_stream(model, list(ids), pictures, NO_END, new_tokens, compile=contestant.compile):
            note(tokens)

    return answer, model.language_model, make_slots(model.language_model, 1, 1)[0].dtype


def prepare_transformers(contestant: Contestant, folder: Path, device: str) -> tuple[Answer, nn.Module, torch.dtype]:
    model = load_transformers(folder, device)
    model.generation_config.eos_token_id = None
    options = {"cache_implementation": "static"} if contestant.peer_cache == "static" else {}

    def answer(ids: Tensor, pictures: Tensor, new_tokens: int, note: Callable[[Tensor], None]) -> None:
        ids = torch.where(ids == IMAGE_TOKEN_ID, model.config.image_token_id, ids)
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pictures, do_sample=False,
            max_new_tokens=new_tokens, streamer=Streamer(note), **options,
        )  # fmt: skip

    return answer, nn.ModuleList([model.model.language_model, model.lm_head]), model.dtype


class Streamer:
    """Hands on the tokens that `generate` shows, but not the prompt, which it shows first."""

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        self.note, self.is_prompt = note, True

    def put(self, tokens: Tensor) -> None:
        if not self.is_prompt:
            self.note(tokens)
        self.is_prompt = False

    def end(self) -> None:
        pass


def count_step_bytes(decoder: nn.Module) -> int:
    """Return the bytes of all weights that a step reads whole: of the table of words it reads only a row."""
    tensors = dict(decoder.named_parameters())
    unread = ["embed_tokens"]
    if any("packed_codes" in name for name in tensors):
        unread += ["weight_codes", "weight_scale", "weight_zero"]  # for many rows, see `model/quantize.py`
    return sum(tensor.nbytes for name, tensor in tensors.items() if not any(part in name for part in unread))


def count_cache_bytes(config: LlamaConfig, batch: int, num_tokens: float, dtype: torch.dtype) -> float:
    """Return the bytes of keys and values of all rows, layers and so many tokens."""
    numbers_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size
    return batch * num_tokens * numbers_per_token * dtype.itemsize


def count_agreeing(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return how many of the first tokens are the same."""
    differs = [index for index, (our, their) in enumerate(zip(ours, theirs, strict=True)) if our != their]
    return differs[0] if differs else len(ours)


def list_goals(ratio: dict[str, dict[str, float]], device: str) -> list[dict[str, Any]]:
    """Set beside its goals whichever of eager and compiled decodes faster."""
    goals = []
    for bits, decode_goal in CPU_DECODE_GOALS.items():
        names = [name for name, other in CONTESTANTS.items() if other.bits == bits and other.peer_cache is None]
        best = max(names, key=lambda name: ratio[name]["decode_to_transformers"])
        decode, first = (ratio[best][f"{figure}_to_transformers"] for figure in ("decode", "first_token"))
        if device == "cpu":
            goals.append(make_goal(f"{best}: x transformers' decoded tokens/s", decode, at_least=decode_goal))
        elif bits == 16:
            share = ratio[best]["share_of_bandwidth"]
            goals.append(make_goal(f"{best}: x transformers' decoded tokens/s", decode, at_least=4.0))
            goals.append(make_goal(f"{best}: share of the limit", share, at_least=0.75))
        goals.append(make_goal(f"{best}: x transformers' time to the first token", first, at_most=1.05))
    return goals


def print_result(result: dict[str, Any]) -> None:
    """Print one row per contestant, then the goals."""
    new_tokens = result["new_tokens"]
    print(
        f"answering with {result['size']}, batch {result['batch']}, {result['prompt_tokens']} tokens of prompt, ",
        end="",
    )
    print(f"{new_tokens} of answer: medians (lowest to highest) of {result['repeats']}\n")
    titles = ["ms to first token", "x peer", "decoded tokens/s", "x peer", "MB weights", "MB per step", "of limit"]
    rows = [["", *titles, "as peer"]]
    for name, row in result["median"].items():
        ratio, agreeing = result["ratio"][name], result["agreeing_tokens"].get(name)
        rows.append(
            [
                name,
                format_median(result, name, "first_token_s", 1000),
                f"{ratio['first_token_to_transformers']:.2f}",
                format_median(result, name, "decoded_tokens_per_s"),
                f"{ratio['decode_to_transformers']:.2f}",
                f"{row['weights_per_step_bytes'] / 1e6:.1f}",
                f"{row['read_per_step_bytes'] / 1e6:.1f}",
                f"{ratio['share_of_bandwidth']:.2f}",
                "-" if agreeing is None else f"{agreeing:.1f} of {new_tokens}",
            ]
        )
    print_table(rows)
    bandwidth = result["read_bandwidth_bytes_per_s"] / 1e9
    print(f"limit: {bandwidth:.1f} GB/s, at which as many threads sum 1 GiB; share = MB per step x steps/s / limit")
    print("MB per step: weights, and keys and values of prompt and answer so far, each in its dtype; mean of the steps")
    print("as peer: the first tokens of an answer that are the peer's, mean of the rows; bf16 rounds differently\n")
    if result["goals"]:
        print_goals(result["goals"])
