"""The profile of one shard: what of every unit is left on a rank when units are divided among the tensor axis.

Parameters exactly, flops in proportion to the matrices that are left; what is saved for backward is counted whole, an
upper bound. Knows profiles and plans, no torch.
"""

from __future__ import annotations

import dataclasses

from shardwise.describe.profile import ModelProfile, ParameterProfile, UnitProfile
from shardwise.describe.tensor import TensorPlan

__all__ = ["profile_of_shard"]


def profile_of_shard(profile: ModelProfile, tensor: TensorPlan, *, shard: int = 0) -> ModelProfile:
    """`profile` with the parameters and flops of one shard of `tensor`."""
    units = tuple(
        dataclasses.replace(unit, parameters={n: _part(n, p, tensor, shard) for n, p in unit.parameters.items()})
        for unit in profile.units
    )
    left = {
        whole.name: _matrices(part) / max(1, _matrices(whole)) for whole, part in zip(profile.units, units, strict=True)
    }
    calls = tuple(
        dataclasses.replace(
            call,
            forward_flops=round(call.forward_flops * left[call.unit]),
            backward_flops=round(call.backward_flops * left[call.unit]),
            weight_flops=None if call.weight_flops is None else round(call.weight_flops * left[call.unit]),
            forward_s=None if call.forward_s is None else call.forward_s * left[call.unit],
            backward_s=None if call.backward_s is None else call.backward_s * left[call.unit],
        )
        if _matrices_of(profile, call.unit)
        else call
        for call in profile.calls
    )
    return dataclasses.replace(profile, units=units, calls=calls)


def _part(name: str, parameter: ParameterProfile, tensor: TensorPlan, shard: int) -> ParameterProfile:
    part = tensor.slice_of(name)
    if part is None:
        return parameter
    shape = list(parameter.shape)
    shape[part.dim] = shape[part.dim] // part.size * part.local_size(shard)
    return dataclasses.replace(parameter, shape=tuple(shape))


def _matrices(unit: UnitProfile) -> int:
    return sum(parameter.num_elements for parameter in unit.parameters.values() if len(parameter.shape) > 1)


def _matrices_of(profile: ModelProfile, name: str) -> int:
    return next(_matrices(unit) for unit in profile.units if unit.name == name)
