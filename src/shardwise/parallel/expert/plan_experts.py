"""The expert plan of a model: which experts are divided, proven for every kind of unit, and why the rest are not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch.nn as nn

from shardwise.describe.expert import ExpertPlan, Experts, Listed, Stacked, runs_of_experts
from shardwise.errors import LayoutError
from shardwise.parallel.expert.find import find_experts, looks_like_experts
from shardwise.parallel.expert.prove import Deal, prove, takes_choices_beyond
from shardwise.parallel.tensor.calls import Kind, kinds_of
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.narrow import narrowed
from shardwise.parallel.tensor.prove import Difference
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers
from shardwise.trace.objective import Batch, LossFunction

__all__ = ["plan_experts"]


def plan_experts(
    model: nn.Module,
    batch: Batch,
    *,
    ep: int,
    loss: LossFunction | None = None,
    units: Sequence[str] = (),
    proof_bytes: int | None = None,
) -> ExpertPlan:
    """How the experts of `model` are divided among `ep` ranks: found by structure, proven unit by unit in float64.

    The model is traced with `batch` once, without its parameters; each kind of unit with experts is copied alone, with
    random values. One whose proof needs more than `proof_bytes` (by default 4 GiB, or half of what is free) is proven
    in two narrow instances of its classes, where its model has a transformers config. Raises `LayoutError` where there
    are no experts, fewer than ranks, or none that is proven, and `ModelError` as `trace` does.
    """
    proofs: list[_Proof] = []
    reasons: dict[str, str] = {}
    kinds = [kind for kind in kinds_of(model, batch, loss=loss, units=units) if looks_like_experts(kind.module)]
    small = narrowed(model, batch, kinds, tp=ep, loss=loss, units=units, proof_bytes=proof_bytes)
    for number, kind in enumerate(kinds):
        if not kind.calls:
            reasons.update(dict.fromkeys(kind.units, "it is not called with this batch"))
            continue
        if number in small.reasons:
            reasons.update(dict.fromkeys(kind.units, small.reasons[number]))
            continue
        instance = small.instances.get(number)
        proof = _proven(kind, ep) if instance is None else _proven_narrow(kind, (instance.first, instance.second), ep)
        proofs.append(proof)
        if proof.reason:
            reasons.update(dict.fromkeys(kind.units, proof.reason))
    found = {unit: proof.experts for proof in proofs if proof.experts for unit in proof.units}
    if not found:
        told = "; ".join(f"{unit}: {why}" for unit, why in list(reasons.items())[:3])
        raise LayoutError(
            f"ep={ep} divides the experts of a model, but {type(model).__name__} has none that can be divided"
            f"{f' ({told})' if told else ''}; use dp={ep} instead of ep={ep}"
        )
    in_order = {name: found[name] for name, _ in model.named_modules() if name in found}
    return ExpertPlan(ep=ep, units=in_order, reasons=reasons, proof=_told([each for each in proofs if each.experts]))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Proof:
    """Of a kind of unit: the experts that are divided, why others are not, the error, and what was run."""

    units: Sequence[str]
    experts: tuple[Experts, ...] = ()
    reason: str = ""
    error: float = 0.0
    signatures: int = 0
    narrow: bool = False


def _told(proofs: Sequence[_Proof]) -> str:
    signatures, error = sum(proof.signatures for proof in proofs), max(proof.error for proof in proofs)
    where = ", in two narrow instances of blocks too large to be proven whole" if any(p.narrow for p in proofs) else ""
    return f"{signatures} signature(s), training and evaluation{where}: error {error:.1e}"


def _proven(kind: Kind, ep: int) -> _Proof:
    """The experts of a kind of unit, proven in a copy of it."""
    unit = random_copy(kind.module)
    unit.train(False)
    made = _Proof(units=kind.units, signatures=len(kind.calls))
    try:
        kind = dataclasses.replace(kind, calls=with_whole_numbers(unit, kind.calls))
        found = find_experts(unit, kind.calls[0])
    except Exception as raised:  # whatever a model raises when it is run alone, on random numbers
        return dataclasses.replace(made, reason=f"it does not run by itself: {type(raised).__name__}: {raised}")
    chosen: list[Experts] = []
    worst = 0.0
    reasons = list(found.reasons)
    for variants in found.variants:
        runs_of_experts(variants[0].num_experts, ep)
        why = _read_elsewhere(kind, variants[0])
        for variant in () if why else variants:
            error, difference = _attempt(unit, kind, (*chosen, variant), ep)
            if not difference:
                chosen.append(variant)
                worst = max(worst, error)
                break
            why = f"not proven: {difference}"  # of the last, in which every number that may be theirs is
        else:
            reasons.append(f"{variants[0].module}: {why}")
    return dataclasses.replace(made, experts=tuple(chosen), reason="; ".join(reasons), error=worst)


def _read_elsewhere(kind: Kind, experts: Experts) -> str:
    """Which parameter of the experts stands, or is read, outside of the unit too; "" where none is."""
    of_module = f"{experts.module}." if experts.module else ""
    for name in sorted(kind.tied | kind.foreign):
        if name.startswith(of_module):
            return f"its {name.removeprefix(of_module)} is read outside of the unit too, where a part is not enough"
    return ""


def _attempt(unit: nn.Module, kind: Kind, experts: tuple[Experts, ...], ep: int) -> tuple[float, str]:
    """The error of the proof, or why it failed; for every call, in training and evaluation, for every expert."""
    plan = ExpertPlan(ep=ep, units={"": experts}, reasons={})
    sizes = {each.module: each.num_experts for each in experts if not isinstance(each, Listed)}
    unseen = {module: frozenset(range(size)) for module, size in sizes.items()}
    deals = any(isinstance(each, Stacked) for each in experts)
    worst, seed = 0.0, 0
    what = ""
    try:
        for seed, (training, call) in enumerate(itertools.product((True, False), kind.calls), start=1):
            proven = prove(unit, call, plan, training=training, seed=seed)
            worst = max(worst, proven.error)
            unseen = {module: numbers - proven.shown[module] for module, numbers in unseen.items()}
        beyond = deals and takes_choices_beyond(unit, kind.calls[0], plan)
        for number in range(max(sizes.values(), default=0)):  # a deal has a row of each rank at least
            if not any(unseen.values()) and not (deals and not number):
                break
            what = "choices dealt out in turn, one of no expert: " if beyond and not number else ""
            deal = Deal(number=number, beyond=beyond and not number)
            proven = prove(unit, kind.calls[0], plan, training=True, seed=seed + 1 + number, deal=deal)
            worst = max(worst, proven.error)
            unseen = {module: numbers - proven.shown[module] for module, numbers in unseen.items()}
    except Difference as difference:
        return worst, f"{what}{difference}"
    except Exception as error:  # sizes that do not fit end in any error of the model
        return worst, f"{what}{type(error).__name__}: {error}"
    for module, numbers in unseen.items():
        if numbers:
            return worst, f"gradients of expert {min(numbers)} of {module} vanish whatever the data: nothing is proven"
    return worst, ""


def _proven_narrow(kind: Kind, instances: Sequence[Kind], ep: int) -> _Proof:
    """The same experts of a block that is too large, proven in each of its narrow instances."""
    proofs = [_proven(dataclasses.replace(each, tied=kind.tied, foreign=kind.foreign), ep) for each in instances]
    made = dataclasses.replace(
        proofs[0], units=kind.units, error=max(proof.error for proof in proofs), signatures=len(kind.calls), narrow=True
    )
    try:
        wide = [tuple(_widened(each, kind.module) for each in proof.experts) for proof in proofs]
    except LayoutError as error:
        return dataclasses.replace(made, experts=(), reason=str(error))
    if wide[0] != wide[1]:
        why = "its two narrow instances are not divided alike: " + "; ".join(proof.reason for proof in proofs)
        return dataclasses.replace(made, experts=(), reason=why)
    for each in wide[0]:
        runs_of_experts(each.num_experts, ep)
    return dataclasses.replace(made, experts=wide[0])


def _widened(experts: Experts, unit: nn.Module) -> Experts:
    """Experts of a narrow instance as those of `unit`: as many as there are. Raises `LayoutError` where they are not
    alike."""
    module = unit.get_submodule(experts.module)
    if isinstance(experts, Listed):
        names = tuple(f"{experts.module}.{leaf}" if experts.module else leaf for leaf, _ in module.named_children())
        return dataclasses.replace(experts, members=names)
    own = {leaf: parameter for leaf, parameter in module._parameters.items() if parameter is not None}
    size = own[experts.parameters[0]].shape[0]
    others = [leaf for leaf, parameter in own.items() if parameter.shape[0] != size]
    others += [name for name in experts.attributes if vars(module).get(name) != size]
    if others or tuple(own) != experts.parameters:
        raise LayoutError(
            f"{experts.module}: not all of {', '.join([*own, *experts.attributes])} have its {size} experts"
        )
    return dataclasses.replace(experts, num_experts=size)
