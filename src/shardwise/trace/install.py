"""The one substitution in a user's model: every unit's body asks a switch what to do. Installed once per model.

While the switch is off, the model behaves as if nothing had been installed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch.nn as nn

__all__ = ["Switch", "Watcher", "installed"]


class Watcher(Protocol):
    """Decides what a unit call does: run the body, record it, or answer for an absent unit."""

    def call(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any: ...


class Switch:
    """Holds the watcher that is asked, or None."""

    def __init__(self) -> None:
        self.watcher: Watcher | None = None

    @contextlib.contextmanager
    def on(self, watcher: Watcher) -> Iterator[None]:
        """Ask `watcher` inside the block."""
        before = self.watcher
        self.watcher = watcher
        try:
            yield
        finally:
            self.watcher = before

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Ask nobody inside the block."""
        before = self.watcher
        self.watcher = None
        try:
            yield
        finally:
            self.watcher = before


@contextlib.contextmanager
def installed(units: Mapping[str, nn.Module], switch: Switch) -> Iterator[None]:
    """Put the switch around the body of every unit; taken out again at the end of the block."""
    undo: list[tuple[nn.Module, Any]] = []
    for name, module in units.items():
        undo.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = _switched(name, module, module.forward, switch)
    try:
        yield
    finally:
        for module, before in undo:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def _switched(name: str, module: nn.Module, body: Callable[..., Any], switch: Switch) -> Callable[..., Any]:
    @functools.wraps(body)
    def forward(*args: Any, **kwargs: Any) -> Any:
        watcher = switch.watcher
        if watcher is None:
            return body(*args, **kwargs)
        return watcher.call(name, module, body, args, kwargs)

    return forward
