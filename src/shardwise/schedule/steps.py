"""What the simulator runs: the rows of a schedule as steps that hold all that an item needs.

    COMPUTE  an action: the times its inputs are ready, its seconds, the time it notes   [each by micro-batch]
    BESIDE   what runs beside the work: a queue of the rank instead of the rank itself
    SEND, RECV  the two ends of a transfer: its route

Actions of one kind on one stage share one work, so a step is three small things and makes no object of its own. It knows
neither order nor clocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shardwise.schedule.actions import Action, Kind, StageAction, StageKind, Transfer, TransferKind
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges, predecessors, successors
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.transfers import Planned, Row

__all__ = ["BESIDE", "COMPUTE", "RECV", "SEND", "Input", "Steps", "World", "transfer_of"]

COMPUTE, BESIDE, SEND, RECV = range(4)
NEVER = -1.0
Times = list[float]  # [micro_batch]: seconds, or NEVER


@dataclass(kw_only=True, slots=True)
class Steps:
    """The row of one rank, in columns: code, micro-batch, and its Work, Aside or Route."""

    codes: list[int] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    whats: list[Any] = field(default_factory=list)

    def add(self, code: int, micro_batch: int, what: Work | Aside | Route) -> None:
        """Appends one step."""
        self.codes.append(code)
        self.micro_batches.append(micro_batch)
        self.whats.append(what)


@dataclass(kw_only=True, slots=True)
class Link:
    """What travels from one rank to another; the n-th send meets the n-th receive."""

    sender: int
    receiver: int
    sent: list[int] = field(default_factory=list)  # micro-batches
    routes: list[Route] = field(default_factory=list)  # their ways
    sent_s: list[float] = field(default_factory=list)
    posted_s: list[float] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)  # of what has arrived
    ends_s: list[float] = field(default_factory=list)
    free_s: float = 0.0

    def deliver(self) -> None:
        """Lets the next value arrive, which is both sent and posted."""
        place = len(self.starts_s)
        m, route = self.sent[place], self.routes[place]
        start_s = max(self.sent_s[place], self.posted_s[place], self.free_s)
        self.free_s = route.arrived_s[m] = start_s + route.seconds[m]
        self.starts_s.append(start_s)
        self.ends_s.append(self.free_s)


@dataclass(kw_only=True, slots=True)
class Route:
    """The way of one kind of value from stage `source` to `target` on a link."""

    source: int
    target: int
    link: Link
    seconds: list[float]  # [micro_batch]
    arrived_s: Times


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One value that an action reads: when it is there, and the stage that makes it, forward or backward."""

    ready_s: Times
    stage: int
    forward: bool


class Work(NamedTuple):
    """All actions of one kind on one stage."""

    inputs: tuple[Times, ...]
    seconds: list[float]
    output: Times


@dataclass(kw_only=True, slots=True)
class Queue:
    """What a rank does beside its work, one after another: on the way to the host, back, or to other replicas."""

    free_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class Aside:
    """All actions of one kind on one stage that run beside the work of its rank."""

    queue: Queue
    seconds: list[float]
    after_s: Times | None  # what must have ended
    output: Times
    whole_stage: bool  # it is there for all micro-batches at once

    def enter(self, m: int, now_s: float) -> tuple[float, float]:
        """Queues one of them at `now_s`; returns its start and end."""
        start_s = max(now_s, self.queue.free_s, self.after_s[m] if self.after_s is not None else 0.0)
        self.queue.free_s = end_s = start_s + self.seconds[m]
        if self.whole_stage:
            self.output[:] = [end_s] * len(self.output)
        else:
            self.output[m] = end_s
        return start_s, end_s


