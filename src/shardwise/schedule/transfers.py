"""The pass that adds sends and receives to a schedule. It knows who owns what, and neither bytes nor time.

A SEND stands right behind the action that makes its value: activations behind F, gradients behind B or I. A
RECV stands `prefetch` own actions ahead of its consumer, so that it is posted before the value arrives; all
are asynchronous, a rank waits only at the consumer. On each link (sender rank, receiver rank) the RECVs stand
in the order of the SENDs, which NCCL needs: where consumers come in another order, RECVs move further ahead,
never back.

Only one direction is ordered so. Seen from both ends, a RECV may well stand ahead of a SEND to the same peer
on both ranks; a transport that works through one queue a pair must give each direction its own (for NCCL, its
own group).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NoReturn

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, StageAction, Transfer, TransferKind
from shardwise.schedule.graph import Edges, checked, predecessors, successors
from shardwise.schedule.schedule import Schedule

__all__ = ["DEFAULT_PREFETCH", "Link", "Planned", "Row", "planned", "readers", "with_transfers"]

Row = tuple[Action | StageAction | Transfer, ...]
Link = tuple[int, int]  # (sender rank, receiver rank)
Targets = dict[Kind, tuple[tuple[int, ...], ...]]  # [kind][stage]: stages
DEFAULT_PREFETCH = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """All transfers of a schedule, as numbers, before they are written out.

    A route is a pair of stages on two ranks, (source, target); a value is route * num_micro_batches + micro-batch.
    routes_of[kind][stage]: the routes on which the value that such an action makes is sent, right behind it.
    posted[r]: the values that rank r receives, in the order in which it posts them; posted_at[r]: ahead of which of its
    actions, ascending.
    """

    routes: tuple[tuple[int, int], ...]
    routes_of: Mapping[Kind, tuple[tuple[int, ...], ...]]
    posted: tuple[list[int], ...]
    posted_at: tuple[list[int], ...]


def with_transfers(
    schedule: Schedule, edges: Edges | None = None, *, prefetch: int = DEFAULT_PREFETCH
) -> tuple[Row, ...]:
    """The rows of `schedule` with their transfers, one row a rank; `edges` is the chain if not given.

    Edges between two stages of one rank need no transfer. Raises ScheduleError if `prefetch` is negative, an
    edge is wrong, or a value is sent to an action that the schedule lacks.
    """
    plan = planned(schedule, checked(edges, schedule.num_stages), prefetch)
    return tuple(tuple(_merged(schedule, plan, r)) for r in range(schedule.num_ranks))


def planned(schedule: Schedule, edges: Edges, prefetch: int) -> Planned:
    """What `with_transfers` writes out. Raises ScheduleError as it does."""
    if prefetch < 0:
        raise ScheduleError(f"receives are posted 0 or more actions ahead, but prefetch={prefetch}; use 0 or more")
    owners, num_micro_batches = schedule.owners, schedule.num_micro_batches
    crossing = sorted((s, t) for s, t in edges if owners[s] != owners[t])
    routes = (*crossing, *((t, s) for s, t in crossing))
    routes_of = _routes_of(schedule, edges, routes)
    consumed_at = _consumers(schedule, routes)
    posted: list[list[int]] = [[] for _ in schedule.actions]
    posted_at: list[list[int]] = [[] for _ in schedule.actions]
    for (_, receiver), sent in sorted(_by_link(schedule, routes, routes_of).items()):
        wanted = [consumed_at[value // num_micro_batches][value % num_micro_batches] for value in sent]
        if min(wanted) < 0:
            _raise_unread(routes, *divmod(sent[wanted.index(-1)], num_micro_batches))
        # No RECV may stand behind a later one of its link: the smallest index from here to the end.
        at = list(accumulate(reversed(wanted), min))[::-1]
        posted[receiver] += sent
        posted_at[receiver] += [max(0, index - prefetch) for index in at]
    for values, at in zip(posted, posted_at, strict=True):
        order = sorted(range(len(at)), key=at.__getitem__)  # stable: the order of each link stays
        values[:], at[:] = [values[i] for i in order], [at[i] for i in order]
    return Planned(routes=routes, routes_of=routes_of, posted=tuple(posted), posted_at=tuple(posted_at))


def readers(schedule: Schedule, edges: Edges) -> Targets:
    """For each kind, the stages on *other* ranks that read what each stage makes."""
    owners = schedule.owners
    num_stages = schedule.num_stages

    def elsewhere(neighbours: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(other for other in others if owners[other] != owners[s]) for s, others in enumerate(neighbours)
        )

    above = elsewhere(successors(edges, num_stages))
    below = elsewhere(predecessors(edges, num_stages))
    made = {Kind.F: above, Kind.B: below, Kind.I: below}
    return {kind: made.get(kind, ((),) * num_stages) for kind in Kind}


def _routes_of(
    schedule: Schedule, edges: Edges, routes: tuple[tuple[int, int], ...]
) -> dict[Kind, tuple[tuple[int, ...], ...]]:
    number_of = {route: number for number, route in enumerate(routes)}
    return {
        kind: tuple(tuple(number_of[s, t] for t in targets) for s, targets in enumerate(targets_of))
        for kind, targets_of in readers(schedule, edges).items()
    }


def _raise_unread(routes: tuple[tuple[int, int], ...], route: int, micro_batch: int) -> NoReturn:
    source, target = routes[route]
    raise ScheduleError(
        f"every value sent has a reader, but no action reads "
        f"{_transfer(TransferKind.SEND, source, target, micro_batch)}; add the "
        f"{'backward' if source > target else 'forward'} of stage {target}, micro-batch {micro_batch}"
    )


def _consumers(schedule: Schedule, routes: tuple[tuple[int, int], ...]) -> list[list[int]]:
    """[route][micro_batch]: where in its rank's row the reader of that value stands, or -1."""
    activations, gradients = ([[-1] * schedule.num_micro_batches for _ in range(schedule.num_stages)] for _ in range(2))
    read_by: dict[str, list[list[int]]] = {Kind.F: activations, Kind.B: gradients, Kind.I: gradients}
    for row in schedule.actions:
        for index, action in enumerate(row):
            read = read_by.get(action.kind)
            if read is not None and isinstance(action, Action):
                read[action.stage][action.micro_batch] = index
    return [(gradients if source > target else activations)[target] for source, target in routes]


