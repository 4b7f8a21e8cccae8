"""What tensors are called and hold, as one number."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from model.files import StoredTensor, hash_tensors


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    return hash_tensors({name: StoredTensor.wrap(tensor, name) for name, tensor in tensors.items()})


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A matrix, a vector, a number."""
    generator = torch.Generator().manual_seed(0)
    return {"b": torch.randn(3, 5, generator=generator).half(), "a": torch.arange(4.0), "c": torch.tensor(2.5)}


def test_the_order_and_the_type_of_equal_numbers_do_not_count(tensors: dict[str, Tensor]) -> None:
    assert hash_of(tensors) == hash_of({name: tensors[name].float() for name in sorted(tensors)})
    assert hash_of({"b": tensors["b"].T.contiguous().T}) == hash_of({"b": tensors["b"]})  # nor how they lie in memory


def test_numbers_shapes_and_names_count(tensors: dict[str, Tensor]) -> None:
    others = [
        tensors | {"a": tensors["a"] + torch.tensor([0, 0, 0, 1e-6])},
        tensors | {"b": tensors["b"].flatten()},
        tensors | {"b": tensors["b"].bfloat16()},  # has fewer digits
        {"b": tensors["b"], "a": tensors["a"], "d": tensors["c"]},
        {"b": tensors["b"], "a": tensors["a"]},
    ]
    hashes = {hash_of(tensors), *map(hash_of, others)}
    assert len(hashes) == 1 + len(others)
