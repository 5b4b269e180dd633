"""Muon: momentum, made orthogonal as a whole matrix, for hidden matrices; AdamW for everything else.

    m ← μ m + (1 - μ) g      u = (1 - μ) g + μ m       W ← W - rate (decay W + 0.2 √max(rows, columns) orthogonal(u))

Source: Jordan et al. 2024; the factor, which makes updates as large as AdamW's so that both have one rate, is of Liu et
al. 2025 (arXiv:2502.16982, equation 4). Momentum and update are this rank's elements; the whole matrix is brought
together by `matrices`. Knows states and matrices; refuses to know how they are divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from shardwise.parallel.states import State
from shardwise.train.optimizers.matrices import Matrices
from shardwise.train.optimizers.newton_schulz import as_matrices, orthogonalised

__all__ = ["Muon"]


class Muon(torch.optim.Optimizer):
    """`hidden` are the names of the states that are parts of hidden matrices; `others` updates the rest, with groups of
    its own. The rate of every group is set before a step. A step is collective where matrices are divided."""

    def __init__(
        self,
        states: Mapping[str, State],
        hidden: Collection[str],
        *,
        matrices: Matrices,
        others: torch.optim.Optimizer | None,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        self._own = {name: state for name, state in states.items() if name in hidden}
        self._matrices = matrices
        self._others = others
        held = [state.parameter for state in self._own.values()]
        options: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__([{"params": held}], {"lr": 0.0, **options})
        if others is not None:
            self.param_groups.extend(others.param_groups)
            others.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update everything by the gradients that are there."""
        assert closure is None, "a step computes no loss"
        group = self.param_groups[0]
        parts = {
            name: self._direction(state, group) for name, state in self._own.items() if state.parameter.grad is not None
        }
        updates = self._matrices.map(parts, _update)
        for name, update in updates.items():
            parameter = self._own[name].parameter
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view(parameter.shape), alpha=-group["lr"])
        if self._others is not None:
            self._others.step()

    def _direction(self, state: State, group: dict[str, Any]) -> torch.Tensor:
        """What is made orthogonal: this rank's elements, in the matrix's shape where all are here."""
        parameter, gradient = state.parameter, state.parameter.grad
        assert gradient is not None
        own = self.state[parameter]
        if "momentum_buffer" not in own:
            own["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        buffer: torch.Tensor = own["momentum_buffer"]
        buffer.lerp_(gradient.to(buffer.dtype), 1 - group["momentum"])
        direction = gradient.to(buffer.dtype).lerp(buffer, group["momentum"]) if group["nesterov"] else buffer.clone()
        return direction.view(state.shape) if state.is_whole else direction


def _update(whole: torch.Tensor) -> torch.Tensor:
    """Of the whole matrix, in its shape: orthogonal, and as large as an update of AdamW."""
    matrices = as_matrices(whole)
    factor = 0.2 * math.sqrt(max(matrices.shape[-2:]))
    return orthogonalised(matrices).mul_(factor).reshape(whole.shape).to(whole.dtype)
