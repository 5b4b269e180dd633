"""A module that is divided in place, and can be shown whole again: for a trace, or for good.

Knows forwards, tensors and attributes that were put in place of others; refuses to know how they divide the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from shardwise.trace.placing import named_tensors, replace

__all__ = ["Forward", "Switched"]

Forward = Callable[..., Any]


class Switched:
    """What was changed in `changed` and its submodules. Forwards ask `_on` whether they divide."""

    def __init__(self, changed: nn.Module) -> None:
        self._changed = changed
        self._on = True
        self._forwards: list[tuple[nn.Module, Forward | None, Forward]] = []  # module, own forward before, ours
        self._wholes: dict[str, torch.Tensor] = {}  # without values
        self._attributes: list[tuple[nn.Module, str, Any, Any]] = []  # module, name, whole, local

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """All of it, divided parameters without values: to be traced, not to be run."""
        here = named_tensors(self._changed)
        local = {name: here[name] for name in self._wholes}
        self._on = False
        self._show({id(tensor): self._wholes[name] for name, tensor in local.items()}, whole=True)
        try:
            yield
        finally:
            self._show({id(self._wholes[name]): tensor for name, tensor in local.items()}, whole=False)
            self._on = True

    def close(self) -> None:
        """Forwards and attributes as they were; parameters stay this rank's parts."""
        self._on = False
        for module, before, ours in reversed(self._forwards):
            if module.__dict__.get("forward") is not ours:
                continue  # wrapped by someone else since, and switched off
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._forwards.clear()
        self._show({}, whole=True)

    def _show(self, tensors: Mapping[int, torch.Tensor], *, whole: bool) -> None:
        replace(self._changed, tensors)
        for module, name, of_all, own in self._attributes:
            module.__dict__[name] = of_all if whole else own
