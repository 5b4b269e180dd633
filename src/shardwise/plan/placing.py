"""Where the groups of an axis stand on the links of a cluster: how many of a group's ranks share a host, a pod.

    Span(sizes=(8, 4))    a group of 32: 8 ranks on every host, 4 hosts

Ranks are placed as `layout.ranks` numbers them: tp innermost, then cp, then replicas, the pipeline outermost; another
order of the axes is an argument. Arithmetic alone: refuses to know bytes and seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from shardwise.describe.cluster import Cluster
from shardwise.errors import LayoutError
from shardwise.layout import Layout

__all__ = ["ORDER", "Span", "Spans", "send_level", "spans_of"]

ORDER = ("tp", "cp", "ep", "fsdp", "dp", "pp")  # innermost first


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """sizes[level]: ranks of the group (level 0), its hosts (1), its pods (2), under one of the next level."""

    sizes: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return math.prod(self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """The span of every group that exchanges. replicas: all that hold the same part; states: that divide the state of
    training; outer: that hold the same share of it; expert_copies, expert_outer: replicas and outer of experts."""

    tp: Span
    cp: Span
    ep: Span
    states: Span
    outer: Span
    replicas: Span
    expert_copies: Span
    expert_outer: Span
    pipeline_crosses: bool  # whether any stage sends to another host


def spans_of(layout: Layout, cluster: Cluster, *, order: Sequence[str] = ORDER) -> Spans:
    """The spans of a layout's groups. Raises `LayoutError` where `order` does not name each axis once."""
    if sorted(order) != sorted(ORDER):
        raise LayoutError(
            f"ranks are placed by the axes {', '.join(ORDER)}, each once, but got {tuple(order)}; mend it"
        )
    degree = {name: getattr(layout, name) for name in ORDER}
    # Gradients are summed over every rank that has other tokens: those that divide sequences have the same weights.
    groups = {
        "tp": ("tp",),
        "cp": ("cp",),
        "ep": ("ep",),
        "states": ("fsdp",),
        "outer": ("cp", "ep", "dp"),
        "replicas": ("cp", "ep", "fsdp", "dp"),
        "expert_copies": ("cp", "fsdp", "dp"),
        "expert_outer": ("cp", "dp"),
    }
    joined = tuple(link.ranks for link in cluster.links)
    spans = {name: _span(axes, degree, order, joined) for name, axes in groups.items()}
    crosses = any(send_level(layout, cluster, place, order=order) > 0 for place in range(layout.pp - 1))
    return Spans(**spans, pipeline_crosses=crosses)


def send_level(
    layout: Layout, cluster: Cluster, place: int, target: int | None = None, *, order: Sequence[str] = ORDER
) -> int:
    """The highest level of a link that messages from one place of the pipeline to `target` (the next) take."""
    axes = order[: order.index("pp")]
    stride = math.prod(getattr(layout, name) for name in axes)
    others = math.prod(getattr(layout, name) for name in order[order.index("pp") + 1 :])
    last = (others - 1) * stride * layout.pp + stride - 1
    there = place * stride
    back = (place + 1 if target is None else target) * stride
    found = 0
    for level, link in enumerate(cluster.links[:-1]):
        size = link.ranks or 1
        if any((there + rank) // size != (back + rank) // size for rank in {0, stride - 1, last}):
            found = level + 1
    return found


def _span(axes: tuple[str, ...], degree: dict[str, int], order: Sequence[str], joined: tuple[int | None, ...]) -> Span:
    """Members of the group of rank 0 are counted by the host, and by the pod, that they stand on."""
    members = [0]
    stride = 1
    for name in order:
        if name in axes:
            members = [member + stride * index for index in range(degree[name]) for member in members]
        stride *= degree[name]
    sizes: list[int] = []
    parts = len(members)
    for size in joined[:-1]:
        domains = len({member // (size or 1) for member in members})
        sizes.append(-(-parts // domains))
        parts = domains
    return Span(sizes=(*sizes, parts))
