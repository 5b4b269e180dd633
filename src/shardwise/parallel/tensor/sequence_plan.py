"""Which units work on the tokens of a rank: seen in a run on threads, then proven like all else.

A unit is proposed where it has activations among its arguments, or makes them from a table. One run shows which of what
it returns is by tokens still, and what asked for all tokens; the proof compares with one device and finds parameters
whose gradients have become partial. Knows kinds of units and their plans.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence

import torch
import torch.nn as nn

from shardwise.describe.tensor import SequenceParallel, SequencePlan, TensorPlan, UnitPlan
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.install import shard_unit
from shardwise.parallel.tensor.instance import Call, Doubled, random_copy, tensors_of, twin
from shardwise.parallel.tensor.propose import argument_names
from shardwise.parallel.tensor.prove import Difference, prove
from shardwise.parallel.tensor.prove_vocabulary import NARROWLY, is_large_layer, narrow_layer
from shardwise.parallel.tensor.threads import on_threads
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers
from shardwise.trace.randomness import RandomMode, Scope

__all__ = ["dealt_out"]


def dealt_out(plan: TensorPlan, kinds: Sequence[Kind], how: SequenceParallel) -> TensorPlan:
    """`plan` with what is proven to work on tokens; `all_tokens` says why other units with activations do not.

    `kinds` are the kinds of the model's units. Where no divided block works on tokens nothing does: it would only cost.
    """
    found: dict[str, UnitPlan] = {}
    reasons: dict[str, str] = {}
    for kind in kinds:
        base = plan.units.get(kind.unit, UnitPlan())
        names = tuple(name for name in _activations(kind) if name not in base.inputs)
        if not kind.calls or not (names or base.lookups):
            continue
        narrow = is_large_layer(kind)
        own, reason = _of_kind(
            narrow_layer(kind) if narrow else kind, base, names, plan.tp, how is SequenceParallel.REGATHER
        )
        if narrow and own is not None and own.proof is not None:
            own = dataclasses.replace(own, proof=dataclasses.replace(own.proof, on=NARROWLY))
        if own is None:
            reasons.update(dict.fromkeys(kind.units, reason))
        else:
            found.update(dict.fromkeys(kind.units, own))
    if not any(own.reduces for own in found.values()):
        return dataclasses.replace(plan, all_tokens=reasons)
    return dataclasses.replace(plan, units={**plan.units, **found}, all_tokens=reasons)


def _of_kind(
    kind: Kind, base: UnitPlan, names: tuple[str, ...], tp: int, regather: bool
) -> tuple[UnitPlan | None, str]:
    """With all arguments `names` by tokens, or else one of them; None and the first reason where that is not equal."""
    reasons: list[str] = []
    for some in (names, *((name,) for name in names if len(names) > 1)):
        try:
            sequence = SequencePlan(inputs=some, regather=regather)
            return _proven(kind, dataclasses.replace(base, sequence=sequence), tp), ""
        except Difference as difference:
            reasons.append(str(difference))
        except Exception as error:  # whatever a model raises when it is run alone, on random numbers
            reasons.append(f"{type(error).__name__}: {error}")
    return None, reasons[0]


def _activations(kind: Kind) -> tuple[str, ...]:
    """Arguments (..., tokens, features) that the model computes."""
    names: dict[str, None] = {}
    for call in kind.calls:
        tensors = call.tensors
        named = argument_names(kind.module, call)
        names |= {named[p]: None for p in sorted(call.requires_grad) if p in named and tensors[p].dim() >= 2}
    return tuple(names)


def _proven(kind: Kind, plan: UnitPlan, tp: int) -> UnitPlan:
    """Raises `Difference`, or whatever the unit raises."""
    unit = random_copy(kind.module)
    kind = dataclasses.replace(kind, calls=with_whole_numbers(unit, kind.calls))
    runs = list(itertools.product((True, False), kind.calls))
    seen = [_observed(unit, call, plan, tp, training) for training, call in runs]
    outputs = frozenset[int]().union(*(places for places, _ in seen))
    joined = sorted({name for _, names in seen for name in names})
    heads = plan.joins or (plan.alone and not joined)  # what they return is whole, and they read tokens as columns do
    if not outputs and not heads:
        asks = f": {', '.join(joined)} asks for all tokens" if joined else ""
        raise Difference(f"nothing that it returns is by tokens{asks}")
    before = plan.partial
    assert plan.sequence is not None
    plan = dataclasses.replace(
        plan, proof=None, sequence=dataclasses.replace(plan.sequence, outputs=tuple(sorted(outputs)))
    )
    first: UnitPlan | None = None
    for seed, (training, call) in enumerate(runs, start=1):
        plan, _ = prove(unit, call, plan, tp=tp, training=training, seed=seed, complete=True)
        first = first or dataclasses.replace(plan, proof=None)
    _refuse_shared(plan.partial - before, kind)
    plan_without = dataclasses.replace(plan, proof=None)
    if plan_without != first:  # what a later run completed holds for the earlier ones too
        plan = plan_without
        for seed, (training, call) in enumerate(runs, start=1):
            plan, _ = prove(unit, call, plan, tp=tp, training=training, seed=seed)
    return plan


def _refuse_shared(partial: Collection[str], kind: Kind) -> None:
    """A parameter that others use too would have a gradient that is partial here and whole there."""
    others = sorted(name for name in partial if name in kind.tied or name in kind.foreign)
    if others:
        raise Difference(f"the gradient of {others[0]} would be partial here, and is whole where others use it")


def _observed(unit: nn.Module, call: Call, plan: UnitPlan, tp: int, training: bool) -> tuple[set[int], set[str]]:
    """Places of what leaves by tokens, and the functions that asked for all."""

    def run(group: TensorGroup) -> tuple[set[int], set[str]]:
        copied = twin(unit)
        copied.train(training)
        region = shard_unit(copied, plan, group).region
        args, kwargs = call.fresh(seed=0)
        given = [tensor for tensor in tensors_of((args, kwargs)) if tensor.requires_grad]
        samples = given[0].shape[0] if given and given[0].dim() else 1
        scope = Scope(seed=0, step=0, micro_batch=0, samples=tuple(range(samples)), place="unit")
        with Doubled(), RandomMode(scope), torch.enable_grad():
            copied(*args, **kwargs)
        return region.left, region.joined_at

    return on_threads(tp, run)[0]
