"""Plans that come from outside: one that a person gives or sets on a model is used or refused, one that a model's class
carries is one more proposal where the dataflow leaves something whole.

Knows plans, words and kinds of units; refuses to know how plans are found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch.nn as nn

from shardwise.describe.tensor import TensorPlan, UnitPlan
from shardwise.errors import LayoutError, ModelError, ShardwiseError
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.check_plan import prove_written
from shardwise.parallel.tensor.narrow import Narrowed
from shardwise.parallel.tensor.written_plan import carried_words, words_by_hand, written_plan

__all__ = ["GivenPlan", "larger_of_carried", "plan_as_given"]

GivenPlan = Mapping[str, str] | TensorPlan  # words of transformers by pattern, or a plan as a value

_UNNAMED = "the written plan does not name it"
_LEFT = "the written plan leaves it whole"
_CARRIED = "the tp_plan that it carries leaves it whole"


def plan_as_given(model: nn.Module, small: Narrowed, given: GivenPlan | None, *, tp: int) -> TensorPlan | None:
    """The plan that was given, or that somebody has set on the model, proven; None where there is none.

    Words are proven in narrow instances where blocks are too large, values by their ranks at start-up. Raises
    `ModelError` or `LayoutError`, with the module and the first tensor that differs, where it is wrong.
    """
    words = words_by_hand(model) if given is None else given
    if words is None:
        return None
    units = [unit for kind in small.whole for unit in kind.units if kind.calls]
    plan = words if isinstance(words, TensorPlan) else _of_words(model, small, words, units, tp)
    if plan.tp != tp:
        raise LayoutError(
            f"a plan divides units among the shards of its layout, but this one was made for tp={plan.tp} and the "
            f"layout has tp={tp}; write one for tp={tp}"
        )
    proven = prove_written(model, small.whole, plan) if isinstance(words, TensorPlan) else plan
    reasons = _reasons_as_given(small.whole, proven) | dict(proven.reasons)
    origin = proven.origin if given is not None else "as set on the model"
    return TensorPlan(tp=tp, units=proven.units, reasons=reasons, sharded_share=0.0, origin=origin)


def _reasons_as_given(kinds: Sequence[Kind], plan: TensorPlan) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for kind in kinds:
        for unit in kind.units:
            if not kind.calls:
                reasons[unit] = "it is not called with this batch"
            elif unit not in plan.units:
                reasons[unit] = _UNNAMED
            elif left := _left(kind, plan.units[unit], _LEFT):
                reasons[unit] = left
    return reasons


def _left(kind: Kind, plan: UnitPlan, why: str) -> str:
    """The matrices of a unit that `plan` does not divide, with why; "" where there are none."""
    whole = [name for name, p in kind.module.named_parameters() if p.dim() > 1 and name not in plan.slices]
    return "; ".join(f"{name.removesuffix('.weight')}: {why}" for name in whole)


def _of_words(model: nn.Module, small: Narrowed, words: Mapping[str, str], units: Sequence[str], tp: int) -> TensorPlan:
    """What words say, proven: of blocks that are too large in narrow instances."""
    plan = written_plan(model, words, units, tp=tp, instances=small.modules)
    for number, reason in small.reasons.items():
        unit = small.whole[number].unit
        if unit in plan.units:
            why = f"a plan is proven before it is used, and that of {unit} cannot be"
            raise ModelError(f"{why}: {reason}; leave it out")
    narrow = prove_written(model, small.kinds, plan)
    wide = small.lifted(narrow)
    lost = next((unit for unit in narrow.units if unit not in wide.units), None)
    if lost is not None:
        raise ModelError(f"the plan of {lost} is not equal to one device: {wide.reasons[lost]}; leave it out")
    return wide


def larger_of_carried(
    model: nn.Module, kinds: Sequence[Kind], plans: Mapping[str, UnitPlan], reasons: Mapping[str, str], *, tp: int
) -> tuple[dict[str, UnitPlan], dict[str, str]]:
    """`plans` and `reasons`, with what the model's class says of a kind of block where that divides more, proven."""
    divided, told = dict(plans), dict(reasons)
    words = carried_words(model)
    for kind in kinds if words else ():
        found = plans.get(kind.unit, UnitPlan())
        if not kind.calls or not reasons.get(kind.unit) or kind.tied or kind.foreign:
            continue
        try:
            known = written_plan(model, words, [kind.unit], tp=tp).units.get(kind.unit)
            if known is None or _num_cut(kind, known) <= _num_cut(kind, found):
                continue
            one = TensorPlan(tp=tp, units={kind.unit: known}, reasons={}, sharded_share=0.0)
            proven = prove_written(model, [kind], one).units[kind.unit]
        except ShardwiseError as error:
            why = f"the tp_plan that it carries is refused: {str(error).partition(';')[0]}"
            told.update({unit: f"{told[unit]}; {why}" for unit in kind.units})
            continue
        left = _left(kind, proven, _CARRIED)
        for unit in kind.units:
            divided[unit] = proven
            told.pop(unit, None)
            if left:
                told[unit] = left
    return divided, told


def _num_cut(kind: Kind, plan: UnitPlan) -> int:
    sizes = {name: math.prod(parameter.shape) for name, parameter in kind.module.named_parameters()}
    return sum(sizes.get(name, 0) for name in plan.slices)
