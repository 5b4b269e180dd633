"""Stages and shares of a batch for devices that are not equal: by their speed and memory, exactly.

    stages   the slowest place of the pipeline as fast as can be: dynamic programming over (devices of each kind that
             are used up, units that are placed), so that the order of the devices is chosen too
    shares   micro-batches go one by one to the replica that would be done first: optimal, as all are alike (list
             scheduling on uniform machines, Graham 1969)

Numbers in, numbers out; refuses to know models and clusters.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from shardwise.errors import LayoutError
from shardwise.quantities import format_bytes

__all__ = ["Kind", "UnevenStages", "micro_batch_shares", "uneven_stages"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of device. seconds[u]: of unit u on it, forward and backward of a micro-batch; places: of the pipeline
    that stand on such devices; memory_bytes: of one."""

    seconds: tuple[float, ...]
    places: int
    memory_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnevenStages:
    """ends[p]: the unit behind the last one of place p; kinds[p]: the kind of device that it stands on; seconds: of the
    slowest place."""

    ends: tuple[int, ...]
    kinds: tuple[int, ...]
    seconds: float


def uneven_stages(
    kinds: Sequence[Kind],
    *,
    held_bytes: Sequence[float],
    saved_bytes: Sequence[float],
    num_micro_batches: int,
    in_order: bool = False,
) -> UnevenStages:
    """The partition of a row of units over all places, one stage each, of the least slowest place that fits.

    held_bytes[u]: for good; saved_bytes[u]: of one micro-batch, of which place p keeps min(places - p,
    `num_micro_batches`), as 1F1B does. in_order: kinds stand as they are given, else as is best.
    Raises `LayoutError` where there are fewer units than places, or nothing fits.
    """
    num_units, num_places = len(held_bytes), sum(kind.places for kind in kinds)
    if num_units < num_places:
        raise LayoutError(
            f"every place has a unit, but there are {num_units} for {num_places} places; use a smaller pp"
        )
    sums = [np.array([0.0, *itertools.accumulate(kind.seconds)]) for kind in kinds]
    held = np.array([0.0, *itertools.accumulate(held_bytes)])
    saved = np.array([0.0, *itertools.accumulate(saved_bytes)])
    used0 = (0,) * len(kinds)
    start = np.full(num_units + 1, np.inf)
    start[0] = 0.0
    best: dict[tuple[int, ...], np.ndarray] = {used0: start}
    came: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    for used in _orders([kind.places for kind in kinds], in_order=in_order):
        place = sum(used) - 1
        in_flight = min(num_places - place, num_micro_batches)
        values, chosen, before = (np.full(num_units + 1, fill) for fill in (np.inf, -1, -1))
        for index, kind in enumerate(kinds):
            earlier = tuple(n - (at == index) for at, n in enumerate(used))
            if earlier not in best:
                continue
            value, behind = _one_more(best[earlier], sums[index], held, saved * in_flight, kind.memory_bytes)
            better = value < values
            values[better], chosen[better], before[better] = value[better], index, behind[better]
        best[used], came[used] = values, (chosen.astype(int), before.astype(int))
    full = tuple(kind.places for kind in kinds)
    if not np.isfinite(best[full][num_units]):
        most = max(kind.memory_bytes for kind in kinds)
        raise LayoutError(
            f"no partition of {num_units} units over {num_places} places fits: they hold {format_bytes(held[-1])} and "
            f"the largest device {format_bytes(most)}; use a larger pp, or divide more"
        )
    return _read_back(came, full, num_units, float(best[full][num_units]))


def micro_batch_shares(seconds: Sequence[float], num_micro_batches: int) -> tuple[int, ...]:
    """[r]: micro-batches of replica r, of `num_micro_batches` in all, so that the last one is done as early as can be.

    seconds[r]: of one on replica r. Every replica gets at least one. Raises `LayoutError` where there are fewer.
    """
    if num_micro_batches < len(seconds):
        raise LayoutError(
            f"every replica has a micro-batch, but {num_micro_batches} are fewer than {len(seconds)}; use more"
        )
    shares = [1] * len(seconds)
    queue = [(2 * each, index) for index, each in enumerate(seconds)]
    heapq.heapify(queue)
    for _ in range(num_micro_batches - len(seconds)):
        _, index = heapq.heappop(queue)
        shares[index] += 1
        heapq.heappush(queue, ((shares[index] + 1) * seconds[index], index))
    return tuple(shares)


def _orders(places: Sequence[int], *, in_order: bool) -> list[tuple[int, ...]]:
    """How many devices of each kind are used up, every state that is reached, in the order of their sum."""
    states = list(itertools.product(*(range(n + 1) for n in places)))
    if in_order:
        states = [s for s in states if all(s[at] == places[at] or not any(s[at + 1 :]) for at in range(len(s)))]
    return sorted((state for state in states if any(state)), key=sum)


def _one_more(
    before: np.ndarray, seconds: np.ndarray, held: np.ndarray, saved: np.ndarray, memory_bytes: float
) -> tuple[np.ndarray, np.ndarray]:
    """[j]: the least slowest place when one more takes the units i to j, and that i. Shapes (units + 1,)."""
    own = seconds[None, :] - seconds[:, None]  # (i, j)
    nbytes = (held + saved)[None, :] - (held + saved)[:, None]
    slowest = np.maximum(before[:, None], own)
    i, j = np.indices(own.shape)
    slowest[(i >= j) | (nbytes > memory_bytes)] = np.inf
    behind = slowest.argmin(axis=0)
    return slowest[behind, np.arange(len(before))], behind


def _read_back(
    came: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]], full: tuple[int, ...], units: int, seconds: float
) -> UnevenStages:
    ends, kinds, used, end = [], [], full, units
    while any(used):
        chosen, before = came[used]
        ends.append(end)
        kinds.append(int(chosen[end]))
        used, end = tuple(n - (at == chosen[end]) for at, n in enumerate(used)), int(before[end])
    return UnevenStages(ends=tuple(ends[::-1]), kinds=tuple(kinds[::-1]), seconds=seconds)
