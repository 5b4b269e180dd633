"""The plan of a run in words, before its first step: stages, memory, traffic and the drawn schedule.

Traces the model once more, on whatever device and rank it is called; seconds come from how fast this machine
multiplies matrices. Refuses to know how a run is started.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.profile import ModelProfile
from shardwise.layout import Layout
from shardwise.plan.cut import cut_stages
from shardwise.plan.estimate import estimate
from shardwise.plan.explain import explain
from shardwise.plan.partition import place
from shardwise.trace.objective import LossFunction
from shardwise.trace.profile import trace

__all__ = ["machine_rate", "plan_of_model", "plan_of_profile"]

_SIDE = 384  # of the matrices that are multiplied
_PROBE_S = 0.1


def plan_of_model(
    model: nn.Module, inputs: Any, *, layout: Layout, loss: LossFunction | None, num_micro_batches: int
) -> str:
    """The plan of a model for micro-batches like `inputs`. Raises ModelError, LayoutError."""
    return plan_of_profile(trace(model, inputs, loss=loss), layout=layout, num_micro_batches=num_micro_batches)


def plan_of_profile(
    profile: ModelProfile, *, layout: Layout, num_micro_batches: int, flops_per_s: float | None = None
) -> str:
    """The plan of a traced model; `flops_per_s` of one rank is measured here if not given. Raises LayoutError."""
    stages = place(profile, layout)
    cut = cut_stages(profile.flow, stages, layout.pp)
    predicted = estimate(
        profile,
        layout,
        cut,
        num_micro_batches=num_micro_batches,
        flops_per_s=flops_per_s or machine_rate(),
    )
    return explain(profile, layout, cut, predicted)


def machine_rate() -> float:
    """Flops per second of float32 matrix products on this process's CPU threads."""
    matrix = torch.ones(_SIDE, _SIDE)
    products, start = 0, time.perf_counter()
    while time.perf_counter() - start < _PROBE_S:
        torch.mm(matrix, matrix)
        products += 1
    return 2.0 * _SIDE**3 * products / (time.perf_counter() - start)
