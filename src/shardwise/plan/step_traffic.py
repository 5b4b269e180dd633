"""What the ranks at a place of the pipeline send in a step, by axis and kind, as a run counts it (`comm.traffic`).

    inside units      tp.*, cp.*, ep.*      exchanges of the stages' work, for every micro-batch
    between stages    pp.send               activations, and the gradients of what was received
    behind them       dp.all_reduce …       gradients, one flag a parameter that says whether there is one

Bytes of whole tensors, of which a rank has or gets a part in a gather or scatter. Left out: padding and flags of
divided state, headers of a first step, what compression saves, and that routers do not deal tokens out evenly.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from shardwise.describe.kernels import ExchangeKind
from shardwise.layout import Layout
from shardwise.plan.job import Job
from shardwise.plan.stage_work import StageWork

__all__ = ["SummedParameter", "traffic_of_step"]

_NAMES = {
    ExchangeKind.ALL_REDUCE: "all_reduce",
    ExchangeKind.ALL_GATHER: "all_gather",
    ExchangeKind.REDUCE_SCATTER: "reduce_scatter",
    ExchangeKind.ALL_TO_ALL: "all_to_all",
    ExchangeKind.SEND: "send",
}


class SummedParameter:
    """A trained parameter: its elements on a rank, the stages that hold it, whether its gradient is partial on every
    shard, and whether it is one of experts that `ep` divides."""

    __slots__ = ("elements", "expert", "partial", "stages")

    def __init__(self, elements: int, stages: Sequence[int], *, partial: bool = False, expert: bool = False) -> None:
        self.elements = elements
        self.stages = tuple(stages)
        self.partial = partial
        self.expert = expert


def traffic_of_step(
    works: Sequence[StageWork],
    stages: Sequence[Sequence[int]],
    parameters: Sequence[SummedParameter],
    layout: Layout,
    job: Job,
    *,
    num_micro_batches: int,
    mapped: bool = False,
) -> tuple[Mapping[str, int], ...]:
    """[place]: kind -> bytes of a step. stages[place]: those that its ranks own. mapped: whether ranks that divide the
    state of training map the same memory, where nothing is gathered."""
    owner = {stage: place for place, own in enumerate(stages) for stage in own}
    found: list[Mapping[str, int]] = []
    for place, own in enumerate(stages):
        sent: collections.Counter[str] = collections.Counter()
        for stage in own:
            sent.update(_of_stage(works, stage, owner, num_micro_batches))
        held = [each for each in parameters if any(owner[stage] == place for stage in each.stages)]
        sent.update(_divided(held, layout, job, num_micro_batches, mapped) if layout.fsdp > 1 else {})
        sent.update(_summed(held, owner, layout, job))
        found.append({kind: sent[kind] for kind in sorted(sent)})
    return tuple(found)


def _of_stage(
    works: Sequence[StageWork], stage: int, owner: Mapping[int, int], num_micro_batches: int
) -> dict[str, int]:
    sent: collections.Counter[str] = collections.Counter()
    for exchange in works[stage].exchanges:
        kind = f"{exchange.axis}.{_NAMES[exchange.kind]}"
        sent[kind] += exchange.nbytes * exchange.count * num_micro_batches
    there = sum(nbytes for target, nbytes in works[stage].sends.items() if owner[target] != owner[stage])
    back = sum(work.gradients[stage] for work in works if stage in work.gradients and owner[work.stage] != owner[stage])
    if there or back:
        sent["pp.send"] = round((there + back) * num_micro_batches)
    return dict(sent)


def _summed(
    parameters: Sequence[SummedParameter], owner: Mapping[int, int], layout: Layout, job: Job
) -> dict[str, int]:
    """Gradients that several ranks sum; of those whose state is divided, this rank's share. Flags are as wide as
    gradients, and divided state has none."""
    sent: collections.Counter[str] = collections.Counter()
    for each in parameters:
        places = len({owner[stage] for stage in each.stages})
        copies = layout.num_replicas * layout.cp // ((layout.ep if each.expert else 1) * layout.fsdp)
        if places * copies * (layout.tp if each.partial else 1) == 1:
            continue
        axis = "tp.gradients" if each.partial else "pp.all_reduce" if places > 1 else "dp.all_reduce"
        flags = 1 if layout.fsdp == 1 else 0
        sent[axis] += job.reduce_bytes * (each.elements // layout.fsdp + flags)
    return dict(sent)


def _divided(
    parameters: Sequence[SummedParameter], layout: Layout, job: Job, num_micro_batches: int, mapped: bool
) -> dict[str, int]:
    """See `divide_states.sent_bytes`."""
    elements = sum(each.elements for each in parameters)
    each_time = layout.zero >= 2 and not layout.unshards_by_step
    gathers = 2 * num_micro_batches if layout.zero == 3 and not layout.unshards_by_step else 1
    gathers = 0 if mapped else gathers
    return {
        "fsdp.reduce_scatter": elements * job.reduce_bytes * (num_micro_batches if each_time else 1),
        "fsdp.all_gather": elements * job.per_parameter.parameter * gathers,
    }
