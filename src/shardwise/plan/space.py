"""The layouts that a search looks at: every product of axes that the rules allow, as columns of small numbers.

A layout is made of a row only when somebody asks for it: a cluster of 16,384 devices has hundreds of thousands. What
the rules refuse is kept with the numbers that broke them. Knows rules and divisors; refuses to know seconds and bytes.

    Mesh    devices = dp · fsdp · ep · cp · tp · pp
    Place   a mesh, what replicas divide among them, and samples of a micro-batch
    row     a place, a schedule with its stages a rank, recompute, sequence parallel, offload
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from shardwise.describe.cluster import Cluster
from shardwise.describe.tensor import SequenceParallel
from shardwise.errors import LayoutError
from shardwise.layout import Layout, Offload, Unshard
from shardwise.schedule import GENERATORS

__all__ = ["Axes", "Limits", "Mesh", "Place", "Refused", "Space", "broken_rule", "divisors", "space_of"]

_MOST_SHARDS, _MOST_CONTEXTS, _MOST_PLACES = 64, 32, 64  # larger ones exchange or wait more than they compute
_LEAST_TOKENS = 512  # of a sample, of each rank that divides it
_FLUSHED = ("1f1b", "zb-h1", "zb-h2", "interleaved", "zb-v", "zb-v-half", "zb-v-min", "dualpipe-v")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What of a model can be divided, by the names that messages use.

    stages: consecutive parts with parameters, at most. tensor, context: numbers that tp and cp divide, such as
    {"heads": 32, "heads of keys and values": 8} and {"tokens": 4096}; an empty `tensor` or `context`: the axis stays 1.
    experts: what ep divides; 0: there are none. sequence_parallel: whether shards can deal out tokens between layers.
    recompute: the words that the model can do. names: of the parts, in order, by which a layout lists stages; empty:
    stages are balanced as the layout's rule says, also where devices are not equal.
    """

    stages: int
    tensor: Mapping[str, int] = dataclasses.field(default_factory=dict)
    context: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    experts: int = 0
    sequence_parallel: bool = True
    recompute: tuple[str, ...] = ("none", "selective", "full")
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise LayoutError(f"a model has at least one stage, but stages={self.stages}; count its unit calls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """The values that are tried. devices: of the whole layout; ways: (schedule, stages a rank); samples: of a
    micro-batch; states: how replicas divide the state of training: 0 not, 1 to 3 ZeRO's stages among all of them,
    "hybrid": stage 3 inside a host."""

    devices: tuple[int, ...]
    tp: tuple[int, ...]
    cp: tuple[int, ...]
    ep: tuple[int, ...]
    pp: tuple[int, ...]
    samples: tuple[int, ...] = (1, 2, 4, 8)
    ways: tuple[tuple[str, int], ...] = ()
    states: tuple[int | str, ...] = (0, 1, 2, 3, "hybrid")
    recompute: tuple[str, ...] = ("none", "selective", "full")
    sequence_parallel: tuple[SequenceParallel, ...] = (SequenceParallel.OFF, SequenceParallel.ON)
    offload: tuple[Offload, ...] = (Offload.NONE,)

    def __post_init__(self) -> None:
        if not self.ways:
            object.__setattr__(self, "ways", _ways(max(self.pp, default=1), 1))
        for name in ("devices", "tp", "cp", "ep", "pp", "samples", "states", "recompute", "offload"):
            if not getattr(self, name):
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
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """The axes that have links of their own; `outer` replicas besides those of experts."""

    devices: int
    tp: int
    cp: int
    ep: int
    pp: int

    @property
    def outer(self) -> int:
        return self.devices // (self.tp * self.cp * self.ep * self.pp)

    def __str__(self) -> str:
        return ",".join(f"{name}={getattr(self, name)}" for name in ("tp", "cp", "ep", "pp"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A mesh with its replicas: `dp` times `fsdp` of them (times ep), which divide state as `zero` says."""

    mesh: Mesh
    dp: int
    fsdp: int
    zero: int
    unshard: Unshard | None
    samples: int
    micro_batches: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """What broke a rule: the axes in words, the rule's name, and the sentence with numbers."""

    axes: str
    rule: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Rows, as columns that index `places` and the values of `axes`; and what was refused."""

    axes: Axes
    places: tuple[Place, ...]
    place: np.ndarray
    way: np.ndarray
    recompute: np.ndarray
    sequence: np.ndarray
    offload: np.ndarray
    refused: tuple[Refused, ...]

    def __len__(self) -> int:
        return len(self.place)

    def layout(self, row: int) -> Layout:
        """The layout of a row."""
        place = self.places[self.place[row]]
        mesh = place.mesh
        schedule, chunks = self.axes.ways[self.way[row]] if mesh.pp > 1 else ("1f1b", 1)
        fewest = GENERATORS[schedule].chunks[0]
        return Layout(
            dp=place.dp,
            fsdp=place.fsdp,
            zero=place.zero,
            unshard=place.unshard,
            tp=mesh.tp,
            cp=mesh.cp,
            ep=mesh.ep,
            pp=mesh.pp,
            micro_batches=place.micro_batches,
            schedule=schedule,
            chunks=None if chunks == fewest else chunks,
            recompute=self.axes.recompute[self.recompute[row]],
            sequence_parallel=self.axes.sequence_parallel[self.sequence[row]],
            offload=self.axes.offload[self.offload[row]],
        )

    def of_places(self, name: str) -> np.ndarray:
        """A number of each row's place: a field of it or of its mesh."""
        numbers = [getattr(p.mesh if name in ("tp", "cp", "ep", "pp", "devices") else p, name) for p in self.places]
        return np.asarray(np.array(numbers, dtype=np.int64)[self.place])


def space_of(limits: Limits, axes: Axes, *, global_batch: int, per_host: int) -> Space:
    """All rows that the rules allow. per_host: devices of a host, which a hybrid division of state stays inside."""
    refused: list[Refused] = []
    places = [
        place
        for mesh in _meshes(limits, axes, refused)
        for place in _places(mesh, axes, global_batch=global_batch, per_host=per_host, refused=refused)
    ]
    ways = {mesh: _ways_of(mesh, limits, axes, refused) for mesh in dict.fromkeys(place.mesh for place in places)}
    columns = [_rows(index, place, ways[place.mesh], axes) for index, place in enumerate(places)]
    table = np.concatenate(columns) if columns else np.zeros((0, 5), dtype=np.int32)
    return Space(
        axes=axes,
        places=tuple(places),
        place=table[:, 0],
        way=table[:, 1],
        recompute=table[:, 2],
        sequence=table[:, 3],
        offload=table[:, 4],
        refused=tuple(refused),
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


def _meshes(limits: Limits, axes: Axes, refused: list[Refused]) -> Iterator[Mesh]:
    for devices, tp, cp, ep, pp in itertools.product(axes.devices, axes.tp, axes.cp, axes.ep, axes.pp):
        if devices % (tp * cp * ep * pp):
            continue  # no layout of so many devices
        mesh = Mesh(devices=devices, tp=tp, cp=cp, ep=ep, pp=pp)
        broken = broken_rule(mesh, limits)
        if broken is None:
            yield mesh
        else:
            refused.append(Refused(axes=str(mesh), rule=broken[0], reason=broken[1]))


def broken_rule(mesh: Mesh, limits: Limits) -> tuple[str, str] | None:
    """The first rule that a mesh breaks, and the sentence with its numbers."""
    for axis, size in (("tp", mesh.tp), ("cp", mesh.cp), ("ep", mesh.ep)):
        found = limits.sizes.get(axis)
        if found is not None and size > 1 and size not in found:
            told = ", ".join(map(str, (1, *found)))
            return f"{axis} divides the model", f"{axis}={size} was not found to divide the model, {told} were"
    for axis, size, numbers in (("tp", mesh.tp, limits.tensor), ("cp", mesh.cp, limits.context)):
        for name, number in numbers.items():
            if number % size:
                return f"{axis} divides {name}", f"{axis}={size} does not divide {number} {name}"
    if mesh.ep > 1 and "ep" not in limits.sizes and (limits.experts == 0 or limits.experts % mesh.ep):
        return "ep divides experts", f"ep={mesh.ep} does not divide {limits.experts} experts"
    if mesh.pp > limits.stages:
        return "a stage has a unit", f"pp={mesh.pp} is more than the {limits.stages} units that can be stages"
    return None


def _places(mesh: Mesh, axes: Axes, *, global_batch: int, per_host: int, refused: list[Refused]) -> Iterator[Place]:
    replicas = mesh.outer * mesh.ep
    for samples in axes.samples:
        micro_batches, rest = divmod(global_batch, replicas * samples)
        if rest or not micro_batches:
            more = f"{replicas} replicas × {samples} samples of a micro-batch"
            reason = f"{more} do not divide a batch of {global_batch}"
            refused.append(Refused(axes=f"{mesh},samples={samples}", rule="micro-batches are whole", reason=reason))
            continue
        for dp, fsdp, zero, unshard in _states(mesh, axes, per_host):
            yield Place(
                mesh=mesh,
                dp=dp,
                fsdp=fsdp,
                zero=zero,
                unshard=unshard,
                samples=samples,
                micro_batches=micro_batches,
            )


_State = tuple[int, int, int, Unshard | None]


def _states(mesh: Mesh, axes: Axes, per_host: int) -> list[_State]:
    """(dp, fsdp, zero, unshard): the ways to divide the state among the replicas of a mesh, each once."""
    outer = mesh.outer
    inside = per_host // (mesh.tp * mesh.cp * mesh.ep) if outer > 1 else 1
    streamed = Unshard.MICRO_BATCH if mesh.pp > 1 else None
    found: dict[_State, None] = {}
    for state in axes.states:
        if state == 0 or outer == 1:
            found[(outer, 1, 3, None)] = None
        elif isinstance(state, int):
            if mesh.pp == 1 or state != 2:
                found[(1, outer, state, streamed if state > 1 else None)] = None
        elif 1 < inside < outer and outer % inside == 0:
            found[(outer // inside, inside, 3, streamed)] = None
    return list(found)


def _ways_of(mesh: Mesh, limits: Limits, axes: Axes, refused: list[Refused]) -> list[int]:
    """Indices of the schedules that the mesh can run. Without a pipeline there is nothing to choose."""
    if mesh.pp == 1:
        return [0]
    fitting = []
    for index, (name, chunks) in enumerate(axes.ways):
        if mesh.pp * chunks <= limits.stages:
            fitting.append(index)
        else:
            reason = f"pp={mesh.pp} × {chunks} stages a rank are more than the {limits.stages} units that can be stages"
            refused.append(Refused(axes=f"{mesh},schedule={name}", rule="a stage has a unit", reason=reason))
    return fitting


def _rows(index: int, place: Place, ways: list[int], axes: Axes) -> np.ndarray:
    """(rows, 5): place, way, recompute, sequence, offload."""
    mesh = place.mesh
    dealt = mesh.tp > 1 and mesh.cp == 1 and mesh.ep == 1
    sequences = [i for i, word in enumerate(axes.sequence_parallel) if dealt or word is SequenceParallel.OFF]
    grid = np.meshgrid([index], ways, range(len(axes.recompute)), sequences, range(len(axes.offload)), indexing="ij")
    return np.stack([column.ravel() for column in grid], axis=1).astype(np.int32)
