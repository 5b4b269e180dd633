"""Seconds of collectives and messages: alpha-beta by algorithm and size on the links that a group spans.

For n ranks, S bytes, b bytes a second and a seconds a hop (Thakur et al. 2005; Patarasuk and Yuan 2009):

    ring            all-gather, reduce-scatter   (n-1) (S/n / b + a)       all-reduce   twice that
    tree            all-reduce                   2 S/b + 2 log2(hosts) hops, two trees (Sanders et al. 2009)
    in the switch   all-reduce inside a host     S/b (n+1)/n: everything goes up once and comes down once
    pairwise        all-to-all                   (n-1)/n of what one rank sends, by the level of the receiver

A ring through k hosts with g ranks each on it is as many rings as there are adapters among its ranks: between hosts it
has g times one device's share. In each of its n - 1 turns somebody sends to the next host, and all wait for that hop.
Of ring and tree the faster is taken, where the link has trees. Arrays in, arrays out. Refuses to know what is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shardwise.describe.cluster import Cluster, Link
from shardwise.describe.kernels import ExchangeKind
from shardwise.plan.compute import FloatArray
from shardwise.plan.placing import Span

__all__ = ["exchange_seconds", "exchange_seconds_of", "send_seconds"]

SWITCH_RANKS = 4  # groups of more ranks than this are added up in the switch (NCCL; see collective_benchmarks_nccl.csv)
KINDS = {kind: index for index, kind in enumerate(ExchangeKind)}


def exchange_seconds(kind: ExchangeKind, nbytes: float, span: Span, cluster: Cluster) -> float:
    """Seconds of one exchange of `nbytes` (see `ExchangeKind`) in a group that spans `span`."""
    kinds = np.array([KINDS[kind]])
    return float(exchange_seconds_of(kinds, np.array([float(nbytes)]), np.array([span.sizes]), cluster)[0])


def exchange_seconds_of(
    kinds: npt.NDArray[np.int64],
    nbytes: FloatArray,
    sizes: npt.NDArray[np.int64],
    cluster: Cluster,
) -> FloatArray:
    """[i]: seconds of exchange i of kind `list(ExchangeKind)[kinds[i]]` in a group of sizes[i] (exchanges, levels)."""
    ranks = np.prod(sizes, axis=1).astype(np.float64)
    half = np.where(ranks > 1, _ring(nbytes, ranks, sizes, cluster.links), 0.0)
    pairwise = np.where(ranks > 1, _pairwise(nbytes, ranks, sizes, cluster.links), 0.0)
    reduced = np.minimum(
        2 * half, np.where(_has_trees(sizes, cluster.links), _tree(nbytes, sizes, cluster.links), np.inf)
    )
    reduced = np.where(
        _in_switch(sizes, cluster.links[0]), _switched(nbytes, ranks, sizes, cluster.links, half), reduced
    )
    reduced = np.where(ranks > 1, reduced, 0.0)
    choices = {
        ExchangeKind.ALL_REDUCE: reduced,
        ExchangeKind.ALL_GATHER: half,
        ExchangeKind.REDUCE_SCATTER: half,
        ExchangeKind.ALL_TO_ALL: pairwise,
        ExchangeKind.SEND: np.where(ranks > 1, _message(nbytes, sizes, cluster.links), 0.0),
    }
    found = np.choose(kinds, [choices[kind] for kind in ExchangeKind])
    met = np.where(kinds == KINDS[ExchangeKind.SEND], 0.0, _meeting(sizes, cluster.links))
    return np.asarray(found + met, dtype=np.float64)


def send_seconds(nbytes: float, level: int, cluster: Cluster) -> float:
    """Seconds of one message over a link of that level."""
    link = cluster.links[min(level, len(cluster.links) - 1)]
    return link.latency_s + (nbytes + link.half_bytes) / (link.bytes_per_s * link.efficiency)


def _ring(
    nbytes: FloatArray,
    ranks: FloatArray,
    sizes: npt.NDArray[np.int64],
    links: Sequence[Link],
) -> FloatArray:
    """(n-1)/n of the bytes over the slowest level that the ring passes; in every turn a hop over the highest one."""
    slowest = np.zeros(len(nbytes))
    hops = np.zeros(len(nbytes))
    below = np.ones(len(nbytes))  # ranks under one member of this level
    share = (ranks - 1) / ranks
    for level, link in enumerate(_padded(links, sizes.shape[1])):
        members = sizes[:, level].astype(np.float64)
        rate = link.bytes_per_s * link.efficiency * (below if level else 1.0)
        seconds = share * (nbytes + link.half_bytes) / rate
        slowest = np.where(members > 1, np.maximum(slowest, seconds), slowest)
        hops = np.where(members > 1, (ranks - 1) * link.latency_s, hops)
        below = below * members
    return slowest + hops


def _has_trees(sizes: npt.NDArray[np.int64], links: Sequence[Link]) -> npt.NDArray[np.bool_]:
    """Whether all levels that a group spans have them."""
    lacks = np.array([not link.trees for link in _padded(links, sizes.shape[1])])
    return np.asarray(~((sizes > 1) & lacks).any(axis=1), dtype=np.bool_)


def _tree(nbytes: FloatArray, sizes: npt.NDArray[np.int64], links: Sequence[Link]) -> FloatArray:
    """Up and down: inside a host a chain, among hosts two trees that each carry half of the bytes."""
    slowest = np.zeros(len(nbytes))
    hops = np.zeros(len(nbytes))
    below = np.ones(len(nbytes))
    for level, link in enumerate(_padded(links, sizes.shape[1])):
        members = sizes[:, level].astype(np.float64)
        rate = link.bytes_per_s * link.efficiency * (below if level else 1.0)
        slowest = np.where(members > 1, np.maximum(slowest, 2 * (nbytes + link.half_bytes) / rate), slowest)
        steps = members - 1 if level == 0 else np.ceil(np.log2(np.maximum(members, 1)))
        hops += 2 * steps * link.latency_s
        below = below * members
    return slowest + hops


def _switched(
    nbytes: FloatArray, ranks: FloatArray, sizes: npt.NDArray[np.int64], links: Sequence[Link], half: FloatArray
) -> FloatArray:
    """In the switch of a host; of several hosts, behind a reduce-scatter and before an all-gather inside each."""
    link = links[0]
    inside = (ranks + 1) / ranks * (nbytes + link.half_bytes) / (link.bytes_per_s * link.efficiency)
    return np.minimum(2 * half, inside + 2 * link.latency_s)


def _meeting(sizes: npt.NDArray[np.int64], links: Sequence[Link]) -> FloatArray:
    """On every level that a group spans."""
    waits = np.array([link.meeting_s for link in _padded(links, sizes.shape[1])])
    return np.asarray((sizes > 1) @ waits, dtype=np.float64)


def _in_switch(sizes: npt.NDArray[np.int64], link: Link) -> npt.NDArray[np.bool_]:
    if not link.reduces:
        return np.zeros(len(sizes), dtype=np.bool_)
    alone = np.prod(sizes[:, 1:], axis=1) == 1
    return np.asarray(alone & (sizes[:, 0] > SWITCH_RANKS), dtype=np.bool_)


def _pairwise(
    nbytes: FloatArray,
    ranks: FloatArray,
    sizes: npt.NDArray[np.int64],
    links: Sequence[Link],
) -> FloatArray:
    """What goes to ranks of the same host takes its link, the rest that between hosts; both run beside each other."""
    slowest = np.zeros(len(nbytes))
    hops = np.zeros(len(nbytes))
    below = np.ones(len(nbytes))
    for level, link in enumerate(_padded(links, sizes.shape[1])):
        members = sizes[:, level].astype(np.float64)
        partners = below * (members - 1)
        seconds = (partners / ranks * nbytes + link.half_bytes) / (link.bytes_per_s * link.efficiency)
        slowest = np.where(members > 1, np.maximum(slowest, seconds), slowest)
        hops += (members > 1) * link.latency_s * np.log2(np.maximum(partners, 1) + 1)
        below = below * members
    return slowest + hops


def _message(nbytes: FloatArray, sizes: npt.NDArray[np.int64], links: Sequence[Link]) -> FloatArray:
    found = np.zeros(len(nbytes))
    for level, link in enumerate(_padded(links, sizes.shape[1])):
        seconds = link.latency_s + (nbytes + link.half_bytes) / (link.bytes_per_s * link.efficiency)
        found = np.where(sizes[:, level] > 1, seconds, found)
    return found


def _padded(links: Sequence[Link], levels: int) -> tuple[Link, ...]:
    """A link for each level of the sizes: the last again where there are fewer."""
    return (*links[:levels], *((links[-1],) * max(0, levels - len(links))))
