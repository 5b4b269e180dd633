"""One forward and backward of one rank's part of a model, without values: what it runs, keeps and exchanges, by node.

The real units run, divided and on own tokens as they are laid out; the other ranks are counted (`counted_group`). Books
are kept by the nodes of the whole model's unit calls, and between them by segments of glue:

    segment 0   embed#0   segment 1   layers.0#0   segment 2   …   head#0   segment n (the loss)

Where a call repeats an earlier one, of a unit that is alike, it is not run: it answers as that one did, and costs as
much. Refuses to know plans and layouts.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.describe.flow import Node
from shardwise.describe.kernels import Exchange, ExchangeKind, Kernel, KernelKind, Phase
from shardwise.errors import DataflowError
from shardwise.parallel.repeated import Template, answer, remembered, signature_of
from shardwise.parallel.tensor.collectives import Carrier
from shardwise.parallel.tensor.sequence_ops import ASKS
from shardwise.trace.alive import LiveCounter
from shardwise.trace.below import tensors_of
from shardwise.trace.capture import Faked
from shardwise.trace.for_real import Twins
from shardwise.trace.randomness import Scope, draw, is_random
from shardwise.trace.running import DataDependent
from shardwise.trace.shapes import Shapes

__all__ = ["GLUE", "RankRun", "segment"]

GLUE = Scope(seed=0, step=0, micro_batch=0, samples=(), place="glue", call=0)  # of a recording that is given no other

_DEVICE = torch.ops.prim.device.default
_FUNCTION = Kernel(kind=KernelKind.FUNCTION, phase=Phase.FORWARD, dtype="")
_Noted = tuple[ExchangeKind, str, Phase, int, bool]


def segment(num_calls: int) -> int:
    """The place of the glue behind so many unit calls."""
    return -num_calls - 1


class RankRun:
    """One run. `calls` are the unit calls in their order; `alike` (node -> key) says which may answer for each other.

    A `Watcher`: it is asked about every unit call while it runs.
    """

    def __init__(
        self,
        calls: Sequence[Node],
        faked: Faked,
        *,
        samples: int | None = None,
        alike: Mapping[int, Hashable] | None = None,
    ) -> None:
        self.counter = LiveCounter(samples=samples)
        self.saved: dict[int, int] = {}  # place -> bytes
        self.kept_bytes = 0  # when the forward ends
        self._calls = calls
        self._faked = faked
        self._alike = alike or {}
        self._templates: dict[Hashable, Template | None] = {}
        self._like: dict[int, int] = {}  # node -> the node that it repeats
        self._exchanges: dict[int, dict[_Noted, int]] = {}
        self._functions: dict[int, int] = {}  # place -> functions of tokens that are dealt out
        self._phase = "forward"
        self._done = 0
        self._place = segment(0)
        self._inside = False

    # -- what was found -------------------------------------------------------------------------

    def source(self, place: int) -> int:
        """The place whose books hold for this one."""
        return self._like.get(place, place)

    def kernels(self, place: int) -> tuple[Kernel, ...]:
        source = self.source(place)
        found, functions = self.counter.kernels(source), self._functions.get(source, 0)
        return (*found, dataclasses.replace(_FUNCTION, count=functions)) if functions else found

    def exchanges(self, place: int) -> tuple[Exchange, ...]:
        """Equal ones once."""
        return tuple(
            Exchange(kind=kind, axis=axis, phase=phase, nbytes=nbytes, hidden=hidden, count=count)
            for (kind, axis, phase, nbytes, hidden), count in self._exchanges.get(self.source(place), {}).items()
        )

    def transient_bytes(self, place: int) -> tuple[int, int]:
        """Forward and backward: the most that is alive besides what is kept."""
        return self.counter.transient_bytes(self.source(place))

    # -- the run --------------------------------------------------------------------------------

    def run(self, objective: Callable[[], torch.Tensor], *, scope: Scope = GLUE) -> None:
        """Forward and backward of what `objective` computes. The model is one without values (`Faked`). `scope`: what
        the glue's draws are keyed by, as in the whole model's recording."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if self._phase == "forward":
                self.counter.keep(tensor)
            return tensor

        self.counter.watch_buffers(lambda tensor: id(tensor) in self._faked.buffers)
        with (
            _Glue(self, scope),
            _Mode(self),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            warnings.catch_warnings(),
        ):
            # a fake twin of a real tensor that was written asks also for its gradient
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            loss = objective()
            if self._done != len(self._calls):
                raise DataflowError(
                    f"a rank's forward calls the units of the whole model's, but {self._done} of {len(self._calls)} "
                    "were called; trace the model again"
                )
            self.counter.ends(self._place)
            self.kept_bytes = self.counter.kept_bytes
            self._add_saved()
            self._phase = "backward"
            if loss.requires_grad:
                torch.autograd.backward([loss])
            self._phase = "over"

    @property
    def in_glue(self) -> bool:
        """Whether the model's own code between units runs."""
        return self._phase == "forward" and not self._inside

    def observe(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """An operation has run."""
        if self._phase == "forward":
            self.counter.forward(self._place, func, args, kwargs, out)
            self.counter.note(self._place, backward=False)
        elif self._phase == "backward":
            self.counter.backward(func, args, kwargs, out)

    def ask(self, types: Collection[type]) -> None:
        """A function is called with tensors of these types."""
        if self._phase == "forward" and any(issubclass(each, Carrier) for each in types):
            self._functions[self._place] = self._functions.get(self._place, 0) + 1

    def note(self, kind: ExchangeKind, axis: str, nbytes: int, hidden: bool) -> None:
        """Ranks exchange something now."""
        place, phase = self._place, Phase.FORWARD
        if self._phase == "backward":
            owner = self.counter.owner()
            if owner is None:
                return
            place, phase = owner[0], Phase.INPUT
        if self._phase == "over" or not nbytes:
            return
        counts = self._exchanges.setdefault(place, {})
        noted = kind, axis, phase, nbytes, hidden
        counts[noted] = counts.get(noted, 0) + 1

    def call(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run a unit, or answer as one that is alike has answered."""
        if self._inside:
            return body(*args, **kwargs)
        if self._done == len(self._calls) or self._calls[self._done].name != unit:
            expected = self._calls[self._done].label if self._done < len(self._calls) else "the loss"
            raise DataflowError(f"a rank calls {unit} where the whole model comes to {expected}; trace the model again")
        node = self._calls[self._done].index
        self.counter.ends(self._place)
        self._place, self._inside = node, True
        try:
            out = self._called(node, body, args, kwargs)
        finally:
            self._inside = False
            self._done += 1
            self.counter.ends(node)
            self._place = segment(self._done)
        return out

    def _called(self, node: int, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        alike = self._alike.get(node)
        if alike is None:
            return body(*args, **kwargs)
        key = alike, signature_of(args, kwargs)
        template = self._templates.get(key)
        if template is not None:
            self._like[node] = template.node
            self.saved[node] = template.kept_bytes
            return answer(template, args, kwargs, self.counter, node, self._faked.mode)
        before = self.counter.saved_keys()
        out = body(*args, **kwargs)
        if key not in self._templates:
            self._templates[key] = remembered(node, args, kwargs, out, self.counter, before)
        return out

    def _add_saved(self) -> None:
        for place, nbytes in self.counter.saved_bytes().items():
            self.saved[place] = self.saved.get(place, 0) + nbytes


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What touches a fake tensor is fake, everything else runs for real."""

    def __init__(self, run: RankRun) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run
        self._shapes = Shapes(run._faked.mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        inputs = tensors_of((*args, *kwargs.values()) if kwargs else args)
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            out = self._shapes.run(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        self._run.observe(func, args, kwargs, out)
        return out


class _Glue(TorchFunctionMode):
    """Functions between units: draws are those of a recording, what looks at values runs once on random numbers."""

    def __init__(self, run: RankRun, scope: Scope) -> None:
        super().__init__()
        self._run = run
        self._scope = scope
        self._draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in ASKS:
            self._run.ask(types)
        if not self._run.in_glue:
            return func(*args, **kwargs)
        if is_random(func, tuple(args), kwargs):
            self._draws += 1
            return draw(func, tuple(args), kwargs, scope=self._scope, index=self._draws - 1)
        try:
            return func(*args, **kwargs)
        except DataDependent:
            return Twins(self._run._faked.mode, bear=lambda twin: None).run(func, args, kwargs)
