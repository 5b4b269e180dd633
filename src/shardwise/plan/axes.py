"""What a search tries: what of a model can be divided, and the values of every axis that may be worth it.

Knows rules of thumb for how far axes go, schedules and divisors; refuses to know which products of values are layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from shardwise.describe.cluster import Cluster
from shardwise.describe.tensor import SequenceParallel
from shardwise.errors import LayoutError
from shardwise.layout import Context, Offload, Unshard
from shardwise.schedule import GENERATORS

__all__ = ["Axes", "Limits", "divisors"]

_MOST_SHARDS, _MOST_CONTEXTS, _MOST_PLACES = 64, 32, 64  # larger ones exchange or wait more than they compute
_LEAST_TOKENS = 512  # of a sample, of each rank that divides it
_FLUSHED = ("1f1b", "zb-h1", "zb-h2", "interleaved", "zb-v", "zb-v-half", "zb-v-min", "dualpipe-v")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What of a model can be divided, by the names that messages use.

    stages: consecutive parts with parameters, at most. tensor, context: numbers that tp and cp divide, such as
    {"heads": 32, "heads of keys and values": 8} and {"tokens": 4096}; an empty `tensor` or `context`: the axis stays 1.
    sizes: of an axis, what was found to divide the model, in place of such numbers.
    experts: what ep divides; 0: there are none. contexts: how ranks of cp can attend to each other's tokens.
    sequence_parallel: whether shards can deal out tokens between layers.
    recompute: the words that the model can do; budgets: whether a number of bytes, too.
    names: of the parts, in order, by which a layout lists stages; empty: stages are balanced as the layout's rule says,
    also where devices are not equal.
    """

    stages: int
    tensor: Mapping[str, int] = dataclasses.field(default_factory=dict)
    context: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    experts: int = 0
    contexts: tuple[Context, ...] = (Context.RING,)
    sequence_parallel: bool = True
    recompute: tuple[str, ...] = ("none", "selective", "full")
    budgets: bool = False
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise LayoutError(f"a model has at least one stage, but stages={self.stages}; count its unit calls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """The values that are tried. devices: of the whole layout; ways: (schedule, stages a rank); samples: of a
    micro-batch; states: how replicas divide the state of training: 0 not, 1 to 3 ZeRO's stages among all of them,
    "hybrid": stage 3 inside a host; unshard: how long what is divided is whole."""

    devices: tuple[int, ...]
    tp: tuple[int, ...]
    cp: tuple[int, ...]
    ep: tuple[int, ...]
    pp: tuple[int, ...]
    samples: tuple[int, ...] = (1, 2, 4, 8)
    ways: tuple[tuple[str, int], ...] = ()
    states: tuple[int | str, ...] = (0, 1, 2, 3, "hybrid")
    unshard: tuple[Unshard, ...] = (Unshard.MICRO_BATCH, Unshard.STEP)
    context: tuple[Context, ...] = (Context.RING,)
    recompute: tuple[str, ...] = ("none", "selective", "full")
    sequence_parallel: tuple[SequenceParallel, ...] = (SequenceParallel.OFF, SequenceParallel.ON)
    offload: tuple[Offload, ...] = (Offload.NONE,)

    def __post_init__(self) -> None:
        if not self.ways:
            object.__setattr__(self, "ways", _ways(max(self.pp, default=1), 1))
        for field in dataclasses.fields(self):
            if not getattr(self, name := field.name):
                raise LayoutError(f"a search tries at least one value of every axis, but {name} has none; name one")

    @classmethod
    def of(cls, limits: Limits, cluster: Cluster, *, devices: int | None = None, global_batch: int) -> Axes:
        """All that may be worth it: every divisor of the number of devices, every schedule that flushes."""
        count = cluster.num_devices if devices is None else devices
        sizes = divisors(count)
        deepest = min(limits.stages, count, _MOST_PLACES)
        contexts = min(_MOST_CONTEXTS, min(limits.context.values(), default=1) // _LEAST_TOKENS)
        return cls(
            devices=(count,),
            tp=_tried(limits, "tp", sizes, _MOST_SHARDS if limits.tensor else 1),
            cp=_tried(limits, "cp", sizes, max(1, contexts) if limits.context else 1),
            ep=_tried(limits, "ep", sizes, max(1, limits.experts)),
            pp=tuple(n for n in sizes if n <= deepest),
            samples=tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= min(global_batch, _samples(count))),
            ways=_ways(deepest, limits.stages),
            recompute=limits.recompute,
            sequence_parallel=(SequenceParallel.OFF, SequenceParallel.ON)[: 1 + limits.sequence_parallel],
            context=limits.contexts,
            offload=tuple(Offload) if all(hosts.memory is not None for hosts in cluster.hosts) else (Offload.NONE,),
        )


def divisors(number: int) -> tuple[int, ...]:
    """Ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def _samples(devices: int) -> int:
    """Of a micro-batch, at most: few devices have small models, whose micro-batches may be large."""
    return 64 if devices <= 64 else 8


def _tried(limits: Limits, axis: str, sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """What was found to divide the model; else all up to `most`."""
    found = limits.sizes.get(axis)
    return tuple(n for n in sizes if (n <= most if found is None else n == 1 or n in found))


def _ways(deepest: int, stages: int) -> tuple[tuple[str, int], ...]:
    """Schedules with each number of stages a rank, up to eight."""
    ways: list[tuple[str, int]] = []
    for name in _FLUSHED:
        fewest, most = GENERATORS[name].chunks
        counts = [chunks for chunks in (1, 2, 4, 8) if chunks >= fewest and (most is None or chunks <= most)]
        if name == "zb-h1":
            counts = [1]
        ways += [(name, chunks) for chunks in counts if deepest > 1 and 2 * chunks <= max(stages, 2)]
    return tuple(ways) or (("1f1b", 1),)
