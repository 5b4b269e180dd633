"""The layouts that a search looks at: every product of axes that the rules allow, as columns of small numbers.

A layout is made of a row only when somebody asks for it: a cluster of 16,384 devices has hundreds of thousands. What
the rules refuse is kept with the numbers that broke them. Knows rules and divisors; refuses to know seconds and bytes.

    Mesh    devices = dp · fsdp · ep · cp · tp · pp
    Place   a mesh, what replicas divide among them and for how long, and samples of a micro-batch
    row     a place, a schedule with its stages a rank, recompute, sequence parallel, offload, how cp attends
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from shardwise.describe.tensor import SequenceParallel
from shardwise.layout import Layout, Offload, Unshard
from shardwise.plan.axes import Axes, Limits, divisors
from shardwise.schedule import GENERATORS

__all__ = ["Axes", "Limits", "Mesh", "Place", "Refused", "Space", "broken_rule", "divisors", "space_of"]


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
    context: np.ndarray
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
            context=self.axes.context[self.context[row]],
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
    choices = {mesh: _choices(mesh, own, axes, refused) for mesh, own in ways.items()}
    table = _table(places, choices)
    return Space(
        axes=axes,
        places=tuple(places),
        place=table[:, 0],
        way=table[:, 1],
        recompute=table[:, 2],
        sequence=table[:, 3],
        offload=table[:, 4],
        context=table[:, 5],
        refused=tuple(refused),
    )


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
            return f"{axis} does not divide the model", f"{axis}={size} is none of the sizes proven on it: {told}"
    for axis, size, numbers in (("tp", mesh.tp, limits.tensor), ("cp", mesh.cp, limits.context)):
        for name, number in numbers.items():
            if number % size:
                return f"{axis} does not divide {name}", f"{axis}={size} does not divide {number} {name}"
    if mesh.ep > 1 and "ep" not in limits.sizes and (limits.experts == 0 or limits.experts % mesh.ep):
        return "ep does not divide experts", f"ep={mesh.ep} does not divide {limits.experts} experts"
    if mesh.pp > limits.stages:
        return "more stages than units", f"pp={mesh.pp} stages, but the model has {limits.stages} units with parameters"
    return None


def _places(mesh: Mesh, axes: Axes, *, global_batch: int, per_host: int, refused: list[Refused]) -> Iterator[Place]:
    replicas = mesh.outer * mesh.ep
    for samples in axes.samples:
        micro_batches, rest = divmod(global_batch, replicas * samples)
        if rest or not micro_batches:
            each = f"{replicas} replicas × {samples} samples a micro-batch"
            reason = f"{each} do not divide the global batch of {global_batch}"
            refused.append(Refused(axes=f"{mesh},samples={samples}", rule="global batch not divisible", reason=reason))
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
    """(dp, fsdp, zero, unshard): the ways to divide the state among the replicas of a mesh, each once. Gradients
    that are divided once a step (zero=2) are whole until then, as at zero=1."""
    outer = mesh.outer
    inside = per_host // (mesh.tp * mesh.cp * mesh.ep) if outer > 1 else 1
    found: dict[_State, None] = {}
    for state, unshard in itertools.product(axes.states, axes.unshard):
        by_step = unshard is Unshard.STEP
        default = by_step == (mesh.pp > 1)  # what a layout means that does not say it
        told = None if default else unshard
        if state == 0 or outer == 1:
            found[(outer, 1, 3, None)] = None
        elif state == 1:
            found[(1, outer, 1, None)] = None
        elif state == 2 and not by_step:
            found[(1, outer, 2, told)] = None
        elif state == 3:
            found[(1, outer, 3, told)] = None
        elif state == "hybrid" and 1 < inside < outer and outer % inside == 0:
            found[(outer // inside, inside, 3, told)] = None
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
            reason = f"pp={mesh.pp} × {chunks} stages a rank, but the model has {limits.stages} units with parameters"
            refused.append(Refused(axes=f"{mesh},schedule={name}", rule="more stages than units", reason=reason))
    return fitting


def _table(places: Sequence[Place], choices: Mapping[Mesh, np.ndarray]) -> np.ndarray:
    """(rows, 6): a place, and what can be chosen there."""
    if not places:
        return np.zeros((0, 6), dtype=np.int32)
    own = [choices[place.mesh] for place in places]
    index = np.repeat(np.arange(len(places), dtype=np.int32), [len(each) for each in own])
    return np.concatenate([index[:, None], np.concatenate(own)], axis=1)


def _choices(mesh: Mesh, ways: list[int], axes: Axes, refused: list[Refused]) -> np.ndarray:
    """(choices, 5): way, recompute, sequence, offload, context."""
    dealt = mesh.tp > 1 and mesh.cp == 1 and mesh.ep == 1
    sequences = [i for i, word in enumerate(axes.sequence_parallel) if dealt or word is SequenceParallel.OFF]
    contexts = range(len(axes.context) if mesh.cp > 1 else 1)
    grid = np.meshgrid(ways, range(len(axes.recompute)), sequences, range(len(axes.offload)), contexts, indexing="ij")
    rows = np.stack([column.ravel() for column in grid], axis=1).astype(np.int32)
    away = np.array([word in (Offload.ACTIVATIONS, Offload.BOTH) for word in axes.offload])
    again = np.array([word != "none" for word in axes.recompute])
    split = np.array([bool(word) for word in axes.sequence_parallel])
    broken = away[rows[:, 3]] & again[rows[:, 1]] & split[rows[:, 2]]
    if broken.any():
        reason = f"units recomputed under sequence parallelism (tp={mesh.tp}) keep their inputs on the device"
        own = f"{mesh},sequence_parallel=on,offload=activations"
        refused.append(Refused(axes=own, rule="activation offload excludes this recompute", reason=reason))
    return np.asarray(rows[~broken])
