"""Which units are computed again in the backward, so that what a rank keeps of activations stays within its bytes.

    unit       none: all that autograd saves   selective: products with weights   full: the inputs
    keeps      saved_bytes                     product_bytes + output_bytes       output_bytes (of the unit before)
    costs      nothing                         the rest of its forward            its forward

A rank keeps n(t) micro-batches of each of its stages at time t of its schedule, and, behind the backward of inputs,
what the gradients of weights are made of. Of all choices that stay below the bytes at every t the cheapest is taken: a
knapsack (Kellerer, Pferschy, Pisinger 2004, chapter 11: multiple choice), solved exactly by its undominated sums.
Arithmetic on a profile, a cut and a schedule; refuses to know tensors, and how a unit is computed again.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence

from shardwise.describe.profile import CallProfile, ModelProfile
from shardwise.errors import ConfigError, LayoutError
from shardwise.plan.cut import Cut
from shardwise.plan.knapsack import Item, Limit, Option, choose
from shardwise.plan.work import FLOPS_PER_BYTE
from shardwise.quantities import format_bytes, parse_bytes
from shardwise.schedule import Action, Kind, Schedule

__all__ = ["How", "RecomputePlan", "computed_again", "kept_bytes", "plan_recompute", "profile_with"]


class How(enum.StrEnum):
    """How much of a unit is computed again."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecomputePlan:
    """What is computed again. Units that are not named keep all. Bytes are a rank's at its peak, by position."""

    units: Mapping[str, How]
    kept_bytes: tuple[int, ...] = ()
    without_bytes: tuple[int, ...] = ()  # where nothing is computed again
    flops: int = 0  # that a micro-batch costs more, over all stages
    forward_flops: int = 0

    def __bool__(self) -> bool:
        return bool(self.units)

    def lines(self) -> list[str]:
        """In words, one line for every way of doing it."""
        told: list[str] = []
        for how in (How.FULL, How.SELECTIVE):
            names = [name for name, own in self.units.items() if own is how]
            if names:
                what = "all but their inputs" if how is How.FULL else "all but products with weights"
                told.append(f"{len(names)} units compute again {what}: {_some(names)}")
        if not told:
            return ["no unit computes anything again: all that autograd saves fits"]
        share = self.flops / self.forward_flops if self.forward_flops else 0.0
        kept, without = max(self.kept_bytes), max(self.without_bytes)
        told.append(
            f"the fullest rank keeps {format_bytes(kept)} instead of {format_bytes(without)} of activations, and "
            f"products cost {share:.0%} of a forward more"
        )
        return told


def plan_recompute(profile: ModelProfile, cut: Cut, schedule: Schedule, recompute: str) -> RecomputePlan:
    """What `Layout.recompute` asks for: "none", "full", "selective", or the bytes that a rank may keep.

    Saved bytes of the profile are those of one micro-batch. Raises LayoutError where even full recompute of all units
    keeps more than the bytes.
    """
    if recompute == How.NONE:
        return RecomputePlan(units={})
    stages_of = _stages_of(profile, cut)
    items = {unit: _item(profile, unit, stages, cut) for unit, stages in stages_of.items()}
    if recompute in (How.FULL, How.SELECTIVE):
        chosen = {unit: how for unit, item in items.items() if (how := How(recompute)) in item.names}
    else:
        chosen = _within(profile, cut, schedule, items, _bytes_of(recompute))
    units = {unit: how for unit, how in chosen.items() if how is not How.NONE}
    nothing = dict.fromkeys(items, How.NONE)
    return RecomputePlan(
        units=units,
        kept_bytes=_peaks(profile, cut, schedule, items, nothing | chosen),
        without_bytes=_peaks(profile, cut, schedule, items, nothing),
        flops=sum(_flops(call, units.get(call.unit, How.NONE)) for call in profile.calls),
        forward_flops=profile.forward_flops,
    )


def computed_again(profile: ModelProfile, cut: Cut, recompute: str) -> dict[str, How]:
    """Units that "full" or "selective" computes again, as far as they keep less for it; {} for "none"."""
    how = How(recompute)
    options = {unit: _item(profile, unit, stages, cut).names for unit, stages in _stages_of(profile, cut).items()}
    return {} if how is How.NONE else {unit: how for unit, names in options.items() if how in names}


def kept_bytes(call: CallProfile, how: How) -> int:
    """What a call keeps for its backward."""
    return _kept(call, how)


