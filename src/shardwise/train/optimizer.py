"""The optimizer over the parameters that a rank holds. Knows parameters and options; refuses to know who else holds
what."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shardwise.parallel.states import State

__all__ = ["optimizer_over", "set_rate"]


def optimizer_over(
    states: Mapping[str, State],
    *,
    name: str = "adamw",
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer | None:
    """AdamW ("adamw", fused) or plain gradient descent ("sgd"); None where nothing is trained here.

    Biases, norms and other parameters of one dim do not decay. The rate is set before every step (`set_rate`).
    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    groups = [
        {"params": [state.parameter for state in states.values() if state.is_matrix], "weight_decay": weight_decay},
        {"params": [state.parameter for state in states.values() if not state.is_matrix], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    if not filled:
        return None
    if name == "sgd":
        return torch.optim.SGD(filled, lr=0.0, fused=True)
    return torch.optim.AdamW(filled, lr=0.0, betas=betas, eps=epsilon, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step, for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate
