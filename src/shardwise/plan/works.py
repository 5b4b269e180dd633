"""What every stage does for one micro-batch and holds, from the profile of one rank's part and a cut.

Sums over the calls and the glue of a stage, as `execute/` runs them: glue on every stage that needs it, a parameter on
every stage that reads it. Knows profiles and cuts; refuses to know torch, seconds and where the profile comes from.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from shardwise.describe.kernels import Exchange, Kernel, KernelKind, Phase
from shardwise.describe.profile import CallProfile, GlueProfile, ModelProfile, ParameterProfile
from shardwise.plan.cut import Cut, StageCut
from shardwise.plan.recompute import How, kept_bytes
from shardwise.plan.stage_work import StageWork

__all__ = ["ADDED_IN_PLACE", "stage_works"]

ADDED_IN_PLACE = 2**17  # elements of a parameter from which products sum its gradient where it lives

_NOTHING: Mapping[str, How] = MappingProxyType({})


def stage_works(
    profile: ModelProfile,
    cut: Cut,
    *,
    recompute: Mapping[str, How] = _NOTHING,
    experts: Collection[str] = (),
    scale: float = 1.0,
) -> tuple[StageWork, ...]:
    """One work for every stage of `cut`, in their order.

    profile: of one rank of the tensor, context and expert axes; its values have the bytes that cross from that rank.
    recompute: how units are computed again, as `plan_recompute` has chosen. experts: parameters that `ep` divides.
    scale: samples of a micro-batch, as a share of those that were traced.
    """
    holders, of_experts = _holders(profile, cut), frozenset(experts)
    return tuple(_work(profile, cut, stage, holders, recompute, of_experts, scale) for stage in cut.stages)


def _work(
    profile: ModelProfile,
    cut: Cut,
    stage: StageCut,
    holders: Mapping[str, tuple[int, ...]],
    recompute: Mapping[str, How],
    experts: frozenset[str],
    scale: float,
) -> StageWork:
    held = {name: profile.parameters[name] for name, stages in holders.items() if stage.stage in stages}
    trained = {name: parameter for name, parameter in held.items() if parameter.trainable}
    parts = [part for part in profile.parts if part.node in stage.computes]
    calls = [part for part in parts if isinstance(part, CallProfile)]
    how = {call.node: recompute.get(call.unit, How.NONE) for call in calls}
    again = [_again(call, how[call.node]) for call in calls]
    exchanges = [each for call in calls for each in call.exchanges]
    exchanges += [_later(each) for call in calls if how[call.node] is not How.NONE for each in _forward(call.exchanges)]
    received = sum(profile.flow.values[value].nbytes for value, _ in stage.receives)
    saved = received + sum(_kept(part, how) for part in parts)
    transient, logits = _transients(parts, how, stage.stage == cut.loss_stage)
    return StageWork(
        stage=stage.stage,
        parameters=_elements(held.values()),
        trained=_elements(trained.values()),
        expert_parameters=_elements(parameter for name, parameter in held.items() if name in experts),
        expert_trained=_elements(parameter for name, parameter in trained.items() if name in experts),
        shared_parameters=_elements(parameter for name, parameter in trained.items() if len(holders[name]) > 1),
        small_trained=_elements(each for name, each in trained.items() if not _is_added_in_place(name, each)),
        unit_parameters=_of_units(profile, calls),
        kernels=_merged((part.kernels for part in parts), scale),
        recomputed=_merged(again, scale),
        accumulation=_accumulation(trained),
        exchanges=_scaled(exchanges, scale),
        saved_bytes=scale * saved,
        unit_saved_bytes=scale * max((_kept(part, how) for part in parts), default=0),
        weight_bytes=scale * sum(_for_weights(call) for call in calls),
        transient_bytes=scale * transient,
        logits_bytes=scale * logits,
        sends=_sent(profile, stage, scale, gradients=False),
        gradients=_sent(profile, stage, scale, gradients=True),
    )


# -- what is held -------------------------------------------------------------------------------------


def _holders(profile: ModelProfile, cut: Cut) -> dict[str, tuple[int, ...]]:
    """Parameter -> the stages that hold it: those that read it, and those of its unit's calls; else stage 0."""
    reads = {name: {stage.stage for stage in cut.stages if name in stage.parameters} for name in profile.parameters}
    of_unit: dict[str, set[int]] = {}
    unit_of = {call.node: call.unit for call in profile.calls}
    for stage in cut.stages:
        for node in stage.calls:
            of_unit.setdefault(unit_of[node], set()).add(stage.stage)
    for unit in profile.units:
        for name, parameter in unit.parameters.items():
            if name.startswith(f"{unit.name}.") and (parameter.trainable or not reads[name]):
                reads[name] |= of_unit.get(unit.name, set())
    return {name: tuple(sorted(stages)) or (0,) for name, stages in reads.items()}


