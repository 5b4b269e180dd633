"""The layouts of a model on a machine, best first: the space, its prices, and why every other layout is not among them.

    found = search(works, cluster, job, limits=limits)      works(layout, samples) -> what every stage does
    found[0].layout, found[0].price, print(found[0].explain())

Closed forms order the whole space; the best are simulated, which decides. Refuses to know models: what can be divided,
and what a stage does, is given.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from shardwise.describe.cluster import Cluster
from shardwise.errors import ConfigError, LayoutError
from shardwise.layout import Layout
from shardwise.plan.best_of import best_of
from shardwise.plan.changes import Change, changes_of
from shardwise.plan.coarse import Works, coarse_of
from shardwise.plan.explain_search import explain_ranked
from shardwise.plan.explore import Explorer
from shardwise.plan.job import Job
from shardwise.plan.pricer import Pricer
from shardwise.plan.ranked import Objective, Ranked, Rejected, Rule, value_of
from shardwise.plan.resize import halves
from shardwise.plan.room import LEAST_ROOM
from shardwise.plan.space import Axes, Limits, space_of
from shardwise.quantities import format_bytes, format_seconds

__all__ = ["Plan", "Search", "search_layouts"]

_MOST = 1500  # prices of one search, where its space has more than `explore` prices whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One place of a ranking."""

    search: Search
    place: int

    @property
    def ranked(self) -> Ranked:
        return self.search.ranking[self.place]

    @property
    def layout(self) -> Layout:
        return self.ranked.layout

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.ranked.price.step_s

    def explain(self) -> str:
        """Layout, memory and time per rank, what the next one would cost, what was rejected; at most 100 columns."""
        return explain_ranked(self.search.ranking, self.place, self.search.rejected, self.search.objective)

    def changes(self) -> tuple[Change, ...]:
        """What one change would buy."""
        search = self.search
        return changes_of(self.layout, search.explorer.pricer, search.explorer.space.axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(Sequence[Plan]):
    """Plans, best first. `complete`: whether no layout that was not priced can be among them, as far as prices of
    their meshes tell; `num_priced` of `num_layouts` were."""

    ranking: tuple[Ranked, ...]
    objective: Objective
    explorer: Explorer
    complete: bool

    @overload
    def __getitem__(self, place: int) -> Plan: ...

    @overload
    def __getitem__(self, place: slice) -> list[Plan]: ...

    def __getitem__(self, place: int | slice) -> Plan | list[Plan]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        number = range(len(self.ranking))[place]
        return Plan(search=self, place=number)

    def __len__(self) -> int:
        return len(self.ranking)

    @property
    def num_layouts(self) -> int:
        """That keep all rules."""
        return len(self.explorer.space)

    @property
    def num_priced(self) -> int:
        return len(self.explorer.priced)

    @property
    def rejected(self) -> tuple[tuple[str, int, Rejected], ...]:
        """(rule, how many, an example) of all that is not in the ranking; the most frequent first."""
        counts: Counter[str] = Counter()
        examples: dict[str, Rejected] = {}
        for refused in self.explorer.space.refused:
            counts[refused.rule] += 1
            examples.setdefault(refused.rule, Rejected(axes=refused.axes, rule=refused.rule, reason=refused.reason))
        for rule, rows in self._rows_by_rule():
            counts[rule] += len(rows)
            examples[rule] = self._rejected(self._nearest(rows, rule), rule)
        return tuple((rule, count, examples[rule]) for rule, count in counts.most_common())

    def rejections(self, rule: str | None = None) -> Iterator[Rejected]:
        """Each of them, with its reason; those of one rule where it is named."""
        for refused in self.explorer.space.refused:
            if rule in (None, refused.rule):
                yield Rejected(axes=refused.axes, rule=refused.rule, reason=refused.reason)
        for own, rows in self._rows_by_rule():
            if rule in (None, own):
                yield from (self._rejected(row, own) for row in rows)

    def _rows_by_rule(self) -> list[tuple[Rule, list[int]]]:
        explorer = self.explorer
        shown = {ranked.layout for ranked in self.ranking}
        rules: dict[Rule, list[int]] = {}
        bounded = explorer.bounded()
        for row in np.flatnonzero(bounded).tolist():
            rules.setdefault(Rule.MEMORY_BOUND, []).append(row)
        for row in np.flatnonzero(~bounded).tolist():
            if row in explorer.priced and explorer.priced[row].layout in shown:
                continue
            rules.setdefault(explorer.rule_of(row), []).append(row)
        return list(rules.items())

    def _nearest(self, rows: list[int], rule: Rule) -> int:
        """The row that would have been next."""
        explorer = self.explorer
        if rule in (Rule.BEHIND, Rule.MEMORY_BOUND):
            key = self._expected_s if rule is Rule.BEHIND else explorer.coarse.at_least_bytes
            return rows[int(key[np.array(rows)].argmin())]
        if rule is Rule.MEMORY:
            return max(rows, key=lambda row: explorer.priced[row].room_bytes)
        if rule in (Rule.SLOWER, Rule.ROOM):
            return min(rows, key=lambda row: explorer.priced[row].price.step_s)
        return rows[0]

    @functools.cached_property
    def _expected_s(self) -> np.ndarray:
        return self.explorer.expected_s()

    def _rejected(self, row: int, rule: Rule) -> Rejected:
        expected_s = float(self._expected_s[row]) if rule is Rule.BEHIND else 0.0
        reason, numbers = _reason(self, row, rule, expected_s)
        return Rejected(axes=str(self.explorer.space.layout(row)), rule=rule, reason=reason, numbers=numbers)


def search_layouts(
    works: Works,
    cluster: Cluster,
    job: Job,
    *,
    limits: Limits,
    axes: Axes | None = None,
    objective: Objective | str = Objective.TIME,
    top: int = 5,
    most: int = _MOST,
) -> Search:
    """The `top` best layouts of the cluster by the objective (all of a front), each one simulated.

    axes: what is tried; None: all that may be worth it, on all devices, where cost counts on half of them, a quarter …
        too. most: layouts that are priced, where the space is larger.
    Raises `LayoutError` where nothing fits, with what would need least; `ConfigError` where cost is asked for and a
    device has no price.
    """
    objective = Objective(objective)
    if axes is None:
        axes = Axes.of(limits, cluster, global_batch=job.global_batch)
        if objective in (Objective.COST, Objective.PARETO_COST):
            axes = dataclasses.replace(axes, devices=halves(cluster))
    per_host = min(hosts.devices for hosts in cluster.hosts)
    space = space_of(limits, axes, global_batch=job.global_batch, per_host=per_host)
    if not len(space):
        raise LayoutError(_nothing(space.refused, cluster))
    coarse = coarse_of(space, works, cluster, job, stages=limits.stages)
    explorer = Explorer(space, Pricer(works, cluster, job, limits), coarse)
    if objective in (Objective.COST, Objective.PARETO_COST) and explorer.pricer.usd_rate(max(axes.devices)) is None:
        raise ConfigError(
            f"cost needs the price of a device, but {cluster.name or 'the cluster'} has none; give usd_per_hour"
        )
    ranking, complete = best_of(explorer, objective, top=top, most=most)
    if not ranking and any(ranked.fits for ranked in explorer.priced.values()):
        explorer.take_what_fits()
        ranking, complete = best_of(explorer, objective, top=top, most=most)
    if not ranking:
        raise LayoutError(_too_large(explorer))
    return Search(ranking=ranking, objective=objective, explorer=explorer, complete=complete)


def _reason(search: Search, row: int, rule: Rule, expected_s: float) -> tuple[str, dict[str, float]]:
    explorer, best = search.explorer, search.ranking[0]
    place = explorer.space.places[explorer.space.place[row]]
    memory = float(explorer.pricer.memory_of(place.mesh.devices))
    if rule is Rule.FAILED:
        return explorer.failed[row], {}
    if rule is Rule.MEMORY_BOUND:
        needs = float(explorer.coarse.at_least_bytes[row])
        text = f"the fullest rank needs {format_bytes(needs)} of {format_bytes(memory)} at the very least"
        return text, {"needs_bytes": needs, "memory_bytes": memory}
    if rule is Rule.DOMINATED:
        other = explorer.space.layout(explorer.dominated[row])
        told = f"recompute={other.recompute}" + (f" and offload={other.offload}" if explorer.moves else "")
        return f"{told} fits too, and recomputes or offloads less", {}
    if rule is Rule.BEHIND:
        return (
            f"about {format_seconds(expected_s)} by the coarse estimate, the best {format_seconds(best.price.step_s)}",
            {"about_s": expected_s, "best_s": best.price.step_s},
        )
    ranked = explorer.priced[row]
    if rule is Rule.MEMORY:
        if ranked.room_bytes >= 0:
            lacks = ranked.host_lacks_bytes
            return f"host memory is {format_bytes(lacks)} short of what is offloaded", {"host_lacks_bytes": lacks}
        lacks = -ranked.room_bytes
        text = f"{format_bytes(ranked.peak_bytes)} of {format_bytes(memory)}: {format_bytes(lacks)} too much"
        return text, {"needs_bytes": ranked.peak_bytes, "memory_bytes": memory, "lacks_bytes": lacks}
    if rule is Rule.ROOM:
        text = (
            f"{format_bytes(ranked.peak_bytes)} of {format_bytes(memory)}: {format_bytes(ranked.room_bytes)} "
            f"({ranked.price.room:.1%}) free, less than {LEAST_ROOM:.0%}, which other layouts leave"
        )
        return text, {"room": ranked.price.room, "least": LEAST_ROOM}
    objective = Objective.TIME if search.objective.startswith("pareto") else search.objective
    margin = value_of(ranked, objective) / value_of(best, objective) - 1
    told = f"{format_seconds(ranked.price.step_s)} and {format_bytes(ranked.peak_bytes)}"
    text = f"{told}: {margin:.1%} behind in {objective}"
    return text, {"step_s": ranked.price.step_s, "peak_bytes": ranked.peak_bytes, "margin": margin}


def _nothing(refused: Sequence[object], cluster: Cluster) -> str:
    some = "; ".join(str(getattr(each, "reason", each)) for each in itertools.islice(refused, 3))
    return (
        f"no layout of {cluster.num_devices} devices divides this model and its batch: {some}; use another number of "
        "devices, or another batch"
    )


def _too_large(explorer: Explorer) -> str:
    if not explorer.priced:
        least = float(explorer.coarse.at_least_bytes.min())
        row = int(explorer.coarse.at_least_bytes.argmin())
        layout = explorer.space.layout(row)
        memory = explorer.pricer.memory_of(layout.world_size)
        return (
            f"no layout fits: a rank needs {format_bytes(least)} at the very least, with {layout}, and a device has "
            f"{format_bytes(memory)}; use more devices, or larger ones"
        )
    nearest = max(explorer.priced.values(), key=lambda ranked: min(ranked.room_bytes, -ranked.host_lacks_bytes))
    if nearest.room_bytes >= 0:
        return (
            f"no layout that was priced fits: the nearest is {nearest.layout}, whose hosts "
            f"have {format_bytes(nearest.host_lacks_bytes)} too little memory; use more devices, or larger ones"
        )
    memory = explorer.pricer.memory_of(nearest.devices)
    return (
        f"no layout that was priced fits: the nearest is {nearest.layout}, which needs "
        f"{format_bytes(nearest.peak_bytes)} of {format_bytes(memory)}, {format_bytes(-nearest.room_bytes)} too much; "
        "use more devices, or larger ones"
    )
