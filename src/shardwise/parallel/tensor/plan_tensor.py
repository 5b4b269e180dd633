"""The tensor plan of a model: for every kind of block what was proven, and why the rest stays whole."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch.nn as nn

from shardwise.describe.tensor import SequenceParallel, TensorPlan, UnitPlan
from shardwise.parallel.tensor.alone import divide_alone
from shardwise.parallel.tensor.attributes import Fit, Tries, fits, hindrance
from shardwise.parallel.tensor.calls import Kind, kinds_of
from shardwise.parallel.tensor.closed import closed_groups, is_closed
from shardwise.parallel.tensor.flops_share import flops_share
from shardwise.parallel.tensor.given_plan import GivenPlan, larger_of_carried, plan_as_given
from shardwise.parallel.tensor.groups import Group, groups_of
from shardwise.parallel.tensor.head_groups import head_groups
from shardwise.parallel.tensor.heads import fuses
from shardwise.parallel.tensor.instance import Call, random_copy
from shardwise.parallel.tensor.layers import layer_of
from shardwise.parallel.tensor.narrow import narrowed
from shardwise.parallel.tensor.products import products_in
from shardwise.parallel.tensor.propose import plan_of
from shardwise.parallel.tensor.prove import Difference, Wholes, prove
from shardwise.parallel.tensor.sequence_plan import dealt_out
from shardwise.parallel.tensor.supports import Sets, Supports, supports
from shardwise.parallel.tensor.unused import called_or_not, unused
from shardwise.parallel.tensor.vocabulary import vocabularies
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers
from shardwise.trace.objective import Batch, LossFunction

__all__ = ["plan_tensor"]

_SEEDS = 4  # of the numbers that dependencies are read off from
_MOST_PROOFS = 10  # assignments of attributes that run, and are proven wrong, of one group


def plan_tensor(
    model: nn.Module,
    batch: Batch,
    *,
    tp: int,
    loss: LossFunction | None = None,
    units: Sequence[str] = (),
    sequence: SequenceParallel = SequenceParallel.OFF,
    tp_plan: GivenPlan | None = None,
    proof_bytes: int | None = None,
) -> TensorPlan:
    """How `model` is divided among `tp` ranks: proposed from its dataflow, proven block by block in float64.

    The model is traced with `batch` once, without its parameters; nothing whole-model runs. Each kind of block is
    copied alone, with random values. With `sequence`, what stands between divided layers works on the tokens of a rank
    where that is proven.

    tp_plan: a plan in the words of transformers (`{"layers.*.mlp.up_proj": "colwise", …}`) or as a value, instead of
    one that is found; so is a `tp_plan` that was set on the model. It is proven, and refused where it is wrong. The
    plan that a transformers class carries is one more proposal.

    proof_bytes: what the proof of one block may take, by default 4 GiB or half of what is free. A larger one is proven
    in two narrow instances of the same classes (its config made small), and by its ranks at start-up; `Proof` says so.

    `print(plan)` shows it; `sharded_share`, `flops_share`, `proofs` and `reasons` are its numbers. Raises `ModelError`
    as `trace` does, and for a wrong `tp_plan`, with the module and the first tensor that differs; `LayoutError` for one
    that does not divide.
    """
    own = kinds_of(model, batch, loss=loss, units=units)
    small = narrowed(model, batch, own, tp=tp, loss=loss, units=units, proof_bytes=proof_bytes)
    given = plan_as_given(model, small, tp_plan, tp=tp)
    if given is not None:
        told = dealt_out(given, small.as_they_are, sequence) if sequence else given
        return _with_numbers(model, own, told, {})
    kinds = small.kinds
    found = {number: _plan_of_kind(kind, tp) for number, kind in enumerate(kinds)}
    inside = {number: plan for number, (plan, _) in found.items() if plan is not None}
    words = vocabularies(model, kinds, inside, tp=tp)
    plans: dict[str, UnitPlan] = {}
    reasons: dict[str, str] = {}
    dead: dict[int, frozenset[str]] = {}
    total = sum(sum(_sizes(kind.module).values()) * len(kind.units) for kind in kinds)
    for number, kind in enumerate(kinds):
        plan, reason = words.plans.get(number, inside.get(number)), words.reason(number, found[number][1])
        if reason and kind.calls:
            dead[number] = _unused(kind)
        reason = called_or_not(reason, dead.get(number, ()))
        plan, reason = divide_alone(kind, plan, reason, tp=tp, total=total, dead=dead.get(number, frozenset()))
        for unit in kind.units:
            if plan is not None:
                plans[unit] = plan
            if reason:
                reasons[unit] = reason
    plans, reasons = larger_of_carried(model, small.as_they_are, plans, reasons, tp=tp)
    told = TensorPlan(tp=tp, units=plans, reasons=reasons, sharded_share=0.0)
    told = small.lifted(dealt_out(told, kinds, sequence) if sequence else told)
    return _with_numbers(model, own, told, dead)


def _with_numbers(
    model: nn.Module, kinds: Sequence[Kind], plan: TensorPlan, dead: Mapping[int, frozenset[str]]
) -> TensorPlan:
    """`plan` with its shares, and in every proof the key that it holds for."""
    keys = {unit: kind.key for kind in kinds for unit in kind.units}
    units = {
        unit: dataclasses.replace(one, proof=None if one.proof is None else one.proof.under(keys[unit]))
        for unit, one in plan.units.items()
    }
    return dataclasses.replace(
        plan,
        units=units,
        sharded_share=_share(model, kinds, units, dead),
        flops_share=flops_share(kinds, units, tp=plan.tp),
    )


def _plan_of_kind(kind: Kind, tp: int) -> tuple[UnitPlan | None, str]:
    sizes = _sizes(kind.module)
    closed = any(is_closed(module) for module in kind.module.modules())
    tables = {part.weight for part in kind.module.modules() if isinstance(part, nn.Embedding)}
    matrices = sum(parameter.dim() > 1 and parameter not in tables for parameter in kind.module.parameters())
    if len(sizes) < 2 and not closed and not fuses(kind.module) and matrices < 2:
        return None, "it has no two layers, one to be divided by columns and one by rows"
    if not kind.calls:
        outside = "it is run by code outside of it, not called as a module" if kind.foreign else ""
        return None, outside or "it is not called with this batch"
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
        self._unit = random_copy(kind.module)
        self._kind = dataclasses.replace(kind, calls=with_whole_numbers(self._unit, kind.calls))
        self._sizes = sizes
        self._tp = tp
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

    def _with_products(self) -> _Search | None:
        """The same search, in which weights that functions multiply with are layers; None where there are none."""
        products, self._attends = products_in(self._unit, self._kind.calls[0])
        if not products:
            return None
        closed = {name for name, module in self._unit.named_modules() if is_closed(module)}
        inner = {name.rpartition(".")[0] for name in products} & closed
        sizes = {name: size for name, size in self._sizes.items() if name not in inner}
        found = _Search(self._kind, {**sizes, **products}, self._tp)
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
        return [*experts, *heads], {**{name: why for name, why in whole.items() if name not in self._opened}, **others}

    def _proposed(self, gathers: frozenset[str]) -> tuple[list[Group], dict[str, str], frozenset[str]]:
        call = self._kind.calls[0]
        found = self._supports(call, gathers)
        groups, reasons = groups_of(
            found,
            self._sizes,
            tp=self._tp,
            gradients=call.requires_grad,
            gathers=gathers,
            tied=self._kind.tied,
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
        module = _around(group.layers)
        tries = self._tries.setdefault(f"{module} {plan}", Tries())
        return fits(self._unit, call, plan, module=module, tp=self._tp, tries=tries)

    def _apart(self, groups: Sequence[Group]) -> UnitPlan | None:
        """The groups that are proven by themselves, and then together; the smallest is dropped until they are."""
        proven: list[_Proven] = []
        for group in groups:
            plan, fit, why = self._prove(group)
            if plan is None or fit is None:
                self._reasons.update(dict.fromkeys(group.ends, why))
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
        plan = plan_of(self._unit, [group], self._kind.calls[0], tp=self._tp)
        return None, None, hindrance(self._unit, self._kind.calls[0], plan, tp=self._tp) or f"not proven: {why}"

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
            if dataclasses.replace(plan, proof=None) != first:
                plan = self._as_a_whole(plan)
        except Difference as difference:
            return None, str(difference)
        except Exception as error:  # sizes that do not fit end in any error of the model
            return None, f"{type(error).__name__}: {error}"
        return plan, ""

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


def _unused(kind: Kind) -> frozenset[str]:
    try:
        return unused(random_copy(kind.module), kind.calls)
    except Exception:  # whatever a model raises when it is run alone: its reason is known
        return frozenset()


def _share(
    model: nn.Module, kinds: Sequence[Kind], plans: Mapping[str, UnitPlan], dead: Mapping[int, frozenset[str]]
) -> float:
    """Of the parameters of matrix products inside blocks (two dims and more, tables apart), the share that is cut.

    Blocks are elements of lists of modules; a model without any is a block. Units, and parameters inside of units,
    that the batch does not use are not counted: `reasons` names them.
    """
    blocks, everything = [0, 0], [0, 0]
    for number, kind in enumerate(kinds):
        if not kind.calls and not kind.foreign:
            continue
        tables = {id(part.weight) for part in kind.module.modules() if isinstance(part, nn.Embedding)}
        for name, parameter in kind.module.named_parameters():
            if parameter.dim() < 2 or id(parameter) in tables or name in dead.get(number, ()):
                continue
            cut = sum(unit in plans and name in plans[unit].slices for unit in kind.units)
            for count in (everything, *([blocks] if _in_block(model, f"{kind.unit}.{name}") else [])):
                count[0] += parameter.numel() * cut
                count[1] += parameter.numel() * len(kind.units)
    cut, total = blocks if blocks[1] else everything
    return cut / total if total else 0.0


def _in_block(model: nn.Module, parameter: str) -> bool:
    """Whether it stands inside an element of a list of modules."""
    path = parameter.partition(".parametrizations.")[0].split(".")[:-1]
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return any(isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) for module in around)
