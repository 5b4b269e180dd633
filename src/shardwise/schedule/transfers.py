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

from collections.abc import Iterator
from itertools import accumulate
from typing import NoReturn

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, Transfer, TransferKind
from shardwise.schedule.graph import Edges, checked, predecessors, successors
from shardwise.schedule.schedule import Schedule

__all__ = ["DEFAULT_PREFETCH", "Link", "Row", "readers", "with_transfers"]

Row = tuple[Action | Transfer, ...]
Link = tuple[int, int]  # (sender rank, receiver rank)
Targets = dict[Kind, tuple[tuple[int, ...], ...]]  # [kind][stage]: stages

DEFAULT_PREFETCH = 2
_F, _SEND, _RECV = Kind.F, TransferKind.SEND, TransferKind.RECV  # looked up once, not once an action


def with_transfers(
    schedule: Schedule, edges: Edges | None = None, *, prefetch: int = DEFAULT_PREFETCH
) -> tuple[Row, ...]:
    """The rows of `schedule` with their transfers, one row a rank; `edges` is the chain if not given.

    Edges between two stages of one rank need no transfer. Raises ScheduleError if `prefetch` is negative, an
    edge is wrong, or a value is sent to an action that the schedule lacks.
    """
    if prefetch < 0:
        raise ScheduleError(f"receives are posted 0 or more actions ahead, but prefetch={prefetch}; use 0 or more")
    targets_of = readers(schedule, checked(edges, schedule.num_stages))
    sends = [_sends(row, targets_of) for row in schedule.actions]
    receives = _receives(schedule, sends, prefetch)
    return tuple(tuple(_merged(row, targets_of, sends[r], receives[r])) for r, row in enumerate(schedule.actions))


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
    return {Kind.F: above, Kind.B: below, Kind.I: below, Kind.W: ((),) * num_stages}


def _sends(row: tuple[Action, ...], targets_of: Targets) -> list[Transfer]:
    """What one rank sends, in the order of its actions."""
    return [
        Transfer(
            kind=_SEND,
            source=action.stage,
            target=target,
            micro_batch=action.micro_batch,
            gradient=action.kind is not _F,
        )
        for action in row
        for target in targets_of[action.kind][action.stage]
    ]


def _receives(schedule: Schedule, sends: list[list[Transfer]], prefetch: int) -> list[dict[int, list[Transfer]]]:
    """receives[r][i]: what rank r posts right ahead of its i-th action."""
    consumed_at = _consumers(schedule)
    receives: list[dict[int, list[Transfer]]] = [{} for _ in schedule.actions]
    for (_, receiver), sent in sorted(_by_link(schedule, sends).items()):
        wanted = [consumed_at[t.gradient][t.target][t.micro_batch] for t in sent]
        if min(wanted) < 0:
            _raise_unread(sent[wanted.index(-1)])
        # No RECV may stand behind a later one of its link: the smallest index from here to the end.
        posted_at = list(accumulate(reversed(wanted), min))[::-1]
        at_index = receives[receiver]
        for transfer, index in zip(sent, posted_at, strict=True):
            received = Transfer(
                kind=_RECV,
                source=transfer.source,
                target=transfer.target,
                micro_batch=transfer.micro_batch,
                gradient=transfer.gradient,
            )
            at_index.setdefault(max(0, index - prefetch), []).append(received)
    return receives


def _raise_unread(transfer: Transfer) -> NoReturn:
    raise ScheduleError(
        f"every value sent has a reader, but no action reads {transfer}; add the "
        f"{'backward' if transfer.gradient else 'forward'} of stage {transfer.target}, "
        f"micro-batch {transfer.micro_batch}"
    )


def _consumers(schedule: Schedule) -> tuple[list[list[int]], list[list[int]]]:
    """[gradient][stage][micro_batch]: where in its rank's row the reader of that value stands, or -1."""
    activations, gradients = ([[-1] * schedule.num_micro_batches for _ in range(schedule.num_stages)] for _ in range(2))
    for row in schedule.actions:
        for index, action in enumerate(row):
            if action.kind is not Kind.W:
                read = activations if action.kind is _F else gradients
                read[action.stage][action.micro_batch] = index
    return activations, gradients


def _by_link(schedule: Schedule, sends: list[list[Transfer]]) -> dict[Link, list[Transfer]]:
    owners = schedule.owners
    links: dict[Link, list[Transfer]] = {}
    for r, sent in enumerate(sends):
        for transfer in sent:
            links.setdefault((r, owners[transfer.target]), []).append(transfer)
    return links


def _merged(
    row: tuple[Action, ...], targets_of: Targets, sends: list[Transfer], receives: dict[int, list[Transfer]]
) -> Iterator[Action | Transfer]:
    """The row of one rank: ahead of each action its receives, behind it its sends."""
    place = 0
    for index, action in enumerate(row):
        yield from receives.get(index, ())
        yield action
        num_sent = len(targets_of[action.kind][action.stage])
        yield from sends[place : place + num_sent]
        place += num_sent