def profile_with(profile: ModelProfile, plan: RecomputePlan) -> ModelProfile:
    """The profile of a model that computes units again: less is saved, and the backward does the work."""
    if not plan:
        return profile
    calls = tuple(_with(call, plan.units.get(call.unit, How.NONE)) for call in profile.calls)
    return dataclasses.replace(profile, calls=calls)


def _with(call: CallProfile, how: How) -> CallProfile:
    if how is How.NONE:
        return call
    again = _flops(call, how)
    share = again / call.forward_flops if call.forward_flops else 1.0
    seconds = call.backward_s
    if seconds is not None and call.forward_s is not None:
        seconds += share * call.forward_s
    kept = _kept(call, how)
    return dataclasses.replace(call, saved_bytes=kept, backward_flops=call.backward_flops + again, backward_s=seconds)


def _kept(call: CallProfile, how: How) -> int:
    if how is How.NONE:
        return call.saved_bytes
    if how is How.FULL:
        return min(call.output_bytes, call.saved_bytes)
    return min(call.saved_bytes, (call.product_bytes or 0) + call.output_bytes)


def _flops(call: CallProfile, how: How) -> int:
    if how is How.NONE:
        return 0
    return call.forward_flops if how is How.FULL else call.forward_flops - (call.product_flops or 0)


def _cost(call: CallProfile, how: How) -> float:
    """In flops: products, and what is written again at the pace of memory."""
    return _flops(call, how) + FLOPS_PER_BYTE * (call.saved_bytes - _kept(call, how))


def _options(calls: Sequence[CallProfile]) -> tuple[How, ...]:
    """Those that keep less than the one before; a unit whose products nobody counted is computed again in full."""
    found = [How.NONE]
    counted = all(call.product_bytes is not None for call in calls)
    for how in (How.SELECTIVE, How.FULL) if counted else (How.FULL,):
        if sum(_kept(call, how) for call in calls) < sum(_kept(call, found[-1]) for call in calls):
            found.append(how)
    return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True)
class _Unit:
    """What a unit keeps on each of its stages, and costs, by how it is computed again."""

    names: tuple[How, ...]
    kept: Mapping[How, Mapping[int, int]]
    cost: Mapping[How, float]


def _item(profile: ModelProfile, unit: str, stages: Mapping[int, int], cut: Cut) -> _Unit:
    calls = [call for call in profile.calls if call.unit == unit and call.node in stages]
    names = _options(calls)
    kept: dict[How, dict[int, int]] = {how: {} for how in names}
    for how in names:
        for call in calls:
            stage = stages[call.node]
            kept[how][stage] = kept[how].get(stage, 0) + _kept(call, how)
    return _Unit(names, kept, {how: sum(_cost(call, how) for call in calls) for how in names})


def _stages_of(profile: ModelProfile, cut: Cut) -> dict[str, dict[int, int]]:
    """Unit -> node of a call -> its stage, in the order of the forward."""
    found: dict[str, dict[int, int]] = {}
    of_node = {node: stage.stage for stage in cut.stages for node in stage.calls}
    for call in profile.calls:
        if call.node in of_node:
            found.setdefault(call.unit, {})[call.node] = of_node[call.node]
    return found


def _bytes_of(text: str) -> int:
    try:
        return round(parse_bytes(text))
    except ConfigError as error:
        raise LayoutError(f"recompute: {error}") from error


# -- within a number of bytes -------------------------------------------------------------------


def _within(
    profile: ModelProfile, cut: Cut, schedule: Schedule, items: Mapping[str, _Unit], limit: int
) -> dict[str, How]:
    """The cheapest choice for every rank; units with calls on several ranks are settled by the first of them."""
    chosen: dict[str, How] = {}
    owners = schedule.owners
    for position, own in enumerate(schedule.ranks):
        here = {unit: item for unit, item in items.items() if unit not in chosen and _first(item, owners) == position}
        settled = {unit: how for unit, how in chosen.items() if any(stage in own for stage in items[unit].kept[how])}
        fixed = _fixed(profile, cut, own)
        for unit, how in settled.items():
            for stage in set(own) & set(items[unit].kept[how]):
                fixed[stage] += items[unit].kept[how][stage]
        weights = {stage: _weight_bytes(profile, cut, stage) for stage in own}
        moments = _moments(schedule, position, own)
        if _largest(moments, own, here, fixed, weights, How.NONE) <= limit:
            chosen |= dict.fromkeys(here, How.NONE)
            continue
        transient = max(_largest_kept(item, How.NONE) - _largest_kept(item, item.names[-1]) for item in here.values())
        limits = [
            Limit(
                weights=tuple(kept),
                bound=limit
                - transient
                - sum(n * fixed[s] + m * weights[s] for s, n, m in zip(own, kept, waiting, strict=True)),
            )
            for kept, waiting in moments
        ]
        picked = choose([_as_item(unit, item, own) for unit, item in here.items()], limits)
        if picked is None:
            least = _largest(moments, own, here, fixed, weights, How.FULL) + transient
            raise LayoutError(
                f"a rank keeps at most what recompute says, but position {position} of the pipeline keeps "
                f"{format_bytes(least)} with every unit computed again, and recompute={format_bytes(limit)}; give it "
                f"{format_bytes(least)} or more, or use more micro-batches, which are smaller"
            )
        chosen |= {unit: How(name) for unit, name in picked.items()}
    return chosen


