"""Plan a stage without a GPU: `python train/plan.py CONFIG.toml [key=value ...] [--world-size 8 --card-gib 32 ...]`.

Says what one card's memory holds and how long a step takes, which token budget fits, and how few layers need to be
checkpointed. The peak is found by running the real objective under the real FSDP for one optimizer step, with tensors
that have shapes but no memory, and collectives that reach nobody; the rest is arithmetic. A GPU's own kernels may need
some working memory that the CPU's, which are simulated, do not.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from data.conversation import IMAGE_TOKEN_ID  # noqa: E402
from data.packing import Batch  # noqa: E402
from data.rows import RowFile  # noqa: E402
from model.config import CONFIGS, MODEL_TYPE, VIT_L_14_336, LlavaConfig  # noqa: E402
from model.files import read_json  # noqa: E402
from model.layouts import read_llama_config  # noqa: E402
from model.llava import Llava  # noqa: E402
from train.config import TrainConfig, load_configs  # noqa: E402
from train.memory import (  # noqa: E402
    CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    NCCL_BYTES,
    SUPERVISED_SHARE,
    TOKENS_PER_DOCUMENT,
    TOKENS_STEP,
    LiveMemory,
    Workload,
    add_reserve,
    count_weights,
    estimate_memory,
    list_linears,
    number_bytes,
    plan_workload,
)
from train.optim import make_optimizer  # noqa: E402
from train.parallel import Ranks, backward, shard, start_fake_ranks  # noqa: E402
from train.stage import build_objective  # noqa: E402

NAMES = {"7b": "llava-1.5-7b", "13b": "llava-1.5-13b"}
KINDS = {
    "weights": "weights, this card's share",
    "optimizer": "AdamW's state",
    "gradients": "gradients on their way to the other cards",
    "gathered": "weights gathered from the other cards",
    "batch": "the batch",
    "forward": "activations kept by the forward pass",
    "logits": "logits",
    "backward": "activations computed again, gradients of activations, gradients that wait",
}
RESERVE = (
    f"CUDA context {CONTEXT_BYTES / GIB:g}, NCCL {NCCL_BYTES / GIB:g}, gaps between the allocator's blocks "
    f"{FRAGMENTATION:.0%}"
)
SHALLOW = 5  # layers up to which a model is simulated as it is, without extrapolating


@dataclass(frozen=True)
class Machine:
    """What a plan is made for."""

    num_ranks: int
    num_local: int  # ranks in a machine
    card_bytes: float
    bus_bytes_per_s: float  # of NCCL's collectives between the cards
    flops: float  # one card's, sustained from end to end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="one stage's .toml file, then key=value as for train/main.py")
    parser.add_argument("--size", choices=NAMES, help="of a model that is not on this machine")
    parser.add_argument("--world-size", type=int, default=8, help="cards")
    parser.add_argument("--cards-per-machine", type=int, help="by default all of them")
    parser.add_argument("--card-gib", type=float, help="memory of a card; by default the stage's card_gib, or 32")
    parser.add_argument("--tokens-per-card", type=int, help="the stage's micro_batch_tokens")
    parser.add_argument("--busbw", type=float, default=20, help="GB/s of NCCL between the cards (all_gather's busbw)")
    parser.add_argument("--tflops", type=float, default=145, help="of one card in matrix products, end to end")
    parser.add_argument("--documents", type=int, help="rows of the data file, where it is not on this machine")
    parser.add_argument("--tokens-per-document", type=float, default=TOKENS_PER_DOCUMENT, help="their mean length")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_intermixed_args()
    files = [Path(text) for text in arguments.settings if text.endswith(".toml") and "=" not in text]
    overrides = [text for text in arguments.settings if Path(text) not in files]
    if arguments.tokens_per_card:
        overrides.append(f"micro_batch_tokens={arguments.tokens_per_card}")
    if len(files) != 1 or min(arguments.world_size, arguments.busbw, arguments.tflops) <= 0:
        parser.error("expected one .toml file, and figures above 0")
    try:
        (config,) = load_configs(files, overrides)
        sizes, note = find_sizes(config, arguments.size)
        machine = Machine(
            arguments.world_size,
            arguments.cards_per_machine or arguments.world_size,
            (arguments.card_gib or config.card_gib or 32) * GIB,
            arguments.busbw * 1e9,
            arguments.tflops * 1e12,
        )
        plan = make_plan(config, sizes, machine, arguments.tokens_per_document, count_documents(config, arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print_plan(plan, config, machine, note)
    if arguments.json:
        print(json.dumps(plan))


def find_sizes(config: TrainConfig, size: str | None) -> tuple[LlavaConfig, str]:
    """Return a model's architecture, and how it is known. Nothing is downloaded.

    Raises: ValueError when neither a file nor its name tells.
    """
    if size:
        return CONFIGS[NAMES[size]], f"--size {size}"
    if config.model in CONFIGS:
        return CONFIGS[config.model], config.model
    for place in (config.base, config.model):
        file = Path(place) / "config.json"
        if place and file.is_file():
            values = read_json(file)
            if values.get("model_type") == MODEL_TYPE:
                return LlavaConfig.from_dict(values), str(file)
            return LlavaConfig(VIT_L_14_336, read_llama_config(values)), f"{file}, and CLIP's ViT-L/14-336"
    text = f"{config.model} {config.base} {config.name}".lower()
    guesses = [name for name in NAMES if name in text]
    if len(guesses) != 1:
        raise ValueError(f"the size of model = {config.model!r} is not known on this machine: use --size 7b or 13b")
    return CONFIGS[NAMES[guesses[0]]], f"guessed from {guesses[0]!r} in its name, as it is not on this machine"


def count_documents(config: TrainConfig, arguments: argparse.Namespace) -> int | None:
    if arguments.documents:
        return arguments.documents
    return len(RowFile(Path(config.data))) if Path(config.data).is_file() else None


def make_plan(
    config: TrainConfig,
    sizes: LlavaConfig,
    machine: Machine,
    tokens_per_document: float,
    num_documents: int | None,
) -> dict[str, Any]:
    """Simulate the stage as it is set, search what fits best, and reckon the time of both.

    Raises: ValueError for a stage that cannot be planned.
    """
    if config.train == "vision":
        raise ValueError("train = 'vision' depends on the data's captions: stages with a LLaMA are planned")
    started = time.perf_counter()
    ranks = start_fake_ranks(machine.num_ranks, machine.num_local, torch.device("cpu"))
    work = plan_workload(config, machine.num_ranks, tokens_per_document)
    half = replace(work, num_tokens=work.num_tokens // 2, num_documents=-(-work.num_documents // 2))
    num_layers = sizes.text.num_hidden_layers
    config = replace(config, checkpoint_layers=min(config.checkpoint_layers, num_layers))
    memory = simulate(config, sizes, work, ranks)
    peaks, half_peaks = (extrapolate(config, sizes, tokens, ranks) for tokens in (work, half))

    def find_budget(num_checkpointed: int) -> int:
        """Follow the straight line through the peaks of this budget and half of it to where the card is full."""
        needed, half_needed = (add_reserve(peak(num_checkpointed)) for peak in (peaks, half_peaks))
        per_token = (needed - half_needed) / (work.num_tokens - half.num_tokens)
        tokens = work.num_tokens + (machine.card_bytes - needed) / per_token
        return max(0, int(tokens // TOKENS_STEP) * TOKENS_STEP)

    fitting = (k for k in range(num_layers + 1) if add_reserve(peaks(k)) <= machine.card_bytes)
    best = next(fitting, None)
    times, best_times = (
        reckon_times(replace(config, checkpoint_layers=k), sizes, work, machine, tokens_per_document)
        for k in (config.checkpoint_layers, num_layers if best is None else best)
    )
    estimate = estimate_memory(config, sizes, machine.num_ranks, machine.num_local, work)
    return {
        "tokens_per_card": work.num_tokens,
        "micro_batches": work.num_micro_batches,
        "checkpoint_layers": config.checkpoint_layers,
        "layers": num_layers,
        "peak_gib": memory.peak / GIB,
        "at_peak_gib": {kind: size / GIB for kind, size in memory.at_peak.items() if size},
        "reserve_gib": (add_reserve(memory.peak) - memory.peak) / GIB,
        "card_gib": machine.card_bytes / GIB,
        "fits": add_reserve(memory.peak) <= machine.card_bytes,
        "extrapolated_peak_gib": peaks(config.checkpoint_layers) / GIB,
        "estimated_peak_gib": sum(estimate.values()) / GIB,
        "estimated_parts_gib": {kind: size / GIB for kind, size in estimate.items()},
        "best_checkpoint_layers": best,
        "best_step_s": None if best is None else best_times["step_s"],
        "max_tokens_per_card": find_budget(config.checkpoint_layers),
        "max_tokens_per_card_all_checkpointed": find_budget(num_layers),
        **times,
        "epoch_h": num_documents and math.ceil(num_documents / config.batch_size) * times["step_s"] / 3600,
        "planned_in_s": time.perf_counter() - started,
    }


def simulate(config: TrainConfig, sizes: LlavaConfig, work: Workload, ranks: Ranks, is_fake: bool = True) -> LiveMemory:
    """Run one optimizer step with every allocation counted; the optimizer's state is there when it starts.

    Args:
        is_fake: give tensors no memory. On real ranks, tensors must be real.
    """
    memory = LiveMemory(sizes.text.vocab_size)
    llava, objective = build_objective(config, sizes)
    shard(objective, objective.blocks(), config.parallel, getattr(torch, config.dtype), ranks)
    if is_fake:
        llava.embed = MethodType(embed_without_looking, llava)  # type: ignore[method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True) if is_fake else nullcontext(), memory:
        memory.phase = "weights"
        objective.to_empty(device=ranks.device)
        memory.phase = "optimizer"
        optimizer = make_optimizer(objective, {"": config.learning_rate}, config.weight_decay, config.beta2)
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        # Also because sharded tensors work out their shapes at first use, with whole tensors that would be counted.
        update(optimizer)
        memory.phase = "batch"
        # Beyond the second, micro-batches meet what the second met.
        num_batches = min(2, work.num_micro_batches)
        batches = [make_batch(work, sizes, config, ranks.device) for _ in range(num_batches)]
        memory.forget_peak()
        for phase in run_step(objective, optimizer, batches, ranks):
            memory.phase = phase
    return memory


def run_step(
    objective: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], ranks: Ranks
) -> Iterator[str]:
    """Do what `train.loop.do_step` does, but look at no number: fake tensors have none. Yields what comes next."""
    for index, batch in enumerate(batches):
        yield "forward"
        loss_sum, _ = objective(batch)
        yield "backward"
        backward(loss_sum, objective, ranks, is_last=index + 1 == len(batches))
        del loss_sum
    yield "optimizer"
    update(optimizer)


def update(optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_([parameter for group in optimizer.param_groups for parameter in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def make_batch(work: Workload, sizes: LlavaConfig, config: TrainConfig, device: torch.device) -> Batch:
    """Return documents of equal length; where they have room for it, each begins with a picture."""
    borders = [work.num_tokens * index // work.num_documents for index in range(work.num_documents + 1)]
    num_patches, size, width = sizes.vision.num_patches, sizes.vision.image_size, sizes.vision.hidden_size
    has_images = config.train != "language" and work.num_tokens > num_patches * work.num_documents
    num_images = work.num_documents if has_images else 0
    input_ids = torch.zeros(work.num_tokens, dtype=torch.long, device=device)
    for start in borders[:num_images]:
        input_ids[start : start + num_patches] = IMAGE_TOKEN_ID
    pixels = features = None
    if num_images and config.features:
        features = torch.zeros(num_images, num_patches, width, dtype=torch.bfloat16, device=device)
    elif num_images:
        pixels = torch.zeros(num_images, 3, size, size, device=device)
    return Batch(
        input_ids=input_ids,
        labels=torch.zeros_like(input_ids),
        supervised=torch.arange(1, 1 + int(SUPERVISED_SHARE * work.num_tokens), device=device),
        position_ids=torch.zeros_like(input_ids),
        branch_ids=None,
        cu_seqlens=borders,
        pixel_values=pixels,
        patch_features=features,
        rows=[],
    )


def embed_without_looking(llava: Llava, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
    """Stand in for `Llava.embed`, which looks where the placeholders are. The same sizes in another order."""
    words = llava.language_model.embed_tokens(input_ids.clamp(min=0))
    if image_features is None:
        return words
    features = image_features.flatten(0, 1)[None].to(words.dtype)
    return torch.cat([features, words[:, features.shape[1] :]], dim=1)


def extrapolate(config: TrainConfig, sizes: LlavaConfig, work: Workload, ranks: Ranks) -> Callable[[int], float]:
    """Return the peak's bytes by the number of checkpointed layers, on straight lines through shallow models' peaks."""

    @functools.cache
    def peak(num_checkpointed: int, num_kept: int) -> int:
        text = replace(sizes.text, num_hidden_layers=num_checkpointed + num_kept)
        shallow = replace(config, checkpoint_layers=num_checkpointed)
        return simulate(shallow, replace(sizes, text=text), work, ranks).peak

    def of_the_whole(num_checkpointed: int) -> float:
        num_kept = num_layers - num_checkpointed
        if num_layers <= SHALLOW:
            return peak(num_checkpointed, num_kept)
        per_checkpointed = (peak(5, 0) - peak(3, 0)) / 2
        if num_kept == 0:
            return peak(3, 0) + (num_checkpointed - 3) * per_checkpointed
        per_kept = (peak(2, 3) - peak(2, 1)) / 2
        return peak(2, 1) + (num_checkpointed - 2) * per_checkpointed + (num_kept - 1) * per_kept

    num_layers = sizes.text.num_hidden_layers
    return of_the_whole


def reckon_times(
    config: TrainConfig,
    sizes: LlavaConfig,
    work: Workload,
    machine: Machine,
    tokens_per_document: float,
) -> dict[str, float]:
    """Return one step's seconds of computing and communicating, on average documents.

    Gathering travels while the card computes, so a micro-batch takes the longer of the two; gradients are exchanged
    after the last one, which nothing hides.
    """
    text, vision, weights, width = sizes.text, sizes.vision, count_weights(config, sizes), number_bytes(config)
    documents = config.batch_size / machine.num_ranks
    tokens = documents * tokens_per_document
    num_matrices = sum(i * o for i, o in list_linears(text).values())
    adapters = weights.layer.num_trained if config.train == "lora" else 0
    share = config.checkpoint_layers / text.num_hidden_layers
    # Forward, and once more where it is computed again; the gradient that passes through; that of what is trained.
    per_token = (4 + 2 * share) * (num_matrices + adapters) + 2 * weights.layer.num_trained
    attention = (3 + share) * 2 * text.hidden_size * tokens_per_document  # a token sees half its document
    head = SUPERVISED_SHARE * (6 if weights.head.num_trained else 4) * text.vocab_size * text.hidden_size
    tower = 2 * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    tower *= weights.num_tower_layers * (vision.num_patches + 1) * (3 if weights.tower_layer.num_trained else 1)
    flop = tokens * (text.num_hidden_layers * (per_token + attention) + head) + documents * tower

    num_shards = {"fsdp": machine.num_ranks, "hsdp": machine.num_local, "ddp": 1}[config.parallel]
    layer, tower_layer, ends = (
        sum(group.frozen_bytes + width * group.num_trained for group in groups)
        for groups in ((weights.layer,), (weights.tower_layer,), (weights.embedding, weights.head, weights.root))
    )
    gathered = 2 * weights.num_layers * layer + weights.num_tower_layers * tower_layer + ends
    gather_s = work.num_micro_batches * gathered * (num_shards - 1) / num_shards / machine.bus_bytes_per_s
    num_copies = machine.num_ranks // num_shards
    gradients = (
        4 * weights.num_trained * ((num_shards - 1) / num_shards + 2 * (num_copies - 1) / num_copies / num_shards)
    )
    compute_s, gradients_s = flop / machine.flops, gradients / machine.bus_bytes_per_s
    return {
        "compute_s": compute_s,
        "gather_s": gather_s,
        "gradients_s": gradients_s,
        "step_s": max(compute_s, gather_s) + gradients_s,
    }


def print_plan(plan: dict[str, Any], config: TrainConfig, machine: Machine, source: str) -> None:
    layers, tokens, peak = plan["layers"], plan["tokens_per_card"], plan["peak_gib"]
    print(f"{config.name}: train = {config.train}, {config.bits} bits, {config.parallel} on {machine.num_ranks} cards")
    print(f"architecture: {source}\n")
    print(f"One card, {tokens} tokens a forward pass, {plan['checkpoint_layers']} of {layers} layers checkpointed, GiB")
    print(f"  {peak:6.2f}  highest point, simulated in full depth: real model, real FSDP, tensors without memory")
    for kind, size in sorted(plan["at_peak_gib"].items(), key=lambda item: -item[1]):
        if size >= 0.005:
            print(f"          {size:6.2f}  {KINDS[kind]}")
    print(f"  {plan['reserve_gib']:6.2f}  reserve, assumed: {RESERVE}")
    verdict = "fits" if plan["fits"] else "does NOT fit"
    print(f"  {peak + plan['reserve_gib']:6.2f}  in all: {verdict} {plan['card_gib']:.1f}")
    by_estimate = ", ".join(f"{kind} {size:.2f}" for kind, size in plan["estimated_parts_gib"].items() if size >= 0.005)
    print(f"  by arithmetic alone {plan['estimated_peak_gib']:.2f}: {by_estimate}\n")

    print("What fits, from simulations of 3 to 5 layers on straight lines over layers and tokens")
    print(f"  (which give {plan['extrapolated_peak_gib']:.2f} for the figure above)")
    best = plan["best_checkpoint_layers"]
    if best is None:
        print(f"  {tokens} tokens fit with no number of checkpointed layers")
    else:
        print(f"  fewest checkpointed layers for {tokens} tokens: {best}, {plan['best_step_s']:.2f} s a step")
    if plan["checkpoint_layers"] < layers:
        print(f"  most tokens with {plan['checkpoint_layers']} layers checkpointed: {plan['max_tokens_per_card']}")
    print(f"  most tokens with all {layers} checkpointed: {plan['max_tokens_per_card_all_checkpointed']}\n")

    bus, flops = machine.bus_bytes_per_s / 1e9, machine.flops / 1e12
    print(
        f"One step of {config.batch_size} documents, {plan['micro_batches']} forward passes a card, seconds: arithmetic"
    )
    print(f"  {plan['compute_s']:6.2f}  computing, at {flops:g} TFLOP/s a card, assumed")
    print(f"  {plan['gather_s']:6.2f}  gathering weights, at {bus:g} GB/s busbw, assumed; hidden by computing, assumed")
    print(f"  {plan['gradients_s']:6.2f}  exchanging gradients afterwards, hidden by nothing")
    print(f"  {plan['step_s']:6.2f}  a step, without loading data, saving and measuring")
    if plan["epoch_h"] is None:
        print(f"  an epoch: not known, data file {config.data} is missing here (--documents gives its rows)")
    else:
        print(f"  an epoch: {plan['epoch_h']:.2f} hours; this stage: {config.epochs:g} epochs")
    print(f"planned in {plan['planned_in_s']:.0f} s")


if __name__ == "__main__":
    main()
