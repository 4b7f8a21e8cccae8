"""One stage of a run: its model spread over the ranks, its training, and what it leaves.

The model is built without memory, sharded, and only then filled: every rank reads its own rows of the files.
"""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.conversation import IGNORE_INDEX
from data.dataset import ConversationDataset, RenderOptions
from data.feature_store import FeatureKey, FeatureStore, TokenStore
from data.features import feature_key, token_key
from data.packing import StepDataset
from data.tokenizer import Tokenizer
from model.config import LlavaConfig
from model.files import StoredTensor, cast_stored, replace_folder
from model.llava import Llava, initialize_weights
from model.lora import add_lora
from model.machine import describe_machine
from model.quantize import QuantizedLinear, quantize_linears
from model.weights import write_llava, write_lora
from train.checkpoint import CheckpointWriter, list_checkpoints, load_checkpoint
from train.config import TrainConfig, settings_of_the_result
from train.loop import StopRequest, train
from train.loss import CaptionMatching, NextToken
from train.memory import check_plan
from train.metrics import draw_curves
from train.optim import make_optimizer
from train.parallel import Ranks, fill, gather, shard
from train.start import Start, list_sources, lora_settings, open_start

Opened = TypeVar("Opened")


def run_stage(
    config: TrainConfig,
    folder: Path,
    previous: Path | None,
    ranks: Ranks,
    stop_request: StopRequest,
    is_profiled: bool,
) -> bool:
    """Train one stage and write `final/`; tell whether it is finished."""
    start = open_in_turn(functools.partial(open_start, config, previous), ranks)
    check_plan(config, start.config, ranks)
    steps, held_out = open_in_turn(functools.partial(open_data, config, start, ranks), ranks)
    llava, objective = build_objective(config, start.config, steps.dataset)
    sources = list_sources(llava, objective, start, config.seed)
    if config.compile:
        compile_layers(llava)
    shard(objective, objective.blocks(), config.parallel, getattr(torch, config.dtype), ranks)
    fill(objective, sources, ranks.device)
    optimizer = make_optimizer(
        objective,
        {
            "projector": config.projector_learning_rate or config.learning_rate,
            "vision_tower": config.vision_learning_rate or config.learning_rate,
            "": config.learning_rate,
        },
        config.weight_decay,
        config.beta2,
    )
    about = settings_of_the_result(config)
    checkpoints = list_checkpoints(folder / "checkpoints")
    first_step = load_checkpoint(checkpoints[-1], objective, optimizer, about) if checkpoints else 0
    num_steps = math.ceil(config.epochs * len(steps.dataset) / config.batch_size)
    num_steps = min(num_steps, config.max_steps or num_steps)
    if ranks.is_first:
        if first_step:
            print(f"{config.name}: going on from step {first_step}")
        facts = {
            "start": config.model or str(previous),
            "first_step": first_step,
            "num_steps": num_steps,
            "rows": len(steps.dataset),
            "parameters": sum(math.prod(tensor.shape) for tensor in start.tensors.values()),
            "trained_parameters": sum(p.numel() for p in llava.parameters() if p.requires_grad),
        }
        note_session(folder, ranks, facts)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first_step, num_steps),
        num_workers=config.num_workers,
        pin_memory=ranks.device.type == "cuda",
    )
    write_trained = functools.partial(write_model, config=config, start=start)
    is_finished = train(
        objective,
        optimizer,
        loader,
        held_out,
        folder,
        ranks,
        stop_request,
        CheckpointWriter(folder / "checkpoints", config.keep_checkpoints, ranks, write_trained, about),
        functools.partial(collect_trained, llava, ranks),
        title=config.name,
        seed=config.seed,
        first_step=first_step,
        num_steps=num_steps,
        warmup_ratio=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        eval_every=config.eval_every,
        eval_rows=config.eval_rows,
        stop_at=config.stop_at,
        save_every=config.save_every,
        flops_per_token=count_flops_per_token(llava),
        peak_flops=config.peak_tflops * 1e12 * ranks.size,
        tensorboard=config.tensorboard,
        is_profiled=is_profiled,
    )
    if is_finished:
        trained = collect_trained(llava, ranks)
        if ranks.is_first:
            with replace_folder(folder / "final") as temporary:
                write_model(temporary, trained, config, start, is_final=True)
    if ranks.is_first:
        draw_curves(folder, config.name)
        print(f"{config.name}: {'finished' if is_finished else 'stopped, the same command goes on from here'}")
    ranks.wait()
    return is_finished


