"""Where the dtype of activations changes: at the model's entry, around what stays in float32, behind the head.

    inputs (float32) ─► bfloat16 ─► block ─► [norm: float32 inside] ─► block ─► head ─► logits (float32, if asked for)

Forwards put around modules' own, which a trace sees as it sees any other code of the model. They act only inside
`on()`: proofs in float32 or float64 run as if there were none. Knows modules; refuses to know masters.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn as nn

__all__ = ["Casts"]

_NARROW = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(slots=True, eq=False)
class _Switch:
    """Whether activations are in 16 bits now, and in which."""

    dtype: torch.dtype
    on: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class _Kept:
    """The forward of a module that computes in float32; a copy of the module gets a copy of it that belongs to it."""

    module: nn.Module
    before: Callable[..., Any] | None
    switch: _Switch
    widens: bool  # its inputs
    narrows: bool  # its outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.switch.on:
            return self._body(*args, **kwargs)
        if self.widens:
            args, kwargs = _mapped(args, _widened), _mapped(kwargs, _widened)
        out = self._body(*args, **kwargs)
        dtype = self.switch.dtype
        return (
            _mapped(out, lambda leaf: leaf.to(dtype) if leaf.dtype == torch.float32 else leaf)
            if self.narrows
            else (_mapped(out, _widened))
        )

    def _body(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class Casts:
    """What is put around the modules of a model that is computed with in `dtype`: `kept` stay in float32, `head`
    returns float32 logits.

    Layers whose weight is in 16 bits and that are given float32 (say, a float32 table is added to activations) have it
    cast. Which ones do is seen in a trace: `learning()` is around it, and costs the others nothing afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        *,
        kept: Collection[nn.Module] = (),
        head: nn.Module | None = None,
    ) -> None:
        self._switch = _Switch(dtype)
        inside = {id(module) for outer in kept for module in outer.modules()}
        own = [module for module in model.modules() if id(module) not in inside and _multiplies(module)]
        self._layers = own
        self._entry = model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._guards: dict[int, Any] = {}
        self._undo: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        for module in kept:
            self._put(module, widens=True, narrows=module is not head)
        if head is not None and id(head) not in inside:
            self._put(head, widens=False, narrows=False)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Activations are in 16 bits inside."""
        before, self._switch.on = self._switch.on, True
        try:
            yield
        finally:
            self._switch.on = before

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, every layer is looked at; those that are given float32 are known from then on."""
        watched = [layer for layer in self._layers if id(layer) not in self._guards]
        used: set[int] = set()
        handles = {id(layer): self._guard(layer, used) for layer in watched}
        try:
            with self.on():
                yield
        finally:
            for known, handle in handles.items():
                if known in used:
                    self._guards[known] = handle
                else:
                    handle.remove()

    def close(self) -> None:
        """The model as it was."""
        self._entry.remove()
        for guard in self._guards.values():
            guard.remove()
        self._guards.clear()
        for module, before in reversed(self._undo):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before
        self._undo.clear()

    def _put(self, module: nn.Module, *, widens: bool, narrows: bool) -> None:
        before = module.__dict__.get("forward")
        module.__dict__["forward"] = _Kept(module, before, self._switch, widens, narrows)
        self._undo.append((module, before))

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return (_mapped(args, self._narrowed), _mapped(kwargs, self._narrowed)) if self._switch.on else None

    def _guard(self, layer: nn.Module, used: set[int]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not self._switch.on or not any(isinstance(a, torch.Tensor) and a.dtype == torch.float32 for a in args):
                return None
            used.add(id(module))
            return _mapped(args, self._narrowed)

        return layer.register_forward_pre_hook(hook)

    def _narrowed(self, leaf: torch.Tensor) -> torch.Tensor:
        return leaf.to(self._switch.dtype) if leaf.dtype == torch.float32 else leaf


def _widened(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.to(torch.float32) if leaf.dtype in _NARROW else leaf


def _mapped(tree: Any, cast: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A structure of plain tuples, lists and dictionaries with its tensors cast; other objects are left alone."""
    if isinstance(tree, torch.Tensor):
        return cast(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_mapped(each, cast) for each in tree)
    if type(tree) is dict:
        return {key: _mapped(each, cast) for key, each in tree.items()}
    return tree


def _multiplies(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() >= 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
