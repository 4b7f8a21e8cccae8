"""What a stage starts from: where each parameter takes its first value, before any of them is read."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.tokenizer import Tokenizer, find_tokenizer
from model.adapter_files import ADAPTER_CONFIG, Adapter, LoraSettings, merge_adapter
from model.config import CONFIGS, LlavaConfig
from model.files import StoredTensor, read_json
from model.llava import Llava, initialize_weights
from model.lora import initial_factors
from model.quantize import LINEARS, QuantizedLinear, quantize_weight
from model.weights import open_checkpoint
from train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Start:
    """What a stage starts from."""

    config: LlavaConfig
    tensors: Mapping[str, StoredTensor]  # the whole model's, by its own names
    factors: Mapping[str, StoredTensor]  # of the adapter that goes on being trained, by name of the parameter; or none
    tokenizer: Tokenizer
    base: str  # where the language model is, as the user or the stage before named it


def open_start(config: TrainConfig, previous: Path | None) -> Start:
    """Find what a stage starts from: random weights, a model, or what the stage before left.

    Raises: FileNotFoundError or ValueError for a start that is missing, or parts that do not go together.
    """
    if config.model in CONFIGS:
        tokenizer = Tokenizer(Path(config.tokenizer) if config.tokenizer else ROOT / "data/tiny/tokenizer.model")
        llava = Llava(CONFIGS[config.model])
        initialize_weights(llava, llava.config.text.hidden_size**-0.5, config.seed)
        tensors = {name: StoredTensor.wrap(tensor, name) for name, tensor in llava.state_dict().items()}
        start = Start(llava.config, tensors, {}, tokenizer, config.model)
    else:
        model, base = config.model or previous, config.base
        if model is None:
            raise ValueError(f"{config.name}: the first stage needs model = a folder or one of {', '.join(CONFIGS)}")
        if not config.model and (Path(model) / ADAPTER_CONFIG).is_file():
            base = read_json(Path(model) / ADAPTER_CONFIG)["base_model_name_or_path"]  # the stage before wrote it
        checkpoint = open_checkpoint(
            model,
            base or None,
            config.vision_tower or None,
            projector_seed=config.seed if config.train == "projector" else None,
        )
        tensors, factors = checkpoint.tensors, {}
        if checkpoint.adapter is not None and config.train == "lora":
            factors = continue_factors(checkpoint.adapter, checkpoint.config, lora_settings(config))
        elif checkpoint.adapter is not None:
            tensors = merge_adapter(tensors, checkpoint.adapter)
        tokenizer = Tokenizer(find_tokenizer(*checkpoint.folders))
        start = Start(checkpoint.config, tensors, factors, tokenizer, str(base or model))
    if tokenizer.vocab_size > start.config.text.vocab_size:
        raise ValueError(
            f"{tokenizer.file} has {tokenizer.vocab_size} pieces, the model {start.config.text.vocab_size}: "
            "they do not belong together"
        )
    return start


def lora_settings(config: TrainConfig) -> LoraSettings:
    targets = tuple(config.lora_targets.replace(" ", "").split(",")) if config.lora_targets else LoraSettings.targets
    return LoraSettings(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_rslora, targets)


def continue_factors(adapter: Adapter, sizes: LlavaConfig, settings: LoraSettings) -> dict[str, StoredTensor]:
    """Return an adapter's factors by the names of the parameters they become, to go on training them.

    Raises: ValueError when it is not the kind of adapter that the stage trains.
    """
    found = {(f.lora_A.shape[0], f.scaling) for f in adapter.factors.values()}
    layers = {f"language_model.layers.{i}.{linear}" for i in range(sizes.text.num_hidden_layers) for linear in LINEARS}
    wanted = {layer for layer in layers if layer.rpartition(".")[2] in settings.targets}
    if found != {(settings.rank, settings.scaling)} or adapter.factors.keys() != wanted:
        raise ValueError(
            f"{adapter.folder} is an adapter of (rank, scale) {sorted(found)} beside {len(adapter.factors)} linears, "
            f"this stage trains {(settings.rank, settings.scaling)} beside {len(wanted)}: use its lora_rank, "
            "lora_alpha, lora_rslora and lora_targets, or merge it into its base first (python -m model.convert)"
        )
    return {
        f"{layer}.{side}.default": getattr(factors, side)
        for layer, factors in adapter.factors.items()
        for side in ("lora_A", "lora_B")
    }


def list_sources(llava: Llava, objective: nn.Module, start: Start, seed: int) -> dict[str, StoredTensor]:
    """Return where each parameter of an objective that is not sharded yet takes its first value from, by its name."""
    factors = {**initial_factors(llava, seed), **start.factors}
    sources: dict[str, StoredTensor] = {}
    for module_name, module in objective.named_modules():
        ours = module_name.removeprefix("llava.").replace(".base_layer", "")
        parts: Mapping[str, StoredTensor] = {}
        if isinstance(module, QuantizedLinear):
            parts = quantize_stored(start.tensors[f"{ours}.weight"], module.bits)
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            model_name = full.removeprefix("llava.")
            if not parameter.is_meta:  # CLIP's text side, which starts at random
                sources[full] = StoredTensor.wrap(parameter.detach(), full)
            elif model_name in factors:
                sources[full] = factors[model_name]
            else:
                sources[full] = parts[name] if parts else start.tensors[f"{ours}.{name}"]
    return sources


def quantize_stored(weight: StoredTensor, bits: int) -> dict[str, StoredTensor]:
    """Return a QuantizedLinear's parameters, made of a stored weight's rows when they are read."""

    @functools.lru_cache(maxsize=1)  # the parameters of one linear are read one after another, from the same rows
    def quantize(start: int | None, stop: int | None) -> dict[str, Tensor]:
        try:
            return quantize_weight(weight.read(slice(start, stop)), bits)
        except ValueError as error:
            raise ValueError(f"{weight.source}: {error}") from error

    def part(name: str, like: Tensor) -> StoredTensor:
        shape = (weight.shape[0], *like.shape[1:])
        return StoredTensor(shape, like.dtype, weight.source, lambda rows: quantize(rows.start, rows.stop)[name])

    return {name: part(name, like) for name, like in quantize_weight(torch.zeros(1, weight.shape[1]), bits).items()}
