"""Blocks that are too large to be proven whole here: proven in narrow instances of the same classes, twice.

    found and proven in A ──lifted──► proven in B, as it stands ──lifted──► the block itself

A and B are models of the same transformers config made small; each kind of size differs between them by another
prime, so that a number which follows the wrong one is no longer right in B. Knows kinds of units and plans, not how
one is found.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

from shardwise.describe.tensor import TensorPlan, UnitPlan
from shardwise.parallel.tensor.calls import Kind, kinds_of
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.lift import lifted, misfit_of_instances
from shardwise.parallel.tensor.narrow_config import narrow_config
from shardwise.parallel.tensor.proof_bytes import bytes_to_prove
from shardwise.parallel.tensor.prove import prove
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers
from shardwise.quantities import format_bytes, format_count
from shardwise.trace.deferred import defer, place
from shardwise.trace.objective import Batch, LossFunction

__all__ = ["Narrowed", "narrowed"]

_USUAL_BYTES = 4 * 2**30  # above, a narrow instance proves the same in seconds
_TOKENS, _SAMPLES = 16, 2


@dataclasses.dataclass(kw_only=True, slots=True)
class _Instance:
    """A narrow one of a kind, and a second one."""

    first: Kind
    second: Kind
    why: str


@dataclasses.dataclass(kw_only=True, slots=True)
class Narrowed:
    """`kinds` to find plans for, narrow where the model's own are too large; `reasons` of those that cannot be."""

    kinds: list[Kind]
    instances: dict[int, _Instance]  # by number of the kind
    reasons: dict[int, str]
    whole: list[Kind]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The narrow instance of every unit that has one."""
        return {unit: self.kinds[number].module for number in self.instances for unit in self.kinds[number].units}

    @property
    def as_they_are(self) -> list[Kind]:
        """The kinds that are not narrow, and that their own proof fits here."""
        return [self.whole[n] for n in range(len(self.whole)) if n not in self.instances and n not in self.reasons]

    def lifted(self, plan: TensorPlan) -> TensorPlan:
        """A plan of `kinds` as one of the model's own; what cannot be lifted, or is wrong in B, stays whole."""
        units, reasons = dict(plan.units), dict(plan.reasons)
        for number, kind in enumerate(self.whole):
            if number in self.reasons:
                reasons.update(dict.fromkeys(kind.units, self.reasons[number]))
            if number not in self.instances or kind.unit not in units:
                continue
            try:
                wide = _lifted(units[kind.unit], self.instances[number], kind, plan.tp)
            except Exception as error:  # it differs, does not run, or a number does not grow
                why = f"its plan does not hold in a second narrow instance: {type(error).__name__}: {error}"
                reasons.update(dict.fromkeys(kind.units, why))
                for unit in kind.units:
                    units.pop(unit)
                continue
            units.update(dict.fromkeys(kind.units, wide))
        return dataclasses.replace(plan, units=units, reasons=reasons)


def _lifted(plan: UnitPlan, instance: _Instance, kind: Kind, tp: int) -> UnitPlan:
    second = dataclasses.replace(lifted(plan, instance.first, instance.second), proof=None)
    unit = random_copy(instance.second.module)
    calls = with_whole_numbers(unit, instance.second.calls)
    for seed, (training, call) in enumerate(itertools.product((True, False), calls), start=1):
        second, _ = prove(unit, call, second, tp=tp, training=training, seed=seed)
    wide = lifted(plan, instance.first, kind)
    assert plan.proof is not None
    assert second.proof is not None
    proof = dataclasses.replace(
        plan.proof,
        on=f"two narrow instances ({instance.why})",
        error=max(plan.proof.error, second.proof.error),
        start_up=True,
    )
    return dataclasses.replace(wide, proof=proof)


