"""Verify a case on tensor-parallel ranks, alone or with pipeline stages: forked ranks, each with its own shards.

    rank t:  divide the units ──► stage 0 ──► stage 1 ──► … ──► sums of partial gradients ──► against one device
             (sums between the ranks go over gloo; stages run one after the other inside each rank)

The plan is found and proven block by block by `plan_tensor`, once for all layouts; here the whole model runs with it,
loss and every gradient beside those of one device. What float32 leaves in doubt is settled in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
import time
from collections import Counter as Count
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from benchmarks.coverage.kinds import block_weights
from benchmarks.coverage.outcome import (
    TOLERANCE,
    Gradients,
    Outcome,
    Run,
    errors_by_name,
    followed_share,
    gradients_of,
    worst_error,
)
from benchmarks.coverage.ranks import RankError, on_forked_ranks
from benchmarks.coverage.staged import Alone, run_stages
from shardwise.describe.tensor import TensorPlan
from shardwise.errors import ShardwiseError
from shardwise.parallel.tensor.divided import Divided
from shardwise.parallel.tensor.instance import Doubled
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.processes import ProcessTensorGroup
from shardwise.verify.rounding import DOUBT, EXACT, MOST

__all__ = ["Shards"]

_SECONDS = 180.0  # of the ranks, once there is a plan: other work may have the processors
_SHAKES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class _Planned:
    plan: TensorPlan | None
    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Doubt:
    """Why a layout that is beyond the tolerance is not proven; empty where it is. The error in float64."""

    reason: str = ""
    wrong: bool = False
    exact: float | None = None
    shaken: bool = False  # settled by weights that differ in their last bit


class Shards:
    """The layouts of one case that divide units among `tp` ranks: they share one plan."""

    def __init__(self, alone: Alone, tp: int = 2) -> None:
        self._alone = alone
        self._case = alone.case
        self._tp = tp
        self._found: _Planned | None = None

    def verify(self, num_stages: int) -> Outcome:
        """`proven`: loss and gradients equal those of one device. How much is divided is `sharded_share`."""
        started = time.monotonic()
        planned = self._planned()
        if planned.plan is None:
            return Outcome(proven=False, seconds=planned.seconds, reason=planned.reason)
        outcome = self._verified(planned.plan, num_stages)
        return dataclasses.replace(
            outcome,
            sharded_share=planned.plan.sharded_share,
            whole=_whole(self._case.model, planned.plan),
            plan_seconds=planned.seconds,
            seconds=time.monotonic() - started,
        )

    def _planned(self) -> _Planned:
        if self._found is None:
            started, plan, reason = time.monotonic(), None, ""
            try:
                plan = plan_tensor(self._case.model, self._case.batch, tp=self._tp, loss=self._case.loss)
            except Exception as error:
                reason = f"no plan, {_told(error)}"
            self._found = _Planned(plan, reason, time.monotonic() - started)
        return self._found

    @functools.cached_property
    def _exact(self) -> Alone:
        batch = {name: _double(value) for name, value in self._case.batch.items()}
        model = copy.deepcopy(self._case.model).double()
        return Alone(dataclasses.replace(self._case, model=model, batch=batch))

    @functools.cached_property
    def _shaken(self) -> list[Run]:
        return [self._alone.shaken(seed) for seed in range(_SHAKES)]

    def _verified(self, plan: TensorPlan, num_stages: int) -> Outcome:
        doubt = _Doubt()
        try:
            worst, where, _ = _compared(self._alone, plan, num_stages)
            if not worst <= TOLERANCE:
                doubt = self._doubt(worst, plan, num_stages)
        except Exception as raised:
            return Outcome(proven=False, reason=_told(raised))
        return Outcome(
            proven=not doubt.reason,
            wrong=doubt.wrong,
            units=len(plan.units),
            stages=self._alone.staged(num_stages).sizes,
            gradient_error=worst,
            followed=followed_share(self._alone.result[1]),
            float64_error=doubt.exact,
            shaken=doubt.shaken,
            reference=self._alone.reference,
            reason=f"error {worst:.1e} at {where}, {doubt.reason}" if doubt.reason else "",
        )

    def _doubt(self, worst: float, plan: TensorPlan, num_stages: int) -> _Doubt:
        """Whether an error beyond the tolerance is float32's own, by the rule of `verify.rounding`; the layout's, which
        is wrong; or undetermined, since one device differs as much from itself.

        One run in float32 is one draw of its errors, and a lucky one where a value ends a rounding away from a kink
        (ReLU at 0): where the layout is farther off, one device is asked again, with weights other in their last bit.
        """
        try:
            with Doubled():
                exact, where, _ = _compared(self._exact, plan, num_stages)
                precise = self._exact.result
                shaken = math.inf if exact <= EXACT else worst_error(self._exact.shaken(), precise)[0]
            _, there, ratio = _compared(self._alone, plan, num_stages, precise)
            shaken_too = exact <= EXACT and ratio > MOST
            if shaken_too:
                _, there, ratio = _compared(self._alone, plan, num_stages, precise, self._shaken)
        except Exception as raised:  # of a type that the model does not know: what float32 showed stands
            return _Doubt(f"does not run in float64: {_told(raised)}", wrong=True)
        if exact <= EXACT and ratio > MOST:
            return _Doubt(f"{ratio:.1f} times as far from float64 as one device at {there}", True, exact)
        if exact <= EXACT:
            reason = "" if worst <= DOUBT else f"in float64 {exact:.1e}: more than is put down to rounding"
            return _Doubt(reason, exact=exact, shaken=shaken_too)
        told = f"in float64 {exact:.1e} at {where}"
        if exact <= MOST * shaken:
            return _Doubt(f"{told}; one device with weights other in their last bit: {shaken:.1e}", exact=exact)
        return _Doubt(told, True, exact)


def _compared(
    alone: Alone, plan: TensorPlan, num_stages: int, precise: Run | None = None, shaken: Sequence[Run] = ()
) -> tuple[float, str, float]:
    """The worst error of any rank, and where it is. With `precise`, one device in float64, of what is beyond the
    tolerance the place that is farthest from it, and how many times as far as one device, or the farthest of `shaken`.
    """
    staged, wanted, model = alone.staged(num_stages), alone.result, alone.case.model

    def rank(process_group: dist.ProcessGroup) -> tuple[float, str, float]:
        group = ProcessTensorGroup(process_group)
        divided = Divided(model, plan, group, staged.tape.units)
        loss = run_stages(alone.case, staged)
        held = dict(model.named_parameters())
        for name, parameter in held.items():
            if plan.is_partial(name):
                missing = parameter.grad is None
                parameter.grad = group.all_reduce(torch.zeros_like(parameter) if missing else parameter.grad)
        divided.sum_shared(held)
        own = _parts(wanted, divided)
        got = (loss, _like(gradients_of(model), own[1]))
        if precise is None:
            return (*worst_error(got, own), 0.0)
        return _farthest(got, own, _parts(precise, divided), [_parts(run, divided) for run in shaken])

    answers = on_forked_ranks(plan.tp, rank, seconds=_SECONDS)
    worst, where, ratio = max((tuple(answer) for answer in answers), key=lambda one: (one[2], one[0]))
    return worst, where, ratio


def _parts(whole: Run, divided: Divided) -> Run:
    """What of a run's gradients a rank holds."""
    return whole[0], {name: None if g is None else divided.cut(name, g) for name, g in whole[1].items()}


