"""Adapter folders: what a LoRA run left is read, merged into stored weights, and written as PEFT writes it.

Read are PEFT's folders and the official pair of `.bin` files. Written is PEFT's, for a model of the llava-hf layout.

Source: Hu et al. 2021; Kalajdzievski 2023 for rsLoRA's scale alpha / sqrt(r).
Shapes: I inputs, O outputs, r rank.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.files import StoredTensor, open_tensors, read_json, write_json, write_tensors
from model.layouts import to_our_name
from model.quantize import LINEARS

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OFFICIAL_REST = "non_lora_trainables.bin"  # what the official code trains in full beside a LoRA: the projector
TARGETS = tuple(name.rpartition(".")[2] for name in LINEARS)

# What an adapter may train whole and still be switched or written, and transformers' name for it.
WHOLE_MODULES = {
    "projector": "model.multi_modal_projector",
    "language_model.embed_tokens": "model.language_model.embed_tokens",
    "language_model.lm_head": "lm_head",
}

# Settings of PEFT that would make it something other than W x + s B A x, each with the value it has when it is off.
_PEFT_IS = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "lora_bias": False,
    "use_qalora": False, "use_bdlora": None, "layer_replication": None, "target_parameters": None,
    "trainable_token_indices": None, "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None,
    "monteclora_config": None, "velora_config": None,
}  # fmt: skip


@dataclass(frozen=True)
class LoraSettings:
    """What a new adapter is. Raises: ValueError for a rank, alpha, dropout or target that makes no LoRA."""

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    targets: tuple[str, ...] = TARGETS  # last names of the LLaMA layers' linears

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank = {self.rank}, expected at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"LoRA alpha = {self.alpha}, expected a number above 0: the adapter is multiplied by it")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout = {self.dropout} is a share, expected at least 0 and below 1")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise ValueError(f"LoRA targets {', '.join(unknown)} are unknown, choose from {', '.join(TARGETS)}")
        if not self.targets:
            raise ValueError(f"no LoRA targets, choose from {', '.join(TARGETS)}")

    @property
    def scaling(self) -> float:
        return find_scaling(self.alpha, self.rank, self.use_rslora)


@dataclass(frozen=True)
class LoraFactors:
    """Shapes: lora_A (r, I), lora_B (O, r)."""

    lora_A: StoredTensor
    lora_B: StoredTensor
    alpha: float
    scaling: float  # s


@dataclass(frozen=True)
class Adapter:
    """What a LoRA run left."""

    folder: Path
    settings: dict[str, Any]  # adapter_config.json
    factors: dict[str, LoraFactors]  # by our name of the linear layer
    trained_whole: dict[str, StoredTensor]  # by our names: tensors that take the base's place, as the projector


def find_scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """Return s: what B A is multiplied by."""
    return alpha / rank**0.5 if use_rslora else alpha / rank


def load_adapter(folder: Path) -> Adapter:
    """List what an adapter folder holds: PEFT's, or the official pair of `.bin` files.

    Raises: FileNotFoundError or ValueError for a folder that is incomplete, or an adapter of another kind.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no adapter, it lacks {ADAPTER_CONFIG}: give what a LoRA run wrote")
    settings = read_json(folder / ADAPTER_CONFIG)
    for name, off in _PEFT_IS.items():
        if settings.get(name, off) != off and not (off is False and settings[name] is None):
            raise ValueError(f"{folder / ADAPTER_CONFIG} has {name} = {settings[name]!r}: only {off!r} is known here")
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"adapter folder {folder} lacks {' or '.join(ADAPTER_FILES)}")
    stored = open_tensors(file)
    if (folder / OFFICIAL_REST).is_file():
        stored |= open_tensors(folder / OFFICIAL_REST)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    trained_whole: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        # PEFT puts the model into `base_model.model`, and older files name the adapter: lora_A.default.weight.
        name = key.removeprefix("base_model.model.")
        if match := re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", name):
            pairs.setdefault(_our_layer(match[1], key), {})[match[2]] = tensor
        elif (ours := to_our_name(name.replace(".modules_to_save.default.", "."))) is not None:
            trained_whole[ours] = tensor
    factors = {layer: _read_factors(layer, pair, settings, file) for layer, pair in pairs.items()}
    _check_targets(factors, settings, file)
    return Adapter(folder, settings, factors, trained_whole)


def _our_layer(layer: str, key: str) -> str:
    ours = to_our_name(f"{layer}.weight")
    if ours is None:
        raise ValueError(f"the adapter changes {key}, which no LLaVA has")
    return ours.removesuffix(".weight")


def _read_factors(layer: str, pair: dict[str, StoredTensor], settings: dict[str, Any], file: Path) -> LoraFactors:
    if set(pair) != {"lora_A", "lora_B"}:
        raise ValueError(f"{file}: {layer} has only {', '.join(pair)}: a LoRA has both lora_A and lora_B")
    rank = pair["lora_A"].shape[0]
    if pair["lora_B"].shape[1:] != (rank,):
        raise ValueError(f"{file}: {layer} has lora_A {pair['lora_A'].shape} and lora_B {pair['lora_B'].shape}")
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?{pattern}", layer):
            alpha = value
    if not isinstance(alpha, int | float):
        raise ValueError(f"{file.parent / ADAPTER_CONFIG} has lora_alpha = {alpha!r}, expected a number")
    scaling = find_scaling(alpha, rank, bool(settings.get("use_rslora")))
    return LoraFactors(pair["lora_A"], pair["lora_B"], float(alpha), scaling)


