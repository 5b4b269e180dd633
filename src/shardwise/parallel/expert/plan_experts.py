"""The expert plan of a model: which experts are divided, proven for every kind of unit, and why the rest are not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch.nn as nn

from shardwise.describe.expert import ExpertPlan, Experts, runs_of_experts
from shardwise.errors import LayoutError
from shardwise.parallel.expert.find import find_experts, looks_like_experts
from shardwise.parallel.expert.prove import prove
from shardwise.parallel.tensor.calls import Kind, kinds_of
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.prove import Difference
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers
from shardwise.trace.objective import Batch, LossFunction

__all__ = ["plan_experts"]


def plan_experts(
    model: nn.Module, batch: Batch, *, ep: int, loss: LossFunction | None = None, units: Sequence[str] = ()
) -> ExpertPlan:
    """How the experts of `model` are divided among `ep` ranks: found by structure, proven unit by unit in float64.

    The model is traced with `batch` once, without its parameters; each kind of unit with experts is copied alone, with
    random values. Raises `LayoutError` where there are no experts, fewer than ranks, or none that is proven, and
    `ModelError` as `trace` does.
    """
    found: dict[str, tuple[Experts, ...]] = {}
    reasons: dict[str, str] = {}
    worst, signatures = 0.0, 0
    for kind in kinds_of(model, batch, loss=loss, units=units):
        if not looks_like_experts(kind.module):
            continue
        if not kind.calls:
            reasons.update(dict.fromkeys(kind.units, "it is not called with this batch"))
            continue
        proven, why, error = _proven(kind, ep)
        if proven:
            found.update(dict.fromkeys(kind.units, proven))
            worst, signatures = max(worst, error), signatures + len(kind.calls)
        if why:
            reasons.update(dict.fromkeys(kind.units, why))
    if not found:
        told = "; ".join(f"{unit}: {why}" for unit, why in list(reasons.items())[:3])
        raise LayoutError(
            f"ep={ep} divides the experts of a model, but {type(model).__name__} has none that can be divided"
            f"{f' ({told})' if told else ''}; use dp={ep} instead of ep={ep}"
        )
    about = f"{signatures} signature(s), training and evaluation: error {worst:.1e}"
    in_order = {name: found[name] for name, _ in model.named_modules() if name in found}
    return ExpertPlan(ep=ep, units=in_order, reasons=reasons, proof=about)


def _proven(kind: Kind, ep: int) -> tuple[tuple[Experts, ...], str, float]:
    """The experts of a kind of unit, why others are not divided, and the error of the proof."""
    unit = random_copy(kind.module)
    kind = dataclasses.replace(kind, calls=with_whole_numbers(unit, kind.calls))
    unit.train(False)
    found = find_experts(unit, kind.calls[0])
    chosen: list[Experts] = []
    worst = 0.0
    reasons = list(found.reasons)
    for variants in found.variants:
        runs_of_experts(variants[0].num_experts, ep)
        why = ""
        for variant in variants:
            error, difference = _attempt(unit, kind, (*chosen, variant), ep)
            if not difference:
                chosen.append(variant)
                worst = max(worst, error)
                break
            why = why or difference
        else:
            reasons.append(f"{variants[0].module}: not proven: {why}")
    return tuple(chosen), "; ".join(reasons), worst


def _attempt(unit: nn.Module, kind: Kind, experts: tuple[Experts, ...], ep: int) -> tuple[float, str]:
    """The error of the proof, or why it failed; for every call, in training and evaluation."""
    plan = ExpertPlan(ep=ep, units={"": experts}, reasons={})
    worst = 0.0
    try:
        for seed, (training, call) in enumerate(itertools.product((True, False), kind.calls), start=1):
            worst = max(worst, prove(unit, call, plan, training=training, seed=seed))
    except Difference as difference:
        return worst, str(difference)
    except Exception as error:  # sizes that do not fit end in any error of the model
        return worst, f"{type(error).__name__}: {error}"
    return worst, ""
