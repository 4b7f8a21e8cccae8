"""Time a training step: forward, backward and AdamW of the main job's model on 16 easy-VQA conversations.

The peer is `transformers` on the same conversations, padded to the longest, with logits at every position; weights,
documents and precision are the same. Both train in one process, step by step in turn; each one's memory is measured in
a process of its own.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from data.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from data.dataset import ConversationDataset, RenderOptions
from data.packing import Batch, StepDataset
from data.prepare import easy_vqa
from data.tokenizer import Tokenizer
from eval.measure import (
    ROOT,
    current_memory_bytes,
    describe_environment,
    measure_product_rate,
    peak_memory_bytes,
    run_in_new_process,
)
from model.config import CONFIGS
from model.llava import Llava, initialize_weights
from train.loss import NextToken  # the trainer's own step is what is timed here

NUM_DOCUMENTS = 16
REPEATS = 15


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time both contestants' steps in turn, after three of warm-up, then measure each one's memory."""
    data, device = arguments.data, arguments.device
    if not (data / "vqa_train.json").is_file():
        easy_vqa.prepare(data)
    environment = describe_environment(device)
    batch = make_batch(data)
    steps = {name: make(batch, device) for name, make in CONTESTANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for repeat in range(-3, arguments.repeats or REPEATS):
        for name, step in steps.items():
            started = time.perf_counter()
            loss = step()  # reading the loss waits for the device
            if repeat == -3:
                losses[name] = loss
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    real, padded = batch.cu_seqlens[-1], max(batch.lengths) * NUM_DOCUMENTS
    inspected = {name: inspect_step(step) for name, step in steps.items()}
    result = {
        "suite": "tiny",
        "documents": NUM_DOCUMENTS,
        "real_tokens": real,
        "padded_tokens": padded,
        "supervised_tokens": int((batch.labels != IGNORE_INDEX).sum()),
        "first_loss": losses,
        "median_s": {name: statistics.median(values) for name, values in seconds.items()},
        "spread_s": {name: [min(values), max(values)] for name, values in seconds.items()},
        "operations": {name: operations for name, (operations, _) in inspected.items()},
        "product_operations_per_s": measure_product_rate(device),
        "kept_for_backward_bytes": {name: kept for name, (_, kept) in inspected.items()},
        "peak_memory_bytes": {name: run_in_new_process(measure_memory, name, data, device) for name in steps},
        "environment": environment,
    }
    return [result]


def make_batch(data: Path) -> Batch:
    """Pack the conversations both contestants train on, as official LLaVA would: each turn sees those before it."""
    tokenizer = Tokenizer(ROOT / "data/tiny/tokenizer.model")
    vision = CONFIGS["tiny"].vision
    options = RenderOptions(vision.num_patches, vision.image_size, max_tokens=512)
    dataset = ConversationDataset(data / "vqa_train.json", data / "images", tokenizer, options)
    return StepDataset(dataset, NUM_DOCUMENTS, 1_000_000, seed=0, rank=0, num_ranks=1)[0].micro_batches[0]


def make_our_step(batch: Batch, device: str) -> Callable[[], float]:
    """Return this project's training step: packed, logits at supervised positions only."""
    llava = Llava(CONFIGS["tiny"])
    initialize_weights(llava, llava.config.text.hidden_size**-0.5, seed=0)
    objective = NextToken(llava).to(device)
    placed = batch.to(torch.device(device))
    num_supervised = int((batch.labels != IGNORE_INDEX).sum())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        loss_sum, _ = objective(placed)
        loss = loss_sum / num_supervised
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def make_transformers_step(batch: Batch, device: str) -> Callable[[], float]:
    """Return the peer's step: LlavaForConditionalGeneration with the same weights on the padded batch."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = CONFIGS["tiny"]
    image_token = 0  # Hugging Face's placeholder must be an id of the vocabulary; <unk> occurs in no conversation
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{k: v for k, v in vars(sizes.vision).items() if k != "select_layer"}),
        text_config=LlamaConfig(**vars(sizes.text)),
        image_token_index=image_token,
        vision_feature_layer=sizes.vision.select_layer,
    )
    model: Any = LlavaForConditionalGeneration(config)  # its `to` is wrapped in a way that type checkers misread
    model = model.to(device).train()
    llava = Llava(sizes)
    initialize_weights(llava, sizes.text.hidden_size**-0.5, seed=0)
    copy_weights(llava, model)
    lengths = batch.lengths
    width = max(lengths)
    input_ids = torch.full((len(lengths), width), 2)  # any other id will do: it is masked
    labels = torch.full((len(lengths), width), IGNORE_INDEX)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    parts = zip(batch.input_ids.split(lengths), batch.labels.split(lengths), lengths, strict=True)
    for row, (ids, row_labels, length) in enumerate(parts):
        input_ids[row, :length] = torch.where(ids == IMAGE_TOKEN_ID, image_token, ids)
        labels[row, :length] = row_labels
        mask[row, :length] = 1
    assert batch.pixel_values is not None
    inputs = {"input_ids": input_ids, "labels": labels, "attention_mask": mask, "pixel_values": batch.pixel_values}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


CONTESTANTS = {"plain-llava": make_our_step, "transformers": make_transformers_step}


@torch.no_grad()
def copy_weights(llava: Llava, model: torch.nn.Module) -> None:
    """Give the peer our weights, every one of them."""
    prefixes = {
        "model.vision_tower.embeddings.": "vision_tower.",
        "model.vision_tower.encoder.": "vision_tower.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "projector.",
        "model.language_model.": "language_model.",
        "lm_head.": "language_model.lm_head.",
    }
    ours = llava.state_dict()
    for name, parameter in model.named_parameters():
        plain = name.replace(".vision_model.", ".")  # an extra level in some versions
        prefix = next(prefix for prefix in prefixes if plain.startswith(prefix))
        tensor = ours.pop(prefixes[prefix] + plain.removeprefix(prefix))
        parameter.copy_(tensor)
    assert not ours, f"the peer has no place for {sorted(ours)}"


def inspect_step(step: Callable[[], float]) -> tuple[int, int]:
    """Return one step's floating-point operations, and the bytes that its forward pass keeps for its backward pass.

    Operations are those of matrix products and attention; of the bytes each storage is counted once.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses from being used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:  # parameters are there anyway
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def measure_memory(name: str, data: Path, device: str) -> int:
    """Return how far memory rises above the built model during three steps, in bytes."""
    step = CONTESTANTS[name](make_batch(data), device)
    before = current_memory_bytes(device)
    for _ in range(3):
        step()
    return peak_memory_bytes(device) - before


def print_result(result: dict[str, Any]) -> None:
    """Print one line per contestant, then the ratio."""
    real = result["real_tokens"]
    print(
        f"one training step on {result['documents']} conversations: {real} real tokens, {result['padded_tokens']} when"
    )
    print(f"padded, {result['supervised_tokens']} supervised\n")
    for name, median in result["median_s"].items():
        low, high = (1000 * value for value in result["spread_s"][name])
        kept, peak = (result[kind][name] / 2**20 for kind in ("kept_for_backward_bytes", "peak_memory_bytes"))
        print(f"{name:14s}{1000 * median:7.1f} ms ({low:.1f} to {high:.1f}), {real / median:.0f} real tokens/s")
        print(f"{'':14s}{kept:7.1f} MiB kept for backward; the process rises {peak:.0f} MiB above the built model")
        rate = result["operations"][name] / median
        share = rate / result["product_operations_per_s"]
        print(f"{'':14s}{100 * share:7.1f} % of the limit: {rate / 1e9:.0f} G operations/s")
        print(f"{'':14s}first loss {result['first_loss'][name]:.6f}")
    ours, peer = (result["median_s"][name] for name in CONTESTANTS)
    kept = [result["kept_for_backward_bytes"][name] for name in CONTESTANTS]
    print(f"\n{peer / ours:.2f} x the peer's speed, {kept[0] / kept[1]:.2f} x its memory kept for backward")
    limit = result["product_operations_per_s"] / 1e9
    print(f"limit: one large fp32 matrix product, {limit:.0f} G operations/s; its share is operations / time / limit")
