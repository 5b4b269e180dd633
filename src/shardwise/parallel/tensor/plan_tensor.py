"""The tensor plan of a model: for every kind of block what was proven, and why the rest stays whole."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch.nn as nn

from shardwise.describe.tensor import TensorPlan, UnitPlan
from shardwise.parallel.tensor.attributes import Fit, fits
from shardwise.parallel.tensor.calls import Kind, kinds_of
from shardwise.parallel.tensor.closed import closed_groups, is_closed
from shardwise.parallel.tensor.groups import Group, groups_of
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.layers import layer_of
from shardwise.parallel.tensor.propose import plan_of
from shardwise.parallel.tensor.prove import Difference, prove
from shardwise.parallel.tensor.supports import Supports, supports
from shardwise.parallel.tensor.vocabulary import vocabularies
from shardwise.trace.objective import Batch, LossFunction

__all__ = ["plan_tensor"]

_MOST_PROOFS = 10  # assignments of attributes that run, and are proven wrong, of one group


def plan_tensor(
    model: nn.Module, batch: Batch, *, tp: int, loss: LossFunction | None = None, units: Sequence[str] = ()
) -> TensorPlan:
    """How `model` is divided among `tp` ranks: proposed from its dataflow, proven block by block in float64.

    The model is traced with `batch` once, without its parameters; nothing whole-model runs. Each kind of block is
    copied alone, with random values. Raises `ModelError` as `trace` does.
    """
    kinds = kinds_of(model, batch, loss=loss, units=units)
    found = {number: _plan_of_kind(kind, tp) for number, kind in enumerate(kinds)}
    inside = {number: plan for number, (plan, _) in found.items() if plan is not None}
    words = vocabularies(model, kinds, inside, tp=tp)
    plans: dict[str, UnitPlan] = {}
    reasons: dict[str, str] = {}
    for number, kind in enumerate(kinds):
        plan, reason = words.plans.get(number, inside.get(number)), words.reason(number, found[number][1])
        for unit in kind.units:
            if plan is not None:
                plans[unit] = plan
            if reason:
                reasons[unit] = reason
    return TensorPlan(tp=tp, units=plans, reasons=reasons, sharded_share=_share(model, kinds, plans))


def _plan_of_kind(kind: Kind, tp: int) -> tuple[UnitPlan | None, str]:
    sizes = _sizes(kind.module)
    closed = any(is_closed(module) for module in kind.module.modules())
    if len(sizes) < 2 and not closed:
        return None, "it has no two layers, one to be divided by columns and one by rows"
    if not kind.calls:
        return None, "it is not called with this batch"
    try:
        return _Search(kind, sizes, tp).run()
    except Exception as error:  # whatever a model raises when it is run alone, on random numbers
        return None, f"it does not run by itself: {type(error).__name__}: {error}"


def _sizes(unit: nn.Module) -> dict[str, int]:
    """Elements of the weights of everything that multiplies."""
    sizes: dict[str, int] = {}
    for name, module in unit.named_modules():
        if layer_of(module) is not None and isinstance(module.weight, nn.Parameter):
            sizes[name] = module.weight.numel()
        elif is_closed(module):
            sizes[name] = sum(p.numel() for p in module._parameters.values() if p is not None)
    return sizes


@dataclasses.dataclass(frozen=True, slots=True)
class _Proven:
    group: Group
    plan: UnitPlan
    fit: Fit


class _Search:
    """Groups of one kind of block: proven all together, or where that fails one by one."""

    def __init__(self, kind: Kind, sizes: dict[str, int], tp: int) -> None:
        self._kind = kind
        self._sizes = sizes
        self._tp = tp
        self._unit = random_copy(kind.module)
        self._reasons: dict[str, str] = {}

    def run(self) -> tuple[UnitPlan | None, str]:
        """The plan with the largest share, and why the rest of the unit's layers stay whole."""
        inside, whole = closed_groups(self._unit, self._kind.calls[0], tp=self._tp)
        groups, reasons, mixing = self._proposed(frozenset())
        plan, reasons = self._proven([*groups, *inside], {**reasons, **whole})
        if mixing and self._num_cut(plan) < sum(self._sizes.values()):
            groups, others, _ = self._proposed(mixing)
            larger, others = self._proven([*groups, *inside], {**others, **whole})
            if self._num_cut(larger) > self._num_cut(plan):
                plan, reasons = larger, others
        left = [name for name in self._sizes if not self._is_cut(name, plan)]
        return plan, "; ".join(f"{name}: {reasons.get(name, 'no row reads it alone')}" for name in left)

    def _proposed(self, gathers: frozenset[str]) -> tuple[list[Group], dict[str, str], frozenset[str]]:
        call = self._kind.calls[0]
        found = supports(self._unit, call, tp=self._tp, cut_at=gathers)
        groups, reasons = groups_of(
            found,
            self._sizes,
            tp=self._tp,
            gradients=call.requires_grad,
            gathers=gathers,
            tied=self._kind.tied,
        )
        return groups, reasons, _mixing(found)

    def _num_cut(self, plan: UnitPlan | None) -> int:
        return sum(n for name, n in self._sizes.items() if self._is_cut(name, plan))

    def _is_cut(self, layer: str, plan: UnitPlan | None) -> bool:
        return plan is not None and (f"{layer}.weight" in plan.slices or layer in plan.reduces)

    def _proven(self, groups: Sequence[Group], reasons: dict[str, str]) -> tuple[UnitPlan | None, dict[str, str]]:
        self._reasons = dict(reasons)
        return self._together(groups) or self._apart(groups), self._reasons

    def _together(self, groups: Sequence[Group]) -> UnitPlan | None:
        """All groups at once, each with the first fit that lets it run; None where that is not equal."""
        chosen: list[Fit] = []
        for group in groups:
            fit = next(self._fits(group), None)
            if fit is None:
                return None
            chosen.append(fit)
        return self._attempt(groups, chosen)[0] if groups else None

    def _fits(self, group: Group) -> Iterator[Fit]:
        call = self._kind.calls[0]
        plan = plan_of(self._unit, [group], call, tp=self._tp)
        return fits(self._unit, call, plan, module=_around(group.layers), tp=self._tp)

    def _apart(self, groups: Sequence[Group]) -> UnitPlan | None:
        """The groups that are proven by themselves, and then together; the smallest is dropped until they are."""
        proven: list[_Proven] = []
        for group in groups:
            plan, fit, why = self._prove(group)
            if plan is None or fit is None:
                self._reasons.update(dict.fromkeys((*group.rows, *group.closed), f"not proven: {why}"))
            else:
                proven.append(_Proven(group, plan, fit))
        while len(proven) > 1:
            plan, why = self._attempt([one.group for one in proven], [one.fit for one in proven])
            if plan is not None:
                return plan
            dropped = min(proven, key=lambda one: sum(self._sizes[name] for name in one.group.layers))
            proven.remove(dropped)
            self._reasons.update(dict.fromkeys(dropped.group.layers, f"not proven with the rest: {why}"))
        return proven[0].plan if proven else None

    def _prove(self, group: Group) -> tuple[UnitPlan | None, Fit | None, str]:
        why = "no division of its attributes and reshapes lets it run"
        for fit in itertools.islice(self._fits(group), _MOST_PROOFS):
            plan, why = self._attempt([group], [fit])
            if plan is not None:
                return plan, fit, ""
        return None, None, why

    def _attempt(self, groups: Sequence[Group], chosen: Sequence[Fit]) -> tuple[UnitPlan | None, str]:
        """The plan, proven for every call, in training and evaluation; or why not."""
        plan = plan_of(self._unit, groups, self._kind.calls[0], tp=self._tp)
        for fit in chosen:
            plan = fit.applied(plan, self._tp)
        worst = 0.0
        try:
            runs = itertools.product((True, False), self._kind.calls)
            for seed, (training, call) in enumerate(runs, start=1):  # other numbers than the proposal was made from
                plan, error = prove(self._unit, call, plan, tp=self._tp, training=training, seed=seed, complete=True)
                worst = max(worst, error)
        except Difference as difference:
            return None, str(difference)
        except Exception as error:  # sizes that do not fit end in any error of the model
            return None, f"{type(error).__name__}: {error}"
        about = f"{len(self._kind.calls)} signature(s), training and evaluation, tp={self._tp}: error {worst:.1e}"
        return dataclasses.replace(plan, proof=about), ""


