"""`shardwise plan --cluster`: layouts that are searched or priced on a cluster, as tables, as JSON, as pictures.

Prints what `plan.search` and `plan.what_if` found. Refuses to know how a model was traced.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

from shardwise.describe.cluster import Cluster
from shardwise.errors import ConfigError
from shardwise.layout import Layout
from shardwise.plan.changes import changes_of
from shardwise.plan.coarse import Works
from shardwise.plan.explain_search import explain_ranked, ranking_table
from shardwise.plan.job import Job
from shardwise.plan.pricer import Pricer
from shardwise.plan.ranked import Objective, Ranked
from shardwise.plan.scaling_svg import scaling_svg
from shardwise.plan.search import Search, search_layouts
from shardwise.plan.space import Axes, Limits
from shardwise.plan.unequal_replicas import Shares, shares_of
from shardwise.plan.what_if import Scaling, parse_sweep, scaling_table, sweep
from shardwise.schedule import draw
from shardwise.schedule.svg import to_svg

__all__ = ["Asked", "assess", "searched", "swept"]

_DRAWN = 88  # columns of the timeline
_CHANGES = 12
_WIDTH = 100
_WORTH = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for."""

    objective: Objective = Objective.TIME
    top: int = 5
    as_json: bool = False
    svg: str = ""


def searched(works: Works, limits: Limits, cluster: Cluster, job: Job, asked: Asked) -> Layout:
    """Searches all layouts of the cluster, prints the best and returns the first. Raises as `search_layouts` does."""
    found = search_layouts(works, cluster, job, limits=limits, objective=asked.objective, top=asked.top)
    _picture(found[0].ranked, asked)
    shares = _shares(found.explorer.pricer, found[0].ranked)
    layout = found[0].layout if shares is None or shares.layout is None else shares.layout
    if asked.as_json:
        print(json.dumps({**_of_search(found), **_of_shares(shares)}))
        return layout
    print("\n".join(_head(cluster, job)))
    print(
        f"searched      {found.num_layouts} layouts are valid, {found.num_priced} were estimated in full; "
        f"{'the others are slower by the coarse estimate' if found.complete else 'others may be faster'}\n"
    )
    print("\n".join(ranking_table(found.ranking)))
    print()
    print(found[0].explain())
    _tell_shares(shares)
    _timeline(found[0].ranked)
    _changes([str(change) for change in found[0].changes()])
    print(f'\nuse it with   --set "layout={layout}"')
    return layout


def assess(works: Works, limits: Limits, cluster: Cluster, job: Job, layout: Layout, asked: Asked) -> Layout:
    """Prices one layout and prints the verdict, and what a change would buy. Returns it with the stages that it has on
    this cluster."""
    pricer = Pricer(works, cluster, job, limits)
    ranked = pricer(layout, exact=True)
    axes = Axes.of(limits, cluster, devices=layout.world_size, global_batch=job.global_batch)
    changes = changes_of(ranked.layout, pricer, axes)
    shares = _shares(pricer, ranked)
    _picture(ranked, asked)
    if asked.as_json:
        told = {"layout": _of_ranked(ranked), "changes": [str(change) for change in changes], **_of_shares(shares)}
        print(json.dumps(told))
        return ranked.layout
    print("\n".join(_head(cluster, job)))
    print(explain_ranked([ranked], 0, ()))
    _tell_shares(shares)
    _timeline(ranked)
    _changes([str(change) for change in changes])
    return ranked.layout


def swept(works: Works, limits: Limits, cluster: Cluster, job: Job, text: str, asked: Asked) -> None:
    """Strong and weak scaling over numbers of devices."""
    both = sweep(works, cluster, job, limits=limits, devices=parse_sweep(text), objective=asked.objective)
    if asked.svg:
        _write(asked.svg, scaling_svg(both, title=f"samples a second, {cluster.name or 'cluster'}"))
    if asked.as_json:
        print(json.dumps({scaling.kind: _of_scaling(scaling) for scaling in both}))
        return
    for scaling in both:
        print("\n".join(scaling_table(scaling)))
        print()


