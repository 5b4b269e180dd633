"""How the tensors inside units are divided among the ranks of the tensor axis, as a value. Knows no torch.

column-parallel C, row-parallel R:   x ──copy──► C_t ──► … ──► R_t ──all-reduce──► y      on rank t of tp
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from shardwise.describe.proof import Proof
from shardwise.errors import LayoutError

__all__ = ["Ranges", "SequenceParallel", "SequencePlan", "Slice", "TensorPlan", "UnitPlan"]

Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """What each rank holds of one tensor: half-open index ranges along `dim`, joined in order.

    Packed projections `[q|k|v]` have a range of each part, key/value heads fewer than ranks the same range on several.
    Raises `LayoutError` where a range is empty or outside, or an index is held by nobody.
    """

    dim: int
    size: int  # of the whole tensor along `dim`
    ranges: tuple[Ranges, ...]  # of each rank

    def __post_init__(self) -> None:
        for start, stop in (bounds for ranges in self.ranges for bounds in ranges):
            if not 0 <= start < stop <= self.size:
                raise LayoutError(f"a slice lies within its tensor: [{start}, {stop}) of {self.size} does not")
        missing = sum(b - a for a, b, count in _holders(self.ranges, self.size) if not count)
        if missing:
            raise LayoutError(f"every index is held by a rank: {missing} of {self.size} are not")

    @classmethod
    def even(cls, dim: int, size: int, ranks: int, parts: tuple[int, ...] = ()) -> Slice:
        """Each of `parts` (sizes along `dim`, by default one) divided evenly among `ranks`.

        Raises `LayoutError` where a part does not divide.
        """
        parts = parts or (size,)
        if sum(parts) != size or any(part % ranks for part in parts):
            raise LayoutError(f"parts {parts} of {size} are divided evenly among {ranks} ranks, and do not divide")
        starts = [sum(parts[:i]) for i in range(len(parts))]
        ranges = tuple(
            tuple((s + rank * p // ranks, s + (rank + 1) * p // ranks) for s, p in zip(starts, parts, strict=True))
            for rank in range(ranks)
        )
        return cls(dim=dim, size=size, ranges=ranges)

    def local_size(self, rank: int) -> int:
        """The size along `dim` on `rank`."""
        return sum(stop - start for start, stop in self.ranges[rank])

    @property
    def num_ranks(self) -> int:
        """How many ranks share the tensor."""
        return len(self.ranges)

    @property
    def shared(self) -> Ranges:
        """What several ranks hold (key/value heads fewer than ranks): their gradients of it are summed."""
        return _joined([(a, b) for a, b, count in _holders(self.ranges, self.size) if count > 1])

    def owned(self, rank: int) -> Ranges:
        """What `rank` counts and saves: of what it holds, what no lower rank holds. Disjoint, and together everything.

        In indices of the whole tensor.
        """
        free = [(a, b) for a, b, count in _holders(self.ranges[:rank], self.size) if not count]
        own = self.ranges[rank]
        return _joined([(max(a, c), min(b, d)) for a, b in free for c, d in own if max(a, c) < min(b, d)])


def _holders(of_ranks: tuple[Ranges, ...], size: int) -> list[tuple[int, int, int]]:
    """Runs [start, stop) in ascending order, with how many hold each. (Not index by index: vocabularies are large.)"""
    changes = {0: 0, size: 0}
    for start, stop in (bounds for ranges in of_ranks for bounds in ranges):
        changes[start] = changes.get(start, 0) + 1
        changes[stop] = changes.get(stop, 0) - 1
    count, runs = 0, []
    for start, stop in itertools.pairwise(sorted(changes)):
        count += changes[start]
        runs.append((start, stop, count))
    return runs


def _joined(ranges: list[tuple[int, int]]) -> Ranges:
    """Disjoint ranges in ascending order, neighbours as one."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)


