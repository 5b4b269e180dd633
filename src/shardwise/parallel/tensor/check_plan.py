"""A tensor plan that someone wrote, proven before it is used: a wrong one is refused by the first tensor that differs.

What a person or a model's author says is a proposal like any other. Attributes that follow a division (numbers of
heads) and the draws of dropout are found where words do not say them; gradients that are to be summed must be said.
Knows plans and kinds of units.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import psutil
import torch.nn as nn

from shardwise.describe.tensor import TensorPlan, UnitPlan
from shardwise.errors import ModelError, ShardwiseError
from shardwise.parallel.tensor.attributes import fits
from shardwise.parallel.tensor.calls import Kind, kinds_of
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.locate import first_module
from shardwise.parallel.tensor.proof_bytes import bytes_to_prove
from shardwise.parallel.tensor.prove import Difference, Wholes, prove
from shardwise.parallel.tensor.ties import names_of
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers
from shardwise.quantities import format_bytes
from shardwise.trace.objective import Batch, LossFunction

__all__ = ["check_plan", "prove_written"]

_MOST_FITS = 8  # assignments of attributes that are tried of a plan whose words do not say them
_REPAIR = "leave the plan out, and one is found and proven"


def check_plan(
    model: nn.Module, batch: Batch, plan: TensorPlan, *, loss: LossFunction | None = None, units: Sequence[str] = ()
) -> TensorPlan:
    """`plan` with a proof in every unit, as it was given otherwise.

    The model is traced once, without its parameters. Raises `ModelError` for a unit that the model does not have or
    does not call, and for one that is not equal to one device: it names the unit, the module, the tensor and the error.
    """
    return prove_written(model, kinds_of(model, batch, loss=loss, units=units), plan)


def prove_written(model: nn.Module, all_kinds: Sequence[Kind], plan: TensorPlan) -> TensorPlan:
    """`check_plan` of a model whose units are known."""
    kinds = {unit: kind for kind in all_kinds for unit in kind.units}
    done: dict[tuple[str, str], UnitPlan] = {}
    proven: dict[str, UnitPlan] = {}
    for unit, given in plan.units.items():
        _refuse_torn(model, unit, given, kinds.get(unit), plan)
    for unit, given in plan.units.items():
        if unit not in kinds or not kinds[unit].calls:
            known = ", ".join(kinds)
            raise ModelError(
                f"a plan divides units that the batch runs through: {unit!r} is none; there are {known}; leave it out"
            )
        kind, key = kinds[unit], (kinds[unit].unit, given.digest)
        if key not in done:
            done[key] = _by_the_ranks(unit, kind, given, plan.tp) or _proven(unit, kind, given, plan.tp)
        proven[unit] = done[key]
    return dataclasses.replace(plan, units=proven)


def _by_the_ranks(unit: str, kind: Kind, given: UnitPlan, tp: int) -> UnitPlan | None:
    """A plan of a block that is too large to be proven here, where its ranks will prove it; None of a smaller one."""
    needed, free = bytes_to_prove(kind, tp), psutil.virtual_memory().available // 2
    if needed <= free or not any(True for _ in kind.module.children()):
        return None
    proof = given.proof
    if proof is not None and proof.start_up and (proof.key, proof.plan) == (kind.key, given.digest):
        return given
    raise ModelError(
        f"a plan is proven before it is used, and that of {unit} would take {format_bytes(needed)}, with "
        f"{format_bytes(free)} to take; leave it out, and one is found and proven in narrow instances"
    )


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


def _proven(unit: str, kind: Kind, given: UnitPlan, tp: int) -> UnitPlan:
    """`given`, proven as it stands, or with the first attributes for which it is equal. Raises `ModelError`."""
    copied = random_copy(kind.module)
    kind = dataclasses.replace(kind, calls=with_whole_numbers(copied, kind.calls))
    wholes = _whole(unit, copied, kind)
    wrong: tuple[UnitPlan, Exception] | None = None  # of the first that ran, or else of the plan as it stands
    for plan in itertools.islice(_variants(copied, kind, given, tp), _MOST_FITS):
        try:
            return _runs(copied, kind, plan, tp, wholes)
        except Exception as error:  # sizes that do not fit end in any error of the model
            ran_first = isinstance(error, Difference) and wrong is not None and not isinstance(wrong[1], Difference)
            wrong = (plan, error) if wrong is None or ran_first else wrong
    assert wrong is not None
    raise _told(unit, copied, kind, wrong[0], tp, wrong[1]) from wrong[1]


def _whole(unit: str, copied: nn.Module, kind: Kind) -> Wholes:
    """What every plan of it is compared with. Raises `ModelError` where the whole unit does not run by itself."""
    wholes = Wholes()
    try:
        for seed, (training, call) in enumerate(itertools.product((True, False), kind.calls)):
            wholes.of(copied, call, training, seed)
    except Exception as error:  # whatever a model raises when it is run alone, on random numbers
        raise ModelError(
            f"a plan is proven before it is used, and {unit} does not run by itself on random numbers: "
            f"{type(error).__name__}: {error}; leave it out of the plan"
        ) from error
    return wholes


def _variants(copied: nn.Module, kind: Kind, given: UnitPlan, tp: int) -> Iterator[UnitPlan]:
    yield given
    try:
        for fit in fits(copied, kind.calls[0], given, module="", tp=tp):
            if fit.attributes:
                yield fit.applied(given, tp)
    except ShardwiseError:  # a plan that names what is not there fits nothing
        return


def _runs(copied: nn.Module, kind: Kind, plan: UnitPlan, tp: int, wholes: Wholes) -> UnitPlan:
    plan = dataclasses.replace(plan, proof=None)
    completed = plan
    for seed, (training, call) in enumerate(itertools.product((True, False), kind.calls)):
        plan, _ = prove(
            copied, call, plan, tp=tp, training=training, seed=seed, complete=True, sums=False, wholes=wholes
        )
        if seed == 0:
            completed = dataclasses.replace(plan, proof=None)
    if dataclasses.replace(plan, proof=None) == completed:
        return plan
    plan = dataclasses.replace(plan, proof=None)  # grown by a later call: all of them once more, with all of it
    for seed, (training, call) in enumerate(itertools.product((True, False), kind.calls)):
        plan, _ = prove(copied, call, plan, tp=tp, training=training, seed=seed, wholes=wholes)
    return plan


def _told(unit: str, copied: nn.Module, kind: Kind, plan: UnitPlan, tp: int, error: Exception) -> ModelError:
    """The error in words: unit, module, tensor."""
    if isinstance(error, ShardwiseError):
        return ModelError(f"the plan of {unit} cannot be applied on {tp} ranks: {error}; {_REPAIR}")
    module = first_module(copied, kind.calls[0], plan, tp=tp)
    if isinstance(error, Difference):
        where = f", and {unit}.{module} is the first module that returns something else" if module else ""
        return ModelError(f"the plan of {unit} on {tp} ranks is not equal to one device: {error}{where}; {_REPAIR}")
    where = f" in {unit}.{module}" if module else ""
    return ModelError(
        f"the plan of {unit} does not run on {tp} ranks: it fails{where}: {type(error).__name__}: {error}; {_REPAIR}"
    )
