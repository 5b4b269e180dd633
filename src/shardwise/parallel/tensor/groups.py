"""Groups of layers that can be divided together: columns whose outputs only rows read, and what lies between.

Works on the sets of indices that `supports` has read off. What it proposes is not yet proven.

    columns {q, k, v} ──► region (norms, tables, attention) ──► row o            forks: read whole inside the region
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch

from shardwise.describe.tensor import Slice
from shardwise.parallel.tensor.products import Product
from shardwise.parallel.tensor.supports import Leaf, Sets, Sink, Supports

__all__ = ["Group", "Refused", "groups_of", "slice_of_sets", "without_kept"]

_MOST_PARTS = 3  # [q|k|v]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What is divided together. Names of modules; slices of layers' outputs, and of tensors and arguments between."""

    columns: Mapping[str, Slice]
    rows: tuple[str, ...]
    forks: frozenset[str] = frozenset()
    forked: frozenset[str] = frozenset()  # columns that read forks only: their input needs no copy
    gathers: Mapping[str, Slice] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Slice] = dataclasses.field(default_factory=dict)  # parameters and buffers
    arguments: Mapping[int, Slice] = dataclasses.field(default_factory=dict)  # by place among the call's tensors
    closed: tuple[str, ...] = ()  # modules that hold columns and rows themselves
    once: frozenset[str] = frozenset()  # parameters that only one rank adds
    products: Mapping[str, Product] = dataclasses.field(default_factory=dict)  # those of the layers that are functions
    heads: tuple[str, ...] = ()  # weights of output projections of attention that is one call of torch

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.columns, *self.ends)

    @property
    def ends(self) -> tuple[str, ...]:
        """Layers behind which the ranks' parts are summed."""
        return (*self.rows, *self.closed, *(name.removesuffix(".weight") for name in self.heads))


class Refused(Exception):  # noqa: N818  it is a finding, not a fault
    """Why a layer cannot be a row."""


def groups_of(
    found: Supports,
    sizes: Mapping[str, int],
    *,
    tp: int,
    gradients: frozenset[int],
    gathers: frozenset[str] = frozenset(),
    kept: frozenset[str] = frozenset(),
) -> tuple[list[Group], dict[str, str]]:
    """The largest groups that do not contradict each other, and for other layers why they are no rows.

    `sizes` are the elements of each layer's weight, `gradients` the places of arguments that want a gradient,
    `gathers` modules that may be run whole inside a region, `kept` parameters that others hold or read whole.
    """
    proposals: list[tuple[int, Group]] = []
    reasons: dict[str, str] = {}
    for layer in found.order:
        if layer in gathers:
            continue
        try:
            group = _Builder(found, tp, gradients, gathers).build(layer)
            _refuse_kept(group, kept)
        except Refused as refused:
            reasons[layer] = str(refused)
            continue
        proposals.append((sum(sizes[name] for name in group.layers), group))
    chosen: list[Group] = []
    for _, group in sorted(proposals, key=lambda proposal: -proposal[0]):
        taken = {name for other in chosen for name in (*other.layers, *other.forks)}
        if not taken.intersection((*group.layers, *group.forks)):
            chosen.append(group)
    place = {name: at for at, name in enumerate(found.order)}
    return sorted(chosen, key=lambda group: min(place[name] for name in group.layers)), reasons


def without_kept(groups: Sequence[Group], kept: frozenset[str]) -> tuple[list[Group], dict[str, str]]:
    """The groups that divide none of the parameters `kept`, and why the layers of the others stay whole."""
    chosen: list[Group] = []
    reasons: dict[str, str] = {}
    for group in groups:
        try:
            _refuse_kept(group, kept)
            chosen.append(group)
        except Refused as refused:
            reasons.update(dict.fromkeys(group.ends, str(refused)))
    return chosen, reasons


def _refuse_kept(group: Group, kept: frozenset[str]) -> None:
    biases = (*(f"{layer}.bias" for layer in group.columns), *(product.bias for product in group.products.values()))
    weights = (*(f"{layer}.weight" for layer in group.layers), *group.layers)
    for name in (*weights, *group.tensors, *biases):
        if name in kept:
            raise Refused(f"{name} is tied to a tensor outside of the unit, or read there, where it is whole")


