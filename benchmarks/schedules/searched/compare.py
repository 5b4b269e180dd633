"""One case: every generator that has room, and what the searches find; all by the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.schedules.searched.cases import CHUNKS, PLACEMENTS, Case
from shardwise.errors import ScheduleError
from shardwise.schedule import Schedule, seconds_of
from shardwise.schedule.memory import fits
from shardwise.schedule.placement import stages_of_ranks
from shardwise.schedule.search import Searched, search, textbooks
from shardwise.schedule.search_placements import on_devices, search_placements

__all__ = ["Row", "compared"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of a step: of every generator that fits, by name and stages a rank; of the searches.

    ordered: the best order found where stages lie as generators lay them. searched: the best of all. bound: what no
    schedule of the winner's placement is below. aware, searched_aware: the best generator on stages that were cut for
    the speeds of the devices, which shardwise's partitioner does not do, and the best search, on those or others.
    """

    case: Case
    textbooks: dict[str, float]
    ordered: float
    searched: float
    bound: float
    aware: float
    searched_aware: float
    schedule: Schedule

    @property
    def best(self) -> tuple[str, float]:
        """The fastest generator."""
        return min(self.textbooks.items(), key=lambda pair: pair[1])

    @property
    def gain(self) -> float:
        return self.best[1] / self.searched

    def line(self) -> str:
        name, seconds = self.best
        ranks = " ".join(",".join(map(str, stages)) for stages in self.schedule.ranks)
        return (
            f"  {self.case.name:32} {name:16} {seconds:8.4f} {self.ordered:8.4f} {self.searched:8.4f} "
            f"{self.gain:7.3f} {self.aware / self.searched_aware:7.3f} {self.searched / self.bound:7.3f}  {ranks}"
        )

    def values(self) -> dict[str, Any]:
        """For the JSON of results."""
        costs, memory = (getattr(self.case.cut(1), name) for name in ("costs", "memory"))
        return {
            "case": self.case.name,
            "source": self.case.model.source,
            "speeds": self.case.speeds,
            "limit_bytes": memory.limit_bytes,
            "one_stage_a_rank": {
                "seconds": {kind.value: seconds for kind, seconds in costs.compute_seconds.items()},
                "transfer_seconds": list(costs.activation_seconds.values()),
                "activation_bytes": memory.activation_bytes,
                "weight_bytes": memory.weight_bytes,
            },
            "textbooks_s": self.textbooks,
            "best_textbook": self.best,
            "ordered_s": self.ordered,
            "searched_s": self.searched,
            "bound_s": self.bound,
            "best_textbook_of_aware_cuts_s": self.aware,
            "searched_of_aware_cuts_s": self.searched_aware,
            "gain": round(self.gain, 4),
            "gain_of_order_alone": round(self.best[1] / self.ordered, 4),
            "gain_of_aware_cuts": round(self.aware / self.searched_aware, 4),
            "ranks": self.schedule.ranks,
        }


def compared(case: Case, seconds: float) -> Row:
    """The case by every way; `seconds` is the budget of each of its searches."""
    ordered = _ordered(case, seconds, aware=False)
    best = min([*ordered, *_placed(case, seconds)], key=lambda one: one.seconds)
    aware = _ordered(case, seconds, aware=True) if len(set(case.speeds)) > 1 else ordered
    return Row(
        case=case,
        textbooks=_textbooks(case, aware=False),
        ordered=min(one.seconds for one in ordered),
        searched=best.seconds,
        bound=best.lower_bound_s,
        aware=min(_textbooks(case, aware=len(set(case.speeds)) > 1).values()),
        searched_aware=min(best.seconds, *(one.seconds for one in aware)),
        schedule=best.schedule,
    )


def _ordered(case: Case, seconds: float, *, aware: bool) -> list[Searched]:
    """Of every placement of generators that has room: only the order is searched."""
    found = []
    for placement, chunks in PLACEMENTS:
        ranks = stages_of_ranks(placement, num_ranks=case.num_ranks, chunks=chunks)
        cut = case.cut(chunks, ranks, aware=aware)
        try:
            found.append(
                search(
                    on_devices(cut.costs, ranks, case.speeds),
                    num_micro_batches=case.num_micro_batches,
                    ranks=ranks,
                    memory=cut.memory,
                    seconds=seconds,
                )
            )
        except ScheduleError:
            continue  # no room for one micro-batch so
    return found


def _placed(case: Case, seconds: float) -> Sequence[Searched]:
    found = []
    for chunks in CHUNKS:
        cut = case.cut(chunks)
        try:
            found.append(
                search_placements(
                    cut.costs,
                    num_micro_batches=case.num_micro_batches,
                    num_ranks=case.num_ranks,
                    speeds=case.speeds,
                    memory=cut.memory,
                    seconds=seconds,
                )
            )
        except ScheduleError:
            continue  # no room for one micro-batch in so many stages
    return found


def _textbooks(case: Case, *, aware: bool) -> dict[str, float]:
    """Name and stages a rank -> seconds, of every generator that fits."""
    found: dict[str, float] = {}
    for placement, chunks in PLACEMENTS:
        ranks = stages_of_ranks(placement, num_ranks=case.num_ranks, chunks=chunks)
        cut = case.cut(chunks, ranks, aware=aware)
        costs = on_devices(cut.costs, ranks, case.speeds)
        for schedule in textbooks(ranks, case.num_micro_batches):
            if fits(schedule, cut.memory):
                name = schedule.name if chunks == 1 else f"{schedule.name} x{chunks}"
                found[name] = min(found.get(name, float("inf")), seconds_of(schedule, costs))
    return found
