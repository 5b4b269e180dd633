"""One pipeline stage of one micro-batch: the model's own forward, with absent units answered and glue chosen.

The stage runs the user's `forward`. A function mode counts its glue, a switch counts its unit calls; the tape says
what each one is: computed here, received, or absent. Knows no schedule, no process group: values come in as tensors
and go out in `sent`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from shardwise.describe.flow import NodeKind
from shardwise.errors import DataflowError
from shardwise.execute.around import Around
from shardwise.execute.collectors import feed, pick_up, watched
from shardwise.execute.crossings import Crossings
from shardwise.execute.dealt import Dealt
from shardwise.execute.ledger import Ledger
from shardwise.execute.programme import Programme
from shardwise.execute.surroundings import Surroundings
from shardwise.plan.cut import StageCut
from shardwise.trace.absent import first_absent
from shardwise.trace.checkpointing import Contexts
from shardwise.trace.functions import as_one_call, loss_of, name_of
from shardwise.trace.install import Switch
from shardwise.trace.keys import key_of
from shardwise.trace.memos import forget
from shardwise.trace.randomness import RandomMode, Scope, draw, is_random, python_streams, repeated_draws
from shardwise.trace.record import glue_key
from shardwise.trace.tape import Record, Tape

__all__ = ["Leave", "StageRun"]


class Leave(BaseException):
    """Raised to leave the forward once a stage has run its last node; passes through `except Exception`."""


class StageRun:
    """Runs the forward of one stage for one micro-batch.

    `received` holds the leaves that came in (value -> tensor); after `forward`, `sent` holds what must go out, with
    the autograd graph attached. `checked` hides from every present node what the dataflow does not list for it.
    """

    def __init__(
        self,
        *,
        tape: Tape,
        cut: StageCut,
        table: Programme,
        modules: Mapping[str, nn.Module],
        received: Mapping[int, torch.Tensor],
        scope: Scope,
        checked: bool = False,
        dealt: Dealt | None = None,
        around: Around | None = None,
        absent: Callable[[int], None] | None = None,
    ) -> None:
        self._around = around
        self._absent = absent  # is told of every unit call that is answered
        self.tape = tape
        self.cut = cut
        self.table = table
        self.modules = modules
        self.scope = scope
        self.checked = checked
        self.position = 0
        self.inside = False
        self.mode: TorchFunctionMode | None = None
        self._recomputes = False  # the unit that is called next is checkpointed
        self._random: RandomMode | None = None  # of the unit that runs
        self._ledger = Ledger(tape, cut, checked=checked)
        self._crossings = Crossings(tape, table, received, ledger=self._ledger, dealt=dealt)
        self.received, self.sent = self._crossings.received, self._crossings.sent

    # -- the forward ----------------------------------------------------------------------------

    def forward(
        self, run: Callable[[], torch.Tensor], switch: Switch, surroundings: Surroundings | None = None
    ) -> torch.Tensor | None:
        """Run the objective as this stage; the loss on the loss stage, None elsewhere."""
        if surroundings is None:
            with Surroundings().open() as around:
                return self.forward(run, switch, around)
        before, surroundings.run, switch.watcher = (surroundings.run, switch.watcher), self, self
        self.mode = _GlueMode(self)
        forget(self.tape.memos)
        try:
            with python_streams(glue_key(self.scope)) if self.table.random else contextlib.nullcontext(), self.mode:
                loss = run()
        except Leave:
            return None
        finally:
            surroundings.run, switch.watcher = before
            self.mode = None  # no cycle: what the stage holds goes with it, not with the next garbage collection
        if self.position < len(self.tape.flow.nodes):
            raise self._mismatch("the forward ended")
        return loss

    def _mismatch(self, got: str) -> DataflowError:
        nodes = self.tape.flow.nodes
        expected = nodes[self.position].label if self.position < len(nodes) else "the end"
        return DataflowError(
            f"stage {self.cut.stage} runs the recorded order: node {self.position} is {expected}, but {got}; the "
            "forward took another path than when it was traced (its control flow depends on something that is not in "
            "the signature); name the enclosing module as a unit"
        )

    def _after(self, index: int) -> None:
        self.position = index + 1
        if index >= self.cut.last_node:
            raise Leave

    # -- glue -----------------------------------------------------------------------------------

    def glue(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One torch function of the glue: computed, or answered from the tape."""
        if self.inside or func in self.tape.queries:
            return func(*args, **kwargs)
        index = self.position
        if index >= len(self.tape.records):
            return self._unrecorded(func, args, kwargs)
        record = self.tape.records[index]
        if record.func is None or record.func != func:
            return self._unrecorded(func, args, kwargs)
        ledger = self._ledger
        if ledger.replaced:
            args, kwargs = ledger.with_replacements(args, kwargs)
        if not self.table.computes[index]:
            out = self._answer(index, record, args, kwargs)
        else:
            if self.checked:
                args, kwargs = ledger.only_listed(index, args, kwargs)
            if ledger.stale:
                ledger.refuse_stale(index, (args, kwargs))
            try:
                out = self._compute(index, record, func, args, kwargs)
            finally:
                ledger.put_back()
            if record.look is not None or self.tape.flow.nodes[index].kind is NodeKind.READ:
                self._compare_look(record, out)
            if self.table.sends[index] or self.checked:
                self._crossings.made(index, record, out)
        self._after(index)
        return out

    def _compute(self, index: int, record: Record, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            if record.random and is_random(func, tuple(args), kwargs):
                out = draw(func, tuple(args), kwargs, scope=self.scope, index=record.draw)
            else:
                out = func(*args, **kwargs)
        except RuntimeError as error:
            absent = first_absent((args, kwargs))
            if absent is None:
                raise
            raise DataflowError(
                f"{self.tape.flow.nodes[index].label} needs {absent.what}, which is not on stage {self.cut.stage}: an "
                "edge is missing in the recorded dataflow; trace the model again"
            ) from error
        if self.checked and record.writes:
            arguments = tree_flatten((args, kwargs))[0]
            for position, value in record.writes:
                self._ledger.wrote(value, arguments[position])
        return out

    def _unrecorded(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_flatten(out)[0]):
            raise self._mismatch(f"the glue called {name_of(func)}")
        return out

    def _compare_look(self, record: Record, out: Any) -> None:
        seen = tuple(leaf.tobytes() if isinstance(leaf, np.ndarray) else leaf for leaf in tree_flatten(out)[0])
        if seen != record.look:
            raise self._mismatch(f"Python saw {seen} where the trace saw {record.look}")

    def _answer(self, index: int, record: Record, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        plain = self.table.plain[index]
        if plain is not None:
            return self._crossings.value(plain)
        if record.changes:
            self._ledger.skip_write(index, args, kwargs)
        arguments = tree_flatten((args, kwargs))[0] if self.table.places[index] else ()
        out = record.answer.build(arguments, self._crossings.value)
        for position, value in record.writes:
            if value in self.received:
                self._ledger.replace(arguments[position], self.received[value])
        return out

    # -- units ----------------------------------------------------------------------------------

    def call(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """A unit call: run here, or answered."""
        if self.inside:
            return body(*args, **kwargs)
        index, table = self.position, self.table
        if index >= len(table.units) or table.units[index] != unit:
            raise self._mismatch(f"unit {unit} was called")
        given = table.given[index]
        if given is not None:
            out: Any = self._crossings.value(given)
        else:
            glue = torch._C._pop_torch_function_stack()  # the operations inside a unit pass no function mode
            try:
                out = self._call(index, unit, body, args, kwargs)
            finally:
                torch._C._push_on_torch_function_stack(glue)
        if self._absent is not None and not table.computes[index]:
            self.inside = True
            try:
                self._absent(index)
            finally:
                self.inside = False
        self._after(index)
        return out

    def _call(
        self, index: int, unit: str, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        record, ledger = self.tape.records[index], self._ledger
        if ledger.replaced:
            args, kwargs = ledger.with_replacements(args, kwargs)
        if not self.table.computes[index]:
            out = self._answer(index, record, args, kwargs)
            if record.extras or record.hooked:
                feed(self.modules, record, unit, self.cut.stage, self._crossings.value, args, kwargs)
            return out
        if self._around is not None:
            body = self._around.wrap(unit, body)
        if self.table.simple[index] and not (self.checked or self._recomputes or ledger.stale):
            self.inside = True
            try:
                return body(*args, **kwargs)
            finally:
                self.inside = False
        if self.checked:
            args, kwargs = ledger.only_listed(index, args, kwargs)
            if ledger.stale:
                ledger.refuse_stale(index, (args, kwargs))
        try:
            return self._run(index, record, unit, body, args, kwargs)
        finally:
            ledger.put_back()

    def _run(
        self,
        index: int,
        record: Record,
        unit: str,
        body: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        taken: dict[int, torch.Tensor] = {}
        self.inside = True
        try:
            with watched(self.modules, record, taken) if record.extras else contextlib.nullcontext():
                if self._recomputes and (self._around is None or not self._around.recomputes(unit)):
                    body = functools.partial(checkpoint, body, use_reentrant=False)
                if record.random or record.host_random:
                    out = self._run_random(record, unit, self.tape.flow.nodes[index].call, body, args, kwargs)
                else:
                    out = body(*args, **kwargs)
        finally:
            self.inside = False
        for value in record.extras:
            tensor = taken.get(value)
            if tensor is None:
                what = self.tape.stand_ins[value].what
                tensor = pick_up(self.modules, record, value, what, args, kwargs)
            if self.checked:
                self._ledger.note(value, tensor)
            if value in self.table.sends[index]:
                self._crossings.send(value, tensor, record)
        if self.table.sends[index] or self.checked:
            self._crossings.made(index, record, out)
        return out

    def _run_random(
        self,
        record: Record,
        unit: str,
        number: int,
        body: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        scope = dataclasses.replace(self.scope, place=unit, call=number)
        key = key_of(scope.seed, scope.step, scope.micro_batch, unit, number)
        host = (random.getstate(), np.random.get_state()) if record.host_random else None
        try:
            with python_streams(key), RandomMode(scope) as self._random:
                return body(*args, **kwargs)
        finally:
            self._random = None
            if host is not None:
                random.setstate(host[0])
                np.random.set_state(host[1])

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Contexts | None]:
        """Checkpointing around a unit is done inside it; the repetition draws what the forward drew."""
        if self.inside:
            yield lambda: (contextlib.nullcontext(), repeated_draws(self._random))
            return
        self._recomputes = torch.is_grad_enabled()
        try:
            yield None
        finally:
            self._recomputes = False


class _GlueMode(TorchFunctionMode):
    def __init__(self, run: StageRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run.glue(func, args, kwargs or {})

    def loss(self, function: Callable[[Any, Any], torch.Tensor], outputs: Any, batch: Any) -> torch.Tensor:
        """What the loss computes, as one function where it was recorded as one."""
        records, index = self.run.tape.records, self.run.position
        if self.run.inside or index >= len(records) or records[index].func is not loss_of:
            return function(outputs, batch)
        whole: torch.Tensor = as_one_call(self, loss_of, (function, outputs, batch), {})
        return whole
