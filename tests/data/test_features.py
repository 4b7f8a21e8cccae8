"""Encoding ahead: features and tokens are those of training; killed, shared or repeated work ends in the same bytes."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import feature_store, features
from data.conversation import parse_turns, render_conversation
from data.dataset import RenderOptions
from data.feature_store import FeatureKey, FeatureStore, TokenStore
from data.features import feature_key, token_key
from data.image import open_image, preprocess_image
from data.pictures import PictureFolder
from data.tokenizer import Tokenizer
from model.config import CONFIGS
from model.files import StoredTensor, cast_stored
from model.llava import Llava, initialize_weights
from model.weights import load_llava, open_checkpoint, save_llava
from tests.conftest import ROOT, TINY_TOKENIZER
from tests.launch import environment

NUM_PICTURES = 17
BATCH_SIZE = 3
VISION = CONFIGS["tiny"].vision
# Small files, so that little data makes several; for a process of its own as well.
SIZES = {"PICTURES_PER_SHARD": 5, "ROWS_PER_SHARD": 8}
CHILD = f"""
import os, signal, sys
from data import feature_store, features
for module in (feature_store, features):
    vars(module).update({SIZES})
rename = os.replace
def replace_or_die(source, target):
    if str(target).endswith(os.environ.get("DIES_AT", "never")):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace_or_die