def _around(layers: Sequence[str]) -> str:
    """The innermost module that holds all of them."""
    paths = [name.split(".")[:-1] for name in layers]
    shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
    depth = next((at for at, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), len(shared))
    return ".".join(shared[:depth])


def _mixing(found: Supports) -> frozenset[str]:
    """Modules between layers whose weight is as wide as a layer that every share reads whole: norms over that width."""
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
            if leaf.kind == "parameter" and owner and width in widths and width == math.prod(found.shapes[leaf]):
                modules.add(owner)
    return frozenset(modules)


def _share(model: nn.Module, kinds: Sequence[Kind], plans: Mapping[str, UnitPlan]) -> float:
    """Of the parameters of matrix products inside blocks (two dims and more, tables apart), the share that is cut.

    Blocks are elements of lists of modules; a model without any is a block. Units that the batch does not call are
    not counted: `reasons` names them.
    """
    blocks, everything = [0, 0], [0, 0]
    for kind in kinds:
        if not kind.calls:
            continue
        tables = {id(part.weight) for part in kind.module.modules() if isinstance(part, nn.Embedding)}
        for name, parameter in kind.module.named_parameters():
            if parameter.dim() < 2 or id(parameter) in tables:
                continue
            cut = sum(unit in plans and name in plans[unit].slices for unit in kind.units)
            for count in (everything, *([blocks] if _in_block(model, f"{kind.unit}.{name}") else [])):
                count[0] += parameter.numel() * cut
                count[1] += parameter.numel() * len(kind.units)
    cut, total = blocks if blocks[1] else everything
    return cut / total if total else 0.0


def _in_block(model: nn.Module, parameter: str) -> bool:
    """Whether it stands inside an element of a list of modules."""
    path = parameter.split(".")[:-1]
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return any(isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) for module in around)
