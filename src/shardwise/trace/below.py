"""The dispatch mode of a recording: what touches a fake tensor is made fake, everything else runs for real.

Sees which tensors every operation reads, makes and writes, and books them on the glue function or the unit that runs.
Refuses to know torch functions and the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.trace.draft import Draft
from shardwise.trace.origins import Born
from shardwise.trace.running import GlueOp, Running, UnitCall
from shardwise.trace.shapes import Shapes

__all__ = ["Below", "Observer"]

_DEVICE = torch.ops.prim.device.default

Observer = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]


class Below(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`observer(func, args, kwargs, out)` sees every operation too."""

    def __init__(self, draft: Draft, running: Running, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.observer: Observer | None = None
        self._draft = draft
        self._running = running
        self._shapes = Shapes(fake)
        self._stale: set[int | None] = set()  # real storages with values that are not real: fake from then on
        self._made_up: set[int | None] = set()  # storages that the unit run on random numbers has made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # no reading, and half of all that is dispatched
            return args[0].fake_device
        kwargs = kwargs or {}
        inputs = tensors_of((*args, *kwargs.values()) if kwargs else args)
        running = self._running
        context = (running.op or running.call) if running.phase == "forward" else None
        if context is not None:
            for tensor in inputs:
                self._draft.read(tensor, context.touched, running.unit_node)
            if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
                context.random = True
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        out = self._run(func, args, kwargs, inputs, written)
        if self.observer is not None:
            self.observer(func, args, kwargs, out)
        if context is not None:
            self._made(context, inputs, written, tensors_of((out,)))
        return out

    def distrust(self) -> None:
        """What the last unit made was computed from random numbers: whatever reads it is fake from now on."""
        self._stale |= self._made_up
        self._made_up.clear()

    def _run(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Sequence[torch.Tensor],
        written: Sequence[torch.Tensor],
    ) -> Any:
        if not any(isinstance(tensor, FakeTensor) for tensor in inputs) and not self._reads_stale(func, inputs):
            return func(*args, **kwargs)
        storage = self._draft.origins.storage
        self._stale.update(storage(tensor) for tensor in written if not isinstance(tensor, FakeTensor))
        return self._shapes.run(func, args, kwargs)

    def _reads_stale(self, func: Any, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether a real computation would use what is not real; views go on being real."""
        if not self._stale or any(argument.alias_info is not None for argument in func._schema.arguments):
            return False
        return any(self._draft.origins.storage(tensor) in self._stale for tensor in inputs)

    def _made(
        self,
        context: GlueOp | UnitCall,
        inputs: Sequence[torch.Tensor],
        written: Sequence[torch.Tensor],
        made: Sequence[torch.Tensor],
    ) -> None:
        storage = self._draft.origins.storage
        by_storage = {storage(tensor): tensor for tensor in reversed(inputs)}
        fresh: list[tuple[int | None, torch.Tensor]] = []
        for leaf in made:
            key = storage(leaf)
            base = by_storage.get(key)
            if base is None:
                fresh.append((key, leaf))
            elif base is not leaf:  # a view has the origin of what it is a view of
                self._draft.view(leaf, base)
        if isinstance(context, GlueOp):
            context.dispatched = context.dispatched or bool(inputs)
            context.written.extend(tensor for tensor in written if storage(tensor) not in context.born)
            context.born.update(fresh)
            return
        self._wrote(context, written)
        for _, leaf in fresh:
            self._draft.origins.bear(leaf, context.node)
        if context.for_real:
            self._made_up.update(key for key, _ in fresh)

    def _wrote(self, call: UnitCall, written: Sequence[torch.Tensor]) -> None:
        origins = self._draft.origins
        for tensor in written:
            if Born(call.node) not in origins.of(tensor) and origins.known(tensor):
                origins.write(tensor, Born(call.node))
                call.changes = True


def tensors_of(tree: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among the arguments or results of a dispatched operation, in order."""
    found: list[torch.Tensor] = []
    for leaf in tree:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif isinstance(leaf, (list, tuple)):
            found.extend(tensors_of(leaf))
        elif isinstance(leaf, Mapping):
            found.extend(tensors_of(tuple(leaf.values())))
    return found


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """False for attention whose dropout is 0, and for what is given a generator (twins are filled from one)."""
    if kwargs.get("generator") is not None:
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.extend(tensors_of((args[place] if place < len(args) else kwargs.get(argument.name),)))
    return found
