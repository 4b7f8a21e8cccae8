"""A LLaVA from disk, in any of its layouts; a model folder of our own to disk.

`open_checkpoint` finds the parts of a model and lists their tensors by our names, `load_llava` builds the model from
them. Loading is strict: a tensor that is missing, unknown or of another shape is an error that lists them all. The few
names that may be there without being read are `model.layouts.NOT_READ`.

A folder is what its files say, never what it is called:
- our own (`runs/<name>/final`), official LLaVA-1.5 and llava-hf hold a language model and a projector, and the tower
  or the name of its repository;
- a folder with a projector only (stage 1) needs `base`, a LLaMA or Vicuna;
- a folder with `adapter_config.json` (PEFT's or official LoRA) needs `base`, what it was trained on.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.adapter_files import ADAPTER_CONFIG, Adapter, LoraSettings, load_adapter, merge_adapter, write_adapter
from model.config import MODEL_TYPE, LlavaConfig
from model.files import StoredTensor, cast_tensor, open_folder, read_json, replace_folder, write_json, write_shards
from model.hub import resolve_folder
from model.layouts import (
    OFFICIAL_CHAT,
    check_llava_settings,
    is_llava,
    read_llama_config,
    read_vision_config,
    to_our_name,
    vision_tower_name,
)
from model.llava import Llava
from model.lora import attach_adapter, check_adapter
from model.projector import Projector
from model.quantize import QuantizedLinear, quantize_linears, quantize_weight

CONFIG_FILE = "config.json"
NUM_LOADERS = 4
BITS = (16, 8, 4)


@dataclass(frozen=True)
class Checkpoint:
    """A whole LLaVA on disk, gathered from as many folders as it is spread over."""

    config: LlavaConfig
    tensors: dict[str, StoredTensor]  # by our names
    adapter: Adapter | None  # its matrices; what it trained whole is among the tensors already
    folders: tuple[Path, ...]  # where its tokenizer may be, the likeliest first

    @property
    def dtype(self) -> torch.dtype:
        """What the language model is stored in."""
        return self.tensors["language_model.embed_tokens.weight"].dtype


def load_llava(
    path: str | Path,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    bits: int = 16,
) -> Llava:
    """Read a model from folders or repositories of the Hugging Face hub.

    Args: see `open_checkpoint` and `build_llava`.
    Raises: FileNotFoundError for a file that is missing; ValueError for one that is not what it should be.
    """
    return build_llava(open_checkpoint(path, base, vision_tower, adapter), dtype, device, bits)


def build_llava(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    bits: int = 16,
) -> Llava:
    """Make the model, one tensor after the other, each at once in its final form.

    In 16 bits an adapter is merged into the weights; over 8 or 4 bits it stays beside them, as it was trained.

    Args:
        dtype: of the weights that are not quantised; None is the one the language model is stored in, which costs no
            memory on a CPU: the files are mapped.
        bits: of the language model's linear layers; 16 leaves them in `dtype`.
    Raises: ValueError for a number of bits there is not, or a tensor that cannot be quantised.
    """
    if bits not in BITS:
        raise ValueError(f"{bits} bits a weight, expected one of {', '.join(map(str, BITS))}")
    with torch.device("meta"):
        model = Llava(checkpoint.config)
    stored, adapter = checkpoint.tensors, checkpoint.adapter
    if adapter is not None and bits == 16:
        stored = merge_adapter(stored, adapter)
    dtype = dtype or checkpoint.dtype
    if bits != 16:
        quantize_linears(model, bits)

    def place(name: str) -> dict[str, Tensor]:
        tensor = stored[name]
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), QuantizedLinear):
            return {name: cast_tensor(tensor.load(), dtype, device)}
        try:
            parts = quantize_weight(tensor.load().to(device), bits)
        except ValueError as error:
            raise ValueError(f"{tensor.source}: {error}") from error
        return {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}

    tensors: dict[str, Tensor] = {}
    # Changing the type is waiting for new memory, which threads do side by side; quantising has several copies at once.
    with ThreadPoolExecutor(NUM_LOADERS if bits == 16 else 1) as threads:
        for placed in threads.map(place, stored):
            tensors |= placed
    model.load_state_dict(tensors, assign=True)
    if adapter is not None and bits != 16:
        attach_adapter(model, adapter, dtype, device)
    return model.eval()


def choose_dtype(stored: torch.dtype, device: str | torch.device) -> torch.dtype:
    """Return what to calculate in: the stored type, but on CPUs bfloat16 for float16, which few of them can."""
    is_cpu = torch.device(device).type == "cpu"
    return torch.bfloat16 if is_cpu and stored == torch.float16 else stored


def open_checkpoint(
    path: str | Path,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    adapter: str | Path | None = None,
    projector_seed: int | None = None,
) -> Checkpoint:
    """Find the parts of a model and list their tensors, after checking that they fit together.

    Args:
        path: a model, a projector or an adapter: a folder, or a repository of the hub.
        base: what a projector or an adapter belongs to.
        vision_tower: a CLIP to take the tower from; otherwise the model's own, or the one that its config names.
        adapter: a LoRA on top of `path`; the same as `path=adapter, base=path`.
        projector_seed: start a projector at random where there is none, as stage 1 does beside a bare language model.
    Raises: FileNotFoundError for a file that is missing; ValueError for parts that do not go together.
    """
    folder = resolve_folder(path)
    adapter_folder = None if adapter is None else resolve_folder(adapter)
    if (folder / ADAPTER_CONFIG).is_file():
        if adapter_folder is not None:
            raise ValueError(f"{path} is an adapter itself: only one can be loaded")
        adapter_folder, folder = folder, _resolve_base(path, base, "an adapter", _named_base(folder))
        base = None
    parts = [folder]
    tensors = _open_renamed(folder)
    if not any(name.startswith("language_model.") for name in tensors):
        if not tensors:
            raise FileNotFoundError(
                f"{path} holds no weights: a model folder has {CONFIG_FILE} and .safetensors or .bin"
            )
        parts.append(_resolve_base(path, base, "a projector without a language model", None))
        tensors = _open_renamed(parts[-1]) | tensors
    elif base is not None:
        raise ValueError(f"{path} holds a language model of its own: leave out the base {base}")
    loaded = None if adapter_folder is None else load_adapter(adapter_folder)
    if loaded is not None:
        parts.insert(0, loaded.folder)
        tensors |= loaded.trained_whole
    configs = [read_json(part / CONFIG_FILE) for part in parts if (part / CONFIG_FILE).is_file()]
    if not configs:
        raise FileNotFoundError(f"{path} lacks {CONFIG_FILE}")
    # An adapter's or projector's folder says which LLaVA it makes of its base; the base says how large that is.
    llava_values = next((values for values in configs if is_llava(values)), {})
    check_llava_settings(llava_values)
    text = read_llama_config(configs[-1])
    vision_values: Mapping[str, Any] = llava_values
    if vision_tower is not None or not any(name.startswith("vision_tower.") for name in tensors):
        tower_folder = resolve_folder(vision_tower or vision_tower_name(llava_values))
        tower = {
            name: tensor for name, tensor in _open_renamed(tower_folder).items() if name.startswith("vision_tower.")
        }
        if not tower:
            raise ValueError(f"{tower_folder} holds no CLIP vision tower")
        tensors |= tower
        layers = {
            key: llava_values[key] for key in ("mm_vision_select_layer", "vision_feature_layer") if key in llava_values
        }
        vision_values = read_json(tower_folder / CONFIG_FILE) | layers
    config = LlavaConfig(text=text, vision=read_vision_config(vision_values, tensors))
    is_ours = llava_values.get("model_type") == MODEL_TYPE
    chat_template = llava_values.get("chat_template", config.chat_template) if is_ours else OFFICIAL_CHAT
    config = replace(config, chat_template=chat_template)
    if projector_seed is not None and not any(name.startswith("projector.") for name in tensors):
        tensors |= _random_projector(config, projector_seed)
    with torch.device("meta"):
        model = Llava(config)
    _check_shapes(list_shapes(model.state_dict()), {name: tensor.shape for name, tensor in tensors.items()}, str(path))
    if loaded is not None:
        loaded = replace(loaded, trained_whole={})
        check_adapter(model, loaded)
    return Checkpoint(config, tensors, loaded, tuple(parts))


def save_llava(folder: Path, config: LlavaConfig, tensors: Mapping[str, Tensor], tokenizer_file: Path) -> None:
    """Write a model folder of our own layout, whole or not at all.

    Raises: OSError when it cannot be written, ValueError when `tensors` are not the model's; what stood at `folder`
        before is then still there.
    """
    with torch.device("meta"):
        wanted = list_shapes(Llava(config).state_dict())
    _check_shapes(wanted, list_shapes(tensors), str(folder))
    with replace_folder(folder) as temporary:
        write_llava(
            temporary,
            config,
            {name: StoredTensor.wrap(tensor, name) for name, tensor in tensors.items()},
            tokenizer_file,
        )


def write_llava(folder: Path, config: LlavaConfig, tensors: Mapping[str, StoredTensor], tokenizer_file: Path) -> None:
    """Write into a folder a model, or a part of one such as a projector, in our own layout. Raises: OSError."""
    _write_config(folder, config, tokenizer_file)
    write_shards(folder, tensors)


def write_lora(
    folder: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    base: str,
    tokenizer_file: Path,
) -> None:
    """Write into a folder an adapter as PEFT does, and what our own layout adds: prompt template and vocabulary.

    Args: see `write_adapter`.
    Raises: OSError.
    """
    _write_config(folder, config, tokenizer_file)
    write_adapter(folder, tensors, settings, base)


def _write_config(folder: Path, config: LlavaConfig, tokenizer_file: Path) -> None:
    write_json(folder / CONFIG_FILE, config.to_dict())
    shutil.copyfile(tokenizer_file, folder / f"tokenizer{tokenizer_file.suffix}")


def list_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _random_projector(config: LlavaConfig, seed: int) -> dict[str, StoredTensor]:
    """Start as official LLaVA does: with PyTorch's own random linear layers."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        projector = Projector(config.vision.hidden_size, config.text.hidden_size)
    return {
        f"projector.{name}": StoredTensor.wrap(tensor, f"random projector.{name}")
        for name, tensor in projector.state_dict().items()
    }


