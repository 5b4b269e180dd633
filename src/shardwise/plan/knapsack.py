"""The cheapest of several options for every item, so that weighted sums stay below their limits. Exact.

Items are taken one after another; of partial choices only those stay that no other one beats in cost and in all sums
(Nemhauser and Ullmann 1969). Items that are alike are told apart by nothing, so that a model of equal layers has few
partial choices. Where there are too many, sums are counted in thousandths of the smallest limit, rounded up: what is
found then keeps its limits, and costs at most what a limit a few thousandths smaller would. Knows numbers only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

__all__ = ["Item", "Limit", "Option", "choose"]

_MOST = 3_000  # partial choices that are kept
_GRAINS = 2_000.0


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One way for an item: its cost, and what it adds to each sum."""

    name: str
    cost: float
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """Exactly one of `options` is taken."""

    name: str
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """sum(weights[i] * sums[i]) <= bound."""

    weights: tuple[int, ...]
    bound: float


@dataclasses.dataclass(slots=True)
class _Partial:
    """A choice for the first items, linked to the one for those before."""

    cost: float
    sizes: tuple[float, ...]
    before: _Partial | None
    name: str


def choose(items: Sequence[Item], limits: Sequence[Limit]) -> dict[str, str] | None:
    """Item -> the name of its option in the cheapest choice within all limits; None where there is none."""
    if not items:
        return {} if all(limit.bound >= 0 for limit in limits) else None
    ordered = sorted(items, key=lambda item: [(option.sizes, option.cost) for option in item.options])
    grains = [0.0] * len(items[0].options[0].sizes)
    while True:
        found = _search(ordered, limits, grains)
        if found is not None or not any(grains):
            break
        grains = [grain / 4 if grain > 1 else 0.0 for grain in grains]
    return None if found is None else _named(found, ordered)


def _search(items: Sequence[Item], limits: Sequence[Limit], grains: list[float]) -> _Partial | None:
    least = _least_to_come(items)
    partials = [_Partial(0.0, (0.0,) * len(grains), None, "")]
    for number, item in enumerate(items):
        grown = [
            _Partial(
                known.cost + option.cost,
                tuple(_rounded(a + b, grain) for a, b, grain in zip(known.sizes, option.sizes, grains, strict=True)),
                known,
                option.name,
            )
            for known in partials
            for option in item.options
        ]
        partials = _undominated([each for each in grown if _within(each.sizes, least[number + 1], limits)])
        if len(partials) > _MOST and not any(grains):
            smallest = min(limit.bound / max(1, max(limit.weights)) for limit in limits)
            grains[:] = [max(1.0, smallest / _GRAINS)] * len(grains)
            return _search(items, limits, grains)
    return min(partials, key=lambda each: each.cost, default=None)


def _rounded(size: float, grain: float) -> float:
    return math.ceil(size / grain) * grain if grain else size


def _least_to_come(items: Sequence[Item]) -> list[tuple[float, ...]]:
    """Of each sum the least that items from number i on add."""
    dims = len(items[0].options[0].sizes)
    found = [(0.0,) * dims]
    for item in reversed(items):
        least = [min(option.sizes[dim] for option in item.options) for dim in range(dims)]
        found.append(tuple(a + b for a, b in zip(found[-1], least, strict=True)))
    return found[::-1]


def _within(sizes: Sequence[float], least: Sequence[float], limits: Sequence[Limit]) -> bool:
    return all(
        sum(weight * (a + b) for weight, a, b in zip(limit.weights, sizes, least, strict=True)) <= limit.bound
        for limit in limits
    )


def _undominated(partials: list[_Partial]) -> list[_Partial]:
    """None costs more than another one, and has larger sums."""
    partials.sort(key=lambda each: (each.cost, each.sizes))
    kept: list[_Partial] = []
    if partials and len(partials[0].sizes) == 1:
        smallest = math.inf
        for each in partials:
            if each.sizes[0] < smallest:
                smallest = each.sizes[0]
                kept.append(each)
        return kept
    for each in partials:
        if not any(all(a <= b for a, b in zip(other.sizes, each.sizes, strict=True)) for other in kept):
            kept.append(each)
    return kept


def _named(found: _Partial, items: Sequence[Item]) -> dict[str, str]:
    names: dict[str, str] = {}
    for item in reversed(items):
        names[item.name] = found.name
        assert found.before is not None
        found = found.before
    return names