def _head(cluster: Cluster, job: Job) -> list[str]:
    kinds = ", ".join(f"{hosts.count} × {hosts.devices} {hosts.device.name}" for hosts in cluster.hosts)
    return [f"cluster       {cluster.name or 'by hand'}: {kinds}; {job.global_batch} samples a step"]


def _shares(pricer: Pricer, ranked: Ranked) -> Shares | None:
    """Where devices are not equal and replicas have no pipeline: a batch dealt out by speed, if it is worth it."""
    layout = ranked.layout
    whole = all(hosts.num_devices % (layout.tp * layout.cp) == 0 for hosts in pricer.cluster.hosts)
    if pricer.cluster.is_uniform or layout.pp > 1 or layout.num_replicas == 1 or not whole:
        return None
    shares = shares_of(pricer, layout)
    return shares if layout.shares is not None or shares.step_s < _WORTH * shares.even_s else None


def _tell_shares(shares: Shares | None) -> None:
    if shares is None:
        return
    how = "replicas that divide state have equal ones" if shares.layout is None else f"layout={shares.layout}"
    print(textwrap.fill(f"shares        of the batch by device speed ({how}): {shares}", _WIDTH))


def _of_shares(shares: Shares | None) -> dict[str, object]:
    if shares is None:
        return {}
    told = {"layout": None if shares.layout is None else str(shares.layout), "step_s": shares.step_s}
    return {"shares": {**told, "even_step_s": shares.even_s}}


def _timeline(ranked: Ranked) -> None:
    timeline = ranked.price.timeline
    if timeline is not None and ranked.layout.pp > 1:
        print()
        print(draw(timeline, width=_DRAWN))


def _changes(told: list[str]) -> None:
    print("\nwhat one change would buy")
    for text in told[:_CHANGES]:
        print(textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="      "))
    if len(told) > _CHANGES:
        print(f"  … and {len(told) - _CHANGES} more, which cost more or are not valid")


def _picture(ranked: Ranked, asked: Asked) -> None:
    if not asked.svg:
        return
    if ranked.price.timeline is None:
        raise ConfigError(
            f"a picture shows a step whose every action was simulated, but {ranked.layout} has too many; give a "
            "smaller batch, or leave out --svg"
        )
    _write(asked.svg, to_svg(ranked.price.timeline, title=str(ranked.layout)))


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--svg names a file that can be written, but {path}: {error.strerror}; name another"
        ) from error


def _of_search(found: Search) -> dict[str, Any]:
    return {
        "objective": str(found.objective),
        "layouts": found.num_layouts,
        "priced": found.num_priced,
        "complete": found.complete,
        "ranking": [_of_ranked(ranked) for ranked in found.ranking],
        "rejected": [
            {"rule": str(rule), "count": count, "example": example.axes, "reason": example.reason}
            for rule, count, example in found.rejected
        ],
        "changes": [str(change) for change in found[0].changes()],
    }


def _of_ranked(ranked: Ranked) -> dict[str, Any]:
    price = ranked.price
    return {
        "layout": str(ranked.layout),
        "devices": ranked.devices,
        "step_s": price.step_s,
        "mfu": price.mfu,
        "usd": ranked.usd,
        "margin": ranked.margin,
        "fits": ranked.fits,
        "has_room": ranked.has_room,
        "peak_bytes": ranked.peak_bytes,
        "room_bytes": ranked.room_bytes,
        "time": [dataclasses.asdict(lines) for lines in price.time],
        "memory": [dataclasses.asdict(lines) for lines in price.memory],
    }


def _of_scaling(scaling: Scaling) -> list[dict[str, Any]]:
    return [
        {
            "devices": point.devices,
            "global_batch": point.global_batch,
            "samples_per_s": point.samples_per_s,
            "efficiency": scaling.efficiency(point),
            "best": None if point.best is None else _of_ranked(point.best),
            "why_not": point.why_not,
        }
        for point in scaling.points
    ]
