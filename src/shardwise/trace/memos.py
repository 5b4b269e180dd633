"""What a model's code remembers between forwards (`functools.lru_cache`): found here, to be emptied before a forward.

A forward that finds a memo full takes another path than the first one (SAM 3 and DETR keep position tables so), and a
trace would leave tensors without values in it. Knows classes and their modules; runs nothing.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch.nn as nn

__all__ = ["Memo", "forget", "memos_of"]


class Memo(Protocol):
    """A function with a memory."""

    def cache_clear(self) -> None: ...


def memos_of(model: nn.Module) -> tuple[Memo, ...]:
    """The memos of the model's classes, of the Python modules that define them, and of modules; none of torch."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__ if _is_foreign(kind)}
    spaces = [sys.modules[name] for name in {kind.__module__ for kind in classes} if name in sys.modules]
    found: dict[int, Memo] = {}
    for module in model.modules():
        own = (value for value in vars(module).values() if isinstance(value, functools._lru_cache_wrapper))
        found.update((id(memo), memo) for memo in own)
    for kind in classes:
        found.update((id(memo), memo) for value in vars(kind).values() for memo in _memos_in(value))
    for space in spaces:
        here = (value for value in vars(space).values() if getattr(value, "__module__", None) == space.__name__)
        found.update((id(memo), memo) for value in here for memo in _memos_in(value))
    return tuple(found.values())


def forget(memos: tuple[Memo, ...]) -> None:
    """Empty them."""
    for memo in memos:
        memo.cache_clear()


def _is_foreign(kind: type) -> bool:
    return issubclass(kind, nn.Module) and not kind.__module__.startswith("torch.")


def _memos_in(value: Any) -> Iterator[Memo]:
    """The memo that a function is, or that it wraps."""
    value = getattr(value, "__func__", value)  # of a static or class method
    if isinstance(value, functools._lru_cache_wrapper):
        yield value
    elif inspect.isfunction(value):
        for cell in value.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(content, functools._lru_cache_wrapper):
                yield content
