"""What the tests of several rooms share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.prepare import easy_vqa, tiny_zh
from model.config import CONFIGS
from model.llava import Llava, initialize_weights
from model.weights import save_llava

ROOT = Path(__file__).resolve().parents[1]
TINY_TOKENIZER = ROOT / "data/tiny/tokenizer.model"

# With `pytest -n 2`, two processes that each calculate on all cores would wait for each other's threads.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session")
def easy_vqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared easy-VQA set; read only."""
    folder = tmp_path_factory.mktemp("sets") / "easy_vqa"
    easy_vqa.prepare(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_zh_folder(easy_vqa_folder: Path) -> Path:
    """The prepared Chinese set, beside easy-VQA's; read only."""
    folder = easy_vqa_folder.with_name("tiny_zh")
    tiny_zh.prepare(easy_vqa_folder, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random tiny weights; read only."""
    folder = tmp_path_factory.mktemp("tiny") / "final"
    llava = Llava(CONFIGS["tiny"])
    initialize_weights(llava, llava.config.text.hidden_size**-0.5, seed=3)
    save_llava(folder, llava.config, llava.state_dict(), TINY_TOKENIZER)
    return folder


@pytest.fixture
def llava() -> Llava:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    llava = Llava(CONFIGS["tiny"])
    initialize_weights(llava, llava.config.text.hidden_size**-0.5, seed=5)
    return llava


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, as the system has it. Of a module: while it is open, no other test can start an event loop."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this system: apt install chromium")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()
