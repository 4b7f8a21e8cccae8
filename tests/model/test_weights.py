"""Model folders: what is saved is what is loaded, bit for bit; what is wrong is named; a failure destroys nothing."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.files import PIECE_NUMBERS, cast_tensor
from model.llava import Llava
from model.quantize import quantize_linears
from model.weights import load_llava, save_llava
from tests.model.small_llava import CONFIG, make_llava, make_pixels

NAME = "language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llava() -> Llava:
    return make_llava(seed=1)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """The model room copies this file and never looks into it."""
    file = tmp_path / "any.model"
    file.write_bytes(b"not a tokenizer")
    return file


@pytest.fixture
def folder(tmp_path: Path, llava: Llava, tokenizer_file: Path) -> Path:
    """A model folder, alone in `models/`."""
    folder = tmp_path / "models" / "final"
    save_llava(folder, CONFIG, llava.state_dict(), tokenizer_file)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """Return everything below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_loaded_is_what_was_saved(llava: Llava, folder: Path) -> None:
    loaded = load_llava(folder)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert loaded.state_dict().keys() == llava.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, llava.state_dict()[name]), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.encode_images(make_pixels(2)), llava.encode_images(make_pixels(2)))


def test_saved_again_is_the_same_file(folder: Path, tmp_path: Path) -> None:
    save_llava(tmp_path / "again", CONFIG, load_llava(folder).state_dict(), folder / "tokenizer.model")
    assert read_files(tmp_path / "again") == read_files(folder)
    assert set(read_files(folder)) == {"config.json", "model.safetensors", "tokenizer.model"}
    assert (folder / "tokenizer.model").read_bytes() == b"not a tokenizer"


def test_dtype_is_the_callers(llava: Llava, folder: Path) -> None:
    loaded = load_llava(folder, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, llava.state_dict()[name].to(torch.bfloat16)), name


def test_strided_tensors_are_saved(llava: Llava, tmp_path: Path, tokenizer_file: Path) -> None:
    """safetensors refuses a transposed view, which is what gathered shards may be."""
    tensors = dict(llava.state_dict())
    tensors[NAME] = tensors[NAME].T.contiguous().T
    assert not tensors[NAME].is_contiguous()
    save_llava(tmp_path / "final", CONFIG, tensors, tokenizer_file)
    assert torch.equal(load_llava(tmp_path / "final").state_dict()[NAME], tensors[NAME])


def test_saving_replaces_the_whole_folder(llava: Llava, folder: Path, tokenizer_file: Path) -> None:
    """Neither a file of the old folder, nor the leftovers of a run that was killed, live on in the new one."""
    (folder / "notes.txt").write_text("old", encoding="utf-8")
    for leftover in ("final.partial", "final.old"):
        (folder.with_name(leftover)).mkdir()
        (folder.with_name(leftover) / "junk").write_text("junk", encoding="utf-8")
    save_llava(folder, CONFIG, llava.state_dict(), tokenizer_file)
    assert set(read_files(folder.parent)) == {
        f"final/{name}" for name in ("config.json", "model.safetensors", "tokenizer.model")
    }


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "{folder} lacks config.json"), ("model.safetensors", "{folder} holds no weights: a model folder")],
)
def test_missing_files_are_named(folder: Path, missing: str, message: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(message.format(folder=folder))):
        load_llava(folder)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "typo"))):
        load_llava(tmp_path / "typo")