class SequenceParallel(StrEnum):
    """Whether shards deal out tokens among them between the layers that they divide. False where they do not."""

    OFF = "off"
    ON = "on"
    REGATHER = "regather"  # and gather the inputs of divided layers once more in the backward, instead of keeping them

    def __bool__(self) -> bool:
        return self is not SequenceParallel.OFF


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SequencePlan:
    """Between its divided regions a unit works on this rank's tokens: an all-reduce is a reduce-scatter or all-gather.

    `inputs` are arguments of the unit's forward, by parameter name, that arrive or are dealt out by tokens, `outputs`
    places among the returned tensors that leave so. Rows give tokens; parameters used on tokens are in the unit's
    `partial`. Tokens are dim -2. With `regather` columns keep their own tokens for the backward and gather all once
    more there: less memory for half as many bytes again as a backward has.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[int, ...] = ()
    regather: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UnitPlan:
    """How one unit is divided. Names of modules and tensors are relative to the unit ("" is the unit itself).

    Modules:
    `copies`   whole inputs, partial input gradients: identity forward, all-reduce backward (column-parallel)
    `forks`    whole output, partial output gradient: the same behind the module (MLA's shared key)
    `reduces`  partial output: all-reduce forward, identity backward; the bias is added once, behind the sum
    `gathers`  run whole inside the divided region: input gathered, output cut again (a norm over a divided width)
    `joins`    output in parts, joined right behind the module (a head: column-parallel by itself)
    `alone`    the same inside a block, where no row reads the parts: always joined, never kept as divided logits
    `heads`    weights of output projections of torch's multi-head attention, of which a rank computes its heads
    `products` weights that a function multiplies with, no layer: "column", "row" or "fork", as copies, reduces, forks
    `lookups`  tables divided by rows: other ranks' ids answer zero, all-reduce forward (a vocabulary)
    `cuts`     whole inputs, cut in front of the module (a row-parallel layer behind whole activations)
    `ends`     forks of so many last features of the output, the features before them are copied later

    Tensors: `slices` are parameters and buffers of which a rank holds a part; `partial` are parameters held whole
    whose gradients are partial and must be summed; `once` are those of them that only the first rank computes with
    (biases in front of a sum; elsewhere they count as zero). `inputs` are arguments of the unit's forward, by
    parameter name, of which the inside sees a part (per-head position biases), `outputs` places among the returned
    tensors that the inside makes in part and the outside gets whole. `draws` are random draws, by their number in a
    call, of which a rank keeps a part. `attributes` maps (module, attribute) to its value on each rank; an attribute
    may be a path (`config.num_heads`: the module gets a config of its own). `reshapes` maps a module to the divided
    dims of those reshapes in its forward, in order, that ask for the elements of the whole.

    A slice of an argument, output or draw whose dim is a multiple of the slice's size counts it as (others × size).
    """

    copies: tuple[str, ...] = ()
    forks: tuple[str, ...] = ()
    reduces: tuple[str, ...] = ()
    gathers: Mapping[str, Slice] = dataclasses.field(default_factory=dict)
    joins: Mapping[str, Slice] = dataclasses.field(default_factory=dict)
    alone: Mapping[str, Slice] = dataclasses.field(default_factory=dict)
    heads: tuple[str, ...] = ()
    products: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lookups: tuple[str, ...] = ()
    cuts: Mapping[str, Slice] = dataclasses.field(default_factory=dict)
    ends: Mapping[str, int] = dataclasses.field(default_factory=dict)
    slices: Mapping[str, Slice] = dataclasses.field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    once: frozenset[str] = frozenset()
    inputs: Mapping[str, Slice] = dataclasses.field(default_factory=dict)
    outputs: Mapping[int, Slice] = dataclasses.field(default_factory=dict)
    draws: Mapping[int, Slice] = dataclasses.field(default_factory=dict)
    attributes: Mapping[tuple[str, str], tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    reshapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    sequence: SequencePlan | None = None  # None: the unit is given all tokens, and returns all
    proof: Proof | None = None  # what was proven, on what, with which error

    @property
    def digest(self) -> str:
        """Of all but the proof: equal plans have one digest, the same in every process."""
        told = [(field.name, _ordered(getattr(self, field.name))) for field in dataclasses.fields(self)]
        return hashlib.blake2b(repr([each for each in told if each[0] != "proof"]).encode(), digest_size=6).hexdigest()


def _ordered(value: object) -> object:
    """Sets and mappings in an order that does not change from process to process."""
    if isinstance(value, Mapping):
        return sorted(value.items(), key=repr)
    return sorted(value) if isinstance(value, frozenset) else value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlan:
    """The units that are divided, and for the rest why not. Units that are missing in `units` are replicated."""

    tp: int
    units: Mapping[str, UnitPlan]
    reasons: Mapping[str, str]  # unit -> why it, or a part of it, stays whole
    sharded_share: float  # of the parameters of matrix products inside blocks that are called (0 to 1)
    flops_share: float | None = None  # of a forward's flops, those that the shards divide (0 to 1); None: not counted
    origin: str = "found by dataflow"  # who proposed it
    all_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)  # unit -> why it cannot work on a part

    def slice_of(self, parameter: str) -> Slice | None:
        """The slice of a parameter or buffer of the model, by its full name; None where every rank holds it whole."""
        unit, name = self._unit_of(parameter)
        return self.units[unit].slices.get(name) if unit is not None else None

    def is_partial(self, parameter: str) -> bool:
        """Whether the gradient of a parameter, by its full name, is partial on every rank and must be summed."""
        unit, name = self._unit_of(parameter)
        return unit is not None and name in self.units[unit].partial

    def _unit_of(self, parameter: str) -> tuple[str | None, str]:
        for unit in self.units:
            prefix = f"{unit}." if unit else ""
            if parameter.startswith(prefix):
                return unit, parameter[len(prefix) :]
        return None, parameter

    def lines(self) -> list[str]:
        """The plan in words: how much is divided, and each reason once, with the units it holds for."""
        proven = [f"proven in {_several(units)}: {proof}" for proof, units in self.proofs.items()]
        return [self._shares(), *proven, *self._whole(), *self._tokens_lines()]

    def _shares(self) -> str:
        flops = "" if self.flops_share is None else f", {_percent(self.flops_share)} of a forward's flops"
        products = f"{_percent(self.sharded_share)} of the blocks' matrix products"
        return f"divided among {self.tp} shards, {self.origin}: {products}{flops}"

    def _whole(self) -> list[str]:
        by_reason: dict[str, list[str]] = {}
        for unit, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(unit)
        return [f"whole in {_several(units)}: {reason}" for reason, units in by_reason.items()]

    @property
    def deals_tokens(self) -> bool:
        """Whether activations between divided regions are dealt out by tokens."""
        return any(plan.sequence is not None for plan in self.units.values())

    def _tokens_lines(self) -> list[str]:
        dealt = [unit for unit, plan in self.units.items() if plan.sequence is not None]
        told = [f"tokens dealt out among the shards in {_several(dealt)}"] if dealt else []
        by_reason: dict[str, list[str]] = {}
        for unit, reason in self.all_tokens.items():
            by_reason.setdefault(reason, []).append(unit)
        return [*told, *(f"all tokens in {_several(units)}: {reason}" for reason, units in by_reason.items())]

    @property
    def proofs(self) -> dict[Proof, tuple[str, ...]]:
        """What was proven, and the units that it holds for."""
        found: dict[Proof, list[str]] = {}
        for unit, plan in self.units.items():
            if plan.proof is not None:
                found.setdefault(plan.proof, []).append(unit)
        return {proof: tuple(units) for proof, units in found.items()}

    def __str__(self) -> str:
        """A table: a row of each kind of divided unit, then what stays whole and why; at most 120 columns."""
        lines = [self._shares()]
        for units in _alike(self.units):
            plan = self.units[units[0]]
            lines.append(f"  {_short(_several(units), 40):<40}  {_short(_parts(plan), 76)}")
            proof = f"proven: {plan.proof or 'not'}"
            lines += textwrap.wrap(proof, 114, initial_indent=" " * 6, subsequent_indent=" " * 14)
        for text in (*self._whole(), *self._tokens_lines()):
            lines += textwrap.wrap(text, 116, initial_indent="  ", subsequent_indent=" " * 6)
        return "\n".join(lines)


def _percent(share: float) -> str:
    """100% is all of it: what rounds to that is told to a tenth, and less."""
    return f"{share:.0%}" if share in (0, 1) or 0.005 < share < 0.995 else f"{math.floor(share * 1000) / 10:.1f}%"


def _several(units: Sequence[str]) -> str:
    more = f" and {len(units) - 1} more" if len(units) > 1 else ""
    return f"{units[0] or 'the model'}{more}"


def _alike(units: Mapping[str, UnitPlan]) -> list[list[str]]:
    """Units with equal plans together."""
    groups: dict[tuple[str, Proof | None], list[str]] = {}
    for unit, plan in units.items():
        groups.setdefault((plan.digest, plan.proof), []).append(unit)
    return list(groups.values())


def _parts(plan: UnitPlan) -> str:
    weights = [name.removesuffix(".weight").rpartition(".")[2] for name in plan.slices if not name.endswith(".bias")]
    summed = f"; sums {len(plan.partial)} gradients" if plan.partial else ""
    return f"{', '.join(dict.fromkeys(weights))}{summed}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
