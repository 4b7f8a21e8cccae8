"""The store of features and tokens: what is read is what was written, and what has changed is refused."""

import hashlib
import json
import pickle
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data import feature_store
from data.conversation import Rendered
from data.feature_store import (
    FeatureKey,
    FeatureStore,
    TokenKey,
    TokenStore,
    arrange_names,
    arrange_rows,
    features_file,
    finish_store,
    open_shard,
    start_store,
    tokens_file,
    write_tensors,
)
from data.pictures import PictureFolder

FEATURES = FeatureKey(tower="a" * 64, image_size=336, aspect="pad")
TOKENS = TokenKey("b" * 64, "c" * 64, tokens_per_image=6, template="vicuna_v1", branched=False, max_tokens=2048)
NAMES = ["a/1.jpg", "a/2.jpg", "b.png", "grüße/日本.jpg", "z.gif"]  # in order
NUM_PATCHES, HIDDEN_SIZE = 6, 4
ROWS = [
    Rendered([1, -200, 7], [-100, -100, 7], [0, 1, 2], [0, 0, 0], num_images=1, num_cut=5),
    Rendered([1, 9], [-100, 9], [0, 1], [0, 1], num_images=0),
    None,  # left out
    Rendered([1, 31999, 8, 2], [-100, 31999, 8, 2], [0, 1, 1, 2], [0, 1, 2, 2], num_images=0),
]