def _by_link(
    schedule: Schedule, routes: tuple[tuple[int, int], ...], routes_of: Mapping[Kind, tuple[tuple[int, ...], ...]]
) -> dict[Link, list[int]]:
    """What each link carries, in the order of the actions that make it."""
    owners, num_micro_batches = schedule.owners, schedule.num_micro_batches
    links: dict[Link, list[int]] = {}
    carried = [links.setdefault((owners[source], owners[target]), []) for source, target in routes]
    for row in schedule.actions:
        for action in row:
            if isinstance(action, Action):
                for route in routes_of[action.kind][action.stage]:
                    carried[route].append(route * num_micro_batches + action.micro_batch)
    return {link: values for link, values in links.items() if values}


def _merged(schedule: Schedule, plan: Planned, rank: int) -> Iterator[Action | StageAction | Transfer]:
    """The row of one rank: ahead of each action its receives, behind it its sends."""
    at, posted, place = plan.posted_at[rank], plan.posted[rank], 0
    for index, action in enumerate(schedule.actions[rank]):
        while place < len(at) and at[place] == index:
            route, micro_batch = divmod(posted[place], schedule.num_micro_batches)
            yield _transfer(TransferKind.RECV, *plan.routes[route], micro_batch)
            place += 1
        yield action
        if isinstance(action, Action):
            for route in plan.routes_of[action.kind][action.stage]:
                yield _transfer(TransferKind.SEND, *plan.routes[route], action.micro_batch)


def _transfer(kind: TransferKind, source: int, target: int, micro_batch: int) -> Transfer:
    return Transfer(kind=kind, source=source, target=target, micro_batch=micro_batch, gradient=source > target)
