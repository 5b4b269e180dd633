"""Proves that the transfers in all ranks' rows fit their schedule. It knows the order of rows, not time.

Rules: every value that crosses ranks is sent once and received once, by the right ranks; a SEND stands behind
the action that makes its value and a RECV ahead of the one that reads it; on each link (sender, receiver)
RECVs stand in the order of the SENDs. NCCL matches by order alone, so a swap there is a wrong value, or a
hang where shapes differ.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, StageAction, Transfer, TransferKind, print_row
from shardwise.schedule.graph import Edges
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.transfers import Link, Row, readers

__all__ = ["check_transfers"]

Value = tuple[int, int, int]  # (source stage, target stage, micro-batch)


@dataclass(kw_only=True, slots=True)
class _Traffic:
    """What the rows say happens on one link, in their order, and what the schedule needs there."""

    sent: list[Value] = field(default_factory=list)
    received: list[Value] = field(default_factory=list)
    needed: set[Value] = field(default_factory=set)


def check_transfers(schedule: Schedule, edges: Edges, rows: tuple[Row, ...]) -> None:
    """Raises ScheduleError that names the first rank and transfer that break a rule."""
    _check_actions(schedule, rows)
    traffic: dict[Link, _Traffic] = {}
    for r, row in enumerate(rows):
        _check_places(schedule, r, row, traffic)
    _add_needed(schedule, edges, traffic)
    for link, on_link in sorted(traffic.items()):
        _check_counts(link, on_link)
        _check_order(link, on_link)


def _check_actions(schedule: Schedule, rows: tuple[Row, ...]) -> None:
    if len(rows) != schedule.num_ranks:
        raise ScheduleError(
            f"every one of {schedule.num_ranks} ranks has a row, but there are {len(rows)} rows; give one a rank"
        )
    for r, row in enumerate(rows):
        actions = tuple(item for item in row if not isinstance(item, Transfer))
        if actions != schedule.actions[r]:
            raise ScheduleError(
                f"rows with transfers hold the schedule's actions in its order, but rank {r} runs "
                f'"{print_row(actions[:8])} ..." and not "{print_row(schedule.actions[r][:8])} ..."; '
                "build the rows from this schedule"
            )


def _check_places(schedule: Schedule, rank: int, row: Row, traffic: dict[Link, _Traffic]) -> None:
    """Checks what one row can tell alone, and notes its sends and receives."""
    owners = schedule.owners
    done: set[tuple[int, int, bool]] = set()  # (stage, micro-batch, backward)
    for item in row:
        if isinstance(item, StageAction):
            continue
        if isinstance(item, Action):
            if item.kind in (Kind.F, Kind.B, Kind.I):
                done.add((item.stage, item.micro_batch, item.kind is not Kind.F))
            continue
        sending = item.kind is TransferKind.SEND
        acting = item.source if sending else item.target
        if not (0 <= acting < schedule.num_stages and owners[acting] == rank):
            raise ScheduleError(
                f"a rank sends and receives for its own stages, but {item} stands on rank {rank}, which owns "
                f"{list(schedule.ranks[rank])}; move it to the rank of stage {acting}"
            )
        if sending != ((acting, item.micro_batch, item.gradient) in done):
            where = "ahead of the action that makes its value" if sending else "behind the action that reads it"
            raise ScheduleError(
                f"a SEND stands behind its value's maker and a RECV ahead of its reader, but on rank {rank} "
                f"{item} stands {where}; move it {'back' if sending else 'ahead'}"
            )
        _note(item, owners, traffic)


def _note(transfer: Transfer, owners: tuple[int, ...], traffic: dict[Link, _Traffic]) -> None:
    other = max(transfer.source, transfer.target)
    if other >= len(owners):
        raise ScheduleError(f"transfers stay within {len(owners)} stages, but found {transfer}; drop it")
    on_link = traffic.setdefault((owners[transfer.source], owners[transfer.target]), _Traffic())
    values = on_link.sent if transfer.kind is TransferKind.SEND else on_link.received
    values.append((transfer.source, transfer.target, transfer.micro_batch))


def _add_needed(schedule: Schedule, edges: Edges, traffic: dict[Link, _Traffic]) -> None:
    readers_of, owners = readers(schedule, edges), schedule.owners
    for r, row in enumerate(schedule.actions):
        for action in row:
            if not isinstance(action, Action):
                continue
            for target in readers_of[action.kind][action.stage]:
                on_link = traffic.setdefault((r, owners[target]), _Traffic())
                on_link.needed.add((action.stage, target, action.micro_batch))


def _check_counts(link: Link, on_link: _Traffic) -> None:
    for kind, values in ((TransferKind.SEND, on_link.sent), (TransferKind.RECV, on_link.received)):
        counts = Counter(values)
        for value in sorted(counts.keys() | on_link.needed):
            num_needed = int(value in on_link.needed)
            if counts[value] != num_needed:
                raise ScheduleError(
                    f"a value that crosses ranks is sent once and received once, others never, but from rank "
                    f"{link[0]} to rank {link[1]} {_text(kind, value)} stands {counts[value]} times and not "
                    f"{num_needed}; {'add' if counts[value] < num_needed else 'drop'} it"
                )


def _check_order(link: Link, on_link: _Traffic) -> None:
    for place, (sent, received) in enumerate(zip(on_link.sent, on_link.received, strict=True)):
        if sent != received:
            raise ScheduleError(
                f"receives stand in the order of the sends, but from rank {link[0]} to rank {link[1]} number "
                f"{place} is {_text(TransferKind.SEND, sent)} on one side and "
                f"{_text(TransferKind.RECV, received)} on the other; post the receives in the order of the "
                "sends"
            )


def _text(kind: TransferKind, value: Value) -> str:
    source, target, micro_batch = value
    return str(Transfer(kind=kind, source=source, target=target, micro_batch=micro_batch, gradient=source > target))