class _Builder:
    """Follows what a row reads, and who else reads that, until nothing is left open or a rule is broken."""

    def __init__(self, found: Supports, tp: int, gradients: frozenset[int], gathers: frozenset[str]) -> None:
        self._found = found
        self._tp = tp
        self._gradients = gradients
        self._may_gather = gathers
        self._rows: list[str] = []
        self._divided: dict[Leaf, dict[int, Sets]] = {}
        self._whole: set[Leaf] = set()

    def build(self, row: str) -> Group:
        """The group of `row`. Raises `Refused`."""
        self._rows = [row]
        for reader in self._rows:  # grows while it is walked
            self._follow(reader)
        columns = {leaf.name: sets for leaf, sets in self._divided.items() if leaf.kind == "layer"}
        both = set(columns) & set(self._rows) - self._may_gather
        if both:
            raise Refused(f"{sorted(both)[0]} would be divided both by columns and by rows")
        forks = {leaf.name for leaf in self._whole if leaf.kind == "layer"}
        self._check_forks(forks, columns.keys())
        products = self._found.products
        return Group(
            products={name: products[name] for name in (*columns, *self._rows, *forks) if name in products},
            columns={
                name: self._slice(Leaf(kind="layer", name=name), sets, fill=True)
                for name, sets in columns.items()
                if name not in self._may_gather
            },
            rows=tuple(row for row in self._rows if row not in self._may_gather),
            forks=frozenset(forks),
            forked=frozenset(name for name in columns if self._reads_forks_only(name, forks)),
            gathers={
                name: self._slice(Leaf(kind="layer", name=name), sets, fill=True)
                for name, sets in columns.items()
                if name in self._may_gather
            },
            tensors={
                leaf.name: self._slice(leaf, sets, fill=True)
                for leaf, sets in self._divided.items()
                if leaf.kind in ("parameter", "buffer")
            },
            arguments=self._arguments(),
        )

    def _follow(self, reader: str) -> None:
        sink = Sink(kind="layer", name=reader)
        needs = self._found.needs.get(reader, {})
        if not any(_differ(s) for leaf, by_dim in needs.items() if leaf.kind == "layer" for s in by_dim.values()):
            reads = _names(self._found.reads.get(sink, set()))
            raise Refused(f"{reader} reads {reads}, and no share of its input is made from a share of that")
        for leaf in sorted(self._found.reads.get(sink, ()), key=lambda leaf: (leaf.kind, leaf.name)):
            divided = {dim: sets for dim, sets in needs.get(leaf, {}).items() if _differ(sets)}
            if leaf.kind == "layer" and divided:
                self._add_divided(leaf, divided)
            elif leaf.kind == "layer":
                self._whole.add(leaf)
            elif divided:
                self._add_divided(leaf, {dim: sets for dim, sets in divided.items() if _disjoint(sets)} or divided)
            else:
                self._whole.add(leaf)

    def _add_divided(self, leaf: Leaf, by_dim: Mapping[int, Sets]) -> None:
        if leaf in self._whole:
            raise Refused(f"{leaf.name} is read both whole and in parts")
        before = self._divided.get(leaf)
        dims = by_dim if before is None else {d: _union(before[d], s) for d, s in by_dim.items() if d in before}
        if not dims:
            raise Refused(f"{leaf.kind} {leaf.name} is read in parts along different dims")
        self._divided[leaf] = dict(dims)
        for reader in self._found.readers(leaf):
            if reader.kind == "layer" and reader.name not in self._rows:
                if leaf.kind == "argument":
                    raise Refused(f"{reader.name} reads argument {leaf.name} whole")
                if leaf.kind == "layer":
                    self._rows.append(reader.name)
        if leaf.name in self._may_gather and leaf.name not in self._rows:
            self._rows.append(leaf.name)

    def _check_forks(self, forks: set[str], columns: Collection[str]) -> None:
        for leaf in self._whole:
            if leaf in self._divided:
                raise Refused(f"{leaf.name} is read both whole and in parts")
        for name in forks:
            for reader in self._found.readers(Leaf(kind="layer", name=name)):
                inside = reader.kind == "layer" and (
                    reader.name in self._rows or (reader.name in columns and self._reads_forks_only(reader.name, forks))
                )
                if not inside:
                    raise Refused(f"{name} is read whole by the divided region and by {reader.name}")

    def _reads_forks_only(self, layer: str, forks: set[str]) -> bool:
        read = self._found.reads.get(Sink(kind="layer", name=layer), set())
        layers = {leaf.name for leaf in read if leaf.kind == "layer"}
        arguments = {int(leaf.name) for leaf in read if leaf.kind == "argument"}
        return bool(layers) and layers <= forks and not arguments & self._gradients

    def _arguments(self) -> dict[int, Slice]:
        found = {int(leaf.name): self._slice(leaf, s) for leaf, s in self._divided.items() if leaf.kind == "argument"}
        for leaf in self._whole:
            if leaf.kind == "argument" and int(leaf.name) in self._gradients:
                others = [r.name for r in self._found.readers(leaf) if r.kind != "layer" or r.name not in self._rows]
                if others:
                    raise Refused(f"argument {leaf.name} is read whole by the region and by {others[0]}")
                size = self._found.shapes[leaf][0]
                found[int(leaf.name)] = Slice(dim=0, size=size, ranges=(((0, size),),) * self._tp)
        return found

    def _slice(self, leaf: Leaf, by_dim: Mapping[int, Sets], *, fill: bool = False) -> Slice:
        shape = self._found.shapes[leaf]
        dim, sets = next(((d, s) for d, s in by_dim.items() if _disjoint(s)), next(iter(by_dim.items())))
        size = shape[dim]
        if leaf.kind == "argument":
            size = _period(sets, size)
            sets = tuple(frozenset(index for index in of_rank if index < size) for of_rank in sets)
        return Slice(dim=dim, size=size, ranges=tuple(_ranges(s) for s in (_filled(sets, size) if fill else sets)))


