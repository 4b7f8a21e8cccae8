"""The train suite compares like with like: the same documents, the same loss, the peer's padding counted as nothing."""

import json
from typing import Any

import pytest
import torch

from data.conversation import IGNORE_INDEX
from eval.speed_train import count_operations
from eval.speed_train_contestants import DEFAULT, OURS, TUNED, Work, make_batches, make_documents, pad_batch
from eval.speed_weights import SIZES
from tests.launch import run_script

NUM_DOCUMENTS = 12


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("train")
    arguments = ["--suite", "train", "--size", "tiny", "--device", "cpu", "--repeats", "1"]
    arguments += ["--documents", str(NUM_DOCUMENTS), "--out", "train.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")  # it would take most of the time; train/test_compile.py compiles
        ended = run_script(folder, "eval/speed.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    (line,) = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(line), ended.stdout


@pytest.fixture
def work(tmp_path: Any) -> Work:
    return Work(tmp_path, SIZES["tiny"], make_documents(SIZES["tiny"], NUM_DOCUMENTS), 5, "cpu")


def test_everybody_starts_with_the_same_loss(measured: tuple[dict[str, Any], str]) -> None:
    losses = measured[0]["first_loss"]
    assert len(losses) == 5
    for loss in losses.values():
        assert loss == pytest.approx(losses[OURS], rel=1e-3)  # bf16 rounds to 4e-3 each of many numbers


def test_ratios_follow_from_the_medians(measured: tuple[dict[str, Any], str]) -> None:
    result, printed = measured
    speeds = {name: row["real_tokens_per_s"] for name, row in result["median"].items()}
    needed = sum(result["operations"].values())
    for name, ratio in result["ratio"].items():
        assert f"\n{name} " in printed
        step_s = result["median"][name]["step_s"]
        assert speeds[name] == pytest.approx(result["real_tokens"] / step_s)
        assert ratio["tokens_to_default"] == pytest.approx(speeds[name] / speeds[DEFAULT])
        assert ratio["share_of_limit"] == pytest.approx(needed / step_s / result["product_operations_per_s"])
    assert max(result["ratio"][name]["tokens_to_tuned"] for name in speeds if TUNED in name) == pytest.approx(1)
    assert 0 < result["kept_bytes"][OURS] < result["kept_bytes"][DEFAULT]
    assert result["real_tokens"] < result["padded_tokens"][TUNED] <= result["padded_tokens"][DEFAULT]


def test_batches_hold_every_document_once(work: Work) -> None:
    for is_grouped in (False, True):
        batches = make_batches(work, is_grouped)
        assert [len(batch) for batch in batches] == [5, 5, 2]
        assert {id(document) for batch in batches for document in batch} == {id(one) for one in work.documents}
    lengths = [[len(document) for document in batch] for batch in make_batches(work, is_grouped=True)]
    assert max(lengths[0]) <= min(lengths[1]) and max(lengths[1]) <= min(lengths[2])  # noqa: PT018


def test_padding_is_masked_and_teaches_nothing(work: Work) -> None:
    documents = work.documents[:5]
    batch = pad_batch(documents, image_token_id=7)
    assert batch["input_ids"].shape == (5, max(map(len, documents)))
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(document) for document in documents]
    assert not (batch["labels"] != IGNORE_INDEX)[batch["attention_mask"] == 0].any()
    num_supervised = sum(document.text.num_supervised for document in documents)
    assert (batch["labels"] != IGNORE_INDEX).sum() == num_supervised > 0
    num_pictures = sum(document.pixels is not None for document in documents)
    assert (batch["input_ids"] == 7).sum() >= num_pictures * work.config.vision.num_patches > 0
    assert len(batch["pixel_values"]) == num_pictures


def test_operations_are_those_of_the_matrices(work: Work) -> None:
    """Counted by hand for the parts that are easy to count."""
    operations, text = count_operations(work), work.config.text
    linears = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    real = sum(map(len, work.documents))
    frozen = 4 * text.num_hidden_layers * linears * real
    assert frozen < operations["layers"] < 2 * frozen  # rank 16 beside linears of 128 to 384
    assert operations["lm_head"] == 4 * text.vocab_size * text.hidden_size * work.num_supervised
    assert torch.tensor(list(operations.values())).gt(0).all()
