"""The outer optimizer: gradient descent with momentum on what workers have done. Knows tensors alone."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["OuterSGD"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OuterSGD:
    """v = momentum · v + g;  w = w - rate · (g + momentum · v) with Nesterov's look-ahead, else w - rate · v.

    As torch.optim.SGD computes it. Source of that form: Sutskever et al., "On the importance of initialization and
    momentum in deep learning", ICML 2013.
    """

    rate: float
    momentum: float
    nesterov: bool

    def step(self, weights: torch.Tensor, velocity: torch.Tensor, gradient: torch.Tensor) -> None:
        """Updates `weights` and `velocity` in place."""
        velocity.mul_(self.momentum).add_(gradient)
        if self.nesterov:
            weights.add_(gradient, alpha=-self.rate).add_(velocity, alpha=-self.rate * self.momentum)
        else:
            weights.add_(velocity, alpha=-self.rate)
