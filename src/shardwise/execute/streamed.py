"""One step of a model in one process that holds the parameters of one stage at a time: for models that do not fit.

Stages are runs of unit calls. Each one's parameters are made when it runs and dropped afterwards; what crosses between
stages is kept, a stage's activations are not: its forward is run once more for its backward.

    forward    stage 0: fill · F of every micro-batch · drop     stage 1: …              (the last has no F of its own)
    backward   stage n: fill · F B of every micro-batch · gradients of what it holds are final · drop     stage n-1: …

Parameters that several stages read carry their gradient from the later stage to the earlier one. Knows neither
optimizers nor files: who takes the gradients decides what becomes of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.errors import DataflowError
from shardwise.execute.assemble import Fill
from shardwise.execute.batches import MicroBatch
from shardwise.execute.buffers import Buffer, buffers_of
from shardwise.execute.flows import Flow, Flows
from shardwise.execute.modes import evaluating
from shardwise.execute.stage import StageRun
from shardwise.execute.streamed_cut import runs_of_calls
from shardwise.parallel.hold import hold, holders_of
from shardwise.plan.cut import StageCut, cut_stages
from shardwise.trace.capture import capture, own
from shardwise.trace.install import Switch, installed
from shardwise.trace.objective import LossFunction, objective
from shardwise.trace.randomness import Scope
from shardwise.trace.tape import Tape

__all__ = ["Streamed", "Take", "Watch", "run_streamed"]

Take = Callable[[str, nn.Parameter], None]
Watch = Callable[[MicroBatch, StageCut, Tape], contextlib.AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Streamed:
    """What a streamed step tells: the mean loss over the micro-batches, and how the model was cut."""

    loss: float
    num_stages: int
    calls: tuple[tuple[str, int], ...]  # (unit, call) in the order of the forward
    random: bool  # whether the forward draws random numbers


def run_streamed(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    *,
    fill: Fill,
    take: Take,
    stage_bytes: int,
    loss: LossFunction | None = None,
    units: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> Streamed:
    """Forward and backward of all micro-batches; `take(name, parameter)` is given every parameter once, with its final
    gradient of the mean loss in `.grad`, and with its value until it returns.

    model: its own parameters are not read, they may be fake or on the meta device; buffers are real. `fill(model,
    names)` gives parameters their values, each time anew. `stage_bytes` bounds the parameters that are held at once,
    save where one unit has more. `watch(micro_batch, stage, tape)` is open around each stage's forward, once.
    Raises `DataflowError`, and `LayoutError`, `ModelError` where the model cannot be cut.
    """
    hold(model, (), device=torch.device(device))
    tape = _every_unit(model, micro_batches[0].inputs, loss, units)
    nbytes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    stages = runs_of_calls(tape.flow, nbytes, stage_bytes)
    placement = {(node.name, node.call): stages[node.index] for node in tape.flow.calls}
    num_stages = max(stages.values()) + 1
    switch = Switch()
    with installed({name: model.get_submodule(name) for name in tape.units}, switch):
        flows = Flows(model, switch=switch, placement=placement, num_stages=num_stages, loss=loss, units=units)
        works = [_work(flows, each, micro_batches, seed) for each in micro_batches]
        holders = holders_of(model, tape.flow, cut_stages(tape.flow, stages, num_stages), tape.units, placement)
        held = _held(holders, works, num_stages)
        stream = _Stream(model, switch=switch, works=works, held=held, fill=fill, loss=loss, watch=watch or _unwatched)
        for stage in range(num_stages):
            stream.forward(stage)
        for stage in reversed(range(num_stages)):
            stream.backward(stage, take)
    return Streamed(
        loss=sum(float(work.loss) * work.factor for work in works),
        num_stages=num_stages,
        calls=tuple((node.name, node.call) for node in tape.flow.calls),
        random=flows.random,
    )


@dataclasses.dataclass(slots=True)
class _Work:
    """A micro-batch, and what is kept of it between stages: values that cross, later their gradients."""

    micro_batch: MicroBatch
    flow: Flow
    factor: float  # of its loss in the mean
    scope: Scope
    loss: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    kept: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    gradients: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class _Run:
    """One stage's forward of one micro-batch, with its graph."""

    loss: torch.Tensor | None
    sent: Mapping[int, torch.Tensor]
    leaves: Mapping[int, torch.Tensor]


