"""Resolves the row of one rank for the flows of its micro-batches, once: see `action_table`.

Which peer, which values, which of them have a gradient, what is handed to another stage of this rank. Knows flows,
stages and ranks; runs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardwise.comm.point_to_point import Expected
from shardwise.execute.action_table import (
    Arrival,
    Backward,
    Done,
    Entry,
    Forward,
    Message,
    Move,
    Post,
    Reduce,
    SendGradients,
    SendValues,
    Table,
    Weights,
)
from shardwise.execute.flows import Flow
from shardwise.execute.row_plan import Op, RowPlan, Step
from shardwise.schedule.actions import Action, StageAction, Transfer, TransferKind

__all__ = ["Keys", "resolve"]


class Keys:
    """Numbers for what is under way, and messages: the same in every table that is resolved with them."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self.messages: dict[object, tuple[Message, ...]] = {}

    def forward(self, stage: int, micro_batch: int) -> int:
        """Of a forward whose backward has not run."""
        return self._number((stage, micro_batch))

    def value(self, first: int, second: int, micro_batch: int, value: int, gradient: bool) -> int:
        """Of a value, or its gradient, on the edge first -> second."""
        return self._number((first, second, micro_batch, value, gradient))

    def _number(self, what: object) -> int:
        return self._numbers.setdefault(what, len(self._numbers))


def resolve(
    plan: RowPlan,
    flows: Sequence[Flow],
    *,
    run: Mapping[Op, Callable[[Any, Any], None]],
    rank: int,
    rank_of_stage: Sequence[int],
    keys: Keys,
    grad: bool,
) -> Table:
    """`flows` of the micro-batches, in order; `run` says who runs an entry, `rank_of_stage` are global ranks. `grad`:
    whether there are gradients."""
    moved = frozenset(
        (step.item.stage, step.item.micro_batch)
        for step in plan.steps
        if isinstance(step.item, Action) and step.op is Op.OFFLOAD
    )
    made = _Resolver(tuple(flows), rank, rank_of_stage, keys, grad, moved)
    timed = [step.item if step.op not in (Op.OFFLOAD, Op.LOAD) else None for step in plan.steps]
    actions = tuple(item for item in timed if isinstance(item, Action))
    return Table(
        plan=plan,
        entries=tuple(
            (run[step.op], made.entry(step), item if isinstance(item, Action) else None, step.last_forward)
            for step, item in zip(plan.steps, timed, strict=True)
        ),
        actions=actions,
        flows=made.flows,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Resolver:
    flows: tuple[Flow, ...]
    rank: int
    rank_of_stage: Sequence[int]
    keys: Keys
    grad: bool
    moved: frozenset[tuple[int, int]]  # stages and micro-batches of which something goes to the host

    def entry(self, step: Step) -> Entry:
        item = step.item
        if isinstance(item, StageAction):
            return Reduce(item.stage)
        if isinstance(item, Transfer):
            return self._transfer(item)
        if step.op is Op.DONE:
            return Done(item)
        if step.op in (Op.OFFLOAD, Op.LOAD):
            return Move(self.keys.forward(item.stage, item.micro_batch))
        if step.op is Op.WEIGHTS:
            return Weights(item, self.keys.forward(item.stage, item.micro_batch), step.ends)
        if step.op in (Op.BACKWARD, Op.INPUTS):
            return self._backward(item, step.ends)
        return self._forward(item, twice=step.op is Op.FORWARD_TWICE)

    def _forward(self, action: Action, *, twice: bool) -> Forward:
        s, m = action.stage, action.micro_batch
        flow = self.flows[m]
        stage = flow.cut.stages[s]
        has_loss = s == flow.cut.loss_stage
        return Forward(
            action=action,
            key=self.keys.forward(s, m),
            stage=stage,
            table=flow.tables[s],
            idle=not stage.computes and not has_loss,
            has_loss=has_loss,
            twice=twice and self.grad,
            moves=(s, m) in self.moved and self.grad,
            inputs=tuple(
                Arrival(
                    value,
                    self.keys.value(source, s, m, value, False),
                    local=self.rank_of_stage[source] == self.rank,
                    differentiable=self.grad and self._differentiable(flow, value),
                )
                for value, source in stage.receives
            ),
            handed=tuple(
                (value, self.keys.value(s, target, m, value, False))
                for value, target in stage.sends
                if self.rank_of_stage[target] == self.rank
            ),
        )

    def _backward(self, action: Action, ends: bool) -> Backward:
        s, m = action.stage, action.micro_batch
        flow = self.flows[m]
        stage = flow.cut.stages[s]
        return Backward(
            action=action,
            key=self.keys.forward(s, m),
            ends=ends,
            gradients=tuple(
                Arrival(
                    value,
                    self.keys.value(s, target, m, value, True),
                    local=self.rank_of_stage[target] == self.rank,
                    differentiable=True,
                )
                for value, target in stage.sends
                if self._differentiable(flow, value)
            ),
            made=tuple(
                (value, self.keys.value(source, s, m, value, True))
                for value, source in stage.receives
                if self._differentiable(flow, value)
            ),
        )

    def _transfer(self, transfer: Transfer) -> Post | SendValues | SendGradients:
        m = transfer.micro_batch
        messages = self._messages(transfer)
        if transfer.kind is TransferKind.RECV:
            return Post(m, messages)
        if transfer.gradient:
            return SendGradients(m, messages)
        return SendValues(m, self.keys.forward(transfer.source, m), messages)

    def _messages(self, transfer: Transfer) -> tuple[Message, ...]:
        known = (self.flows[transfer.micro_batch].digest, transfer, self.grad)
        messages = self.keys.messages.get(known)
        if messages is None:
            messages = self.keys.messages[known] = self._new_messages(transfer)
        return messages

    def _new_messages(self, transfer: Transfer) -> tuple[Message, ...]:
        flow, m, gradient = self.flows[transfer.micro_batch], transfer.micro_batch, transfer.gradient
        first, second = transfer.edge  # as the forward has it
        where = f"edge stage {first} -> stage {second}, micro-batch {m}"
        peer = self.rank_of_stage[transfer.source if transfer.kind is TransferKind.RECV else transfer.target]
        return tuple(
            Message(
                value=value,
                key=self.keys.value(first, second, m, value, gradient),
                expected=_expected(flow, value, gradient, where),
                peer=peer,
                confirmed=self.grad and not gradient and self._differentiable(flow, value),
            )
            for value, target in flow.cut.stages[first].sends
            if target == second and (not gradient or self._differentiable(flow, value))
        )

    def _differentiable(self, flow: Flow, value: int) -> bool:
        return flow.tape.flow.values[value].requires_grad


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
