"""The profile of one rank that holds some of the experts: fewer parameters, the same work where loads are even.

Knows profiles and plans, no torch.
"""

from __future__ import annotations

import dataclasses

from shardwise.describe.expert import ExpertPlan
from shardwise.describe.profile import ModelProfile, ParameterProfile

__all__ = ["profile_of_expert_rank"]


def profile_of_expert_rank(profile: ModelProfile, experts: ExpertPlan, *, rank: int = 0) -> ModelProfile:
    """`profile` with the parameters that `rank` of the expert axis holds; flops stay: each rank has its own tokens."""
    slices, owners = experts.slices(), experts.owners()

    def held(name: str, parameter: ParameterProfile) -> ParameterProfile:
        if name in slices:
            size = parameter.shape[0] // slices[name].size * slices[name].local_size(rank)
            return dataclasses.replace(parameter, shape=(size, *parameter.shape[1:]))
        elsewhere = any(owners.get(prefix, rank) != rank for prefix in _prefixes(name))
        return dataclasses.replace(parameter, shape=(0, *parameter.shape[1:])) if elsewhere else parameter

    units = tuple(
        dataclasses.replace(unit, parameters={name: held(name, each) for name, each in unit.parameters.items()})
        for unit in profile.units
    )
    return dataclasses.replace(profile, units=units)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
