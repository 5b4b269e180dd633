"""Tapes and cuts of every signature that a rank meets, traced before their first use and kept.

Every rank derives the same from the same batch. The placement of unit calls is fixed by the first tape; later tapes
(another length, a layer dropped) follow it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.flow import Dataflow, NodeKind
from shardwise.errors import DataflowError, LayoutError, ModelError
from shardwise.execute.batches import MicroBatch, signature
from shardwise.execute.dealt import Dealt
from shardwise.execute.programme import Programme, programme
from shardwise.execute.stage import StageRun
from shardwise.parallel.context.install import DealtContext
from shardwise.parallel.tensor.divided import Divided
from shardwise.plan.cut import Cut, StageCut, cut_stages
from shardwise.trace.capture import Compute, Watch, capture, own
from shardwise.trace.install import Switch
from shardwise.trace.objective import LossFunction, objective
from shardwise.trace.randomness import Scope
from shardwise.trace.tape import Tape

__all__ = ["Flow", "Flows"]


@dataclasses.dataclass(slots=True)
class Flow:
    """One signature's tape, cut and tables."""

    tape: Tape
    cut: Cut
    tables: Mapping[int, Programme]
    digest: int
    writes_batch: bool
    random: bool
    dealt: Dealt
    met: int = 0  # steps in which it has been used
    free: frozenset[int] = frozenset()  # nodes that every stage computes, whoever needs them
    notes: Any = None  # of who recorded it, for a forward that is not the objective's


class Flows:
    """Answers `flow_of(micro_batch)`; traces what it has not met."""

    def __init__(
        self,
        model: nn.Module,
        *,
        switch: Switch,
        placement: Mapping[tuple[str, int], int],
        num_stages: int,
        loss: LossFunction | None,
        units: Sequence[str] = (),
        whole: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        divided: Divided | None = None,
        context: DealtContext | None = None,
    ) -> None:
        self.model = model
        self._divided = divided
        self._context = context
        self._whole = whole  # around a trace: the model as it is on one device
        self._switch = switch
        self.placement = dict(placement)
        self.num_stages = num_stages
        self.loss = loss
        self.units = tuple(units)
        self._modules = dict(model.named_modules())
        self._flows: dict[object, list[Flow]] = {}

    def flow_of(self, micro_batch: MicroBatch, scope: Scope) -> Flow:
        """The flow of a micro-batch in a step; looks at random numbers (LayerDrop) make several of one signature."""
        return self.flow_for(signature(micro_batch.inputs, self.model.training), micro_batch.inputs, scope)

    def flow_for(
        self,
        signed: Hashable,
        inputs: Any,
        scope: Scope,
        *,
        compute: Compute = objective,
        watch: Watch | None = None,
    ) -> Flow:
        """The flow of what `compute(model, inputs, loss)` runs, as often as it is asked; `signed` says which forwards
        are alike. `watch(recorder)` is open around a recording."""
        known = self._flows.setdefault((signed, torch.is_grad_enabled()), [])
        for flow in sorted(known, key=lambda flow: -flow.met):  # the usual ones first
            if not flow.tape.looks or self._agrees(flow, inputs, scope, compute):
                return flow
        with self._switch.off(), self._whole():
            tape = capture(
                self.model,
                inputs,
                loss=self.loss,
                units=self.units,
                scope=scope,
                watch=watch,
                backward=False,
                compute=compute,
            ).tape
        known.append(self._made(tape))
        return known[-1]

    @property
    def random(self) -> bool:
        """Whether a forward that has been met draws random numbers."""
        return any(flow.random for flows in self._flows.values() for flow in flows)

    def _agrees(self, flow: Flow, inputs: Any, scope: Scope, compute: Compute) -> bool:
        """Whether Python would see now what it saw when the tape was made: the glue runs with every unit absent."""
        looking = _looking(flow.tape.flow, flow.free)
        run = StageRun(
            tape=flow.tape,
            cut=looking,
            table=programme(flow.tape, looking),
            modules=self._modules,
            received={},
            scope=scope,
        )
        given = own(inputs) if flow.writes_batch else inputs
        try:
            with torch.no_grad():
                run.forward(lambda: compute(self.model, given, self.loss), self._switch)
        except DataflowError:
            return False
        return True

    def _made(self, tape: Tape) -> Flow:
        stages = {node.index: self._stage(node.name, node.call) for node in tape.flow.calls}
        cut = cut_stages(tape.flow, stages, self.num_stages, idle=True)
        if self.num_stages > 1:
            _refuse_state(tape)
        text = repr((tape.flow.nodes, tape.flow.values, sorted(stages.items())))
        return Flow(
            tape=tape,
            cut=cut,
            tables={plan.stage: programme(tape, plan) for plan in cut.stages},
            digest=int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()),
            writes_batch=any(record.changes for record in tape.records),
            random=tape.random,
            dealt=Dealt(tape, self._divided, self._context),
        )

    def _stage(self, unit: str, call: int) -> int:
        for number in range(call, -1, -1):
            if (unit, number) in self.placement:
                return self.placement[(unit, number)]
        others = [stage for (name, _), stage in self.placement.items() if name == unit]
        if others:
            return others[0]
        raise LayoutError(
            f"every unit call has a stage: {unit} was not called when the layout was made; name its stage, or make the "
            "layout from a batch that uses it"
        )


def _refuse_state(tape: Tape) -> None:
    """Stages run different parts of the glue, and leave it early: a state that glue keeps would drift apart."""
    for node, record in zip(tape.flow.nodes, tape.records, strict=True):
        if record.buffers_written:
            raise ModelError(
                f"code between the units keeps no state: {node.label} writes buffer {record.buffers_written[0]} in "
                "place, which stages would do differently often; name the module around it as a unit"
            )


def _looking(flow: Dataflow, free: frozenset[int]) -> StageCut:
    """A stage without unit calls that computes what Python looks at."""
    looks = [node for node in flow.nodes if node.kind is NodeKind.READ]
    computes: set[int] = set()
    stack = [node.index for node in looks]
    while stack:
        index = stack.pop()
        if index not in computes and flow.nodes[index].kind is not NodeKind.CALL:
            computes.add(index)
            stack.extend(flow.values[read].node for read in flow.nodes[index].reads)
    return StageCut(
        stage=-1,
        calls=(),
        computes=free.union(computes),
        receives=(),
        sends=(),
        last_node=looks[-1].index,
        parameters=frozenset(),
    )