class World:
    """The ranks, links and queues of one run, and who reads what from whom."""

    def __init__(self, schedule: Schedule, edges: Edges, costs: Costs) -> None:
        self.schedule = schedule
        self.owners = schedule.owners
        self.costs = costs
        self.factors = costs.micro_batch_factors or (1.0,) * schedule.num_micro_batches
        self.links: dict[tuple[int, int], Link] = {}
        self.routes: dict[tuple[int, int], Route] = {}
        self.queues: dict[tuple[int, str], Queue] = {}
        used = {action.kind for row in schedule.actions for action in row}
        stages = range(schedule.num_stages)
        self.forward_s, self.backward_s, scratch = ([self._times(NEVER) for _ in stages] for _ in range(3))
        self.loaded_s = [self._times(0.0) for _ in stages]  # on the device unless it was moved away
        self.offloaded_s = [self._times(0.0) for _ in stages]
        self.gathered_s = [self._times(0.0) for _ in stages]  # and gathered unless it is sharded
        self.outputs = {Kind.F: self.forward_s, Kind.B: self.backward_s, Kind.I: self.backward_s}
        self.inputs = self._connect(edges)
        self.work = {
            kind: [
                Work(
                    (
                        *(value.ready_s for value in self.inputs[kind][s]),
                        *([self.loaded_s[s]] if Kind.L in used and kind in (Kind.B, Kind.I, Kind.C) else []),
                        *([self.gathered_s[s]] if StageKind.U in used else []),
                    ),
                    self._scaled(costs.of(kind, schedule.num_stages)[s]),
                    self.outputs.get(kind, scratch)[s],
                )
                for s in stages
            ]
            for kind in Kind
            if kind.computes and kind in used
        }
        self.asides = {kind: [self._aside(kind, s) for s in stages] for kind in used if kind not in self.work}

    def planned_steps(self, plan: Planned) -> list[Steps]:
        """The steps of the schedule with the transfers of `plan`."""
        routes = [self.routes[route] for route in plan.routes]
        return [self._planned_row(plan, r, routes) for r in range(self.schedule.num_ranks)]

    def _planned_row(self, plan: Planned, rank: int, routes: list[Route]) -> Steps:
        steps, work, num_micro_batches = Steps(), self.work, self.schedule.num_micro_batches
        add, posted, at, place = steps.add, plan.posted[rank], [*plan.posted_at[rank], -1], 0
        for index, action in enumerate(self.schedule.actions[rank]):
            while at[place] == index:
                route, m = divmod(posted[place], num_micro_batches)
                add(RECV, m, routes[route])
                place += 1
            if isinstance(action, Action) and action.kind in work:
                kind, s, m = action.kind, action.stage, action.micro_batch
                add(COMPUTE, m, work[kind][s])
                for route in plan.routes_of[kind][s]:
                    add(SEND, m, routes[route])
            else:
                self._add_beside(steps, action)
        return steps

    def steps_of(self, rows: tuple[Row, ...]) -> list[Steps]:
        """The steps of rows that hold their transfers."""
        return [self._row(row) for row in rows]

    def _row(self, row: Row) -> Steps:
        steps = Steps()
        for item in row:
            if isinstance(item, Transfer):
                code = SEND if item.kind is TransferKind.SEND else RECV
                steps.add(code, item.micro_batch, self.routes[item.source, item.target])
            elif isinstance(item, Action) and item.kind in self.work:
                steps.add(COMPUTE, item.micro_batch, self.work[item.kind][item.stage])
            else:
                self._add_beside(steps, item)
        return steps

    def _add_beside(self, steps: Steps, item: Action | StageAction) -> None:
        m = item.micro_batch if isinstance(item, Action) else 0
        steps.add(BESIDE, m, self.asides[item.kind][item.stage])

    def _connect(self, edges: Edges) -> dict[Kind, list[list[Input]]]:
        stages = range(self.schedule.num_stages)
        below, above = predecessors(edges, len(stages)), successors(edges, len(stages))
        own_forward = [Input(ready_s=self.forward_s[s], stage=s, forward=True) for s in stages]
        own_backward = [Input(ready_s=self.backward_s[s], stage=s, forward=False) for s in stages]
        activations = [[self._value(t, s, forward=True) for t in below[s]] for s in stages]
        gradients = [[own_forward[s], *(self._value(t, s, forward=False) for t in above[s])] for s in stages]
        return {
            Kind.F: activations,
            Kind.B: gradients,
            Kind.I: gradients,
            Kind.W: [[b] for b in own_backward],
            Kind.C: [[f] for f in own_forward],
        }

    def _value(self, source: int, target: int, *, forward: bool) -> Input:
        sender, receiver = self.owners[source], self.owners[target]
        made_s = (self.forward_s if forward else self.backward_s)[source]
        if sender == receiver:
            return Input(ready_s=made_s, stage=source, forward=forward)
        link = self.links.setdefault((sender, receiver), Link(sender=sender, receiver=receiver))
        priced = self.costs.activation_seconds if forward else self.costs.gradient_seconds
        edge = (source, target) if forward else (target, source)
        self.routes[source, target] = route = Route(
            source=source,
            target=target,
            link=link,
            seconds=self._scaled(priced.get(edge, 0.0)),
            arrived_s=self._times(NEVER),
        )
        return Input(ready_s=route.arrived_s, stage=source, forward=forward)

    def _aside(self, kind: Kind | StageKind, stage: int) -> Aside:
        whole_stage = isinstance(kind, StageKind)
        queue = self.queues.setdefault((self.owners[stage], "replicas" if whole_stage else kind), Queue())
        seconds = self.costs.of(kind, self.schedule.num_stages)[stage]
        if kind is Kind.L:
            after_s, output = self.offloaded_s[stage], self.loaded_s[stage]
        elif kind is Kind.O:
            after_s, output = None, self.offloaded_s[stage]
        else:
            after_s, output = None, self.gathered_s[stage] if kind is StageKind.U else [0.0]
        return Aside(
            queue=queue,
            seconds=[seconds] if whole_stage else self._scaled(seconds),
            after_s=after_s,
            output=output,
            whole_stage=whole_stage,
        )

    def _times(self, seconds: float) -> Times:
        return [seconds] * self.schedule.num_micro_batches

    def _scaled(self, seconds: float) -> list[float]:
        return [seconds * factor for factor in self.factors]


def transfer_of(route: Route, micro_batch: int) -> Transfer:
    """The send of one micro-batch on a route."""
    return Transfer(
        kind=TransferKind.SEND,
        source=route.source,
        target=route.target,
        micro_batch=micro_batch,
        gradient=route.source > route.target,
    )
