"""The search for the plan of one kind of block: groups of layers proposed from its dataflow, divided, proven.

    proposed ──► all groups at once ──proven──► the plan
                     └─ differs ──► each half of them, what is proven together, the smallest dropped until equal

Knows one kind of block, by itself; refuses to know the model around it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from shardwise.describe.tensor import UnitPlan
from shardwise.parallel.tensor.attributes import Fit, Tries, fits, hindrance
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.closed import closed_groups, is_closed
from shardwise.parallel.tensor.groups import Group, groups_of, without_kept
from shardwise.parallel.tensor.head_groups import head_groups
from shardwise.parallel.tensor.instance import Call, random_copy
from shardwise.parallel.tensor.products import products_in
from shardwise.parallel.tensor.propose import plan_of
from shardwise.parallel.tensor.prove import Difference, Wholes, prove
from shardwise.parallel.tensor.supports import Sets, Supports, supports
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers

__all__ = ["Search"]

_SEEDS = 4  # of the numbers that dependencies are read off from
_MOST_PROOFS = 10  # assignments of attributes that run, and are proven wrong, of one group


@dataclasses.dataclass(frozen=True, slots=True)
class _Proven:
    group: Group
    fit: Fit


class Search:
    """Groups of one kind of block: proven all together, or where that fails in halves. smaller: what was proven for a
    divisor of `tp`; groups that are whole in it are not tried."""

    def __init__(self, kind: Kind, sizes: dict[str, int], tp: int, smaller: UnitPlan | None = None) -> None:
        self._unit = random_copy(kind.module)
        self._kind = dataclasses.replace(kind, calls=with_whole_numbers(self._unit, kind.calls))
        self._sizes = sizes
        self._tp = tp
        self._smaller = smaller
        self._reasons: dict[str, str] = {}
        self._tries: dict[str, Tries] = {}
        self._wholes = Wholes()
        self._attends = True  # whether torch's multi-head attention may be called
        self._products: frozenset[str] = frozenset()
        self._opened: frozenset[str] = frozenset()  # modules whose products are layers by themselves

    def run(self) -> tuple[UnitPlan | None, str]:
        """The plan with the largest share, and why the rest of the unit's layers stay whole."""
        with_products = self._with_products()
        if with_products is None:
            return self._run()
        plan, reason = with_products._run()
        if with_products._num_cut(plan) == sum(with_products._sizes.values()):
            return plan, reason
        other, why = self._run()
        more = with_products._num_cut(plan) >= with_products._num_cut(other)
        return (plan, reason) if more else (other, why)

    def _with_products(self) -> Search | None:
        """The same search, in which weights that functions multiply with are layers; None where there are none."""
        products, self._attends = products_in(self._unit, self._kind.calls[0])
        if not products:
            return None
        closed = {name for name, module in self._unit.named_modules() if is_closed(module)}
        inner = {name.rpartition(".")[0] for name in products} & closed
        sizes = {name: size for name, size in self._sizes.items() if name not in inner}
        found = Search(self._kind, {**sizes, **products}, self._tp, self._smaller)
        found._products, found._opened, found._attends = frozenset(products), frozenset(inner), self._attends
        return found

    def _run(self) -> tuple[UnitPlan | None, str]:
        inside, whole = self._inside()
        groups, reasons, mixing = self._proposed(frozenset())
        plan, reasons = self._proven([*groups, *inside], {**reasons, **whole})
        if mixing and self._num_cut(plan) < sum(self._sizes.values()):
            groups, others, _ = self._proposed(mixing)
            larger, others = self._proven([*groups, *inside], {**others, **whole})
            if self._num_cut(larger) > self._num_cut(plan):
                plan, reasons = larger, others
        left = [name for name in self._sizes if not self._is_cut(name, plan)]
        return plan, "; ".join(f"{name}: {reasons.get(name, 'no row reads it alone')}" for name in left)

    def _inside(self) -> tuple[list[Group], dict[str, str]]:
        """Groups of what holds columns and rows itself: modules of experts, attention that is one call of torch."""
        call = self._kind.calls[0]
        experts, whole = closed_groups(self._unit, call, tp=self._tp)
        heads, others = head_groups(self._unit, call, tp=self._tp) if self._attends else ([], {})
        experts = [group for group in experts if not self._opened.intersection(group.closed)]
        groups, kept = without_kept([*experts, *heads], self._kind.kept_whole)
        return groups, {**{name: why for name, why in whole.items() if name not in self._opened}, **others, **kept}

    def _proposed(self, gathers: frozenset[str]) -> tuple[list[Group], dict[str, str], frozenset[str]]:
        call = self._kind.calls[0]
        found = self._supports(call, gathers)
        groups, reasons = groups_of(
            found,
            self._sizes,
            tp=self._tp,
            gradients=call.requires_grad,
            gathers=gathers,
            kept=self._kind.kept_whole,
        )
        return groups, reasons, _mixing(found)

    def _supports(self, call: Call, gathers: frozenset[str]) -> Supports:
        """What the layers depend on; with other numbers where these leave layers out (experts without tokens)."""
        found = supports(self._unit, call, tp=self._tp, products=self._products, cut_at=gathers)
        for seed in range(1, _SEEDS):
            if len(found.order) >= len(self._sizes):
                break
            other = supports(self._unit, call, tp=self._tp, products=self._products, cut_at=gathers, seed=seed)
            found = max(found, other, key=lambda seen: len(seen.order))
        return found

    def _num_cut(self, plan: UnitPlan | None) -> int:
        return sum(n for name, n in self._sizes.items() if self._is_cut(name, plan))

    def _is_cut(self, layer: str, plan: UnitPlan | None) -> bool:
        return plan is not None and not {f"{layer}.weight", layer}.isdisjoint((*plan.slices, *plan.reduces))

    def _proven(self, groups: Sequence[Group], reasons: dict[str, str]) -> tuple[UnitPlan | None, dict[str, str]]:
        self._reasons = dict(reasons)
        hopeless = [group for group in groups if not self._may_divide(group)]
        groups = [group for group in groups if group not in hopeless]
        for group in hopeless:
            self._reasons.update(dict.fromkeys(group.ends, "not divided among fewer shards either"))
        return self._largest(groups)[1] if groups else None, self._reasons

    def _may_divide(self, group: Group) -> bool:
        """Whether fewer shards divide any of its layers, not each by itself."""
        smaller = self._smaller
        if smaller is None:
            return True
        return any(self._is_cut(name, smaller) and name not in smaller.alone for name in group.layers)

    def _largest(self, groups: Sequence[Group]) -> tuple[list[_Proven], UnitPlan | None]:
        """Those of `groups` that are proven, and the plan of all of them: all at once, or else of each half."""
        if len(groups) == 1:
            plan, fit, why = self._prove(groups[0])
            if plan is not None and fit is not None:
                return [_Proven(groups[0], fit)], plan
            self._reasons.update(dict.fromkeys(groups[0].ends, why))
            return [], None
        plan, fits_ = self._together(groups)
        if plan is not None:
            return [_Proven(group, fit) for group, fit in zip(groups, fits_, strict=True)], plan
        half = len(groups) // 2
        (first, plan), (second, other) = self._largest(groups[:half]), self._largest(groups[half:])
        return self._joined([*first, *second]) if first and second else (first or second, plan or other)

    def _together(self, groups: Sequence[Group]) -> tuple[UnitPlan | None, list[Fit]]:
        """All groups at once, each with the first fit that lets it run; None where that is not equal."""
        chosen = [next(self._fits(group), None) for group in groups]
        found = [fit for fit in chosen if fit is not None]
        return (self._attempt(groups, found)[0] if len(found) == len(groups) else None), found

    def _fits(self, group: Group) -> Iterator[Fit]:
        call = self._kind.calls[0]
        plan = plan_of(self._unit, [group], call, tp=self._tp)
        module = _around(group.layers)
        tries = self._tries.setdefault(f"{module} {plan}", Tries())
        return fits(self._unit, call, plan, module=module, tp=self._tp, tries=tries)

    def _joined(self, proven: list[_Proven]) -> tuple[list[_Proven], UnitPlan | None]:
        """Groups that are proven in two parts, in one plan: without the smallest, until that is proven."""
        while True:
            plan, why = self._attempt([one.group for one in proven], [one.fit for one in proven])
            if plan is not None or len(proven) == 1:
                return proven, plan
            dropped = min(proven, key=lambda one: sum(self._sizes[name] for name in one.group.layers))
            proven.remove(dropped)
            self._reasons.update(dict.fromkeys(dropped.group.layers, f"not proven with the rest: {why}"))

    def _prove(self, group: Group) -> tuple[UnitPlan | None, Fit | None, str]:
        why = ""  # of the likeliest
        for fit in itertools.islice(self._fits(group), _MOST_PROOFS):
            plan, other = self._attempt([group], [fit])
            if plan is not None:
                return plan, fit, ""
            why = why or f"not proven: {other}"
        call = self._kind.calls[0]
        plan = plan_of(self._unit, [group], call, tp=self._tp)
        return None, None, hindrance(self._unit, call, plan, tp=self._tp, otherwise=why)

    def _attempt(self, groups: Sequence[Group], chosen: Sequence[Fit]) -> tuple[UnitPlan | None, str]:
        """The plan, proven for every call, in training and evaluation; or why not."""
        plan = plan_of(self._unit, groups, self._kind.calls[0], tp=self._tp)
        for fit in chosen:
            plan = fit.applied(plan, self._tp)
        first: UnitPlan | None = None
        try:
            runs = itertools.product((True, False), self._kind.calls)
            for seed, (training, call) in enumerate(runs, start=1):  # other numbers than the proposal was made from
                plan, _ = prove(
                    self._unit,
                    call,
                    plan,
                    tp=self._tp,
                    training=training,
                    seed=seed,
                    complete=True,
                    wholes=self._wholes,
                )
                first = first or dataclasses.replace(plan, proof=None)
            self._refuse_unproven(plan)
            if dataclasses.replace(plan, proof=None) != first:
                plan = self._as_a_whole(plan)
        except Difference as difference:
            return None, str(difference)
        except Exception as error:  # sizes that do not fit end in any error of the model
            return None, f"{type(error).__name__}: {error}"
        return plan, ""

    def _refuse_unproven(self, plan: UnitPlan) -> None:
        """Raise `Difference` for a weight that no call uses, and a partial gradient of what others read whole."""
        parameters = dict(self._unit.named_parameters())
        unused = [
            name
            for name in plan.slices
            if name in parameters and parameters[name].dim() > 1 and name not in self._wholes.reached
        ]
        if unused:
            raise Difference(f"no call has a gradient of {min(unused)}: nothing is proven of it")
        shared = plan.partial & self._kind.kept_whole
        if shared:
            raise Difference(
                f"{min(shared)} is tied to a tensor outside of the unit, or read there: its gradient is whole"
            )

    def _as_a_whole(self, plan: UnitPlan) -> UnitPlan:
        """`plan` proven for all calls as it has become: what a later call completed holds for the earlier ones too."""
        plan = dataclasses.replace(plan, proof=None)
        for seed, (training, call) in enumerate(itertools.product((True, False), self._kind.calls), start=1):
            plan, _ = prove(self._unit, call, plan, tp=self._tp, training=training, seed=seed, wholes=self._wholes)
        return plan


def _around(layers: Sequence[str]) -> str:
    """The innermost module that holds all of them."""
    paths = [name.split(".")[:-1] for name in layers]
    shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
    depth = next((at for at, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), len(shared))
    return ".".join(shared[:depth])


def _mixing(found: Supports) -> frozenset[str]:
    """Modules between layers that mix a width, where shares read a layer whole: norms as wide as it, or as a row."""
    modules: set[str] = set()
    for needs in found.needs.values():
        widths = {
            len(sets[0])
            for leaf, by_dim in needs.items()
            for sets in by_dim.values()
            if leaf.kind == "layer" and len(set(sets)) == 1
        }
        for leaf in needs:
            owner, _, _ = leaf.name.rpartition(".")
            width = max(found.shapes[leaf], default=0)
            row = leaf.kind == "parameter" and width == math.prod(found.shapes[leaf])
            if owner and row and (width in widths or (widths and _in_shares(needs[leaf], width))):
                modules.add(owner)
    return frozenset(modules)


def _in_shares(by_dim: Mapping[int, Sets], width: int) -> bool:
    """Whether each rank's share of a row's input needs its own share of a weight along that width."""
    return any(len(set(sets)) == len(sets) and sum(map(len, sets)) == width for sets in by_dim.values())
