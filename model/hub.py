"""A model's name becomes a folder: one that is there already, or a repository of the Hugging Face hub, downloaded.

Downloads go to Hugging Face's own cache, which other programs share. Its variables are honoured: HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE, HF_TOKEN, and HF_ENDPOINT for a mirror such as https://hf-mirror.com. A connection that is cut is taken
up where it broke; after a program that was stopped, whole files stay and the one under way starts anew.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
TIMEOUT_S = 10.0
# Of each line the first that a repository has is wanted, as `model.files` and `model.lora` read them.
WEIGHTS = (
    (
        "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
        "mm_projector.bin",
    ),
    ("adapter_model.safetensors", "adapter_model.bin"),
)  # fmt: skip
# These are wanted, too; all else that a repository holds (other frameworks, pictures, documents) is not.
OTHERS = (
    "config.json", "generation_config.json", "adapter_config.json", "non_lora_trainables.bin",
    "preprocessor_config.json", "processor_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """Return a folder as it is, or what `owner/name` or `owner/name@revision` holds on the hub, downloading what lacks.

    Raises: FileNotFoundError for what is neither; PermissionError for a repository that asks for a licence or a token;
        ValueError for one that holds no weights; OSError for a disk that is full, a hub that does not answer or a file
        that arrived damaged.
    """
    text = str(path_or_hub_id)
    folder = Path(os.path.expanduser(text))
    if text and folder.is_dir():
        return folder
    match = HUB_ID.fullmatch(text)
    if match is None or folder.is_file():
        what = "is a file" if folder.is_file() else "does not exist"
        raise FileNotFoundError(f"{text!r} {what}: give a model's folder, or owner/name of a repository on the hub")
    if os.environ.get("HF_ENDPOINT", "").rstrip("/") not in ("", "https://huggingface.co"):
        # Mirrors pass on files, but not the chunk store from which Xet would fetch them past the mirror.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        from huggingface_hub import HfApi, constants  # here, because it reads the variables when it is imported
    except ImportError as error:
        raise FileNotFoundError(
            f"there is no folder {text} here; to download one from the hub: pip install huggingface_hub ({error})"
        ) from error
    repository, revision = match["name"], match["revision"] or "main"
    cache = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
    except Exception as error:  # of requests, httpx or huggingface_hub, depending on its version
        if cached := _find_cached(cache, revision):
            return cached
        raise _explain(error, repository, revision) from error
    names = choose_files([file.rfilename for file in info.siblings or ()], repository)
    for index in [name for name in names if name.endswith(".index.json")]:
        names += _list_shards(_download(info, revision, [index], cache) / index)
    return _download(info, revision, names, cache)


def choose_files(names: Collection[str], repository: str) -> list[str]:
    """Pick what a model needs among a repository's files; an index stands for its shards.

    Raises: ValueError when none of them holds weights.
    """
    weights = [name for kinds in WEIGHTS for name in [name for name in kinds if name in names][:1]]
    if not weights:
        raise ValueError(f"{repository} holds no weights in a known format: none of {', '.join(sum(WEIGHTS, ()))}")
    return weights + [name for name in OTHERS if name in names]


def _list_shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} does not say which tensor lies in which file: {error!r}") from error


def _find_cached(cache: Path, revision: str) -> Path | None:
    """Return the snapshot that an earlier download left, if it has all weights."""
    ref = cache / "refs" / revision
    folder = cache / "snapshots" / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision)
    try:
        names = choose_files([file.name for file in folder.iterdir()], folder.name)
        shards = [shard for name in names if name.endswith(".index.json") for shard in _list_shards(folder / name)]
    except (OSError, ValueError):
        return None
    return folder if all((folder / name).is_file() for name in names + shards) else None


def _download(info: "ModelInfo", revision: str, names: Iterable[str], cache: Path) -> Path:
    """Bring the named files into the cache and check them; return their folder."""
    from huggingface_hub import snapshot_download

    known = {file.rfilename: file for file in info.siblings or ()}
    if missing := sorted(set(names) - set(known)):
        raise ValueError(f"{info.id} lacks {', '.join(missing)}, which its index names: choose another revision")
    files = [known[name] for name in names]
    folder = cache / "snapshots" / str(info.sha)
    absent = [file for file in files if not (folder / file.rfilename).exists()]
    fresh = [file for file in absent if not (cache / "blobs" / _blob_name(file)).exists()]
    _check_space(info.id, sum(_size(file) for file in fresh), cache)
    failure = None
    if absent:
        patterns = [file.rfilename for file in absent]
        try:
            snapshot_download(info.id, revision=revision, allow_patterns=patterns)
        except Exception as error:  # also of hf_xet
            failure = error
    # After a failure, too: what came before it is taken for granted the next time.
    wrong = [problem for file in files if (problem := _check_file(folder / file.rfilename, file, file in fresh))]
    if failure:
        raise _explain(failure, info.id, revision) from failure
    if wrong:
        raise OSError("; ".join(wrong))
    return folder


def _blob_name(file: "RepoSibling") -> str:
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def _size(file: "RepoSibling") -> int:
    if file.size is None:
        raise OSError(f"the hub does not say how large {file.rfilename} is: choose another mirror (HF_ENDPOINT)")
    return file.size


def _check_space(repository: str, need: int, cache: Path) -> None:
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if need > (free := shutil.disk_usage(place).free):
        raise OSError(
            f"{repository} needs {need / 1e9:.2f} GB more and {place} has {free / 1e9:.2f} GB left: free some, or set "
            "HF_HOME to a folder on a larger disk"
        )


def _check_file(path: Path, file: "RepoSibling", is_fresh: bool) -> str:
    """Compare a file with what the hub says of it and return what is wrong; one that has just come is then removed.

    Hashing 13 GB takes half a minute, so only what has just come is hashed.
    """
    size = path.stat().st_size if path.exists() else 0
    wrong = f"has {size} bytes, the hub says {file.size}" if size != file.size else ""
    if not wrong and is_fresh and file.lfs:
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.lfs.sha256:
                wrong = "has another SHA-256 than the hub says"
    if not wrong:
        return ""
    if not is_fresh:
        return f"{path} {wrong}: delete {path.resolve()} and run this again"
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return f"{path} {wrong}: run this again"


def _explain(error: Exception, repository: str, revision: str) -> OSError:
    """Say what to do about an error of huggingface_hub."""
    from huggingface_hub import constants, errors

    hub = _hide_secrets(constants.ENDPOINT)
    page = f"{hub}/{repository}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return PermissionError(f"{page} is gated: accept its licence there and set HF_TOKEN to a token of your account")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{page} has no revision {revision}: see its branches and tags")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"there is no folder {repository} here and no repository {page}: check the spelling; a private one needs "
            "HF_TOKEN"
        )
    if status == 401:
        return PermissionError(f"{hub} does not know your token: correct HF_TOKEN, or unset it")
    said = f"HTTP status {status}" if status else f"{type(error).__name__}: {_hide_secrets(str(error))}"
    return OSError(
        f"there is no folder {repository} here, no whole copy in {constants.HF_HUB_CACHE}, and {hub} did not send one "
        f"({said}). Run this again; or set HF_ENDPOINT to a mirror such as https://hf-mirror.com; or download the "
        "repository by other means (ModelScope, another computer) and give the folder. With HF_HUB_OFFLINE set, only "
        "the cache is used: unset it to download"
    )


def _hide_secrets(text: str) -> str:
    """Leave out passwords in addresses and tokens in headers."""
    return re.sub(r"(//)[^/\s]*@|(Bearer )[^'\"]*", r"\1\2", text)
