"""What is dropped from the page cache is read again from the disk, and eight ranks read every byte once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.page_cache import count_cached_bytes, drop_from_cache
from eval.speed_load import NUM_RANKS, list_rank_goals, measure_ranks, print_ranks
from eval.speed_weights import HF_BF16, HF_FP16, prepare_checkpoint
from model.files import StoredTensor, open_tensors, write_tensors

SLACK_BYTES = 2**17
ROW_NUMBERS = 2**19  # 1 MB in bf16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on a disk whose files can be dropped from the page cache."""
    folder = tmp_path_factory.mktemp("page_cache")
    (folder / "file").write_bytes(bytes(SLACK_BYTES))
    if drop_from_cache([folder / "file"]):
        pytest.skip("files of this file system cannot be dropped from the page cache")
    return folder


def test_cached_bytes_are_counted(folder: Path) -> None:
    file = folder / "counted"
    file.write_bytes(bytes(3 * SLACK_BYTES + 1))
    assert count_cached_bytes(file) > 3 * SLACK_BYTES
    assert drop_from_cache([file]) == 0
    file.read_bytes()
    assert count_cached_bytes(file) > 3 * SLACK_BYTES


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_rows_are_read_without_what_lies_around_them(folder: Path, suffix: str) -> None:
    file = folder / f"weights{suffix}"
    tensors = {"other": torch.ones(3), "matrix": torch.arange(48.0).bfloat16()[:, None].expand(48, ROW_NUMBERS).clone()}
    if suffix == ".bin":
        torch.save(tensors, file)
    else:
        write_tensors(file, tensors)
    stored: StoredTensor = open_tensors(file)["matrix"]
    assert drop_from_cache([file]) == 0
    rows = stored.read(slice(24, 26))
    assert rows.unique().tolist() == [24, 25]
    assert rows.nbytes <= count_cached_bytes(file) <= rows.nbytes + SLACK_BYTES


def test_ranks_read_the_files_once(folder: Path) -> None:
    ranks = measure_ranks(prepare_checkpoint(folder, "tiny", HF_BF16), prepare_checkpoint(folder, "tiny", HF_FP16))
    if "not_measured" in ranks:
        pytest.skip(ranks["not_measured"])
    at_once = ranks["at_once"]
    assert len(at_once) == NUM_RANKS
    assert 0.95 * ranks["files_bytes"] < sum(row["rows_bytes"] for row in at_once) <= ranks["files_bytes"]
    assert sum(row["disk_bytes"] for row in at_once) < 1.05 * ranks["files_bytes"]
    assert ranks["alone"]["rows_bytes"] == at_once[3]["rows_bytes"]


def test_goals_of_ranks_follow_from_their_figures(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "rows_bytes": 100,
        "opening_disk_bytes": 10,
        "disk_bytes": 140,
        "private_peak_bytes": 0,
        "file_pages_bytes": 0,
    }
    ranks: dict[str, Any] = {"files_bytes": 800, "at_once": [row] * NUM_RANKS, "alone": row}
    sum_goal, alone_goal = list_rank_goals(ranks)
    assert sum_goal["value"] == pytest.approx(1.4)
    assert alone_goal["value"] == pytest.approx(1.3)
    assert not sum_goal["reached"]
    assert list_rank_goals({"not_measured": "why"}) == []
    print_ranks({"not_measured": "why"})
    assert "is not measured here: why" in capsys.readouterr().out
