"""Float32 masters of parameters that the model computes with in 16 bits (Micikevicius et al. 2018, section 3.1).

    master w (float32) ──cast──► parameter (bfloat16) ──backward──► .grad (float32: `grad_dtype`)
          ▲                                                             │ collect()
          └──────────────── optimizer ◄── master.grad ◄─────────────────┘

A parameter keeps its identity: hooks, groups and ties that know it stay right. Knows tensors by name; refuses to know
optimizers, groups and loss scales. Whoever divides masters among ranks takes them with `give` and casts by himself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn as nn

from shardwise.trace.absent import Absent

__all__ = ["Masters", "gradient_dtype", "narrow"]


def gradient_dtype(parameter: torch.Tensor) -> torch.dtype:
    """In which dtype the gradient of a parameter is accumulated: float32 where the parameter is in 16 bits."""
    return parameter.grad_dtype or parameter.dtype


def narrow(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """Make a parameter one of `dtype`, in place, whose gradient is float32; what it was is returned."""
    before = parameter.data
    parameter.data = before.to(dtype)
    if parameter.requires_grad:
        parameter.grad_dtype = torch.float32
    return before


class Masters:
    """The masters of a rank's parameters, by name; `names` are those that are computed with in `dtype`."""

    def __init__(self, names: Collection[str] = (), dtype: torch.dtype = torch.float32) -> None:
        self.names = frozenset(names)
        self.dtype = dtype
        self._parameters: dict[str, nn.Parameter] = {}
        self._masters: dict[str, nn.Parameter] = {}

    def take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Narrow the parameters in `names`, in place. The values of those that are trained become masters."""
        for name, parameter in parameters.items():
            if name not in self.names or isinstance(parameter.data, Absent) or parameter.dtype == self.dtype:
                continue
            before = narrow(parameter, self.dtype)
            if parameter.requires_grad:
                self._parameters[name] = parameter
                self._masters[name] = nn.Parameter(before)

    def __contains__(self, name: str) -> bool:
        return name in self._masters

    def of(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """What an optimizer updates: the master of a parameter, or itself where it has none."""
        return self._masters.get(name, parameter)

    def give(self, name: str) -> torch.Tensor | None:
        """The float32 value of a parameter, whole and of this rank, which is forgotten here; None where it has none.

        Its new owner collects the gradient, which is in the parameter's `.grad` in float32, and casts.
        """
        self._parameters.pop(name, None)
        master = self._masters.pop(name, None)
        return None if master is None else master.data

    def collect(self) -> None:
        """Gradients of the parameters become those of the masters, or are added to them."""
        for name, parameter in self._parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            master = self._masters[name]
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def put_back(self) -> None:
        """The parameters have the masters' values again, in float32; nothing is held here any more."""
        for name, parameter in self._parameters.items():
            parameter.data = self._masters[name].data
        self._parameters.clear()
        self._masters.clear()

    @torch.no_grad()
    def cast(self) -> None:
        """The parameters become what the masters are, rounded."""
        own = [parameter.data for parameter in self._parameters.values()]
        if own:
            torch._foreach_copy_(own, [self._masters[name].data for name in self._parameters])