@dataclass
class Made:
    """A store, and what it was made of."""

    folder: Path
    images: Path
    features: dict[str, Tensor]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Five pictures in three files, four rows in two."""
    monkeypatch.setattr(feature_store, "PICTURES_PER_SHARD", 2)
    monkeypatch.setattr(feature_store, "ROWS_PER_SHARD", 3)
    images, folder = tmp_path / "images", tmp_path / "store"
    for name in NAMES:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(f"bytes of {name}".encode())
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(NUM_PATCHES, HIDDEN_SIZE, generator=generator).bfloat16() for name in NAMES}
    key = asdict(FEATURES) | asdict(TOKENS) | {"dtype": "float32"}
    start_store(folder, key)
    shards = [NAMES[:2], NAMES[2:4], NAMES[4:]]
    for shard, names in enumerate(shards):
        digests = [list(hashlib.sha256((images / name).read_bytes()).digest()) for name in names]
        tensors = {"features": torch.stack([features[name] for name in names]), "names": arrange_names(names)}
        tensors["sha256"] = torch.tensor(digests, dtype=torch.uint8)
        write_tensors(features_file(folder, shard), tensors)
    write_tensors(tokens_file(folder, 0), arrange_rows(ROWS[:3]))
    assert finish_store(folder, key, shards, len(ROWS), NUM_PATCHES, HIDDEN_SIZE) is None  # a file is missing
    assert not (folder / "manifest.json").exists()
    write_tensors(tokens_file(folder, 1), arrange_rows(ROWS[3:]))
    assert finish_store(folder, key, shards, len(ROWS), NUM_PATCHES, HIDDEN_SIZE) is not None
    return Made(folder, images, features)


def test_features_are_read_as_they_were_written(made: Made) -> None:
    store, pictures = FeatureStore(made.folder, FEATURES), PictureFolder(made.images)
    assert len(store) == len(NAMES)
    for name in reversed(NAMES):
        assert name in store
        loaded = store.load(name, pictures)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(loaded, made.features[name])
        assert loaded.untyped_storage().nbytes() == NUM_PATCHES * HIDDEN_SIZE * 2  # no view of a whole file
    for name in ("", "a/1.jp", "a/1.jpg" + "g" * 40, "a/1.jpg2", "zz.gif", "A/1.jpg"):
        assert name not in store
    with pytest.raises(ValueError, match=r"store has no features of zz\.gif"):
        store.load("zz.gif", pictures)


def test_a_changed_picture_is_refused_and_a_missing_one_is_not(made: Made) -> None:
    store = FeatureStore(made.folder, FEATURES)
    (made.images / "b.png").write_bytes(b"another picture")
    (made.images / "z.gif").unlink()
    pictures = PictureFolder(made.images)
    assert torch.equal(store.load("z.gif", pictures), made.features["z.gif"])
    with pytest.raises(ValueError, match=r"images/b\.png has changed since .*: delete features-00001\.safetensors"):
        store.load("b.png", pictures)
    assert torch.equal(store.load("a/1.jpg", pictures), made.features["a/1.jpg"])


def test_rows_are_read_as_they_were_rendered(made: Made) -> None:
    store = TokenStore(made.folder, TOKENS)
    assert len(store) == len(ROWS)
    for number in (3, 0, 1):
        assert store[number] == ROWS[number]
    with pytest.raises(ValueError, match="without row 2"):
        store[2]
    for number in (-1, 4):
        with pytest.raises(IndexError):
            store[number]


def test_stores_can_be_sent_to_other_processes(made: Made) -> None:
    features = pickle.loads(pickle.dumps(FeatureStore(made.folder, FEATURES)))
    tokens = pickle.loads(pickle.dumps(TokenStore(made.folder, TOKENS)))
    open_shard.cache_clear()  # as in a process that has opened nothing
    assert torch.equal(features.load("b.png", PictureFolder(made.images)), made.features["b.png"])
    assert tokens[0] == ROWS[0]


@pytest.mark.parametrize(
    ("field", "value"), [("tower", "d" * 64), ("image_size", 224), ("aspect", "square"), ("processing", 0)]
)
def test_features_made_otherwise_are_refused(made: Made, field: str, value: str | int) -> None:
    stored = getattr(FEATURES, field)
    with pytest.raises(ValueError, match=f"{field} is {stored!r} there, {value!r} here.*python -m data.features"):
        FeatureStore(made.folder, FeatureKey(**(asdict(FEATURES) | {field: value})))


@pytest.mark.parametrize(
    ("field", "value"),
    [("data", "d" * 64), ("tokenizer", "d" * 64), ("tokens_per_image", 7), ("template", "plain"), ("branched", True),
     ("max_tokens", 2047)],
)  # fmt: skip
def test_tokens_made_otherwise_are_refused(made: Made, field: str, value: str | int) -> None:
    stored = getattr(TOKENS, field)
    with pytest.raises(ValueError, match=f"{field} is {stored!r} there, {value!r} here.*python -m data.features"):
        TokenStore(made.folder, TokenKey(**(asdict(TOKENS) | {field: value})))
    FeatureStore(made.folder, FEATURES)  # they do not depend on the text


def test_no_store_and_an_unfinished_one_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere holds no features"):
        FeatureStore(tmp_path / "nowhere", FEATURES)
    (made.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="unfinished: run the same"):
        FeatureStore(made.folder, FEATURES)


@pytest.mark.parametrize("name", ["features-00001.safetensors", "tokens-00000.safetensors", "index.safetensors"])
def test_files_that_are_cut_off_or_missing_are_refused(made: Made, name: str) -> None:
    content = (made.folder / name).read_bytes()
    (made.folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name} has {len(content) - 1} bytes, expected {len(content)}: delete it"):
        FeatureStore(made.folder, FEATURES)
    (made.folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} has 0 bytes, expected {len(content)}"):
        TokenStore(made.folder, TOKENS)


@pytest.mark.parametrize("name", ["key.json", "manifest.json"])
def test_a_damaged_description_is_refused(made: Made, name: str) -> None:
    (made.folder / name).write_text((made.folder / name).read_text()[:-9])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        FeatureStore(made.folder, FEATURES)


def test_a_damaged_file_of_the_right_size_is_refused(made: Made) -> None:
    file = features_file(made.folder, 0)
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ValueError, match=r"features-00000\.safetensors is damaged"):
        FeatureStore(made.folder, FEATURES).load(NAMES[0], PictureFolder(made.images))


def test_another_shards_pictures_are_not_taken_for_its_own(made: Made) -> None:
    features_file(made.folder, 0).write_bytes(features_file(made.folder, 1).read_bytes())
    with pytest.raises(ValueError, match=r"features-00000\.safetensors holds other pictures"):
        finish_store(made.folder, {}, [NAMES[:2], NAMES[2:4], NAMES[4:]], len(ROWS), NUM_PATCHES, HIDDEN_SIZE)


def test_a_started_store_takes_no_other_settings(made: Made) -> None:
    before = json.loads((made.folder / "key.json").read_text())
    start_store(made.folder, before)
    with pytest.raises(ValueError, match="dtype is 'float32' there, 'bfloat16' here"):
        start_store(made.folder, before | {"dtype": "bfloat16"})
    assert json.loads((made.folder / "key.json").read_text()) == before


def test_the_index_of_350_thousand_pictures_is_small(tmp_path: Path) -> None:
    """Whatever of it is not mapped."""
    names = [f"vg/VG_100K/{number:07d}.jpg" for number in range(350_000)]
    index = {"names": arrange_names(names), "sha256": torch.zeros(len(names), 32, dtype=torch.uint8)}
    (tmp_path / "key.json").write_text(json.dumps(asdict(FEATURES)))
    write_tensors(tmp_path / "index.safetensors", index)
    (tmp_path / "manifest.json").write_text(json.dumps({"bytes": {}, "pictures_per_shard": 256}))
    tracemalloc.start()
    store = FeatureStore(tmp_path, FEATURES)
    assert names[123_456] in store
    assert "vg/VG_100K/0123456.jpeg" not in store
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert len(pickle.dumps(store)) < 25e6
