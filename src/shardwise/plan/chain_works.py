"""Stages made of units in a row: what each unit does, added up over consecutive ones.

Where a model is a chain of units, the work of every unit is counted once for each way to divide it (tp, cp, ep,
samples, recompute), and every number of stages follows by sums. Equal neighbours are counted, not repeated, so that a
stage of thirty layers is made as fast as one of two. Refuses to know what a unit is.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence

from shardwise.describe.kernels import Kernel
from shardwise.errors import LayoutError
from shardwise.layout import Layout, StageRule, expand
from shardwise.plan.balance import evened_ends
from shardwise.plan.stage_work import StageWork
from shardwise.schedule import GENERATORS, placement

__all__ = ["ChainWorks", "even_ends", "merged_work"]

Units = Callable[[Layout, int], Sequence[StageWork]]
"""(layout, samples) -> the work of every unit, by itself; reads tp, cp, ep, context, sequence_parallel, recompute and
offload of the layout alone. Equal units share their kernels and exchanges."""


class ChainWorks:
    """`works(layout, samples)` of a chain. names[i]: of unit i, by which layouts list stages; weight_s: what a unit
    weighs when stages are balanced (its flops, if not given)."""

    def __init__(
        self, units: Units, names: Sequence[str], *, weight: Callable[[StageWork], float] | None = None
    ) -> None:
        self.names = tuple(names)
        self._units, self._weight = units, weight or _flops
        self._known: dict[tuple[object, ...], tuple[StageWork, ...]] = {}
        self._ends: dict[tuple[object, ...], tuple[int, ...]] = {}

    def units(self, layout: Layout, samples: int) -> tuple[StageWork, ...]:
        """The work of every unit, made once for each way to divide it."""
        key = (
            *(layout.tp, layout.cp, layout.ep, samples, layout.recompute),
            *(layout.sequence_parallel, layout.offload, layout.context),
        )
        if key not in self._known:
            self._known[key] = tuple(self._units(layout, samples))
        return self._known[key]

    def __call__(self, layout: Layout, samples: int) -> tuple[StageWork, ...]:
        """The stages of a layout. Raises `LayoutError` where there are fewer units than stages, or where listed stages
        do not name each unit once, in order."""
        units = self.units(layout, samples)
        ends = self._ends_of(layout, units)
        starts = (0, *ends[:-1])
        made: dict[tuple[tuple[int, int], ...], StageWork] = {}
        stages: list[StageWork] = []
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True)):
            runs = _runs(units[start:end])
            if runs not in made:
                made[runs] = merged_work(0, units[start:end])
            stages.append(_numbered(made[runs], stage, last=stage + 1 == len(ends)))
        return tuple(stages)

    def _ends_of(self, layout: Layout, units: Sequence[StageWork]) -> tuple[int, ...]:
        if not isinstance(layout.stages, StageRule):
            return _listed(layout.stages, self.names)
        if layout.num_stages > len(units):
            raise LayoutError(
                f"a stage has a unit, but {layout} has {layout.num_stages} stages and the model {len(units)} units; "
                "use fewer stages"
            )
        weights = self._weights(units, layout.stages)
        heaviest = max(weights) or 1.0
        shape = tuple((round(weight / heaviest, 3), sum(1 for _ in run)) for weight, run in itertools.groupby(weights))
        key = (layout.num_stages, layout.pp, GENERATORS[layout.schedule].placement if layout.pp > 1 else None, shape)
        if key not in self._ends:
            ends = even_ends(weights, layout.num_stages)
            if layout.num_stages > layout.pp > 1:
                ranks = placement(layout.schedule, num_ranks=layout.pp, chunks=layout.chunks)
                owner = {stage: place for place, stages in enumerate(ranks) for stage in stages}
                of_stage = [owner[stage] for stage in range(layout.num_stages)]
                own = [True] * len(units)
                ends = evened_ends(ends, weights, [1.0] * (len(units) + 1), own, of_stage)
            self._ends[key] = tuple(ends)
        return self._ends[key]

    def _weights(self, units: Sequence[StageWork], rule: StageRule) -> list[float]:
        """Equal units are weighed once."""
        known: dict[int, float] = {}
        for unit in units:
            if id(unit.kernels) not in known:
                known[id(unit.kernels)] = self._weight_of(unit, rule)
        return [known[id(unit.kernels)] for unit in units]

    def _weight_of(self, unit: StageWork, rule: StageRule) -> float:
        if rule is StageRule.DEPTH:
            return 1.0
        return float(unit.parameters) if rule is StageRule.PARAMETERS else self._weight(unit)


def even_ends(weights: Sequence[float], num_parts: int) -> list[int]:
    """Ends of consecutive parts, none empty: the heaviest as light as can be, the others as even as that allows.

    By bisection: parts are filled up to a limit (Iqbal 1991); then every end goes next to its share of the whole.
    """
    sums = [0.0, *itertools.accumulate(weights)]
    low, high = max(max(weights), sums[-1] / num_parts), sums[-1]
    for _ in range(40):
        limit = (low + high) / 2
        low, high = (low, limit) if _latest(sums, num_parts, limit) is not None else (limit, high)
    first = _latest(sums, num_parts, high * (1 + 1e-9))
    assert first is not None  # one part of everything is within its sum
    ends: list[int] = []
    for part in range(num_parts - 1):
        start = ends[-1] if ends else 0
        most = bisect.bisect_right(sums, sums[start] + high * (1 + 1e-9)) - 1
        wanted = bisect.bisect_left(sums, sums[-1] * (part + 1) / num_parts)
        near = min((wanted - 1, wanted), key=lambda end: abs(sums[end] - sums[-1] * (part + 1) / num_parts))
        latest = min(most, len(weights) - (num_parts - part - 1))
        ends.append(min(max(near, start + 1, first[part]), latest))
    return [*ends, len(weights)]


def _latest(sums: Sequence[float], num_parts: int, limit: float) -> list[int] | None:
    """The earliest end of each part from which the parts behind it still take the rest within the limit; None where
    they cannot."""
    end = len(sums) - 1
    ends = [end]
    for part in range(num_parts - 1, 0, -1):
        start = bisect.bisect_left(sums, sums[end] - limit * (1 + 1e-12))
        end = max(min(start, end - 1), part)
        if sums[ends[-1]] - sums[end] > limit * (1 + 1e-9):
            return None
        ends.append(end)
    return ends[::-1] if sums[ends[-1]] <= limit * (1 + 1e-9) else None


def merged_work(stage: int, units: Sequence[StageWork]) -> StageWork:
    """What a stage of these units does and holds; what crosses is that of the last one (and sent to the next stage)."""
    counted = _counted(units)

    def joined(of: Callable[[StageWork], Sequence[Kernel]]) -> tuple[Kernel, ...]:
        return tuple(kernel.times(times) for unit, times in counted for kernel in of(unit))

    exchanges = tuple(
        dataclasses.replace(exchange, count=exchange.count * times)
        for unit, times in counted
        for exchange in unit.exchanges
    )
    return StageWork(
        stage=stage,
        parameters=sum(unit.parameters for unit in units),
        trained=sum(unit.trained for unit in units),
        kernels=joined(lambda unit: unit.kernels),
        recomputed=joined(lambda unit: unit.recomputed),
        accumulation=joined(lambda unit: unit.accumulation),
        exchanges=exchanges,
        expert_parameters=sum(unit.expert_parameters for unit in units),
        expert_trained=sum(unit.expert_trained for unit in units),
        shared_parameters=sum(unit.shared_parameters for unit in units),
        unit_parameters=tuple(itertools.chain.from_iterable(unit.unit_parameters for unit in units)),
        saved_bytes=sum(unit.saved_bytes for unit in units),
        unit_saved_bytes=max(unit.unit_saved_bytes or unit.saved_bytes for unit in units),
        weight_bytes=sum(unit.weight_bytes for unit in units),
        transient_bytes=max(unit.transient_bytes for unit in units),
        logits_bytes=sum(unit.logits_bytes for unit in units),
        sends={stage + 1: sum(units[-1].sends.values())} if units[-1].sends else {},
        gradients={stage + 1: sum(units[-1].gradients.values())} if units[-1].gradients else {},
    )


def _numbered(work: StageWork, stage: int, *, last: bool) -> StageWork:
    """The same work on another stage."""
    sends = {} if last else {stage + 1: sum(work.sends.values())}
    gradients = {} if last else {stage + 1: sum(work.gradients.values())}
    return dataclasses.replace(work, stage=stage, sends=sends, gradients=gradients)


def _runs(units: Sequence[StageWork]) -> tuple[tuple[int, int], ...]:
    """(what a unit is, how many of it follow each other)."""
    return tuple((kind, sum(1 for _ in run)) for kind, run in itertools.groupby(id(unit.kernels) for unit in units))


def _counted(units: Sequence[StageWork]) -> list[tuple[StageWork, int]]:
    """Units of one kind together, wherever they stand."""
    kinds: dict[tuple[int, int, int], list[StageWork]] = {}
    for unit in units:
        kinds.setdefault((id(unit.kernels), id(unit.recomputed), id(unit.exchanges)), []).append(unit)
    return [(own[0], len(own)) for own in kinds.values()]


def _flops(unit: StageWork) -> float:
    return float(sum(kernel.flops * kernel.count for kernel in unit.kernels)) or float(unit.parameters)


def _listed(stages: Sequence[Sequence[str]], names: Sequence[str]) -> tuple[int, ...]:
    """Ends of stages that are listed by unit."""
    calls = [f"{name}#0" for name in names]
    place = {call: index for index, call in enumerate(calls)}
    ends, start = [], 0
    for texts in stages:
        own = [place[call] for text in texts for call in expand(text, calls)]
        if own != list(range(start, start + len(own))):
            raise LayoutError(
                f"stages of a chain list its units in order, each once, but one lists {', '.join(texts)} where "
                f"{names[start] if start < len(names) else 'nothing'} comes next; reorder them"
            )
        start += len(own)
        ends.append(start)
    if start != len(names):
        raise LayoutError(f"every unit stands on a stage, but those from {names[start]} on do not; add them")
    return tuple(ends)