features.main()
"""

Encode = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that are started have it: small sums are slower in several."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.json` and `images/`: text alone too, a picture in two rows, several turns."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    rows = []
    for number in range(NUM_PICTURES):
        name = f"{'val' if number % 2 else 'train'}/{number}.png"
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20 + number % 7, 30 - number % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        turns = [("human", "<image>\nWhat is this?"), ("gpt", f"noise {number}")]
        turns += [("human", "Are you sure? " * (number % 9)), ("gpt", "yes")] * (number % 3)
        rows.append(make_row(turns, image=name))
        if number % 4 == 0:
            rows.append(make_row([("human", "Hello!"), ("gpt", "Good morning.")]))
    rows.append(make_row([("human", "<image>\nAgain?"), ("gpt", "yes")], image="train/4.png"))
    rows.append(make_row([("human", "<image>\nA caption"), ("gpt", "noise")], image="train/2.png", template="plain"))
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def make_row(turns: list[tuple[str, str]], **fields: str) -> dict:
    return {"id": "row", "conversations": [{"from": role, "value": text} for role, text in turns], **fields}


@pytest.fixture
def encode(data: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Encode:
    """Run the command in this process: `encode(out, "--branched", file=..., rank=1, num_ranks=2)`."""
    for module in (feature_store, features):
        for name, value in SIZES.items():
            monkeypatch.setattr(module, name, value)
    # Maps of files that a test removes and makes again.
    monkeypatch.setattr(feature_store, "open_shard", feature_store.map_tensors)

    def run(out: Path, *options: str, file: Path = data / "rows.json", rank: int = 0, num_ranks: int = 1) -> Path:
        monkeypatch.setattr(sys, "argv", ["features", *arguments(out, file, tiny_model_folder), *options])
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
        features.main()
        return out

    return run


def arguments(out: Path, file: Path, model: Path) -> list[str]:
    """Return what every run is given."""
    images = file.parent / "images"
    return [str(file), "--images", str(images), "--model-path", str(model), "--out", str(out),
            "--batch-size", str(BATCH_SIZE), "--workers", "0", "--device", "cpu"]  # fmt: skip


def start_process(out: Path, data: Path, model: Path, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments(out, data / "rows.json", model)],
        cwd=ROOT,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def whole(encode: Encode, tmp_path: Path) -> Path:
    """A store made at one go."""
    return encode(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def key_of(model: Path, aspect: str = "pad") -> FeatureKey:
    return feature_key(open_checkpoint(model).tensors, VISION, aspect)


def options_of(**others: bool | int | str) -> RenderOptions:
    return RenderOptions(VISION.num_patches, VISION.image_size, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(("aspect", "dtype"), [("pad", torch.float32), ("square", torch.bfloat16)])
def test_features_are_those_of_the_tower(
    encode: Encode, data: Path, tiny_model_folder: Path, tmp_path: Path, aspect: str, dtype: torch.dtype
) -> None:
    out = encode(tmp_path / "out", "--aspect", aspect, "--dtype", str(dtype).removeprefix("torch."))
    store = FeatureStore(out, key_of(tiny_model_folder, aspect))
    pictures = PictureFolder(data / "images")
    tower = load_llava(tiny_model_folder, dtype=dtype).vision_tower
    names = sorted(str(path.relative_to(data / "images")) for path in data.glob("images/*/*.png"))
    assert len(store) == len(names) == NUM_PICTURES
    assert all(len(row) == 32 for row in store.digests)
    for first in range(0, NUM_PICTURES, SIZES["PICTURES_PER_SHARD"]):
        shard = names[first : first + SIZES["PICTURES_PER_SHARD"]]
        for start in range(0, len(shard), BATCH_SIZE):  # the same batches: sums of another shape round differently
            batch = shard[start : start + BATCH_SIZE]
            images = [open_image(data / "images" / name) for name in batch]
            pixels = torch.stack([preprocess_image(image, VISION.image_size, aspect) for image in images])
            with torch.no_grad():
                wanted = tower(pixels.to(dtype)).bfloat16()
            for name, expected in zip(batch, wanted, strict=True):
                assert torch.equal(store.load(name, pictures), expected)


@pytest.mark.parametrize(
    ("options", "render_options"),
    [([], options_of()), (["--branched", "--max-tokens", "150"], options_of(branched=True, max_tokens=150)),
     (["--template", "llava_llama_2"], options_of(template="llava_llama_2"))],
)  # fmt: skip
def test_tokens_are_those_of_rendering(
    encode: Encode, data: Path, tmp_path: Path, options: list[str], render_options: RenderOptions
) -> None:
    out, tokenizer = encode(tmp_path / "out", *options), Tokenizer(TINY_TOKENIZER)
    store = TokenStore(out, token_key(data / "rows.json", tokenizer, render_options))
    rows = json.loads((data / "rows.json").read_text())
    rendered = [
        render_conversation(
            parse_turns(row),
            tokenizer,
            VISION.num_patches,
            row.get("template", render_options.template),
            render_options.branched,
            render_options.max_tokens,
        )
        for row in rows
    ]
    assert [store[number] for number in range(len(store))] == rendered
    assert {row.num_images for row in rendered} == {0, 1}
    assert any(row.num_cut for row in rendered) == (render_options.max_tokens == 150)
    assert any(max(row.branch_ids) > 1 for row in rendered) == render_options.branched


def test_the_key_is_the_towers_and_no_other_weights(llava: Llava, tmp_path: Path) -> None:
    def key(changed: str | None = None, dtype: torch.dtype = torch.float32) -> str:
        tensors = {name: tensor.half() for name, tensor in llava.state_dict().items()}  # as CLIP is distributed
        if changed is not None:
            tensors[changed] = tensors[changed] + 1
        stored = {name: cast_stored(StoredTensor.wrap(tensor, name), dtype) for name, tensor in tensors.items()}
        return feature_key(stored, VISION, "pad").tower

    num_used = llava.vision_tower.num_used_layers
    assert key() == key(dtype=torch.float16)
    for part in ("patch_embedding.weight", f"layers.{num_used - 1}.mlp.fc2.bias"):
        assert key(f"vision_tower.{part}") != key()
    for name in ("projector.linear_1.weight", "vision_tower.post_layernorm.bias",
                 f"vision_tower.layers.{num_used}.mlp.fc2.bias"):  # fmt: skip
        assert key(name) == key()


def test_another_tower_is_refused(whole: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    llava = Llava(CONFIGS["tiny"])
    initialize_weights(llava, 0.1, seed=4)
    save_llava(tmp_path / "other", llava.config, llava.state_dict(), TINY_TOKENIZER)
    FeatureStore(whole, key_of(tiny_model_folder))
    with pytest.raises(ValueError, match=r"whole was made otherwise: tower is '\w{64}' there, '\w{64}' here"):
        FeatureStore(whole, key_of(tmp_path / "other"))


def test_stopped_at_any_file_it_goes_on_to_the_same_bytes(
    encode: Encode, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace
    num_files = len(contents(whole))
    assert num_files == 4 + 3 + 3  # pictures, rows, descriptions
    for stop_at in range(num_files):
        names: list[str] = []

        def rename_or_stop(source: Path, target: Path, names: list[str] = names, stop_at: int = stop_at) -> None:
            names.append(target.name)
            if len(names) > stop_at:
                raise KeyboardInterrupt
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", rename_or_stop)
            with pytest.raises(KeyboardInterrupt):
                encode(tmp_path / f"stopped-{stop_at}")
        encode(tmp_path / f"stopped-{stop_at}")
        assert contents(tmp_path / f"stopped-{stop_at}") == contents(whole)


def test_killed_it_goes_on_to_the_same_bytes(
    encode: Encode, whole: Path, data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    process = start_process(killed, data, tiny_model_folder, DIES_AT="features-00002.safetensors")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert (killed / "features-00001.safetensors").is_file()
    assert not (killed / "features-00002.safetensors").exists()
    with pytest.raises(ValueError, match="killed is unfinished"):
        FeatureStore(killed, key_of(tiny_model_folder))
    done = (killed / "features-00001.safetensors").stat().st_mtime_ns
    encode(killed)
    assert (killed / "features-00001.safetensors").stat().st_mtime_ns == done  # not made again
    assert contents(killed) == contents(whole)


def test_two_ranks_make_what_one_does(
    encode: Encode, whole: Path, data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    processes = [
        start_process(shared, data, tiny_model_folder, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert any("shared is finished" in output for output in outputs)
    assert contents(shared) == contents(whole)


def test_a_rank_makes_its_share_and_leaves_the_rest(encode: Encode, tmp_path: Path, whole: Path) -> None:
    out = encode(tmp_path / "out", rank=1, num_ranks=2)
    odd = {f"{kind}-0000{shard}.safetensors" for kind in ("features", "tokens") for shard in (1, 3)}
    assert contents(out).keys() == (odd & contents(whole).keys()) | {"key.json"}
    encode(out, rank=0, num_ranks=2)
    assert contents(out) == contents(whole)


def test_it_goes_on_only_with_the_same_settings_and_data(
    encode: Encode, whole: Path, data: Path, tmp_path: Path
) -> None:
    before = contents(whole)
    shutil.copytree(data / "images", tmp_path / "images")
    rows = json.loads((data / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows[:-1]))
    for options, problem in (
        (["--aspect", "square"], "aspect is 'pad' there, 'square' here"),
        (["--template", "plain"], "template is 'vicuna_v1' there, 'plain' here"),
        (["--dtype", "bfloat16"], "dtype is 'float32' there, 'bfloat16' here"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*whole was made otherwise: {problem}"):
            encode(whole, *options)
    with pytest.raises(SystemExit, match="data is"):
        encode(whole, file=tmp_path / "rows.json")
    assert contents(whole) == before


def test_a_changed_picture_is_encoded_again_once_its_file_is_deleted(
    encode: Encode, data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "copy")
    rows = tmp_path / "copy/rows.json"
    out = encode(tmp_path / "out", file=rows)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "copy/images/val/3.png")
    pictures = PictureFolder(tmp_path / "copy/images")
    with pytest.raises(ValueError, match=r"val/3\.png has changed.*delete features-0000(\d)") as refusal:
        FeatureStore(out, key_of(tiny_model_folder)).load("val/3.png", pictures)
    (out / str(refusal.value).split("delete ")[1].split()[0]).unlink()
    encode(out, file=rows)
    loaded = FeatureStore(out, key_of(tiny_model_folder)).load("val/3.png", pictures)
    assert not torch.equal(loaded, FeatureStore(out, key_of(tiny_model_folder)).load("val/1.png", pictures))


def test_broken_pictures_are_named_or_left_out(
    encode: Encode, data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "copy")
    rows = tmp_path / "copy/rows.json"
    (tmp_path / "copy/images/train/4.png").write_bytes((data / "images/train/4.png").read_bytes()[:200])
    with pytest.raises(SystemExit, match=r"train/4\.png: cannot read .*python -m data\.check.*--bad-list"):
        encode(tmp_path / "out", "--workers", "1", file=rows)
    bad_list = tmp_path / "bad.jsonl"
    bad_list.write_text('{"image": "train/4.png", "reason": "truncated"}\n{"row": 1, "reason": "no answer"}\n')
    with pytest.raises(SystemExit, match="bad_list is None there, '"):
        encode(tmp_path / "out", "--bad-list", str(bad_list), file=rows)
    out = encode(tmp_path / "out2", "--bad-list", str(bad_list), file=rows)
    store = FeatureStore(out, key_of(tiny_model_folder))
    assert len(store) == NUM_PICTURES - 1
    assert "train/4.png" not in store
    tokens = TokenStore(out, token_key(rows, Tokenizer(TINY_TOKENIZER), options_of()))
    bad = [n for n, row in enumerate(json.loads(rows.read_text())) if n == 1 or row.get("image") == "train/4.png"]
    assert len(bad) == 3
    for number in range(len(tokens)):
        if number in bad:
            with pytest.raises(ValueError, match=f"without row {number}"):
                tokens[number]
        else:
            assert len(tokens[number])


def test_text_alone_needs_no_pictures(encode: Encode, tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([make_row([("human", "Hello!"), ("gpt", "Good morning.")])]))
    out = encode(tmp_path / "out", file=rows)
    assert len(FeatureStore(out, key_of(tiny_model_folder))) == 0
    assert TokenStore(out, token_key(rows, Tokenizer(TINY_TOKENIZER), options_of()))[0].num_images == 0


def test_a_full_disk_is_noticed_before_the_work(
    encode: Encode, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit, match=r"error: .*out will take 0\.0 GB.*disk has 0\.0 GB free"):
        encode(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    encode(whole)  # what is there already takes no more room


def test_the_table_says_what_was_made(encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = encode(tmp_path / "out")
    table = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    sizes = [path.stat().st_size for path in out.glob("features-*")]
    assert table["pictures"] == str(NUM_PICTURES)
    assert table["bytes a picture"] == f"{sum(sizes) / NUM_PICTURES:,.0f}"
    assert float(table["pictures/s"]) > 0
    assert sum(sizes) / NUM_PICTURES < VISION.num_patches * VISION.hidden_size * 2 * 1.02


def test_the_bytes_that_were_encoded_are_those_that_are_hashed(encode: Encode, whole: Path, data: Path) -> None:
    """Even where the file's name is found in another letter case."""
    content = (data / "images/train/0.png").read_bytes()
    batches = features.PictureBatches(PictureFolder(data / "images"), 28, "pad", torch.float32)
    made = batches[["Train/0.PNG"]]
    assert not isinstance(made, ValueError)
    assert bytes(made[1][0].tolist()) == hashlib.sha256(content).digest()
    assert torch.equal(made[0][0], preprocess_image(open_image(io.BytesIO(content)), 28))
