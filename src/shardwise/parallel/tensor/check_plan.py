"""A tensor plan that someone wrote, proven before it is used: a wrong one is refused by the first tensor that differs.

What a person or a model's author says is a proposal like any other. Knows plans and units; completes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch.nn as nn

from shardwise.describe.tensor import TensorPlan, UnitPlan
from shardwise.errors import ModelError, ShardwiseError
from shardwise.parallel.tensor.calls import Kind, kinds_of
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.prove import Difference, prove
from shardwise.parallel.tensor.ties import names_of
from shardwise.trace.objective import Batch, LossFunction

__all__ = ["check_plan"]


def check_plan(
    model: nn.Module, batch: Batch, plan: TensorPlan, *, loss: LossFunction | None = None, units: Sequence[str] = ()
) -> TensorPlan:
    """`plan` with a proof in every unit, as it was given otherwise.

    The model is traced once, without its parameters. Raises `ModelError` for a unit that the model does not have or
    does not call, and for one that is not equal to one device: it names the unit, the tensor and the error.
    """
    kinds = {unit: kind for kind in kinds_of(model, batch, loss=loss, units=units) for unit in kind.units}
    proofs: dict[tuple[str, str], str] = {}
    proven: dict[str, UnitPlan] = {}
    for unit, given in plan.units.items():
        _refuse_torn(model, unit, given, kinds.get(unit), plan)
    for unit, given in plan.units.items():
        if unit not in kinds or not kinds[unit].calls:
            known = ", ".join(kinds)
            raise ModelError(f"a plan divides units that the batch runs through: {unit!r} is none; there are {known}")
        kind, key = kinds[unit], (kinds[unit].unit, repr(given))
        if key not in proofs:
            proofs[key] = _proof(unit, kind, given, plan.tp)
        proven[unit] = dataclasses.replace(given, proof=proofs[key])
    return dataclasses.replace(plan, units=proven)


def _refuse_torn(model: nn.Module, unit: str, given: UnitPlan, kind: Kind | None, plan: TensorPlan) -> None:
    """A tied tensor is divided alike under all of its names, and what others read is not divided."""
    holders = names_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for local, part in given.slices.items():
        name = f"{unit}.{local}"
        for other in holders.get(id(parameters[name]), ()) if name in parameters else ():
            if plan.slice_of(other) != part:
                raise ModelError(
                    f"a divided parameter is divided alike under all of its names: {name} is tied to {other}, and the "
                    "plan divides them differently; leave both whole"
                )
        if kind is not None and local in kind.foreign:
            raise ModelError(f"a divided parameter is read in its unit: {name} is read outside of it; leave it whole")


def _proof(unit: str, kind: Kind, given: UnitPlan, tp: int) -> str:
    copied, worst = random_copy(kind.module), 0.0
    for training in (True, False):
        for seed, call in enumerate(kind.calls):
            try:
                worst = max(worst, prove(copied, call, given, tp=tp, training=training, seed=seed)[1])
            except ShardwiseError as error:
                raise ModelError(f"the plan of {unit} cannot be applied on {tp} ranks: {error}") from error
            except Difference as difference:
                raise ModelError(
                    f"the plan of {unit} on {tp} ranks is not equal to one device: {difference} "
                    f"({'training' if training else 'evaluation'}); leave the plan out, and one is found and proven"
                ) from difference
            except Exception as error:  # sizes that do not fit end in any error of the model
                raise ModelError(
                    f"the plan of {unit} does not run on {tp} ranks: {type(error).__name__}: {error}; leave the plan "
                    "out, and one is found and proven"
                ) from error
    return f"{len(kind.calls)} signature(s), training and evaluation, tp={tp}: error {worst:.1e}"