def slice_of_sets(shape: tuple[int, ...], masks: Sequence[Sequence[torch.Tensor]]) -> Slice | None:
    """The slice of a tensor of which each rank needs what its masks show; None where no dim is divided."""
    for dim, size in enumerate(shape):
        others = [other for other in range(len(shape)) if other != dim]
        sets = tuple(
            frozenset(
                index
                for mask in of_rank
                for index in (mask.any(dim=others) if others else mask).nonzero().flatten().tolist()
            )
            for of_rank in masks
        )
        if all(sets) and _disjoint(sets):
            return Slice(dim=dim, size=size, ranges=tuple(_ranges(s) for s in _filled(sets, size)))
    return None


def _differ(sets: Sets) -> bool:
    return len(set(sets)) > 1


def _disjoint(sets: Sets) -> bool:
    return sum(len(of_rank) for of_rank in sets) == len(frozenset().union(*sets))


def _union(a: Sets, b: Sets) -> Sets:
    return tuple(x | y for x, y in zip(a, b, strict=True))


def _filled(sets: Sets, size: int) -> Sets:
    """Indices that nobody needed (a dead unit of these data) go where an even division of equal parts has them.

    Where no such division holds what is needed, they go to whoever has the ones before them.
    """
    ranks = len(sets)
    for parts in range(1, _MOST_PARTS + 1):
        even = size % (parts * ranks) == 0 and tuple(_even_set(size, ranks, rank, parts) for rank in range(ranks))
        if even and all(needed <= mine for needed, mine in zip(sets, even, strict=True)):
            return even
    grown = [set(of_rank) for of_rank in sets]
    known = frozenset().union(*sets)
    owners = [rank for rank, of_rank in enumerate(sets) if min(known, default=0) in of_rank]
    for index in range(size):
        if index in known:
            owners = [rank for rank, of_rank in enumerate(sets) if index in of_rank]
        else:
            for rank in owners:
                grown[rank].add(index)
    return tuple(frozenset(of_rank) for of_rank in grown)


def _even_set(size: int, ranks: int, rank: int, parts: int) -> frozenset[int]:
    share = size // parts // ranks
    return frozenset(part * size // parts + rank * share + at for part in range(parts) for at in range(share))


def _period(sets: Sets, size: int) -> int:
    """The smallest number of elements after which the owners repeat: heads in a dim of batch × heads."""
    owners = [tuple(index in of_rank for of_rank in sets) for index in range(size)]
    for period in range(len(sets), size):
        if size % period == 0 and all(owners[index] == owners[index - period] for index in range(period, size)):
            return period
    return size


def _ranges(indices: frozenset[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for index in sorted(indices):
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return tuple(runs)


def _names(leaves: set[Leaf]) -> str:
    return ", ".join(sorted(leaf.name for leaf in leaves if leaf.kind == "layer")) or "the unit's arguments"
