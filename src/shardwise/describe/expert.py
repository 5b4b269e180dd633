"""How the experts of a model are divided among the ranks of the expert axis, as a value. Knows no torch.

tokens of rank 0 ─┐            ┌─► experts 0-3 on rank 0 ─┐            ┌─► rank 0, summed by token
                  ├─all-to-all─┤                          ├─all-to-all─┤
tokens of rank 1 ─┘            └─► experts 4-7 on rank 1 ─┘            └─► rank 1
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from shardwise.describe.tensor import Slice
from shardwise.errors import LayoutError

__all__ = ["ExpertPlan", "Experts", "Listed", "Ordered", "Stacked", "runs_of_experts"]


def runs_of_experts(num_experts: int, ep: int) -> tuple[tuple[int, int], ...]:
    """The half-open run of experts on each rank; sizes differ by one at most. `LayoutError` if a rank had none."""
    if num_experts < ep:
        raise LayoutError(
            f"every rank of the expert axis holds an expert, but there are {num_experts} experts and ep={ep}; use "
            f"ep={num_experts} or less"
        )
    bounds = [rank * num_experts // ep for rank in range(ep + 1)]
    return tuple(itertools.pairwise(bounds))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stacked:
    """One module whose parameters have a dim of experts in front, called with rows and where they go.

    `module` is relative to its unit. `rows` (tokens, width), `index` (tokens, choices) of experts and `weights`
    (tokens, choices) are arguments of its forward, by name; it returns for every token the weighted sum over its
    choices. `parameters` have dim 0 of `num_experts`; `attributes` are those that say how many there are.
    """

    module: str
    num_experts: int
    parameters: tuple[str, ...]
    rows: str
    index: str
    weights: str
    attributes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ordered:
    """One module whose parameters have a dim of experts in front, called with rows in the order of their experts.

    `module` is relative to its unit. `rows` (rows, width) and `counts`, a list of how many rows each expert has, are
    arguments of its forward, by name; without `counts` ("") each has as many. It returns as many rows, in their order.
    `parameters` and `attributes` as those of `Stacked`.
    """

    module: str
    num_experts: int
    parameters: tuple[str, ...]
    rows: str
    counts: str = ""
    attributes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """Modules that are alike, one an expert, called in their order by `caller`, each with one tensor of rows.

    Names are relative to the unit. An expert that gets no row need not be called.
    """

    module: str  # what holds them
    members: tuple[str, ...]
    caller: str

    @property
    def num_experts(self) -> int:
        return len(self.members)


Experts = Stacked | Ordered | Listed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertPlan:
    """The experts of every unit that are divided among `ep` ranks; for the rest why not."""

    ep: int
    units: Mapping[str, tuple[Experts, ...]]
    reasons: Mapping[str, str]
    proof: str = ""  # what was proven, on what, with which error

    def slices(self) -> dict[str, Slice]:
        """Stacked parameters, by full name, with their slice along the experts."""
        found: dict[str, Slice] = {}
        for unit, each in self._each():
            if not isinstance(each, Listed):
                runs = runs_of_experts(each.num_experts, self.ep)
                part = Slice(dim=0, size=each.num_experts, ranges=tuple((run,) for run in runs))
                found |= {_join(unit, each.module, leaf): part for leaf in each.parameters}
        return found

    def owners(self) -> dict[str, int]:
        """Experts that are modules, by full name, with the rank of the expert axis that alone holds them."""
        found: dict[str, int] = {}
        for unit, each in self._each():
            if isinstance(each, Listed):
                for rank, (start, stop) in enumerate(runs_of_experts(each.num_experts, self.ep)):
                    found |= {_join(unit, member): rank for member in each.members[start:stop]}
        return found

    def _each(self) -> Iterator[tuple[str, Experts]]:
        for unit, experts in self.units.items():
            for each in experts:
                yield unit, each

    def lines(self) -> list[str]:
        """The plan in words."""
        numbers = sorted({each.num_experts for experts in self.units.values() for each in experts})
        sizes = sorted({stop - start for n in numbers for start, stop in runs_of_experts(n, self.ep)})
        layers = sum(len(experts) for experts in self.units.values())
        count = " or ".join(map(str, numbers))
        told = [
            f"{count} experts of {layers} layers divided among {self.ep} ranks, {_few(sizes)} on each; "
            f"proven: {self.proof}"
        ]
        by_reason: dict[str, list[str]] = {}
        for unit, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(unit)
        for reason, units in by_reason.items():
            more = f" and {len(units) - 1} more" if len(units) > 1 else ""
            told.append(f"experts on every rank in {units[0] or 'the model'}{more}: {reason}")
        return told


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _few(sizes: list[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