class _Stream:
    def __init__(
        self,
        model: nn.Module,
        *,
        switch: Switch,
        works: Sequence[_Work],
        held: Sequence[Sequence[str]],
        fill: Fill,
        loss: LossFunction | None,
        watch: Watch,
    ) -> None:
        self._model = model
        self._switch = switch
        self._works = works
        self._held = held
        self._fill = fill
        self._loss = loss
        self._watch = watch
        self._modules = dict(model.named_modules())
        self._first = {name: stage for stage in reversed(range(len(held))) for name in held[stage]}
        self._pending: dict[str, torch.Tensor] = {}  # gradients of parameters that an earlier stage reads too
        self._states: dict[int, list[Buffer]] = {}  # stage -> buffers it has written, as they were

    def forward(self, stage: int) -> None:
        """Run a stage for all micro-batches and keep what it sends; nothing, where nobody waits for it."""
        if not any(work.flow.cut.stages[stage].sends for work in self._works):
            return
        state = buffers_of(self._model)
        with self._holding(stage):
            for work in self._works:
                sent = self._run(work, stage).sent
                work.kept.update({value: tensor.detach().clone() for value, tensor in sent.items()})
        self._states[stage] = [buffer for buffer in state if buffer.is_written()]

    def backward(self, stage: int, take: Take) -> None:
        """Run a stage again, and backward; hand out the parameters that no earlier stage reads."""
        for buffer in self._states.pop(stage, ()):
            buffer.restore()
        with self._holding(stage) as parameters:
            for name, parameter in parameters.items():
                parameter.grad = self._pending.pop(name, None)
            for work in self._works:
                self._backward(work, stage)
            for name, parameter in parameters.items():
                if self._first[name] == stage:
                    take(name, parameter)
                elif parameter.grad is not None:
                    self._pending[name] = parameter.grad
                parameter.grad = None

    @contextlib.contextmanager
    def _holding(self, stage: int) -> Iterator[dict[str, nn.Parameter]]:
        names = set(self._held[stage])
        self._fill(self._model, self._held[stage])
        try:
            yield {name: p for name, p in self._model.named_parameters() if name in names}
        finally:
            hold(self._model, ())

    def _run(self, work: _Work, stage: int, watch: Watch | None = None) -> _Run:
        """The stage's forward. Both times with a graph, so that both take the same path."""
        flow = work.flow
        plan = flow.cut.stages[stage]
        if not plan.computes and stage != flow.cut.loss_stage:  # its layers are all dropped
            return _Run(None, {}, {})
        values = flow.tape.flow.values
        leaves = {
            value: work.kept[value].clone().requires_grad_(values[value].requires_grad) for value, _ in plan.receives
        }
        run = StageRun(
            tape=flow.tape,
            cut=plan,
            table=flow.tables[stage],
            modules=self._modules,
            received=leaves,
            scope=work.scope,
            checked=True,
        )
        inputs = own(work.micro_batch.inputs) if flow.writes_batch else work.micro_batch.inputs
        with (watch or _unwatched)(work.micro_batch, plan, flow.tape):
            loss = run.forward(lambda: objective(self._model, inputs, self._loss), self._switch)
        return _Run(loss if stage == flow.cut.loss_stage else None, run.sent, leaves)

    def _backward(self, work: _Work, stage: int) -> None:
        run = self._run(work, stage, self._watch)
        plan = work.flow.cut.stages[stage]
        roots: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        if run.loss is not None:
            work.loss = run.loss.detach()
            if run.loss.requires_grad:
                roots.append(run.loss)
                gradients.append(torch.full_like(run.loss, work.factor))
        for value in {value for value, _ in plan.sends}:
            work.kept.pop(value, None)  # its readers have run
            gradient = work.gradients.pop(value, None)
            if gradient is not None and run.sent[value].requires_grad:
                roots.append(run.sent[value])
                gradients.append(gradient)
        if roots:
            torch.autograd.backward(roots, gradients)
        for value, leaf in run.leaves.items():
            if leaf.grad is not None:
                before = work.gradients.get(value)
                work.gradients[value] = leaf.grad if before is None else before + leaf.grad


def _work(flows: Flows, micro_batch: MicroBatch, all_of_them: Sequence[MicroBatch], seed: int) -> _Work:
    scope = Scope(seed=seed, step=0, micro_batch=micro_batch.index, samples=micro_batch.samples, place="glue", call=0)
    flow = flows.flow_of(micro_batch, scope)
    if list(flow.cut.order) != sorted(flow.cut.order):
        raise DataflowError(
            "micro-batches of a streamed model go through its stages in one order, but micro-batch "
            f"{micro_batch.index} needs {list(flow.cut.order)}: it calls units in another order than the first; "
            'verify with reference="whole"'
        )
    weight = sum(each.weight for each in all_of_them)
    return _Work(micro_batch, flow, micro_batch.weight / weight if weight else 0.0, scope)


def _held(holders: Mapping[str, Sequence[int]], works: Sequence[_Work], num_stages: int) -> list[list[str]]:
    """The parameters of every stage, in any flow."""
    names: list[dict[str, None]] = [{} for _ in range(num_stages)]
    for name, stages in holders.items():
        for stage in stages:
            names[stage][name] = None
    for work in works:
        for plan in work.flow.cut.stages:
            names[plan.stage].update(dict.fromkeys(sorted(plan.parameters)))
    return [list(each) for each in names]


def _every_unit(model: nn.Module, inputs: Any, loss: LossFunction | None, units: Sequence[str]) -> Tape:
    """A tape in which no unit is dropped: where the glue decides by random numbers, that of evaluation."""
    tape = capture(model, inputs, loss=loss, units=units).tape
    if not (tape.looks and tape.random and model.training):
        return tape
    with evaluating(model):
        return capture(model, inputs, loss=loss, units=units).tape


def _unwatched(micro_batch: MicroBatch, stage: StageCut, tape: Tape) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
