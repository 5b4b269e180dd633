"""The tensor plan of a model: for every kind of block what was proven, and why the rest stays whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch.nn as nn

from shardwise.describe.tensor import SequenceParallel, TensorPlan, UnitPlan
from shardwise.parallel.tensor.alone import divide_alone
from shardwise.parallel.tensor.calls import Kind, kinds_of
from shardwise.parallel.tensor.closed import is_closed
from shardwise.parallel.tensor.flops_share import flops_share
from shardwise.parallel.tensor.given_plan import GivenPlan, larger_of_carried, plan_as_given
from shardwise.parallel.tensor.heads import fuses
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.layers import layer_of
from shardwise.parallel.tensor.narrow import narrowed
from shardwise.parallel.tensor.search import Search
from shardwise.parallel.tensor.sequence_plan import dealt_out
from shardwise.parallel.tensor.unused import called_or_not, unused
from shardwise.parallel.tensor.vocabulary import vocabularies
from shardwise.trace.objective import Batch, LossFunction

__all__ = ["plan_tensor"]


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
    smaller: TensorPlan | None = None,
    undealt: TensorPlan | None = None,
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

    smaller: a plan for a divisor of `tp`, with the same arguments otherwise: what that leaves whole is not tried again.
    undealt: the plan for the same `tp` without `sequence`: only tokens are left to deal out.

    `print(plan)` shows it; `sharded_share`, `flops_share`, `proofs` and `reasons` are its numbers. Raises `ModelError`
    as `trace` does, and for a wrong `tp_plan`, with the module and the first tensor that differs; `LayoutError` for one
    that does not divide.
    """
    own = kinds_of(model, batch, loss=loss, units=units)
    small = narrowed(model, batch, own, tp=tp, loss=loss, units=units, proof_bytes=proof_bytes)
    if undealt is not None and sequence and not small.instances and not small.reasons:
        return _under_keys(own, dealt_out(undealt, small.kinds, sequence))
    given = plan_as_given(model, small, tp_plan, tp=tp)
    if given is not None:
        told = dealt_out(given, small.as_they_are, sequence) if sequence else given
        return _with_numbers(model, own, told, {})
    kinds = small.kinds
    found = {number: _plan_of_kind(kind, tp, smaller) for number, kind in enumerate(kinds)}
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
    plan = _under_keys(kinds, plan)
    return dataclasses.replace(
        plan,
        sharded_share=_share(model, kinds, plan.units, dead),
        flops_share=flops_share(kinds, plan.units, tp=plan.tp),
    )


def _under_keys(kinds: Sequence[Kind], plan: TensorPlan) -> TensorPlan:
    keys = {unit: kind.key for kind in kinds for unit in kind.units}
    units = {
        unit: dataclasses.replace(one, proof=None if one.proof is None else one.proof.under(keys[unit], one.digest))
        for unit, one in plan.units.items()
    }
    return dataclasses.replace(plan, units=units)


def _plan_of_kind(kind: Kind, tp: int, smaller: TensorPlan | None) -> tuple[UnitPlan | None, str]:
    sizes = _sizes(kind.module)
    closed = any(is_closed(module) for module in kind.module.modules())
    tables = {part.weight for part in kind.module.modules() if isinstance(part, nn.Embedding)}
    matrices = sum(parameter.dim() > 1 and parameter not in tables for parameter in kind.module.parameters())
    if len(sizes) < 2 and not closed and not fuses(kind.module) and matrices < 2:
        return None, "it has no two layers, one to be divided by columns and one by rows"
    if not kind.calls:
        outside = "it is run by code outside of it, not called as a module" if kind.foreign else ""
        return None, kind.hidden or outside or "it is not called with this batch"
    try:
        return Search(kind, sizes, tp, None if smaller is None else smaller.units.get(kind.unit, UnitPlan())).run()
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