def _of_units(profile: ModelProfile, calls: Sequence[CallProfile]) -> tuple[int, ...]:
    elements = {unit.name: unit.num_parameters for unit in profile.units}
    return tuple(elements[unit] for unit in dict.fromkeys(call.unit for call in calls))


def _elements(parameters: Iterable[ParameterProfile]) -> int:
    return sum(parameter.num_elements for parameter in parameters)


def _is_added_in_place(name: str, parameter: ParameterProfile) -> bool:
    """Whether the product that makes a gradient adds it to the sum of those before it: of large weights of layers (as
    `execute.weight_sums` has it), not of parameters that a model's own code multiplies with, as experts'."""
    return parameter.num_elements >= ADDED_IN_PLACE and name.rpartition(".")[2] == "weight"


def _accumulation(parameters: Mapping[str, ParameterProfile]) -> tuple[Kernel, ...]:
    """Where the product adds, the sum before it is read; elsewhere a gradient is read, and that sum read and
    written."""
    totals: collections.Counter[str] = collections.Counter()
    for name, parameter in parameters.items():
        totals[parameter.dtype] += (1 if _is_added_in_place(name, parameter) else 3) * parameter.nbytes
    return tuple(
        Kernel(kind=KernelKind.MEMORY, phase=Phase.WEIGHT, dtype=dtype, nbytes=nbytes, batch_bytes=0)
        for dtype, nbytes in totals.items()
    )


# -- what is done -------------------------------------------------------------------------------------


def _merged(lists: Iterable[Sequence[Kernel]], scale: float) -> tuple[Kernel, ...]:
    """Equal kernels once. Parts that do the same share one tuple, which is looked through once."""
    times = collections.Counter(tuple(kernels) for kernels in lists)
    counts: collections.Counter[Kernel] = collections.Counter()
    for kernels, num in times.items():
        for kernel in kernels:
            counts[dataclasses.replace(kernel, count=1)] += num * kernel.count
    return tuple(
        dataclasses.replace(kernel if scale == 1.0 else kernel.scaled(scale), count=num)
        for kernel, num in counts.items()
        if num
    )


def _again(call: CallProfile, how: How) -> tuple[Kernel, ...]:
    """Forward kernels that run once more: all, or all but products with weights."""
    if how is How.NONE:
        return ()
    forward = tuple(kernel for kernel in call.kernels if kernel.phase is Phase.FORWARD)
    return forward if how is How.FULL else tuple(kernel for kernel in forward if not _has_weight(kernel))


def _has_weight(kernel: Kernel) -> bool:
    """Of a product of two activations the samples are a dim of the batch."""
    return kernel.kind is KernelKind.MATMUL and kernel.batch_dims != (0,)


def _forward(exchanges: Iterable[Exchange]) -> list[Exchange]:
    return [each for each in exchanges if each.phase is Phase.FORWARD]


def _later(exchange: Exchange) -> Exchange:
    return dataclasses.replace(exchange, phase=Phase.INPUT, again=True)


def _scaled(exchanges: Iterable[Exchange], scale: float) -> tuple[Exchange, ...]:
    counts: collections.Counter[Exchange] = collections.Counter()
    for each in exchanges:
        counts[dataclasses.replace(each, nbytes=round(scale * each.nbytes), count=1)] += each.count
    return tuple(dataclasses.replace(each, count=num) for each, num in counts.items() if num)


def _sent(profile: ModelProfile, stage: StageCut, scale: float, *, gradients: bool) -> dict[int, float]:
    """Target -> bytes of what it is sent, or of what comes back for it."""
    found: dict[int, float] = {}
    for value, target in stage.sends:
        about = profile.flow.values[value]
        if about.requires_grad or not gradients:
            found[target] = found.get(target, 0.0) + scale * about.nbytes
    return found


# -- what is kept -------------------------------------------------------------------------------------


def _kept(part: CallProfile | GlueProfile, how: Mapping[int, How]) -> int:
    return kept_bytes(part, how[part.node]) if isinstance(part, CallProfile) else part.saved_bytes


def _for_weights(call: CallProfile) -> int:
    return call.saved_bytes if call.weight_bytes is None else call.weight_bytes


def _transients(
    parts: Sequence[CallProfile | GlueProfile], how: Mapping[int, How], has_loss: bool
) -> tuple[float, float]:
    """What is alive at most beside what the stage keeps for a micro-batch: of its units, and of its head and the loss.

    A backward frees what it has used: while that of an early call runs, what later ones kept is gone.
    """
    in_order = sorted(parts, key=lambda part: part.node)
    last_call = max((part.node for part in in_order if isinstance(part, CallProfile)), default=-1)
    transient = logits = 0
    freed = 0
    for part in reversed(in_order):
        extra = (part.transient_bytes or 0) - freed
        kept = _kept(part, how)
        if isinstance(part, CallProfile):
            extra += part.saved_bytes - kept
        if has_loss and part.node >= last_call:
            logits = max(logits, extra)
        else:
            transient = max(transient, extra)
        freed += kept
    return transient, logits