def _check_targets(factors: dict[str, LoraFactors], settings: dict[str, Any], file: Path) -> None:
    """An adapter that lacks some of the layers it names would load, and answer like something between two models."""
    if not factors:
        raise ValueError(f"{file} holds no LoRA matrices")
    targets = settings.get("target_modules")
    found: dict[str, set[str]] = {}  # "self_attn.q_proj" -> numbers of its layers
    for layer in factors:
        if match := re.fullmatch(r"language_model\.layers\.(\d+)\.(.+)", layer):
            found.setdefault(match[2], set()).add(match[1])
    problems = []
    if isinstance(targets, list):
        problems += [
            f"none of {target}" for target in targets if not any(f".{name}".endswith(f".{target}") for name in factors)
        ]
    if found and not settings.get("layers_to_transform"):
        everywhere = set().union(*found.values())
        problems += [
            f"{name} of layers {', '.join(sorted(everywhere - layers, key=int))}"
            for name, layers in found.items()
            if layers != everywhere
        ]
    if problems:
        raise ValueError(f"{file} lacks matrices that {ADAPTER_CONFIG} names: {'; '.join(problems)}")


def merge_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return W + s B A, added in fp32, in the weight's dtype. (O, I), (r, I), (O, r) -> (O, I)."""
    return (weight.float() + scaling * (lora_B.float() @ lora_A.float())).to(weight.dtype)


def merge_adapter(tensors: dict[str, StoredTensor], adapter: Adapter) -> dict[str, StoredTensor]:
    """Return `tensors` with the adapter's matrices in them; each is computed when it is read."""
    merged = dict(tensors)
    for layer, factors in adapter.factors.items():
        merged[f"{layer}.weight"] = _merge_stored(tensors[f"{layer}.weight"], factors)
    return merged


def _merge_stored(weight: StoredTensor, factors: LoraFactors) -> StoredTensor:
    def read(rows: slice) -> Tensor:
        return merge_weight(weight.read(rows), factors.lora_A.load(), factors.lora_B.read(rows), factors.scaling)

    return StoredTensor(weight.shape, weight.dtype, f"{weight.source}, merged with {factors.lora_A.source}", read)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], settings: LoraSettings, base: str) -> None:
    """Write into a folder what a run has trained, in fp32, as PEFT does; `load_llava` and PEFT read it.

    Args:
        tensors: by their names in the model that `add_lora` changed: the factors, and what was trained whole.
        base: where the model lies that the adapter belongs to; only shown to people.
    Raises: ValueError for a tensor that no adapter can hold; OSError when it cannot be written or reads back wrong.
    """
    stored = {name: StoredTensor.wrap(tensor.detach().float(), name) for name, tensor in tensors.items()}
    factors: dict[str, LoraFactors] = {}
    trained_whole: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if ".lora_A." in name:
            lora_B = stored[name.replace(".lora_A.", ".lora_B.")]
            factors[name.partition(".lora_A.")[0]] = LoraFactors(tensor, lora_B, settings.alpha, settings.scaling)
        elif ".lora_B." not in name:
            trained_whole[name] = tensor
    assert 2 * len(factors) + len(trained_whole) == len(tensors), "a lora_B without its lora_A"
    values = {"lora_alpha": settings.alpha, "use_rslora": settings.use_rslora, "lora_dropout": settings.dropout}
    write_peft(folder, Adapter(folder, values, factors, trained_whole), base)


def write_peft(folder: Path, adapter: Adapter, base: str | None) -> None:
    """Write an adapter into a folder as PEFT does for a model of the llava-hf layout; tensors keep their dtype.

    Raises: ValueError for an adapter that holds more than PEFT can put on that model; OSError.
    """
    if outside := [layer for layer in adapter.factors if not layer.startswith("language_model.layers.")]:
        raise ValueError(f"{adapter.folder} has LoRA matrices outside the language model: {', '.join(outside)}")
    ranks = {layer: factors.lora_A.shape[0] for layer, factors in adapter.factors.items()}
    alphas = {layer: factors.alpha for layer, factors in adapter.factors.items()}
    rank, alpha = max(ranks.values()), adapter.settings["lora_alpha"]
    linears = sorted({layer.split(".", maxsplit=3)[3] for layer in adapter.factors})
    tensors: dict[str, Tensor] = {}
    for layer, factors in adapter.factors.items():
        tensors[f"base_model.model.model.{layer}.lora_A.weight"] = factors.lora_A.load()
        tensors[f"base_model.model.model.{layer}.lora_B.weight"] = factors.lora_B.load()
    whole = split_whole(adapter)
    for module, parts in whole.items():
        for name, tensor in parts.items():
            tensors[f"base_model.model.{WHOLE_MODULES[module]}.{name}"] = tensor.load()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or adapter.settings.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": bool(adapter.settings.get("use_rslora")),
        "lora_dropout": adapter.settings.get("lora_dropout", 0.0),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        # A pattern: a list of names would also match the vision tower's q_proj, k_proj and v_proj.
        "target_modules": rf".*language_model\.layers\.\d+\.({'|'.join(map(re.escape, linears))})",
        "modules_to_save": [WHOLE_MODULES[module].rpartition(".")[2] for module in whole] or None,
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ADAPTER_CONFIG, settings)
    write_tensors(folder / ADAPTER_FILES[0], tensors)


def split_whole(adapter: Adapter) -> dict[str, dict[str, StoredTensor]]:
    """Return what an adapter trained whole, by module and name in it.

    Raises: ValueError for what can only be merged into a model: anything but `WHOLE_MODULES`.
    """
    split: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in adapter.trained_whole.items():
        module = next((module for module in WHOLE_MODULES if name.startswith(f"{module}.")), None)
        if module is None:
            raise ValueError(
                f"{adapter.folder} has trained {name} whole: only {', '.join(WHOLE_MODULES)} can ride along, "
                "the rest has to be merged (load_llava(base, adapter=...), or model.convert --to hf)"
            )
        split.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
    return split