def _open_renamed(folder: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in open_folder(folder).items():
        ours = to_our_name(name)
        if ours in tensors:
            raise ValueError(f"{folder} holds two tensors for {ours}: {tensors[ours].source} and {tensor.source}")
        if ours is not None:
            tensors[ours] = tensor
    return tensors


def _named_base(folder: Path) -> str | None:
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return str(name) if name else None


def _resolve_base(path: str | Path, base: str | Path | None, what: str, named: str | None) -> Path:
    if base is None:
        # The name in the file is where somebody once had the base: a hint for a person, not an address.
        hint = f" (it was trained on {named!r})" if named else ""
        raise ValueError(f"{path} is {what}: say with --model-base (base=) what it belongs to{hint}")
    return resolve_folder(base)


def _check_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str) -> None:
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & found.keys() if found[name] != wanted[name])
    if not (missing or unknown or misshapen):
        return
    problems = [f"missing {name} {wanted[name]}" for name in missing]
    problems += [f"unknown {name} {found[name]}" for name in unknown]
    problems += [f"{name} is {found[name]}, config.json says {wanted[name]}" for name in misshapen]
    causes = []
    if misshapen and all(name.startswith("projector.") for name in misshapen):
        causes.append("the projector belongs to a language model or a tower of another size")
    if not any(name.startswith("projector.") for name in found):
        causes.append("a language model alone is no LLaVA: give its projector as the model and it as the base")
    if misshapen and all(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in misshapen):
        causes.append("tokens were added to the vocabulary, or config.json is another model's")
    if any(".base_layer." in name or ".lora_" in name for name in unknown):
        causes.append("an adapter was saved inside the model: merge it, or save it by itself")
    if any(name.startswith("vision_tower.layers.") for name in (*missing, *unknown)):
        causes.append("the tower is another CLIP than config.json says")
    cause = f"\nlikely cause: {'; '.join(causes)}" if causes else ""
    raise ValueError(f"{source} does not fit its config.json:\n  " + "\n  ".join(problems) + cause)
