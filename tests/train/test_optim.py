"""The schedule reproduces the official runs' numbers; the groups get their own rates."""

import pytest
import torch
from torch import nn

from train.optim import make_optimizer, schedule, set_learning_rates


def test_schedule_reproduces_the_official_numbers() -> None:
    """Stage 2 has 5198 steps, 156 of warm-up, and official logs show 2.8205e-6 at step 22 of a peak of 2e-5."""
    assert 2e-5 * schedule(22, 5198, 0.03) == pytest.approx(2.8205e-6, rel=1e-4)
    assert schedule(155, 5198, 0.03) < 1 == schedule(156, 5198, 0.03)
    assert schedule(65, 2181, 0.03) < 1 == schedule(66, 2181, 0.03)
    assert schedule(0, 100, 0.03) == 0
    assert schedule(0, 100, 0.0) == 1
    assert schedule(50, 100, 0.0) == pytest.approx(0.5)
    assert schedule(100, 100, 0.03) == pytest.approx(0)


def test_schedule_equals_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=6, num_training_steps=200)
    for step in range(200):
        assert schedule(step, 200, 0.03) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_groups_have_their_rates_and_decay() -> None:
    module = nn.ModuleDict({"projector": nn.Linear(3, 5), "other": nn.Linear(5, 2)})
    module["other"].weight.requires_grad_(False)
    optimizer = make_optimizer(module, {"projector": 0.5, "": 0.25}, weight_decay=0.1, beta2=0.9)
    groups = [(g["base_lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in optimizer.param_groups]
    assert groups == [(0.5, 0.1, [(5, 3)]), (0.5, 0.0, [(5,)]), (0.25, 0.0, [(2,)])]
    assert set_learning_rates(optimizer, 0.1) == pytest.approx([0.05, 0.05, 0.025])
