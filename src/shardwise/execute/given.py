"""What a unit is given besides tensors, as it was before the unit ran: caches and lists that it writes into.

Knows Python objects; copies their structure and none of their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import torch.nn as nn

__all__ = ["Given"]


class Given:
    """The arguments of one call, which is run a second time."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        known: dict[int, Any] = {}
        self._before = {
            place: copied
            for place, value in enumerate(arguments)
            if not isinstance(value, torch.Tensor) and (copied := _as_it_is(value, known)) is not value
        }
        self._again = False

    def once_more(self, given: Sequence[Any]) -> Sequence[Any]:
        """`given`, the first time; then with what stands for objects that the first run may have written into."""
        if not self._again:
            self._again = True
            return given
        return [self._before.get(place, value) for place, value in enumerate(given)]


def _as_it_is(value: Any, known: dict[int, Any]) -> Any:
    """A copy down to tensors and whatever has no state of its own; the value itself where there is none."""
    if id(value) in known:
        return known[id(value)][1]
    kind = type(value)
    made: Any = value
    if kind is list:
        made = [_as_it_is(each, known) for each in value]
    elif kind is dict:
        made = {key: _as_it_is(each, known) for key, each in value.items()}
    elif kind is tuple:
        own = tuple(_as_it_is(each, known) for each in value)
        made = value if all(a is b for a, b in zip(own, value, strict=True)) else own
    elif _has_state(value):
        made = copy(value)
        known[id(value)] = value, made
        for name, each in list(vars(made).items()):
            vars(made)[name] = _as_it_is(each, known)
    known[id(value)] = value, made
    return made


def _has_state(value: Any) -> bool:
    stateless = (torch.Tensor, nn.Module, type, str, int, float, bool, torch.dtype, torch.device)
    if value is None or isinstance(value, stateless) or callable(value):
        return False
    return bool(getattr(value, "__dict__", None))
