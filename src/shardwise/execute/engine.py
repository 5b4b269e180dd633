"""The executor: interprets one rank's actions for one step. Knows neither layouts nor optimizers.

It is given rows of actions and transfers, and for every micro-batch a flow; it runs forwards and backwards, posts
receives where the row says, and hands values between two stages of one rank without a send.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.comm.point_to_point import Expected, Incoming, Outgoing, Transport, receive, send
from shardwise.errors import DataflowError
from shardwise.execute.backward import run_backward
from shardwise.execute.batches import MicroBatch
from shardwise.execute.flows import Flow
from shardwise.execute.stage import StageRun, Surroundings
from shardwise.execute.weight_sums import WeightSums
from shardwise.schedule.actions import Action, Kind, Transfer, TransferKind
from shardwise.trace.capture import own
from shardwise.trace.install import Switch
from shardwise.trace.objective import LossFunction, objective
from shardwise.trace.randomness import Scope

__all__ = ["Engine", "Moment", "Work"]


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """When an action ran on this rank; seconds of the monotonic clock."""

    action: Action
    start_s: float
    end_s: float


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


@dataclasses.dataclass(slots=True)
class _State:
    """What is under way in one step."""

    works: Sequence[Work]
    alive: dict[tuple[int, int], _Alive] = dataclasses.field(default_factory=dict)
    incoming: dict[tuple[int, int, int, int, bool], Incoming] = dataclasses.field(default_factory=dict)
    local: dict[tuple[int, int, int, int, bool], torch.Tensor] = dataclasses.field(default_factory=dict)
    gradients: dict[tuple[int, int], dict[tuple[int, int], torch.Tensor]] = dataclasses.field(default_factory=dict)
    outgoing: list[Outgoing] = dataclasses.field(default_factory=list)
    losses: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    moments: list[Moment] = dataclasses.field(default_factory=list)


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
        self._modules = dict(model.named_modules())
        self._messages: dict[tuple[int, TransferKind, int, int, int, bool], list[_Message]] = {}
        self._factors: dict[tuple[float, torch.dtype], torch.Tensor] = {}

    def run(
        self,
        row: Sequence[Action | Transfer],
        works: Sequence[Work],
        *,
        before_last_backward: Callable[[int], None] | None = None,
        after_last_forward: Callable[[Mapping[int, torch.Tensor]], None] | None = None,
    ) -> tuple[dict[int, torch.Tensor], list[Moment]]:
        """Interpret `row`. Returns the losses of the micro-batches whose loss stage is here (unweighted, detached),
        and when every action ran. Gradients accumulate in the parameters. `after_last_forward` is given the losses once
        they are all known, `before_last_backward` the stage.

        Raises `TransferError` and `DataflowError`.
        """
        state = _State(works)
        last = {action.stage: i for i, action in enumerate(row) if isinstance(action, Action) and action.kind is Kind.B}
        last_forward = max(
            (i for i, action in enumerate(row) if isinstance(action, Action) and action.kind is Kind.F), default=-1
        )
        summing = self._sums.running() if len(works) > 1 else contextlib.nullcontext()  # one gradient is no sum
        with summing, self._surroundings.open():
            for position, action in enumerate(row):
                if isinstance(action, Transfer):
                    self._transfer(state, action)
                    continue
                start = time.perf_counter()
                if action.kind is Kind.F:
                    self._forward(state, action)
                    if after_last_forward is not None and position == last_forward:
                        after_last_forward(state.losses)
                elif action.kind is Kind.B:
                    final = before_last_backward is not None and last[action.stage] == position
                    if final and before_last_backward is not None:
                        before_last_backward(action.stage)
                    self._sums.adds = not final  # who waits for gradients is told of them by autograd
                    try:
                        self._backward(state, action)
                    finally:
                        self._sums.adds = False
                else:
                    raise DataflowError(f"this executor runs F and B; it was given {action}")
                state.moments.append(Moment(action, start, time.perf_counter()))
        for outgoing in state.outgoing:
            outgoing.wait()
        return state.losses, state.moments

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

    def _forward(self, state: _State, action: Action) -> None:
        work = state.works[action.micro_batch]
        plan = work.flow.cut.stages[action.stage]
        values = work.flow.tape.flow.values
        leaves: dict[int, torch.Tensor] = {}
        for value, source in plan.receives:
            leaf = self._arrived(state, source, action, value)
            leaves[value] = leaf.requires_grad_() if values[value].requires_grad and torch.is_grad_enabled() else leaf
        if not plan.computes and action.stage != work.flow.cut.loss_stage:  # a stage whose layers are all dropped
            state.alive[(action.stage, action.micro_batch)] = _Alive({}, leaves, None)
            return
        inputs = own(work.micro_batch.inputs) if work.flow.writes_batch else work.micro_batch.inputs
        if len(work.flow.cut.stages) == 1 and not work.flow.random and not work.headers:
            loss: torch.Tensor | None = objective(self.model, inputs, self._loss)
            sent: dict[int, torch.Tensor] = {}
        else:
            run = StageRun(
                tape=work.flow.tape,
                cut=plan,
                table=work.flow.tables[action.stage],
                modules=self._modules,
                received=leaves,
                dealt=work.flow.dealt,
                scope=work.scope,
                checked=work.headers,
            )
            loss = run.forward(lambda: objective(self.model, inputs, self._loss), self._switch, self._surroundings)
            sent = run.sent
        if action.stage == work.flow.cut.loss_stage:
            assert loss is not None
            state.losses[action.micro_batch] = loss.detach()
        else:
            loss = None
        if torch.is_grad_enabled():
            state.alive[(action.stage, action.micro_batch)] = _Alive(sent, leaves, loss)
        else:
            state.alive[(action.stage, action.micro_batch)] = _Alive({v: t.detach() for v, t in sent.items()}, {}, None)
        for value, target in plan.sends:
            if self.rank_of_stage[target] == self.rank:
                state.local[(action.stage, target, action.micro_batch, value, False)] = sent[value].detach()

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
