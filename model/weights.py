"""Weights in, weights out. A model folder holds `config.json`, `model.safetensors` and `tokenizer.model`.

Loading is strict: a tensor that is missing, unknown or of another shape is an error that lists them all.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import LlavaConfig
from model.llava import Llava

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.model"


def load_llava(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Llava:
    """Read a model folder.

    Raises: FileNotFoundError for a folder that lacks a file; ValueError for a file that is not what it should be.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = Llava(config)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt", device=str(device)) as file:
            wanted = list_shapes(model.state_dict())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(wanted, found, folder / WEIGHTS_FILE)
            tensors = {name: file.get_tensor(name).to(dtype) for name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is not a whole safetensors file ({error}): copy it again") from error
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_config(folder: Path) -> LlavaConfig:
    """Read the architecture of a model folder, after checking that every file is there."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"model folder {folder} lacks {', '.join(missing)}: a folder that training wrote (runs/<name>/final) "
            "holds all three"
        )
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{folder / CONFIG_FILE} holds a {type(values).__name__}, expected an object")
    return LlavaConfig.from_dict(values)


def save_llava(folder: Path, config: LlavaConfig, tensors: Mapping[str, Tensor], tokenizer_file: Path) -> None:
    """Write a model folder, whole or not at all.

    Raises: OSError when it cannot be written, ValueError when `tensors` are not the model's; what stood at `folder`
        before is then still there.
    """
    with torch.device("meta"):
        wanted = list_shapes(Llava(config).state_dict())
    _check_shapes(wanted, list_shapes(tensors), folder / WEIGHTS_FILE)
    with replace_folder(folder) as temporary:
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        shutil.copyfile(tokenizer_file, temporary / TOKENIZER_FILE)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / WEIGHTS_FILE)
        except SafetensorError as error:  # safetensors wraps the system's error, a full disk among them
            raise OSError(f"cannot write {folder / WEIGHTS_FILE}: {error}") from error


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place only if the block ends well."""
    folder = folder.resolve()
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def list_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], file: Path) -> None:
    problems = [f"missing {name} {wanted[name]}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unknown {name} {found[name]}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {found[name]}, config.json says {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    if problems:
        raise ValueError(f"{file} does not fit its config.json:\n  " + "\n  ".join(problems))