def test_as_stored_is_mapped_and_not_copied(folder: Path) -> None:
    """The default costs no memory: the weights are the file's pages. Writing to them does not change the file."""
    before = (folder / "model.safetensors").read_bytes()
    loaded = load_llava(folder)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith("model.safetensors")]
    address = loaded.get_parameter(NAME).data_ptr()
    assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)
    with torch.no_grad():
        loaded.get_parameter(NAME).zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_every_wrong_tensor_is_named_at_once(folder: Path) -> None:
    """One message lists them all, each with its shape: a wrong file is understood at one look."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["projector.linear_2.bias"], tensors["language_model.norm.weight"]
    tensors["projector.linear_3.weight"] = torch.zeros(2, 3)
    tensors[NAME] = tensors[NAME].T.contiguous()
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not fit") as error:
        load_llava(folder)
    assert str(error.value).splitlines() == [
        f"{folder} does not fit its config.json:",
        "  missing language_model.norm.weight (48,)",
        "  missing projector.linear_2.bias (48,)",
        "  unknown projector.linear_3.weight (2, 3)",
        f"  {NAME} is (48, 112), config.json says (112, 48)",
    ]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999], ids=["empty", "in the header", "half", "end cut off"])
def test_truncated_weights_are_refused(folder: Path, kept: float) -> None:
    """A download or copy that broke off."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    message = rf"{re.escape(str(file))} \(\d+ bytes\) is cut off or no safetensors file .*: download or copy it again$"
    with pytest.raises(ValueError, match=message):
        load_llava(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "plain_llava",', "is not JSON: "),
        (b"\xff\xfe{}", "is not JSON: "),
        (b"[1, 2]", "holds a list, expected an object"),
        (b"{}", "config.json has neither a text_config nor a hidden_size: it describes no LLaMA"),
        (b'{"model_type": "plain_llava"}', "config.json has no object 'vision_config'"),
    ],
)
def test_broken_config_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_llava(folder)


def test_config_of_another_size_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=r"missing language_model\.layers\.2\.input_layernorm\.weight \(48,\)"):
        load_llava(folder)


@pytest.mark.parametrize("error", [OSError("No space left on device"), SafetensorError("No space left on device")])
@pytest.mark.parametrize("stood_before", [True, False])
def test_failed_save_destroys_nothing(
    llava: Llava,
    tmp_path: Path,
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    stood_before: bool,
) -> None:
    """A full disk at the end of a run must not take the run before with it. safetensors has its own error for it."""
    folder = tmp_path / "models" / "final"
    folder.parent.mkdir()
    if stood_before:
        save_llava(folder, CONFIG, llava.state_dict(), tokenizer_file)
    before = read_files(folder.parent)

    def write_half(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("model.files.save_file", write_half)
    with pytest.raises(OSError, match="No space left on device"):
        save_llava(folder, CONFIG, make_llava(seed=2).state_dict(), tokenizer_file)
    assert read_files(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == (["final"] if stood_before else [])


def test_failed_save_of_the_tokenizer_destroys_nothing(llava: Llava, folder: Path, tmp_path: Path) -> None:
    before = read_files(folder.parent)
    with pytest.raises(OSError, match="typo"):
        save_llava(folder, CONFIG, llava.state_dict(), tmp_path / "typo.model")
    assert read_files(folder.parent) == before


def test_saving_tensors_that_are_not_the_models_leaves_the_old_folder(folder: Path) -> None:
    """An incomplete set would only be noticed when it is loaded again, long after the good one is gone."""
    before = (folder / "model.safetensors").read_bytes()
    model = load_llava(folder)
    tensors = dict(model.state_dict())
    del tensors["projector.linear_1.bias"]
    with pytest.raises(ValueError, match=r"missing projector\.linear_1\.bias"):
        save_llava(folder, model.config, tensors, folder / "tokenizer.model")
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("new", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("old", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fast_cast_is_the_plain_cast(old: torch.dtype, new: torch.dtype) -> None:
    """Every 16-bit number, infinities and NaNs among them, in a tensor of several pieces whose last one is short."""
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16 if old == torch.bfloat16 else torch.float16)
    tensor = numbers.to(old).repeat(13)[:-3].view(5, -1)
    assert tensor.numel() > 20 * PIECE_NUMBERS
    assert tensor.numel() % PIECE_NUMBERS
    cast = cast_tensor(tensor, new, "cpu")
    expected = tensor.to(new)
    assert cast.dtype == new
    assert torch.equal(cast.isnan(), expected.isnan())
    assert torch.equal(cast.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_while_loading_is_quantised_after_loading(folder: Path, bits: int) -> None:
    loaded = load_llava(folder, bits=bits)
    expected = load_llava(folder)
    quantize_linears(expected, bits)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_number_of_bits_there_is_not_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="5 bits a weight, expected one of 16, 8, 4"):
        load_llava(folder, bits=5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_that_cannot_be_quantised_is_named(llava: Llava, folder: Path, bits: int) -> None:
    tensors = {name: tensor.clone() for name, tensor in llava.state_dict().items()}
    tensors[NAME][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(NAME)}: the weight holds NaN"):
        load_llava(folder, bits=bits)
