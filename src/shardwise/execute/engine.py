"""The executor: interprets one rank's actions for one step. Knows neither layouts nor optimizers.

It is given rows of actions and transfers, and for every micro-batch a flow; it runs forwards and backwards (whole, or
inputs first and weights later), posts receives where the row says, and hands values between two stages of one rank
without a send. Whoever waits for gradients is told by it when those of a stage are final.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn as nn

from shardwise.comm.point_to_point import Expected, Incoming, Outgoing, Transport, receive, send
from shardwise.execute.backward import run_backward
from shardwise.execute.batches import MicroBatch
from shardwise.execute.buffers import Buffer
from shardwise.execute.deferred import Deferred
from shardwise.execute.flows import Flow
from shardwise.execute.moments import Moment, Moments, clock_of
from shardwise.execute.repetition import Repetition
from shardwise.execute.row_plan import Item, Op, RowPlan, Step, plan_of
from shardwise.execute.stage import StageRun, Surroundings
from shardwise.execute.weight_sums import WeightSums
from shardwise.schedule.actions import Action, StageAction, Transfer, TransferKind
from shardwise.trace.capture import own
from shardwise.trace.install import Switch
from shardwise.trace.objective import LossFunction, objective
from shardwise.trace.randomness import Scope

__all__ = ["Engine", "Moment", "UnderWay", "Waiting", "Work"]


class Waiting(Protocol):
    """Who reduces gradients once they are final (`parallel.gradients.GradientSum`)."""

    def begin(self, order: Sequence[int]) -> None: ...

    def during(self, stage: int) -> contextlib.AbstractContextManager[None]: ...

    def end(self, stage: int, *, but: Collection[int] = ()) -> None: ...

    def final(self, parameter: nn.Parameter) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """One micro-batch of a step: its inputs, its flow, and the factor of its loss in the global mean."""

    micro_batch: MicroBatch
    flow: Flow
    factor: float
    scope: Scope
    headers: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Message:
    """A value, or its gradient, on its way between two stages of different ranks."""

    value: int
    key: tuple[int, int, int, int, bool]  # the edge as the forward has it, micro-batch, value, gradient
    expected: Expected
    peer: int
    has_gradient: bool


@dataclasses.dataclass(slots=True)
class _Alive:
    """A forward whose backward has not run."""

    sent: dict[int, torch.Tensor]
    leaves: dict[int, torch.Tensor]
    loss: torch.Tensor | None
    outgoing: dict[tuple[int, int], Outgoing] = dataclasses.field(default_factory=dict)  # (value, target)
    written: Sequence[Buffer] = ()  # by a forward that is run again, as they were before it


@dataclasses.dataclass(slots=True)
class UnderWay:
    """What one row leaves to the next: forwards whose backward has not run, messages on their way, losses."""

    alive: dict[tuple[int, int], _Alive] = dataclasses.field(default_factory=dict)
    incoming: dict[tuple[int, int, int, int, bool], Incoming] = dataclasses.field(default_factory=dict)
    local: dict[tuple[int, int, int, int, bool], torch.Tensor] = dataclasses.field(default_factory=dict)
    losses: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    outgoing: list[Outgoing] = dataclasses.field(default_factory=list)  # sends of the last row


@dataclasses.dataclass(slots=True)
class _State:
    """What is under way in one step."""

    works: Sequence[Work]
    alive: dict[tuple[int, int], _Alive] = dataclasses.field(default_factory=dict)
    incoming: dict[tuple[int, int, int, int, bool], Incoming] = dataclasses.field(default_factory=dict)
    local: dict[tuple[int, int, int, int, bool], torch.Tensor] = dataclasses.field(default_factory=dict)
    deferred: dict[tuple[int, int], Deferred] = dataclasses.field(default_factory=dict)
    outgoing: list[Outgoing] = dataclasses.field(default_factory=list)
    losses: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    actions: list[Action] = dataclasses.field(default_factory=list)
    marks: list[Any] = dataclasses.field(default_factory=list)  # start, inputs ready, end of every action
    ready: Any = None  # when the inputs of the action under way were there


class Engine:
    """Runs the actions of one rank. `rank_of_stage` are global ranks of this replica's pipeline."""

    def __init__(
        self,
        model: nn.Module,
        *,
        switch: Switch,
        loss: LossFunction | None,
        rank: int,
        rank_of_stage: Sequence[int],
        transport: Transport,
        device: torch.device,
        sums: WeightSums | None = None,
        repeating: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.model = model
        self.rank = rank
        self.rank_of_stage = tuple(rank_of_stage)
        self._switch = switch
        self._loss = loss
        self._transport = transport
        self._sums = sums or WeightSums()
        self._surroundings = Surroundings()
        self.device = device
        self._clock = clock_of(device)
        self._modules = dict(model.named_modules())
        self._messages: dict[tuple[int, TransferKind, int, int, int, bool], list[_Message]] = {}
        self._factors: dict[tuple[float, torch.dtype], torch.Tensor] = {}
        self._plans: dict[int, tuple[Sequence[Item], RowPlan]] = {}
        self._repetition = Repetition(model)
        self._repeating = repeating  # around a forward that is run again: it counts once

    def run(
        self,
        row: Sequence[Item],
        works: Sequence[Work],
        *,
        gradients: Waiting | None = None,
        after_last_forward: Callable[[Mapping[int, torch.Tensor]], None] | None = None,
        before_action: Callable[[Action], None] | None = None,
        under_way: UnderWay | None = None,
    ) -> tuple[dict[int, torch.Tensor], Moments]:
        """Interpret `row`. Returns the losses of the micro-batches whose loss stage is here (unweighted, detached),
        and when every action ran. Gradients accumulate in the parameters. `after_last_forward` is given the losses once
        they are all known; `gradients` is told of every stage whose gradients are final. A row that goes on where the
        one before ended is given what is `under_way`, with equal numbers of micro-batches for equal things.

        Raises `TransferError` and `DataflowError`.
        """
        plan = self.plan_of(row)
        state = _State(works)
        if under_way is not None:
            state.alive, state.incoming, state.local = under_way.alive, under_way.incoming, under_way.local
            state.losses = under_way.losses
        if gradients is not None:
            gradients.begin(plan.order)
        # one gradient is no sum
        with self._sums.running(sums=len(works) > 1, splits=plan.splits), self._surroundings.open():
            for step in plan.steps:
                item = step.item
                if isinstance(item, Transfer):
                    self._transfer(state, item)
                elif isinstance(item, StageAction):
                    if gradients is not None:
                        gradients.end(item.stage)
                else:
                    if before_action is not None:
                        before_action(item)
                    start = self._clock.now()
                    state.ready = None
                    self._act(state, step, item, gradients)
                    if step.last_forward and after_last_forward is not None:
                        after_last_forward(state.losses)
                    state.actions.append(item)
                    state.marks += start, start if state.ready is None else state.ready, self._clock.now()
        sent = state.outgoing
        if under_way is not None:  # waited for behind the next row: who receives it may be behind in this one
            sent, under_way.outgoing = under_way.outgoing, sent
        for outgoing in sent:
            outgoing.wait()
        return state.losses, Moments(self._clock, state.actions, state.marks)

    def plan_of(self, row: Sequence[Item]) -> RowPlan:
        """What the items of a row ask for; rows are kept, so that it is found once. Raises `DataflowError`."""
        known = self._plans.get(id(row))
        if known is None:
            known = self._plans[id(row)] = row, plan_of(row)
        return known[1]

    def _act(self, state: _State, step: Step, action: Action, gradients: Waiting | None) -> None:
        op, key = step.op, (action.stage, action.micro_batch)
        if op is Op.FORWARD or op is Op.FORWARD_TWICE:
            self._forward(state, action, twice=op is Op.FORWARD_TWICE)
        elif op is Op.AGAIN:
            self._again(state, action)
        elif op is Op.BACKWARD and step.ends and gradients is not None:
            with gradients.during(action.stage):  # gradients that autograd accumulates are told of by its hooks
                self._backward(state, action)
            gradients.end(action.stage)
        elif op is Op.BACKWARD:
            with self._sums.adding(True):
                self._backward(state, action)
        elif op is Op.INPUTS:
            state.deferred[key] = Deferred()
            with self._sums.deferring(state.deferred[key]):
                self._backward(state, action)
        elif op is Op.WEIGHTS:
            queue = state.deferred.pop(key)
            if step.ends and gradients is not None:
                gradients.end(action.stage, but=queue.parameters)
                queue.run(gradients.final)
            else:
                queue.run()

    # -- transfers ------------------------------------------------------------------------------

    def _transfer(self, state: _State, transfer: Transfer) -> None:
        work = state.works[transfer.micro_batch]
        for message in self._messages_of(work.flow, transfer):
            expected, peer = message.expected, message.peer
            if transfer.kind is TransferKind.RECV:
                state.incoming[message.key] = receive(
                    self._transport, expected, peer, device=self.device, headers=work.headers
                )
                continue
            if transfer.gradient:
                tensor = state.local.pop(message.key, None)
                if tensor is None:
                    tensor = torch.zeros(expected.shape, dtype=expected.dtype, device=self.device)
            else:
                alive = state.alive[(transfer.source, transfer.micro_batch)]
                tensor = alive.sent[message.value]
            outgoing = send(self._transport, tensor, expected, peer, headers=work.headers)
            if transfer.gradient or not (message.has_gradient and torch.is_grad_enabled()):
                state.outgoing.append(outgoing)
            else:  # its gradient will tell that it has arrived
                alive.outgoing[(message.value, transfer.target)] = outgoing

    def _messages_of(self, flow: Flow, transfer: Transfer) -> Sequence[_Message]:
        """What a transfer moves; the same in every step of a flow, so it is made once."""
        source, target, gradient = transfer.source, transfer.target, transfer.gradient
        known = (flow.digest, transfer.kind, source, target, transfer.micro_batch, gradient)
        messages = self._messages.get(known)
        if messages is not None:
            return messages
        first, second = (target, source) if gradient else (source, target)  # the edge, as the forward has it
        where = f"edge stage {first} -> stage {second}, micro-batch {transfer.micro_batch}"
        peer = self.rank_of_stage[source if transfer.kind is TransferKind.RECV else target]
        self._messages[known] = [
            _Message(
                value=value,
                key=(first, second, transfer.micro_batch, value, gradient),
                expected=_expected(flow, value, gradient, where),
                peer=peer,
                has_gradient=flow.tape.flow.values[value].requires_grad,
            )
            for value in _crossing(flow, first, second, gradient)
        ]
        return self._messages[known]

    # -- forward and backward -------------------------------------------------------------------

    def _forward(self, state: _State, action: Action, *, twice: bool) -> None:
        work = state.works[action.micro_batch]
        plan = work.flow.cut.stages[action.stage]
        values = work.flow.tape.flow.values
        leaves: dict[int, torch.Tensor] = {}
        for value, source in plan.receives:
            leaf = self._arrived(state, source, action, value)
            leaves[value] = leaf.requires_grad_() if values[value].requires_grad and torch.is_grad_enabled() else leaf
        state.ready = self._clock.now()
        if not plan.computes and action.stage != work.flow.cut.loss_stage:  # a stage whose layers are all dropped
            state.alive[(action.stage, action.micro_batch)] = _Alive({}, leaves, None)
            return
        if twice and torch.is_grad_enabled():
            # with a graph, which is freed at once: so both runs take the same path
            given = _copies(leaves) if work.flow.tables[action.stage].writes else leaves
            with self._repetition.first((work.flow.digest, action.stage)) as written:
                sent, loss = self._compute(work, action.stage, given)
            alive = _Alive(_detached(sent), leaves, None, written=written)
        else:
            sent, loss = self._compute(work, action.stage, leaves)
            alive = _Alive(sent, leaves, loss) if torch.is_grad_enabled() else _Alive(_detached(sent), {}, None)
        state.alive[(action.stage, action.micro_batch)] = alive
        if loss is not None:
            state.losses[action.micro_batch] = loss.detach()
        for value, target in plan.sends:
            if self.rank_of_stage[target] == self.rank:
                state.local[(action.stage, target, action.micro_batch, value, False)] = sent[value].detach()

    def _again(self, state: _State, action: Action) -> None:
        """The forward once more, of which all is kept; it sends nothing."""
        work = state.works[action.micro_batch]
        alive = state.alive[(action.stage, action.micro_batch)]
        if not work.flow.cut.stages[action.stage].computes and action.stage != work.flow.cut.loss_stage:
            return
        with self._repetition.again(alive.written), self._repeating():
            alive.sent, alive.loss = self._compute(work, action.stage, alive.leaves)
        alive.written = ()

    def _compute(
        self, work: Work, stage: int, leaves: Mapping[int, torch.Tensor]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """What a stage sends, and the loss on the loss stage, of what it has received."""
        inputs = own(work.micro_batch.inputs) if work.flow.writes_batch else work.micro_batch.inputs
        if len(work.flow.cut.stages) == 1 and not work.flow.random and not work.headers:
            return {}, objective(self.model, inputs, self._loss)
        run = StageRun(
            tape=work.flow.tape,
            cut=work.flow.cut.stages[stage],
            table=work.flow.tables[stage],
            modules=self._modules,
            received=leaves,
            dealt=work.flow.dealt,
            scope=work.scope,
            checked=work.headers,
        )
        loss = run.forward(lambda: objective(self.model, inputs, self._loss), self._switch, self._surroundings)
        return run.sent, loss if stage == work.flow.cut.loss_stage else None

    def _arrived(self, state: _State, source: int, action: Action, value: int) -> torch.Tensor:
        key = (source, action.stage, action.micro_batch, value, False)
        if self.rank_of_stage[source] == self.rank:
            return state.local.pop(key).clone()
        return state.incoming.pop(key).wait()

    def _backward(self, state: _State, action: Action) -> None:
        work = state.works[action.micro_batch]
        plan = work.flow.cut.stages[action.stage]
        alive = state.alive.pop((action.stage, action.micro_batch))
        roots: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        if alive.loss is not None and alive.loss.requires_grad:
            roots.append(alive.loss)
            gradients.append(self._factor(work.factor, alive.loss))
        arrived = self._arrived_gradients(state, work, plan, action)
        for outgoing in alive.outgoing.values():
            outgoing.wait()
        alive.outgoing.clear()
        state.ready = self._clock.now()
        for value, gradient in arrived.items():
            if alive.sent[value].requires_grad:
                roots.append(alive.sent[value])
                gradients.append(gradient)
        if roots:
            run_backward(roots, gradients)
        for value, source in plan.receives:
            leaf = alive.leaves[value]
            if work.flow.tape.flow.values[value].requires_grad and leaf.grad is not None:
                state.local[(source, action.stage, action.micro_batch, value, True)] = leaf.grad

    def _factor(self, factor: float, loss: torch.Tensor) -> torch.Tensor:
        """The gradient of the mean loss by the loss of a micro-batch; few differ, so they are kept."""
        known = self._factors.get((factor, loss.dtype))
        if known is None or known.shape != loss.shape:
            self._factors.clear()
            known = self._factors[(factor, loss.dtype)] = torch.full_like(loss, factor)
        return known

    def _arrived_gradients(self, state: _State, work: Work, plan: Any, action: Action) -> Mapping[int, torch.Tensor]:
        sums: dict[int, torch.Tensor] = {}
        for value, target in plan.sends:
            if not work.flow.tape.flow.values[value].requires_grad:
                continue
            key = (action.stage, target, action.micro_batch, value, True)
            if self.rank_of_stage[target] == self.rank:
                gradient = state.local.pop(key, None)
            else:
                gradient = state.incoming.pop(key).wait()
            if gradient is not None:
                sums[value] = sums[value] + gradient if value in sums else gradient
        return sums


def _detached(tensors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {value: tensor.detach() for value, tensor in tensors.items()}


def _copies(leaves: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """For a forward that may write into what it is given."""
    return {value: leaf.detach().clone().requires_grad_(leaf.requires_grad) for value, leaf in leaves.items()}


def _expected(flow: Flow, value: int, gradient: bool, where: str) -> Expected:
    stand_in = flow.tape.stand_ins[value]
    dealt = flow.dealt.shape(value)
    strides = tuple(stand_in.stride() if dealt is None else torch.empty(dealt, device="meta").stride())
    return Expected(
        what=f"{'the gradient of ' if gradient else ''}{stand_in.what} on {where}",
        check=(flow.digest + value * 2 + gradient) & (2**62 - 1),
        shape=tuple(stand_in.shape) if dealt is None else dealt,
        strides=tuple(stride or 1 for stride in strides) if gradient else strides,  # a gradient is never broadcast
        dtype=stand_in.dtype,
    )


def _crossing(flow: Flow, first: int, second: int, gradient: bool) -> list[int]:
    """The values on the edge first -> second; for gradients, those that have one."""
    values = flow.tape.flow.values
    return [
        value
        for value, target in flow.cut.stages[first].sends
        if target == second and (not gradient or values[value].requires_grad)
    ]
