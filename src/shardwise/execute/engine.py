"""The executor: interprets one rank's actions for one step. Knows neither layouts nor optimizers.

It is given rows of actions and transfers, and for every micro-batch a flow; it runs forwards and backwards (whole, or
inputs first and weights later), posts receives where the row says, and hands values between two stages of one rank
without a send. Whoever waits for gradients is told by it when those of a stage are final.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.comm.buffers import ReceiveBuffers
from shardwise.comm.point_to_point import Transport, receive, send
from shardwise.execute.action_table import (
    Backward,
    Forward,
    Move,
    Post,
    Reduce,
    SendGradients,
    SendValues,
    Table,
    Weights,
)
from shardwise.execute.around import Around
from shardwise.execute.backward import run_backward
from shardwise.execute.deferred import Deferred
from shardwise.execute.moments import Moments, clock_of
from shardwise.execute.offload import Offloads
from shardwise.execute.repetition import Repetition
from shardwise.execute.resolve import Keys, resolve
from shardwise.execute.row_plan import Item, Op, RowPlan, plan_of
from shardwise.execute.stage_forward import Seen, StageForward
from shardwise.execute.step_state import Alive, Gathered, StepState, UnderWay, Waiting, Work
from shardwise.execute.weight_sums import WeightSums
from shardwise.schedule.actions import Action
from shardwise.trace.install import Switch
from shardwise.trace.objective import LossFunction

_TABLES = 64  # kept of an engine

__all__ = ["Engine"]


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
        around: Around | None = None,
        offloads: Offloads | None = None,
        parameters: Gathered | None = None,
        copies: int = 1,
    ) -> None:
        self._parameters = parameters
        self._copies = copies  # ranks that compute the same loss of their own tokens: they differentiate its mean
        self.model = model
        self.rank = rank
        self.rank_of_stage = tuple(rank_of_stage)
        self._stage_forward = StageForward(model, switch=switch, loss=loss, around=around or Around())
        self.transport = transport
        self._sums = sums or WeightSums()
        self._offloads = offloads  # where a schedule moves what forwards keep
        self.device = device
        self._clock = clock_of(device)
        self._keys = Keys()
        self._tables: dict[tuple[int, ...], Table] = {}
        self._buffers = ReceiveBuffers() if device.type == "cpu" else None
        self._factors: dict[tuple[float, torch.dtype], torch.Tensor] = {}
        self._plans: dict[int, tuple[Sequence[Item], RowPlan]] = {}
        self._repetition = Repetition(model)
        self._repeating = repeating  # around a forward that is run again: it counts once
        self._run_entry: Mapping[Op, Callable[[StepState, Any], None]] = {
            Op.POST: self._post,
            Op.SEND_VALUES: self._send_values,
            Op.SEND_GRADIENTS: self._send_gradients,
            Op.REDUCE: self._reduce,
            Op.UNSHARD: self._unshard,
            Op.RESHARD: self._reshard,
            Op.FORWARD: self._forward,
            Op.FORWARD_TWICE: self._forward,
            Op.AGAIN: self._again,
            Op.OFFLOAD: self._offload,
            Op.LOAD: self._load,
            Op.BACKWARD: self._whole_backward,
            Op.INPUTS: self._backward_of_inputs,
            Op.WEIGHTS: self._weights,
            Op.DONE: _nothing,
        }

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
        table = self._table(row, works)
        kept = under_way or UnderWay()
        state = StepState(works, gradients, kept.alive, kept.incoming, kept.local, kept.losses)
        if gradients is not None:
            gradients.begin(table.plan.order)
        now = self._clock.now
        marks: list[Any] = []  # start, inputs ready, end of every action
        # one gradient is no sum
        with self._sums.running(sums=len(works) > 1, splits=table.plan.splits), self._stage_forward.surroundings.open():
            for run, entry, action, is_last_forward in table.entries:
                if action is None:
                    run(state, entry)
                    continue
                if before_action is not None:
                    before_action(action)
                start = state.ready = now()
                run(state, entry)
                if is_last_forward and after_last_forward is not None:
                    after_last_forward(state.losses)
                marks += start, state.ready, now()
        sent = state.outgoing
        if under_way is not None:  # waited for behind the next row: who receives it may be behind in this one
            sent, under_way.outgoing = under_way.outgoing, sent
        for outgoing in sent:
            outgoing.wait()
        if self._buffers is not None:
            self._buffers.end_step()
        return state.losses, Moments(self._clock, table.actions, marks)

    @contextlib.contextmanager
    def showing(self, seen: Seen | None) -> Iterator[None]:
        """Inside the block `seen` is shown the outputs of every micro-batch whose loss is computed here."""
        self._stage_forward.seen = seen
        try:
            yield
        finally:
            self._stage_forward.seen = None

    def whole(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` runs of a model that is one stage, with what stands around its units."""
        with self._stage_forward.surroundings.open():
            return self._stage_forward.whole(compute)

    def plan_of(self, row: Sequence[Item]) -> RowPlan:
        """What the items of a row ask for; rows are kept, so that it is found once. Raises `DataflowError`."""
        known = self._plans.get(id(row))
        if known is None:
            known = self._plans[id(row)] = row, plan_of(row)
        return known[1]

    def _table(self, row: Sequence[Item], works: Sequence[Work]) -> Table:
        """The row, resolved for the flows of these micro-batches; the same in every step that looks the same."""
        grad = torch.is_grad_enabled()
        known = (id(row), grad, *(id(work.flow) for work in works))
        table = self._tables.get(known)
        if table is None:
            if len(self._tables) >= _TABLES:  # layers are dropped at random: hardly a step is like another
                self._tables.clear()
            table = self._tables[known] = resolve(
                self.plan_of(row),
                [work.flow for work in works],
                run=self._run_entry,
                rank=self.rank,
                rank_of_stage=self.rank_of_stage,
                keys=self._keys,
                grad=grad,
            )
        return table

    # -- transfers ------------------------------------------------------------------------------

    def _post(self, state: StepState, post: Post) -> None:
        headers = state.works[post.micro_batch].headers
        for message in post.messages:
            state.incoming[message.key] = receive(
                self.transport,
                message.expected,
                message.peer,
                device=self.device,
                headers=headers,
                buffers=self._buffers,
            )

    def _send_values(self, state: StepState, sending: SendValues) -> None:
        headers = state.works[sending.micro_batch].headers
        alive = state.alive[sending.forward]
        for message in sending.messages:
            tensor = alive.sent[message.value]
            outgoing = send(self.transport, tensor, message.expected, message.peer, headers=headers)
            (alive.outgoing if message.confirmed else state.outgoing).append(outgoing)

    def _send_gradients(self, state: StepState, sending: SendGradients) -> None:
        headers = state.works[sending.micro_batch].headers
        for message in sending.messages:
            expected = message.expected
            tensor = state.local.pop(message.key, None)
            if tensor is None:
                tensor = torch.zeros(expected.shape, dtype=expected.dtype, device=self.device)
            state.outgoing.append(send(self.transport, tensor, expected, message.peer, headers=headers))

    # -- forward and backward -------------------------------------------------------------------

    def _forward(self, state: StepState, forward: Forward) -> None:
        m = forward.action.micro_batch
        work = state.works[m]
        leaves: dict[int, torch.Tensor] = {}
        for arrival in forward.inputs:
            key = arrival.key
            leaf = state.local.pop(key).clone() if arrival.local else state.incoming.pop(key).wait()
            leaves[arrival.value] = leaf.requires_grad_() if arrival.differentiable else leaf
        state.ready = self._clock.now()
        if forward.idle:
            state.alive[forward.key] = Alive({}, leaves, None)
            return
        if forward.twice:
            # with a graph, which is freed at once: so both runs take the same path
            given = _copies(leaves) if forward.table.writes else leaves
            with self._repetition.first((work.flow.digest, forward.action.stage)) as written:
                sent, loss = self._stage_forward.of(work, forward, given)
            alive = Alive(_detached(sent), leaves, None, written=written)
        else:
            moves = forward.moves and self._offloads is not None
            with self._offloads.keeping(forward.key) if moves else contextlib.nullcontext():  # type: ignore[union-attr]
                sent, loss = self._stage_forward.of(work, forward, leaves)
            alive = Alive(sent, leaves, loss) if torch.is_grad_enabled() else Alive(_detached(sent), {}, None)
        state.alive[forward.key] = alive
        if loss is not None:
            state.losses[m] = loss.detach()
        for value, key in forward.handed:
            state.local[key] = sent[value].detach()

    def _offload(self, state: StepState, move: Move) -> None:
        if self._offloads is not None:
            self._offloads.put(move.key)

    def _load(self, state: StepState, move: Move) -> None:
        if self._offloads is not None:
            self._offloads.bring(move.key)

    def _again(self, state: StepState, forward: Forward) -> None:
        """The forward once more, of which all is kept; it sends nothing."""
        alive = state.alive[forward.key]
        if forward.idle:
            return
        with self._repetition.again(alive.written), self._repeating():
            alive.sent, alive.loss = self._stage_forward.of(
                state.works[forward.action.micro_batch], forward, alive.leaves
            )
        alive.written = ()

    def _whole_backward(self, state: StepState, backward: Backward) -> None:
        stage = backward.action.stage
        if backward.ends and state.gradients is not None:
            with state.gradients.during(stage) as begins:  # autograd's hooks tell of gradients that it accumulates
                self._backward(state, backward, begins)
            state.gradients.end(stage)
            return
        with self._sums.adding(True):
            self._backward(state, backward)

    def _backward_of_inputs(self, state: StepState, backward: Backward) -> None:
        state.deferred[backward.key] = Deferred()
        with self._sums.deferring(state.deferred[backward.key]):
            self._backward(state, backward)

    def _weights(self, state: StepState, weights: Weights) -> None:
        queue = state.deferred.pop(weights.key)
        if weights.ends and state.gradients is not None:
            state.gradients.end(weights.action.stage, but=queue.parameters)
            queue.run(state.gradients.final)
        else:
            queue.run()

    def _unshard(self, state: StepState, stage: Reduce) -> None:
        if self._parameters is not None:
            self._parameters.unshard(stage.stage)

    def _reshard(self, state: StepState, stage: Reduce) -> None:
        if self._parameters is not None:
            self._parameters.reshard(stage.stage)

    def _reduce(self, state: StepState, reduce: Reduce) -> None:
        if state.gradients is not None:
            state.gradients.end(reduce.stage)

    def _backward(
        self, state: StepState, backward: Backward, begins: Callable[[torch.Tensor], None] | None = None
    ) -> None:
        alive = state.alive.pop(backward.key)
        roots: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        if alive.loss is not None and alive.loss.requires_grad:
            roots.append(alive.loss)
            gradients.append(self._factor(state.works[backward.action.micro_batch].factor / self._copies, alive.loss))
        arrived: dict[int, torch.Tensor] = {}
        for arrival in backward.gradients:
            if arrival.local:
                gradient = state.local.pop(arrival.key, None)
                if gradient is None:
                    continue
            else:
                gradient = state.incoming.pop(arrival.key).wait()
            value = arrival.value
            arrived[value] = arrived[value] + gradient if value in arrived else gradient
        for outgoing in alive.outgoing:
            outgoing.wait()
        alive.outgoing.clear()
        state.ready = self._clock.now()
        for value, gradient in arrived.items():
            if alive.sent[value].requires_grad:
                roots.append(alive.sent[value])
                gradients.append(gradient)
        if roots:
            for root in roots if begins is not None else ():  # one of them runs first
                if root.grad_fn is not None:
                    root.register_hook(begins)  # type: ignore[no-untyped-call]
            run_backward(roots, gradients)
        for value, key in backward.made:
            gradient = alive.leaves[value].grad
            if gradient is not None:
                state.local[key] = gradient

    def _factor(self, factor: float, loss: torch.Tensor) -> torch.Tensor:
        """The gradient of the mean loss by the loss of a micro-batch; few differ, so they are kept."""
        known = self._factors.get((factor, loss.dtype))
        if known is None or known.shape != loss.shape:
            self._factors.clear()
            known = self._factors[(factor, loss.dtype)] = torch.full_like(loss, factor)
        return known


def _nothing(state: StepState, entry: object) -> None:
    """A second half that was run with the first."""


def _detached(tensors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {value: tensor.detach() for value, tensor in tensors.items()}


def _copies(leaves: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """For a forward that may write into what it is given."""
    return {value: leaf.detach().clone().requires_grad_(leaf.requires_grad) for value, leaf in leaves.items()}
