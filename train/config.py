"""What one training stage is: a flat list of settings, read from TOML and `key=value`, strictly.

A *run* of `train/main.py` is one or more stages, one after another, each starting from what the last one left.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.conversation import TEMPLATES
from data.image import ASPECTS

CHOICES: dict[str, tuple] = {
    "train": ("vision", "language", "projector", "lora", "full"),
    "template": TEMPLATES,
    "aspect": ASPECTS,
    "dtype": ("float32", "bfloat16"),
    "bits": (16, 8, 4),
    "parallel": ("fsdp", "hsdp", "ddp"),
}


@dataclass(frozen=True)
class TrainConfig:
    name: str  # the stage's folder is runs/<name>
    # vision: the ViT, as CLIP; language: the LLaMA, on text; projector: it alone; lora: adapters beside the LLaMA's
    # linears, and the projector; full: LLaMA and projector
    train: str
    data: str  # conversation file, JSON or JSONL

    # Start
    model: str = ""  # a size to start at random ("tiny"), a model folder or hub id; "" is what the stage before left
    base: str = ""  # what `model` belongs to where it is a projector or an adapter
    vision_tower: str = ""  # CLIP for a model that has none, or another one than its own
    tokenizer: str = ""  # used with a size, "" is the tiny vocabulary; a model folder brings its own
    seed: int = 0  # decides random weights, the order of the data, augmentation

    # Data
    held_out: str = ""  # conversation file to measure on; "" measures nothing
    image_folder: str = ""  # what the files' image paths are relative to, or tar shards; "" is the data file's folder
    bad_list: str = ""  # what `python -m data.check` found unusable in `data`: these rows are left out
    features: str = ""  # what `python -m data.features` encoded ahead of `data`: no vision tower is loaded then
    held_out_features: str = ""  # the same of `held_out`
    template: str = "vicuna_v1"  # data/conversation.py has them: vicuna_v1 for tuning, plain for stage 1
    aspect: str = "pad"  # pad: the whole picture on a square ground; square: its middle (official stage 1)
    branched: bool = False  # turns are independent questions: all see the picture, none sees another
    augment_pixels: int = 0  # shift pictures by up to this many pixels, mirror half of them
    max_tokens: int = 2048  # a document's limit; text beyond it is cut, placeholders never
    num_workers: int = 0  # loader processes per rank; 0 prepares the data between steps

    # Length
    batch_size: int = 128  # documents per optimizer step, over all ranks
    micro_batch_tokens: int = 8192  # most tokens of one forward pass; decides the number of accumulation steps
    epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # stop here if that comes first; 0 is no limit
    stop_at: float = 0.0  # end as soon as this held-out exact match is reached, fail if it never is; 0 is no gate

    # LoRA (train = "lora"); scale of what it adds: alpha / rank
    lora_rank: int = 128
    lora_alpha: float = 256.0
    lora_dropout: float = 0.0
    lora_rslora: bool = False  # scale alpha / sqrt(rank): large ranks then learn as fast as small ones
    lora_targets: str = ""  # linears of the LLaMA's layers, "q_proj,v_proj"; "" is all seven
    lora_vocabulary: bool = False  # train embeddings and lm_head, too, as a whole: for words the base never saw
    bits: int = 16  # of the frozen linears under the adapters: 8 and 4 are quantised, 4 is QLoRA

    # Optimizer: AdamW, warm-up, cosine to zero
    learning_rate: float = 2e-5
    projector_learning_rate: float = 0.0  # 0 is learning_rate
    vision_learning_rate: float = 0.0  # in "full": 0 keeps the tower frozen, as LLaVA does
    warmup_ratio: float = 0.03  # share of the steps
    weight_decay: float = 0.0  # on matrices
    beta2: float = 0.999
    max_grad_norm: float = 1.0  # 0 is no clipping

    # Machine
    dtype: str = "bfloat16"  # of computing and of frozen weights; trained weights are always kept in float32
    # fsdp: the ranks share one copy of the weights; hsdp: those of a machine do; ddp: a copy each (small, or in 4 bits)
    parallel: str = "fsdp"
    checkpoint_layers: int = 0  # of the LLaMA, from the first: their activations are computed again in backward
    compile: bool = False  # the LLaMA's layers through torch.compile: takes a minute before the first step
    card_gib: float = 0.0  # memory that a rank may use, for the plan; 0 is what its card has
    peak_tflops: float = 0.0  # one card's dense peak in `dtype`, for MFU; 0 leaves MFU out

    # Records
    eval_every: int = 0  # steps between measurements on held_out; 0 measures at the end only
    eval_rows: int = 0  # rows of held_out to measure on; 0 is all
    save_every: int = 0  # steps between checkpoints; 0 saves none on the way
    keep_checkpoints: int = 2  # newest ones kept
    tensorboard: bool = False  # the metrics as TensorBoard events, too
    score: str = ""  # tasks of eval/main.py that are answered at the end, "tiny_zh,easy_vqa", and before it as well
    keep: bool = False  # take the result of an identical earlier run instead of training again


NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
TYPES: dict[str, type] = typing.get_type_hints(TrainConfig)


def load_configs(files: Sequence[Path], overrides: Sequence[str] = ()) -> list[TrainConfig]:
    """Read one stage per file; every `key=value` applies to all of them.

    Raises: FileNotFoundError, or ValueError for a key, type or combination that makes no sense.
    """
    changes = dict(_parse_override(override) for override in overrides)
    configs = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"configuration {file} is missing")
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not TOML: {error}") from error
        configs.append(make_config(values | changes, str(file)))
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"the stages {', '.join(names)} need different names: each writes runs/<name>")
    return configs


def make_config(values: dict[str, Any], source: str) -> TrainConfig:
    """Check keys, types and combinations. `source` says in messages where the values came from."""
    for key, value in values.items():
        if key not in TYPES:
            close = difflib.get_close_matches(key, TYPES, n=1)
            hint = f", did you mean '{close[0]}'?" if close else f"; known are {', '.join(TYPES)}"
            raise ValueError(f"{source}: unknown key '{key}'{hint}")
        kind = TYPES[key]
        if kind is float and type(value) is int:
            values = values | {key: float(value)}
        elif type(value) is not kind:
            raise ValueError(f"{source}: {key} = {value!r} is a {type(value).__name__}, expected {NAMES[kind]}")
    missing = [key for key in ("name", "train", "data") if not values.get(key)]
    if missing:
        raise ValueError(f"{source}: {', '.join(missing)} must be given")
    config = TrainConfig(**values)
    if problem := _find_problem(config):
        raise ValueError(f"{source}: {problem}")
    return config


def _find_problem(config: TrainConfig) -> str | None:
    """Return what is wrong with the values, each alone and together."""
    values = dataclasses.asdict(config)
    numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
    positive = ("batch_size", "micro_batch_tokens", "max_tokens", "keep_checkpoints", "epochs", "learning_rate")
    rules = [
        *(
            (values[key] in choices, f"{key} = {values[key]!r}, expected one of {', '.join(map(str, choices))}")
            for key, choices in CHOICES.items()
        ),
        *((0 <= n < math.inf, f"{key} = {n}, expected a finite number of at least 0") for key, n in numbers.items()),
        *((numbers[key] > 0, f"{key} = 0, expected more") for key in positive),
        (config.warmup_ratio < 1, f"warmup_ratio = {config.warmup_ratio} is a share of the steps, expected below 1"),
        (config.beta2 < 1, f"beta2 = {config.beta2}, expected below 1"),
        (config.stop_at <= 1, f"stop_at = {config.stop_at} is a share of the answers, expected at most 1"),
        (
            re.fullmatch(r"\w[\w.-]*", config.name) is not None,
            f"name = {config.name!r} is a folder inside runs/, expected letters, digits, '_', '.' and '-'",
        ),
        (
            config.max_tokens <= config.micro_batch_tokens,
            f"max_tokens = {config.max_tokens} exceeds micro_batch_tokens = {config.micro_batch_tokens}: "
            "a document must fit a micro-batch",
        ),
        (
            bool(config.held_out) or not (config.stop_at or config.eval_every),
            "stop_at and eval_every measure on held_out, which is not given",
        ),
        (not config.stop_at or config.eval_every > 0, "stop_at needs eval_every: the gate is measured on the way"),
        (
            config.train in ("full", "lora") or not config.projector_learning_rate,
            f"projector_learning_rate goes with train = 'full' or 'lora', not {config.train!r}: use learning_rate",
        ),
        (
            config.train == "full" or not config.vision_learning_rate,
            f"vision_learning_rate goes with train = 'full', not {config.train!r}",
        ),
        (
            config.bits == 16 or config.train in ("lora", "projector"),
            f"bits = {config.bits} are frozen weights, train = {config.train!r} trains them: use 'lora'",
        ),
        (config.train != "lora" or config.lora_rank > 0, "lora_rank = 0, expected more"),
        (
            not config.features or (config.train in ("projector", "lora", "full") and not config.vision_learning_rate),
            f"features come from a frozen tower, train = {config.train!r} does not have one: leave them out",
        ),
        (
            not (config.features and config.augment_pixels),
            f"augment_pixels = {config.augment_pixels} changes pictures, features are of pictures as they are",
        ),
        (
            bool(config.features and config.held_out) == bool(config.held_out_features),
            "features and held_out_features go together where there is a held_out file: without a tower, its pictures "
            "cannot be encoded either",
        ),
        (config.lora_dropout < 1, f"lora_dropout = {config.lora_dropout} is a share, expected below 1"),
        (
            bool(config.model) or not (config.base or config.vision_tower),
            "base and vision_tower belong to a model, which is not given",
        ),
    ]
    return next((problem for is_kept, problem in rules if not is_kept), None)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"argument {text!r} is neither a .toml file nor key=value")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value  # a bare word is a string: train=projector


# What may change between a run and its checkpoint: where and how fast, not what is learned.
NOT_OF_THE_RESULT = {
    "parallel", "checkpoint_layers", "compile", "card_gib", "peak_tflops", "num_workers", "save_every",
    "keep_checkpoints", "tensorboard", "score", "keep",
}  # fmt: skip


def settings_of_the_result(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide what a stage learns, up to the order of sums."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_OF_THE_RESULT}


def is_same_result(file: Path, config: TrainConfig) -> bool:
    """Tell whether a run's `config.toml` asks for the same result as `config`."""
    try:
        (saved,) = load_configs([file])
    except ValueError:  # a key of another version of this project
        return False
    return settings_of_the_result(saved) == settings_of_the_result(config)


def format_config(config: TrainConfig) -> str:
    """Return the resolved configuration as TOML that `load_configs` reads again."""
    # JSON's strings, numbers and booleans are TOML's too.
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in dataclasses.asdict(config).items())
