"""AdamW over the parameters that a rank holds. Knows parameters and options; refuses to know who else holds what."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn

__all__ = ["adamw", "set_rate"]


def adamw(
    parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW | None:
    """Fused AdamW; biases, norms and other parameters of one dim do not decay. None where nothing is trained here.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=0.0, betas=betas, eps=epsilon, fused=True) if filled else None


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step, for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate
