"""Live bytes of one rank while its program runs: every storage counted when it is made, when it grows and when it goes.

    peak      most bytes alive, and behind which operation; the same operation of an equal step is looked at once more
    lines     whose bytes these are: by identity of what the program and its optimizer hold at that very moment

Where there is no device the parameters are fake tensors, and so is whatever is computed from them; memory without
values yet is fake too, and everything else (token ids, masks, rotary tables) is computed for real. Refuses to know
layouts and schedules.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.errors import ModelError
from shardwise.trace.absent import Absent
from shardwise.trace.below import tensors_of
from shardwise.trace.shapes import Shapes

__all__ = ["LiveBytes", "Peak", "RehearsalMode", "fake_parameter"]

_DEVICE = torch.ops.prim.device.default
_READ = torch.ops.aten._local_scalar_dense.default
_EMPTY = frozenset({torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default})
Look = Callable[[Mapping[int, int], Collection[int]], None]  # bytes of storages, and which were there before the step
_COUNTED = (torch.Tensor, torch.nn.Parameter, FakeTensor)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Most bytes alive, at operation number `at` of a step, while `where` ran."""

    nbytes: int = 0
    at: int = -1
    where: str = ""


class LiveBytes:
    """Bytes alive of tensors on `device`. `place` is what runs now, in words."""

    def __init__(self, device: torch.device) -> None:
        self.alive = 0
        self.place = ""
        self.peak = Peak()
        self.highest = 0  # since `mark`
        self._device = device
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._resized: list[weakref.ref[torch.UntypedStorage]] = []
        self._operations = 0
        self._stops: int | None = None
        self._look: Look = _nothing
        self._stays: set[int] = set()

    def adopt(self, tensors: Iterable[torch.Tensor], *, resized: bool = False) -> None:
        """Tensors that were made before; `resized`: their memory comes and goes behind them."""
        for tensor in tensors:
            if not self.counts(tensor):
                continue
            storage = tensor.untyped_storage()
            new = storage._cdata not in self._sizes
            self._hold(storage)
            if resized and new:
                self._resized.append(weakref.ref(storage))

    def counts(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is one of the device's, with memory."""
        return type(tensor) in _COUNTED and tensor.device.type == self._device.type

    def operation(self, made: Sequence[torch.Tensor]) -> None:
        """An operation has run, and has made or handed on these."""
        for tensor in made:
            if self.counts(tensor):
                self._hold(tensor.untyped_storage())
        for reference in self._resized:
            storage = reference()
            if storage is not None and storage.nbytes() != self._sizes[storage._cdata]:
                self.alive += storage.nbytes() - self._sizes[storage._cdata]
                self._sizes[storage._cdata] = storage.nbytes()
        self.highest = max(self.highest, self.alive)
        if self.alive > self.peak.nbytes:
            self.peak = Peak(nbytes=self.alive, at=self._operations, where=self.place)
        if self._operations == self._stops:
            self._look(dict(self._sizes), frozenset(self._stays))
        self._operations += 1

    def begin(self, *, stop_at: int | None = None, look: Look | None = None) -> None:
        """A step begins. Behind operation `stop_at` of it, `look` is told."""
        self._operations, self._stops = 0, stop_at
        self._stays = set(self._sizes)
        self._look = look or _nothing
        self.peak = Peak(nbytes=self.alive, where=self.place)
        self.highest = self.alive

    def mark(self) -> int:
        """The most that was alive since the last mark."""
        highest, self.highest = self.highest, self.alive
        return highest

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.alive += self._sizes[key]
        self._watched[key] = weakref.ref(storage, lambda _, key=key: self._let_go(key))  # type: ignore[misc]

    def _let_go(self, key: int) -> None:
        del self._watched[key]
        self._stays.discard(key)
        self.alive -= self._sizes.pop(key)


class RehearsalMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operations make. With `fake`, what touches a tensor of it is fake, as is memory without values."""

    def __init__(self, live: LiveBytes, fake: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = live
        self._fake = fake
        self._shapes = None if fake is None else Shapes(fake)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        inputs = tensors_of((*args, *kwargs.values()) if kwargs else args)
        out = self._run(func, args, kwargs, inputs)
        self._live.operation(tensors_of((out,)) if func.namespace != "c10d" else ())
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, inputs: Sequence[torch.Tensor]) -> Any:
        fakes = [tensor for tensor in inputs if isinstance(tensor, FakeTensor)]
        if self._fake is None or self._shapes is None or any(isinstance(tensor, Absent) for tensor in inputs):
            return func(*args, **kwargs)
        if not fakes:
            if func in _EMPTY and not inputs and _on(kwargs, "cpu"):
                return self._shapes.run(func, args, kwargs)
            return func(*args, **kwargs)
        if any(tensor.fake_mode is not self._fake for tensor in fakes):  # of a trace
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return _unanswered(func, args)
        if func is _READ:
            return _value_of(inputs[0])
        return self._shapes.run(func, args, kwargs)


def fake_parameter(fake: FakeTensorMode, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape and dtype of `like`, without memory, that says it is on the CPU."""
    return FakeTensor(fake, torch.empty(tuple(like.shape), dtype=like.dtype, device="meta"), torch.device("cpu"))


def _on(kwargs: Mapping[str, Any], device: str) -> bool:
    asked = kwargs.get("device")
    return asked is None or torch.device(asked).type == device


def _unanswered(func: Any, args: Sequence[Any]) -> Any:
    """Of an exchange, what it would have written into and a work that is done."""
    done = FakeWork().boxed()
    return done if len(func._schema.returns) == 1 else (args[0], done)


def _value_of(tensor: torch.Tensor) -> float:
    """What is read of losses, norms and flags of gradients changes nothing that is counted: all are 1. A count or a
    decision of the model must be computed."""
    if tensor.dtype.is_floating_point:
        return 1.0
    raise ModelError(
        f"without a device nothing is computed, but the model looks at a value of {tensor.dtype} that a unit makes (a "
        "router that counts rows, say); rehearse it where there is a device"
    )


def _nothing(sizes: Mapping[int, int], stays: Collection[int]) -> None:
    """Nobody looks."""
