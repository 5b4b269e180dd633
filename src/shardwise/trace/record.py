"""One forward (and backward) with real inputs and fake parameters, recorded as a tape.

Two modes watch. The function mode (`glue`) sees every torch function that the model calls between units. The dispatch
mode (`below`) makes whatever touches a fake tensor fake, runs everything else for real, and sees which tensors are
read, made and written. Unit calls come through the switch. Refuses to know stages.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten

from shardwise.describe.flow import Node, NodeKind
from shardwise.errors import ModelError
from shardwise.trace.below import Below
from shardwise.trace.checkpointing import Contexts, noticed
from shardwise.trace.draft import Draft
from shardwise.trace.extras import changed_attributes, grown_containers
from shardwise.trace.fake_answers import moved
from shardwise.trace.finish import finished
from shardwise.trace.for_real import Twins, real_parameters
from shardwise.trace.functions import as_one_function
from shardwise.trace.glue import Glue
from shardwise.trace.keys import key_of
from shardwise.trace.randomness import Scope
from shardwise.trace.running import DataDependent, GlueLooks, HookedModule, Running, UnitCall, as_numpy
from shardwise.trace.tape import Fixed, Record, Structure, Tape
from shardwise.trace.writing import write_call

__all__ = ["DataDependent", "GlueLooks", "Recorder", "glue_key"]


def glue_key(scope: Scope) -> int:
    """The key of everything that glue draws in one micro-batch: the same on every stage."""
    return key_of(scope.seed, scope.step, scope.micro_batch, "glue")


class Recorder:
    """Records one forward. Use `with recorder.active(): loss = forward()`, then `recorder.tape(loss)`.

    `looking` are the units that look at values they compute: they run on random real numbers. A unit that is found to
    do so is added and run again, after an attempt that may have left something behind: record once more from the start.
    With `whole_loss` the loss is one function, which may look at values.
    """

    def __init__(
        self,
        *,
        parameters: Mapping[int, str],
        buffers: Mapping[int, str],
        modules: Mapping[nn.Module, str],
        fake: FakeTensorMode,
        scope: Scope,
        looking: set[str] | None = None,
        whole_loss: bool = False,
    ) -> None:
        self.scope = scope
        self._looking = set() if looking is None else looking
        self.running = Running()
        self._fake = fake
        self._modules = modules
        self._draft = Draft(parameters=parameters, buffers=buffers)
        self._glue = Glue(self._draft, self.running, fake, scope, whole_loss=whole_loss)
        self.below = Below(self._draft, self.running, fake)
        self._counts: dict[str, int] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Both modes on, inner hooked modules watched, autograd functions of the glue seen as one function each."""
        entered = nn.modules.module.register_module_forward_pre_hook(self._enter_module)
        handle = nn.modules.module.register_module_forward_hook(self._saw_module, with_kwargs=True)
        try:
            with (
                self._glue,
                self.below,
                as_one_function(lambda: self._glue if self.running.in_glue else None),
                noticed(self),
                mock.patch.object(torch.utils, "swap_tensors", moved),  # of `module.to(dtype)` in a forward
                mock.patch.object(FakeTensor, "numpy", as_numpy),
                warnings.catch_warnings(),
            ):
                # a fake twin of a real tensor that was written asks also for its gradient
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                yield
        finally:
            handle.remove()
            entered.remove()
            # torch forgets this one, and then warns whoever compiles a module (2.13)
            nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)

    @property
    def place(self) -> int | None:
        """The node that is running: a unit call, or the glue operation that becomes the next node; None between."""
        return len(self._draft.nodes) if self.running.op is not None else self.running.unit_node

    def is_buffer(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is one of the model's buffers."""
        return id(tensor) in self._draft.buffers

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Contexts | None]:
        """A checkpointed call runs once, everything kept; around several units it is refused."""
        before = len(self._draft.calls)
        yield None
        around = [call.unit for call in list(self._draft.calls.values())[before:]] if self.running.in_glue else []
        if len(around) > 1:
            raise ModelError(
                f"activation checkpointing stands inside one unit or around it, and a checkpointed call of this model "
                f"holds {len(around)}: {', '.join(around[:4])}; name the module around them as a unit, or switch the "
                "model's checkpointing off"
            )

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if self.running.call is None and module in self._modules:
            self.running.open_modules.append(self._modules[module])

    def _saw_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, opened = self.running.call, self.running.open_modules
        if call is not None and module._forward_hooks and module in self._modules:
            call.hooked.append(HookedModule(self._modules[module], args, output))
        if call is None and opened and self._modules.get(module) == opened[-1]:
            opened.pop()

    def call(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run a unit's body and record the call; a unit inside a running unit is a part of it."""
        if not self.running.in_glue:
            return body(*args, **kwargs)
        call = self._opened(unit, tree_flatten((args, kwargs))[0])
        attributes = changed_attributes(module, self._modules)
        containers = grown_containers((args, kwargs))
        host = (random.getstate(), np.random.get_state())
        self.running.call = call
        try:
            with self._glue.off():
                out = self._body(call, module, body, args, kwargs)
        finally:
            self.running.call = None
        host_random = random.getstate() != host[0] or not _same_numpy(np.random.get_state(), host[1])
        if host_random:
            random.setstate(host[0])
            np.random.set_state(host[1])
        call.left = {**attributes(), **containers()}
        write_call(self._draft, call, out, host_random=host_random)
        return out

    def _opened(self, unit: str, arguments: list[object]) -> UnitCall:
        index, number = len(self._draft.nodes), self._counts.get(unit, 0)
        self._counts[unit] = number + 1
        call = UnitCall(node=index, unit=unit, arguments=arguments)
        self._draft.nodes.append(Node(index=index, kind=NodeKind.CALL, name=unit, call=number))
        self._draft.records.append(Record(func=None, answer=Structure(tree_flatten(None)[1], (Fixed(None),))))
        self._draft.calls[index] = call
        return call

    def _body(
        self, call: UnitCall, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        if call.unit not in self._looking:
            try:
                return body(*args, **kwargs)
            except DataDependent:
                self._looking.add(call.unit)
        # The unit looks at its own values (a router, say): run this one unit on random real numbers for its shapes.
        call.for_real = True
        for leaf in call.arguments:
            if isinstance(leaf, torch.Tensor):
                self._draft.read(leaf, call.touched, call.node)
        twins = Twins(self._fake, bear=lambda twin: self._draft.origins.bear(twin, call.node))
        with real_parameters(module, self._draft.parameters) as names:
            call.touched.parameters |= names
            out = twins.run(body, args, kwargs)
        self.below.distrust()
        return out

    def tape(self, results: object, units: Sequence[str]) -> Tape:
        """The tape, once the forward is over; `results` are the tensors that the caller needs, as a rule the loss."""
        return finished(self._draft, results, units=units, queries=self._glue.queries)


def _same_numpy(a: Any, b: Any) -> bool:
    return bool(a[2] == b[2] and np.array_equal(a[1], b[1]))
