"""What fake tensors cannot answer in a build: conversions to Python and numpy, deep copies, `Module.to`.

It knows fake tensors and who can tell their value. It records nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from shardwise.trace.placing import as_before
from shardwise.trace.replay import without_modes

__all__ = ["FakeAnswers", "moved"]

_CONVERSIONS = frozenset({torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist})


def moved(parameter: FakeTensor, converted: FakeTensor) -> None:
    """The parameter becomes what it was converted to (another dtype or device), and stays the same object."""
    torch._C._swap_tensor_impl(parameter, converted)
    before = parameter.__dict__
    parameter.__dict__ = {**before, **converted.__dict__}
    converted.__dict__ = before


class FakeAnswers(TorchFunctionMode):
    """Inside, tensors convert to Python and numpy by `value(tensor)`; copies of parameters are parameters."""

    def __init__(self, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._value = value

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVERSIONS:
            value = self._value(args[0])
            with without_modes():
                return func(value, *args[1:], **kwargs)
        if func is torch.Tensor.__deepcopy__:
            return self._copied(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if id(tensor) not in memo:
            twin = tensor.detach().clone()
            memo[id(tensor)] = as_before(tensor, twin)
        copied: torch.Tensor = memo[id(tensor)]
        return copied
