"""AdamW over up to three learning rates, and the schedule they share."""

import math
from collections.abc import Mapping

import torch
from torch import nn


def make_optimizer(
    objective: nn.Module, learning_rates: Mapping[str, float], weight_decay: float, beta2: float
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of a sharded objective.

    Args:
        learning_rates: by what a parameter's name contains, tried in order; "" fits the rest.
        weight_decay: for matrices; vectors (norms, biases) get none.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            part = next(part for part in learning_rates if part in name)
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": learning_rates[part],
                "base_lr": learning_rates[part],
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
            for (part, is_matrix), parameters in groups.items()
        ],
        betas=(0.9, beta2),
        fused=True,
    )


def schedule(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Return what step number `step` (from 0) multiplies the learning rates by: linear warm-up, cosine to zero.

    Note: like transformers' schedule, which official LLaVA uses, the very first step has a rate of zero.
    """
    warmup_steps = math.ceil(num_steps * warmup_ratio)
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> list[float]:
    """Set every group's rate to its base times `factor`; return the rates."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return [group["lr"] for group in optimizer.param_groups]