def _farthest(got: Run, wanted: Run, precise: Run, shaken: Sequence[Run]) -> tuple[float, str, float]:
    errors, layout = errors_by_name(got, wanted), errors_by_name(got, precise)
    devices = [errors_by_name(run, precise) for run in (wanted, *shaken)]
    beyond = [name for name, error in errors.items() if not error <= TOLERANCE]
    device = {name: max(each[name] for each in devices) for name in beyond}
    ratios = {name: layout[name] / device[name] if device[name] > 0 else math.inf for name in beyond}
    where = max(ratios, key=lambda name: ratios[name], default="")
    return errors.get(where, 0.0), where, ratios.get(where, 0.0)


def _like(gradients: Gradients, wanted: Gradients) -> Gradients:
    """Zeros that sums made of gradients that nobody has are none."""
    return {
        name: None if wanted[name] is None and gradient is not None and not gradient.any() else gradient
        for name, gradient in gradients.items()
    }


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _whole(model: nn.Module, plan: TensorPlan) -> str:
    """The weights of blocks that are not divided, the largest share first, and why."""
    weights = block_weights(model)
    total = sum(weight.num_elements for weight in weights.values()) or 1
    left: Count[str] = Count()
    reasons: dict[str, str] = {}
    for name, weight in weights.items():
        if plan.slice_of(name) is None:
            alike = re.sub(r"\d+", "*", name)
            left[alike] += weight.num_elements
            unit = next((unit for unit in plan.reasons if name.startswith(f"{unit}.") or not unit), None)
            reasons.setdefault(alike, "" if unit is None else _of_layer(plan.reasons[unit], unit, name))
    told = [f"{100 * count / total:.0f} % {alike}: {reasons[alike]}" for alike, count in left.most_common(6)]
    return " | ".join(told)[:1500]


def _of_layer(reason: str, unit: str, parameter: str) -> str:
    """Of a unit's reasons, that of the layer of one parameter; all of them where it has none of its own."""
    layer = parameter.removeprefix(f"{unit}.").rpartition(".")[0]
    own = [part for part in reason.split("; ") if layer and layer in part.partition(": ")[0]]
    return " ".join("; ".join(own or [reason]).split())[:200]


def _told(error: Exception) -> str:
    own = isinstance(error, (ShardwiseError, RankError))
    kind = type(error).__name__ if own else f"crash, {type(error).__name__}"
    return f"{kind}: {' '.join(str(error).split())}"