def note_session(folder: Path, ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Append a line to `sessions.jsonl`: what trains what, for reports. A run that is resumed has several."""
    session = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "ranks": ranks.size,
        "machines": int(os.environ.get("GROUP_WORLD_SIZE", "1")),  # as torchrun says
        **facts,
        **describe_machine(ranks.device),
    }
    with (folder / "sessions.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(session) + "\n")


def open_in_turn(open_: Callable[[], Opened], ranks: Ranks) -> Opened:
    """Open something on the first rank, which downloads or indexes what is not there yet, then on the others."""
    opened = open_() if ranks.is_first else None
    ranks.wait()
    return open_() if opened is None else opened


def open_data(config: TrainConfig, start: Start, ranks: Ranks) -> tuple[StepDataset, StepDataset | None]:
    """Open the training and the held-out file."""
    vision, limit = start.config.vision, start.config.text.max_position_embeddings
    if config.max_tokens > limit:
        raise ValueError(f"max_tokens = {config.max_tokens} exceeds the model's {limit} positions")
    if config.max_tokens <= vision.num_patches and config.train != "language":
        raise ValueError(
            f"max_tokens = {config.max_tokens} leaves no text beside a picture's {vision.num_patches} tokens"
        )
    if config.held_out and 0 < config.eval_rows < ranks.size:
        raise ValueError(f"eval_rows = {config.eval_rows} rows cannot be shared by {ranks.size} ranks: raise it")
    options = RenderOptions(
        tokens_per_image=vision.num_patches,
        image_size=vision.image_size,
        template=config.template,
        aspect=config.aspect,
        branched=config.branched,
        max_tokens=config.max_tokens,
        augment_pixels=config.augment_pixels,
    )
    key = feature_key(start.tensors, vision, config.aspect) if config.features else None
    opened: list[StepDataset] = []
    for file, bad_list, features in (
        (config.data, config.bad_list, config.features),
        (config.held_out, "", config.held_out_features),
    ):
        if file:
            folder = Path(config.image_folder) if config.image_folder else Path(file).parent
            stores = open_stores(Path(features), key, Path(file), start.tokenizer, options) if key else ()
            dataset = ConversationDataset(
                Path(file), folder, start.tokenizer, options, Path(bad_list) if bad_list else None, *stores
            )
            if config.train == "language" and dataset.has_pictures:
                raise ValueError(f"{file} has pictures, train = 'language' takes text only")
            if dataset.num_left_out and ranks.is_first:
                print(f"{file}: {dataset.num_left_out} of {len(dataset.rows)} rows are left out, as {bad_list} says")
            opened.append(
                StepDataset(dataset, config.batch_size, config.micro_batch_tokens, config.seed, ranks.rank, ranks.size)
            )
    return opened[0], opened[1] if config.held_out else None


def open_stores(
    folder: Path, key: FeatureKey, file: Path, tokenizer: Tokenizer, options: RenderOptions
) -> tuple[FeatureStore, TokenStore]:
    """Open what was encoded ahead of a file. Raises: ValueError for features of another model, or of other rows."""
    return FeatureStore(folder, key), TokenStore(folder, token_key(file, tokenizer, options))


def build_objective(
    config: TrainConfig, sizes: LlavaConfig, dataset: ConversationDataset | None = None
) -> tuple[Llava, CaptionMatching | NextToken]:
    """Return the model and what the stage minimises, on the meta device: shapes, types, what is trained, no numbers.

    Trained weights are float32, frozen ones in the type of computing, or quantised.

    Args:
        dataset: only for train = "vision", whose captions belong to the objective.
    """
    with torch.device("meta"):
        llava = Llava(sizes).to(getattr(torch, config.dtype))
        if config.bits != 16:
            quantize_linears(llava, config.bits)
        if config.train == "lora":
            add_lora(llava, lora_settings(config))
        if config.features:
            del llava.vision_tower
    llava.language_model.checkpoint_layers = config.checkpoint_layers
    freeze(llava, config)
    for parameter in llava.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.train != "vision":
        reads = "features" if config.features else "pixels"
        return llava, NextToken(llava, "text" if config.train == "language" else reads)
    assert dataset is not None
    objective = CaptionMatching(llava.vision_tower, list_captions(dataset), dataset.tokenizer.vocab_size)
    for part in (objective.visual_projection, objective.word_embedding):
        initialize_weights(part, sizes.vision.hidden_size**-0.5, config.seed)
    return llava, objective


def compile_layers(llava: Llava) -> None:
    """Run the LLaMA's layers, all but attention, through `torch.compile`: what is not a matrix product is fused.

    Each layer is code of its own that knows nothing of sharding or checkpointing around it; for any number of tokens.
    """
    for layer in llava.language_model.layers:
        layer.compile(dynamic=True)


def list_captions(dataset: ConversationDataset) -> list[tuple[int, ...]]:
    """Return the distinct answers of a file as token ids, in an order that depends on nothing else."""
    labels = (dataset.render(row).labels for row in range(len(dataset)))
    return sorted({tuple(label for label in row if label != IGNORE_INDEX) for row in labels})


def freeze(llava: Llava, config: TrainConfig) -> None:
    """Leave trainable what the stage trains, and of that only what its loss reaches."""
    for name, parameter in llava.named_parameters():
        parameter.requires_grad_(is_trained(name, llava, config))


def is_trained(name: str, llava: Llava, config: TrainConfig) -> bool:
    """Tell whether a stage trains a parameter."""
    room, _, rest = name.partition(".")
    if room == "vision_tower":
        number = int(rest.split(".")[1]) if rest.startswith("layers.") else 0
        is_reached = number < llava.vision_tower.num_used_layers and not rest.startswith("post_layernorm")
        return is_reached and (config.train == "vision" or config.vision_learning_rate > 0)
    if room == "projector":
        return config.train in ("projector", "lora", "full")
    is_vocabulary = rest.startswith(("embed_tokens", "lm_head"))
    is_factor = ".lora_" in rest
    return config.train in ("language", "full") or (
        config.train == "lora" and (is_factor or (is_vocabulary and config.lora_vocabulary))
    )


def collect_trained(llava: Llava, ranks: Ranks) -> dict[str, Tensor]:
    """Return the trained parameters, whole, on the first rank's CPU; none on the others. Every rank must ask."""
    gathered = ((name, gather(p)) for name, p in llava.named_parameters() if p.requires_grad)
    return {name: tensor for name, tensor in gathered if ranks.is_first}


def write_model(
    folder: Path, trained: Mapping[str, Tensor], config: TrainConfig, start: Start, is_final: bool = False
) -> None:
    """Write into a folder what `load_llava` reads: the model in the type of computing, or in fp32 what was trained.

    The latter is an adapter with its projector, or a projector's checkpoint (its `final/` is the model): they are
    loaded with `--model-base`, what they belong to.
    """
    # It is talked to in the words it was tuned on; stage 1's template has none for that.
    chat_template = start.config.chat_template if config.template == "plain" else config.template
    sizes = replace(start.config, chat_template=chat_template)
    if config.train == "lora":
        write_lora(folder, sizes, trained, lora_settings(config), start.base, start.tokenizer.file)
        return
    tensors = {name: StoredTensor.wrap(tensor, name) for name, tensor in trained.items()}
    if config.train != "projector" or is_final:
        dtype = getattr(torch, config.dtype)
        tensors = {name: cast_stored({**start.tensors, **tensors}[name], dtype) for name in start.tensors}
    write_llava(folder, sizes, tensors, start.tokenizer.file)


def count_flops_per_token(llava: Llava) -> float:
    """Return the floating-point operations of one token in the language model's layers, forward and backward.

    2 per weight forward, 2 for the gradient that passes through, 2 more where the weight itself is trained;
    attention, `lm_head` and the vision tower, a few percent at LLaVA's lengths, are left out.
    """
    flops = 0.0
    for module in llava.language_model.layers.modules():
        if isinstance(module, QuantizedLinear):
            flops += 4.0 * module.in_features * module.out_features
        else:
            matrices = (p for p in module.parameters(recurse=False) if p.ndim > 1)
            flops += sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in matrices)
    return flops
