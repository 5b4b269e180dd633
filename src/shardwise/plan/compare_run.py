"""Predicted beside measured, number by number: the rows of a report, and what a calibration makes small.

A row without a prediction or without a measurement says so by None; nothing is made up for it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence

from shardwise.layout import Layout
from shardwise.layout.ranks import coordinates
from shardwise.plan.run_estimate import KINDS, Predicted
from shardwise.plan.run_measured import RunMeasured

__all__ = ["Row", "compare", "median_error"]

STEP, MEMORY, ACTIONS, WAITING, TRANSFERS, TRAFFIC = "step", "memory", "actions", "waiting", "transfers", "traffic"
_WHOLE = "a step"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One number, in seconds ("s") or bytes ("B"), of a step unless its section says otherwise."""

    section: str
    what: str
    unit: str
    predicted: float | None
    measured: float | None

    @property
    def is_step(self) -> bool:
        """Whether it is the step itself, and no part of it."""
        return self.section == STEP and self.what == _WHOLE

    @property
    def error(self) -> float | None:
        """By what share the prediction is above the measurement; None where one of them is missing, or 0 was measured
        and something else predicted."""
        if self.predicted is None or self.measured is None:
            return None
        if self.measured == 0:
            return 0.0 if self.predicted == 0 else None
        return self.predicted / self.measured - 1


def compare(
    predicted: Predicted, measured: RunMeasured, layout: Layout, traffic: Sequence[Mapping[str, int]]
) -> tuple[Row, ...]:
    """All rows. traffic[place]: what a rank there was predicted to send in a step."""
    return (
        *_step(predicted, measured, summed=layout.num_replicas * layout.cp > 1),
        *_memory(predicted, measured, layout),
        *_actions(predicted, measured),
        *_waiting(predicted, measured),
        *_transfers(predicted, measured),
        *_traffic(measured, layout, traffic),
    )


def median_error(rows: Sequence[Row], section: str | None = None) -> float | None:
    """Of the absolute errors of a section, or of all rows; None where there are none."""
    errors = [abs(row.error) for row in rows if row.error is not None and section in (None, row.section)]
    return statistics.median(errors) if errors else None


def _step(predicted: Predicted, measured: RunMeasured, *, summed: bool) -> Iterator[Row]:
    """summed: whether ranks sum gradients, hidden or not: rows do not depend on what is predicted. Where nothing is
    summed, what is waited for behind the last action belongs to everything else."""
    first = predicted.time[0]
    parts = [measured.pipeline_s, measured.optimizer_s, *([measured.sums_s] if summed else [])]
    known = [seconds for seconds in parts if seconds is not None]
    rest = max(0.0, measured.step_s - sum(known)) if measured.step_s is not None and len(known) == len(parts) else None
    for what, guess, seconds in (
        (_WHOLE, predicted.step_s, measured.step_s),
        ("pipeline", predicted.pipeline_s, measured.pipeline_s),
        *([("sums of gradients", first.replicas, measured.sums_s)] if summed else []),
        ("optimizer", first.optimizer, measured.optimizer_s),
        ("everything else", predicted.step_overhead_s, rest),
        ("  of it data", None, measured.data_s),
    ):
        yield Row(section=STEP, what=what, unit="s", predicted=guess, measured=seconds)


def _memory(predicted: Predicted, measured: RunMeasured, layout: Layout) -> Iterator[Row]:
    for rank in range(layout.world_size):
        place = coordinates(layout, rank).position
        total = predicted.memory[place].total
        held = measured.memory.get(rank)
        yield Row(section=MEMORY, what=f"rank {rank}", unit="B", predicted=total, measured=held)


def _actions(predicted: Predicted, measured: RunMeasured) -> Iterator[Row]:
    """Of those that the schedule has, as it was recorded; of forwards and backwards where nothing was."""
    for kind in (kind.value for kind in KINDS):
        own = measured.actions.get(kind, {})
        if not own and (measured.actions or kind not in ("F", "B")):
            continue
        for stage, seconds in enumerate(predicted.actions[kind]):
            if own and stage not in own:
                continue
            what = f"{kind} of stage {stage}"
            yield Row(section=ACTIONS, what=what, unit="s", predicted=seconds, measured=own.get(stage))


def _waiting(predicted: Predicted, measured: RunMeasured) -> Iterator[Row]:
    if len(predicted.stages) == 1:
        return
    for place in range(len(predicted.stages)):
        guess = predicted.waiting_s(place)
        yield Row(
            section=WAITING, what=f"place {place}", unit="s", predicted=guess, measured=measured.waiting.get(place)
        )


def _transfers(predicted: Predicted, measured: RunMeasured) -> Iterator[Row]:
    owner = {stage: place for place, own in enumerate(predicted.stages) for stage in own}
    for edge in predicted.edges:
        pair = edge.source, edge.target
        if owner[edge.source] == owner[edge.target]:
            continue
        there, back = f"{edge.source} to {edge.target}", f"{edge.target} to {edge.source}"
        for what, seconds, nbytes, found in (
            (there, edge.forward_s, edge.forward_bytes, measured.forward_s),
            (back, edge.backward_s, edge.backward_bytes, measured.backward_s),
        ):
            if nbytes:
                yield Row(section=TRANSFERS, what=what, unit="s", predicted=seconds, measured=found.get(pair))


def _traffic(measured: RunMeasured, layout: Layout, traffic: Sequence[Mapping[str, int]]) -> Iterator[Row]:
    """Of the first rank at every place; ranks at one place send the same but for what routers decide."""
    each = layout.world_size // layout.pp
    for place, own in enumerate(traffic):
        sent = measured.traffic.get(place * each)
        for kind in sorted({*own, *(sent or {})}):
            guess, found = own.get(kind), None if sent is None else sent.get(kind, 0)
            if guess or found:
                what = f"{kind} of place {place}" if len(traffic) > 1 else kind
                yield Row(section=TRAFFIC, what=what, unit="B", predicted=guess, measured=found)
