"""The ranks, links and queues of one simulation, and the rows of a schedule as steps on them. Runs nothing.

It knows who reads what from whom on the graph of stages, and what everything costs.
"""

from __future__ import annotations

from shardwise.schedule.actions import Action, Kind, StageAction, StageKind, Transfer, TransferKind
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges, predecessors, successors
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.steps import (
    BESIDE,
    COMPUTE,
    NEVER,
    RECV,
    SEND,
    Aside,
    Input,
    Link,
    Queue,
    Route,
    Steps,
    Times,
    Work,
)
from shardwise.schedule.transfers import Planned, Row

__all__ = ["World"]


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
