"""LoRA: a frozen linear layer learns through two thin matrices beside it, y = W x + s B A x.

An adapter is read from the folder that PEFT or the official LLaVA code wrote, and is either merged into the weights
(in fp32) or attached beside them, as over 4-bit weights, which nothing can be merged into.

Source: Hu et al. 2021; Kalajdzievski 2023 for rsLoRA's scale alpha / sqrt(r).
Shapes: B rows, T tokens, I inputs, O outputs, r rank.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.files import StoredTensor, open_tensors, read_json
from model.layouts import to_our_name

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OFFICIAL_REST = "non_lora_trainables.bin"  # what the official code trains in full beside a LoRA: the projector

# Settings of PEFT that would make it something other than W x + s B A x, each with the value it has when it is off.
_PEFT_IS = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "lora_bias": False,
    "use_qalora": False, "use_bdlora": None, "layer_replication": None, "target_parameters": None,
    "trainable_token_indices": None, "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None,
    "monteclora_config": None, "velora_config": None,
}  # fmt: skip


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
    scaling = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
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


class LoraLinear(nn.Module):
    """A frozen linear layer, of any number of bits, with an adapter beside it."""

    def __init__(self, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, I) -> (B, T, O)."""
        low = F.linear(x, self.lora_A.to(x.dtype))
        return self.base_layer(x) + self.scaling * F.linear(low, self.lora_B.to(x.dtype))


def attach_adapter(model: nn.Module, adapter: Adapter, dtype: torch.dtype, device: str | torch.device) -> None:
    """Put an adapter beside the model's linear layers; its weights stay as they are."""
    for layer, factors in adapter.factors.items():
        parent_name, _, name = layer.rpartition(".")
        parent = model.get_submodule(parent_name)
        lora_A, lora_B = (side.load().to(device, dtype) for side in (factors.lora_A, factors.lora_B))
        setattr(parent, name, LoraLinear(parent.get_submodule(name), lora_A, lora_B, factors.scaling))
