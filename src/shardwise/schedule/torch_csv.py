"""Schedules as the CSV of torch.distributed.pipelining: read what torch dumps, write what torch loads.

A line is a rank, a cell one item, an empty cell a slot in which the rank idles. The two formats of torch:

    compute_only     0F0,0F1,,0B0,0B1                               F, B, I and W as here
    compute_comms    0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD,0RESHARD
                     (0F4;3B1)OVERLAP_F_B                           two items side by side, here one after the other

Torch's transfers name only the acting stage, since they run between neighbours. This file knows text, not files.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, StageAction, StageKind, Transfer, TransferKind
from shardwise.schedule.passes.gradients import with_reductions
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.transfers import with_transfers

__all__ = ["read_csv", "write_csv"]

_KINDS = "".join(kind for kind in (Kind.F, Kind.B, Kind.I, Kind.W))
_ACTION = re.compile(f"([0-9]+)([{_KINDS}])([0-9]+)")
_TRANSFER = re.compile("[0-9]+(SEND|RECV)_[FB][0-9]+")
_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")
_STAGE_ACTION = re.compile("([0-9]+)(UNSHARD|RESHARD|REDUCE_GRAD)")
_NAMES: Mapping[StageKind, str] = MappingProxyType(
    {StageKind.U: "UNSHARD", StageKind.H: "RESHARD", StageKind.G: "REDUCE_GRAD"}
)


def read_csv(text: str, *, name: str = "csv", stage_actions: bool = False) -> Schedule:
    """The schedule that torch dumped in either format.

    Transfers are left out: they follow from the order and are added anew. So are UNSHARD, RESHARD and REDUCE_GRAD
    unless `stage_actions`; torch writes them for models that are not sharded, too. Whether the schedule can run is the
    business of `check`. Raises ScheduleError if a cell cannot be read, or a stage stands on two ranks.
    """
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    rows = [tuple(_items(line, r)) for r, line in enumerate(lines)]
    micro_batches = {action.micro_batch for row in rows for action in row if isinstance(action, Action)}
    if not micro_batches:
        raise ScheduleError("a schedule in CSV has a line a rank with cells such as 0F0, but there are none; add them")
    ranks = tuple(tuple(sorted({action.stage for action in row})) for row in rows)
    return Schedule(
        name=name,
        num_stages=1 + max(s for stages in ranks for s in stages),
        num_micro_batches=1 + max(micro_batches),
        ranks=ranks,
        actions=tuple(tuple(a for a in row if stage_actions or isinstance(a, Action)) for row in rows),
    )


def write_csv(schedule: Schedule, *, transfers: bool = False, prefetch: int = 0) -> str:
    """The CSV for torch: compute_only, or compute_comms with `transfers`.

    With transfers every stage reduces its gradients (torch scales them there), behind its last backward if the schedule
    does not say when. Receives stand right ahead of their readers, where no order of them can make ranks wait for each
    other; `prefetch` posts them earlier. Raises ScheduleError if torch has no word for an action of the schedule.
    """
    for action in (action for row in schedule.actions for action in row):
        known = action.kind in _KINDS if isinstance(action, Action) else transfers
        if not known:
            raise ScheduleError(
                f"torch's CSV has F, B, I and W, and with transfers G, U and H, but the schedule holds {action}; leave "
                "out the pass that added it"
            )
    if transfers:
        reduces = any(action.kind is StageKind.G for row in schedule.actions for action in row)
        rows = with_transfers(schedule if reduces else with_reductions(schedule), prefetch=prefetch)
    else:
        rows = schedule.actions
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows([_cell(item) for item in row] for row in rows)
    return written.getvalue()


def _items(line: list[str], rank: int) -> Iterator[Action | StageAction]:
    for cell in line:
        overlapped = _OVERLAP.fullmatch(cell.strip())
        for word in overlapped[1].split(";") if overlapped else [cell]:
            if word.strip() and not _TRANSFER.fullmatch(word.strip()):
                yield _item(word.strip(), rank)


def _item(word: str, rank: int) -> Action | StageAction:
    if found := _ACTION.fullmatch(word):
        return Action(kind=Kind(found[2]), stage=int(found[1]), micro_batch=int(found[3]))
    if found := _STAGE_ACTION.fullmatch(word):
        kind = next(kind for kind, text in _NAMES.items() if text == found[2])
        return StageAction(kind=kind, stage=int(found[1]))
    raise ScheduleError(
        f"a cell is written STAGE, one of F B I W, MICRO-BATCH, as in 2F0, or as torch writes transfers, but the line "
        f'of rank {rank} holds "{word}"; correct it'
    )


def _cell(item: Action | StageAction | Transfer) -> str:
    if isinstance(item, StageAction):
        return f"{item.stage}{_NAMES[item.kind]}"
    if isinstance(item, Action):
        return str(item)
    sending = item.kind is TransferKind.SEND
    what = "B" if item.gradient else "F"
    return f"{item.source if sending else item.target}{'SEND' if sending else 'RECV'}_{what}{item.micro_batch}"