def narrowed(
    model: nn.Module,
    batch: Batch,
    kinds: Sequence[Kind],
    *,
    tp: int,
    loss: LossFunction | None = None,
    units: Sequence[str] = (),
    proof_bytes: int | None = None,
) -> Narrowed:
    """`kinds` of which those that need more than `proof_bytes` are narrow (by default a few GiB, and never more than
    half of what this machine has free). Lone layers are proven with few of their columns and stay."""
    free = psutil.virtual_memory().available // 2
    most = min(_USUAL_BYTES, free) if proof_bytes is None else proof_bytes
    large = {
        number: needed
        for number, kind in enumerate(kinds)
        if kind.calls and any(True for _ in kind.module.children()) and (needed := bytes_to_prove(kind, tp)) > most
    }
    result = Narrowed(kinds=list(kinds), instances={}, reasons={}, whole=list(kinds))
    if not large:
        return result
    pairs, why_not = _pairs(model, batch, [kinds[number] for number in large], tp, loss, units)
    for number, needed in large.items():
        kind = kinds[number]
        size = format_count(sum(p.numel() for p in kind.module.parameters()), "parameters")
        why = f"the block has {size}: its own proof would take {format_bytes(needed)}"
        pair = pairs.get(kind.unit)
        misfit = why_not if pair is None else next(filter(None, (misfit_of_instances(each, kind) for each in pair)), "")
        if pair is not None and not misfit:
            result.kinds[number] = dataclasses.replace(pair[0], units=kind.units, key=kind.key)
            result.instances[number] = _Instance(first=pair[0], second=pair[1], why=why)
        elif needed > (free if proof_bytes is None else proof_bytes):
            to_take = format_bytes(free if proof_bytes is None else proof_bytes)
            result.kinds[number] = dataclasses.replace(kind, calls=[])
            result.reasons[number] = f"{why}, with {to_take} to take, and there is no narrow one: {misfit}"
    return result


def _pairs(
    model: nn.Module, batch: Batch, kinds: Sequence[Kind], tp: int, loss: LossFunction | None, units: Sequence[str]
) -> tuple[dict[str, tuple[Kind, Kind]], str]:
    """Two narrow kinds for each unit, by name; or why there are none."""
    if not _is_transformers(model):
        return {}, "the model has no config to narrow"
    layers = 1 + max((int(part) for kind in kinds for part in kind.unit.split(".") if part.isdigit()), default=0)
    found: list[dict[str, Kind]] = []
    try:
        for grown in (False, True):
            small = _narrow_model(model, tp=tp, num_layers=layers, grown=grown)
            made = kinds_of(small, _narrow_batch(small, batch), loss=loss, units=units)
            found.append({unit: kind for kind in made for unit in kind.units})
    except Exception as error:  # whatever a class raises of a config that it cannot build
        return {}, f"its config cannot be narrowed: {type(error).__name__}: {error}"
    names = [kind.unit for kind in kinds if all(kind.unit in each for each in found)]
    return {name: (_named(found[0][name], name), _named(found[1][name], name)) for name in names}, "it has no such unit"


def _named(kind: Kind, unit: str) -> Kind:
    return dataclasses.replace(kind, unit=unit)


def _is_transformers(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    import transformers

    return isinstance(model, transformers.PreTrainedModel)


def _narrow_model(model: Any, *, tp: int, num_layers: int, grown: bool) -> Any:
    """A model of the same class with a narrow config, its parameters without values."""
    config = narrow_config(model.config, tp=tp, num_layers=num_layers, grown=grown)
    blueprint = defer(lambda: type(model)._from_config(copy.deepcopy(config)), seed=0)
    small: Any = blueprint.module
    place(small, blueprint.materialize([name for name, _ in small.named_buffers(remove_duplicate=False)]))
    if small._can_set_experts_implementation():
        small.set_experts_implementation(model.config._experts_implementation)
    small.config.use_cache = model.config.use_cache
    small.train(model.training)
    return small


def _narrow_batch(small: Any, batch: Batch) -> Any:
    """Few samples of few tokens of the model's own batch, ids within the narrow vocabulary."""
    rows = small.config.get_text_config().vocab_size
    lengths = [leaf.shape[1] for leaf in _tensors(batch) if leaf.dim() == 2 and not leaf.is_floating_point()]
    length = max(lengths, default=0)

    def cut(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor) or not leaf.dim():
            return leaf
        leaf = leaf[:_SAMPLES]
        for dim in range(1, leaf.dim()):
            if leaf.shape[dim] == length and (not leaf.is_floating_point() or leaf.dim() == 4):  # ids, masks
                leaf = leaf.narrow(dim, 0, min(_TOKENS, length))
        wide = leaf.dtype in (torch.int64, torch.int32)
        return torch.where(leaf >= 0, leaf % rows, leaf) if wide else leaf

    made: Any = tree_map(cut, dict(batch) if isinstance(batch, Mapping) else batch)
    return made


def _tensors(batch: Any) -> list[torch.Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, torch.Tensor)]
