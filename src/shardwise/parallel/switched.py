"""A module that is divided in place, and can be shown whole again: for a trace, or for good.

Knows forwards, tensors and attributes that were put in place of others; refuses to know how they divide the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from shardwise.parallel.forwards import Forwards
from shardwise.trace.placing import named_tensors, replace

__all__ = ["Switched"]


class Switched:
    """What was changed in `changed` and its submodules. Forwards divide while they are on."""

    def __init__(self, changed: nn.Module) -> None:
        self._changed = changed
        self._forwards = Forwards()
        self._wholes: dict[str, torch.Tensor] = {}  # without values
        self._attributes: list[tuple[nn.Module, str, Any, Any]] = []  # module, name, whole, local

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """All of it, divided parameters without values: to be traced, not to be run."""
        here = named_tensors(self._changed)
        local = {name: here[name] for name in self._wholes}
        self._forwards.on = False
        self._show({id(tensor): self._wholes[name] for name, tensor in local.items()}, whole=True)
        try:
            yield
        finally:
            self._show({id(self._wholes[name]): tensor for name, tensor in local.items()}, whole=False)
            self._forwards.on = True

    def close(self) -> None:
        """Forwards and attributes as they were; parameters stay this rank's parts."""
        self._forwards.close()
        self._show({}, whole=True)

    def _show(self, tensors: Mapping[int, torch.Tensor], *, whole: bool) -> None:
        replace(self._changed, tensors)
        for module, name, of_all, own in self._attributes:
            module.__dict__[name] = of_all if whole else own
