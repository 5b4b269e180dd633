"""Optimizers over what a rank holds of a model, and what each of them remembers of a parameter between steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["MOMENTS"]

# Name in a run file -> tensors of the optimizer's state: like the parameter, but for "step", a single number. Muon's
# parameters that are no hidden matrices have AdamW's.
MOMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "adamw": ("exp_avg", "exp_avg_sq", "step"),
        "sgd": (),
        "momentum": ("momentum_buffer",),
        "muon": ("momentum_buffer", "exp_avg", "exp_avg_sq", "step"),
    }
)