def _first(item: _Unit, owners: Sequence[int]) -> int:
    return min(owners[stage] for stage in item.kept[item.names[0]])


def _as_item(unit: str, item: _Unit, own: Sequence[int]) -> Item:
    options = tuple(
        Option(str(how), item.cost[how], tuple(item.kept[how].get(stage, 0) for stage in own)) for how in item.names
    )
    return Item(name=unit, options=options)


def _largest_kept(item: _Unit, how: How) -> int:
    return max(item.kept[how].values())


def _fixed(profile: ModelProfile, cut: Cut, own: Iterable[int]) -> dict[int, int]:
    """What a micro-batch keeps on a stage whatever is computed again: of glue, and what was received."""
    found: dict[int, int] = {}
    for stage in own:
        here = cut.stages[stage]
        glue = sum(part.saved_bytes for part in profile.glue if part.node in here.computes)
        found[stage] = glue + sum(profile.flow.values[value].nbytes for value, _ in here.receives)
    return found


def _weight_bytes(profile: ModelProfile, cut: Cut, stage: int) -> int:
    """What waits for the gradients of weights, where they are put off."""
    calls = [call for call in profile.calls if call.node in cut.stages[stage].calls]
    return sum(call.saved_bytes if call.weight_bytes is None else call.weight_bytes for call in calls)


Moments = list[tuple[tuple[int, ...], tuple[int, ...]]]  # micro-batches kept whole, and waiting for W, of each stage


def _moments(schedule: Schedule, position: int, own: Sequence[int]) -> Moments:
    """The times at which a rank keeps most: how many micro-batches of each of its stages; no time that another one
    covers."""
    place = {stage: index for index, stage in enumerate(own)}
    kept, waiting = [0] * len(own), [0] * len(own)
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for action in schedule.actions[position]:
        if not isinstance(action, Action):
            continue
        at = place[action.stage]
        if action.kind is Kind.F:
            kept[at] += 1
        elif action.kind is Kind.B:
            kept[at] -= 1
        elif action.kind is Kind.I:
            kept[at], waiting[at] = kept[at] - 1, waiting[at] + 1
        elif action.kind is Kind.W:
            waiting[at] -= 1
        found.add((tuple(kept), tuple(waiting)))
    return [time for time in found if not any(_covers(other, time) for other in found if other != time)]


def _covers(other: tuple[tuple[int, ...], ...], time: tuple[tuple[int, ...], ...]) -> bool:
    return all(a >= b for one, two in zip(other, time, strict=True) for a, b in zip(one, two, strict=True))


def _largest(
    moments: Moments,
    own: Sequence[int],
    items: Mapping[str, _Unit],
    fixed: Mapping[int, int],
    weights: Mapping[int, int],
    how: How | Mapping[str, How],
) -> int:
    """What the rank keeps at most. `how`: of every unit, or the most that each can do below it."""
    totals = dict(fixed)
    for unit, item in items.items():
        wanted = how if isinstance(how, How) else how[unit]
        usable = wanted if wanted in item.names else item.names[-1] if wanted is How.FULL else item.names[0]
        for stage, nbytes in item.kept[usable].items():
            if stage in totals:
                totals[stage] += nbytes
    return max(
        sum(n * totals[s] + m * weights[s] for s, n, m in zip(own, kept, waiting, strict=True))
        for kept, waiting in moments
    )


def _peaks(
    profile: ModelProfile, cut: Cut, schedule: Schedule, items: Mapping[str, _Unit], how: Mapping[str, How]
) -> tuple[int, ...]:
    return tuple(
        _largest(
            _moments(schedule, position, own),
            own,
            items,
            _fixed(profile, cut, own),
            {stage: _weight_bytes(profile, cut, stage) for stage in own},
            how,
        )
        for position, own in enumerate(schedule.ranks)
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
