"""What the LLaMA's hand-written backward passes return is what plain autograd would, from less that was kept."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.llama import LlamaConfig, LlamaMLP, RMSNorm

B, T, D, INTERMEDIATE = 2, 5, 24, 56
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.0}  # of the largest; measured: 1e-7 and 0


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def assert_same_gradients(
    ours: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], parameters: list[Tensor], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(B, T, D, generator=generator).to(dtype)
    found = torch.autograd.grad(ours(x), [x, *parameters], upstream)
    expected = torch.autograd.grad(plain(x), [x, *parameters], upstream)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype] * other.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(D, EPS).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(2))
    assert_same_gradients(norm, lambda x: plain_norm(x, norm.weight), [norm.weight], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mlp(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    mlp = LlamaMLP(LlamaConfig(100, D, INTERMEDIATE, 1, 4, 2, 64, EPS, 10000.0)).to(dtype)

    def plain(x: Tensor) -> Tensor:
        return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    assert_same_gradients(mlp, plain, list(mlp.parameters()), dtype)


def test_frozen_weights_get_no_gradient() -> None:
    norm = RMSNorm(D, EPS).requires_grad_(False)
    x = torch.randn(B, T, D, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None
