"""What came of one layout beside one device, and how far two runs are apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from shardwise.verify.comparison import FLOOR, errors_of, relative

__all__ = [
    "TOLERANCE",
    "Gradients",
    "Outcome",
    "Run",
    "errors_by_name",
    "followed_share",
    "gradients_of",
    "worst_error",
]

TOLERANCE = 1e-5  # float32: sums of gradients that arrive in another order

Gradients = Mapping[str, torch.Tensor | None]
Run = tuple[float, Gradients]  # its loss and gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One layout beside one device. `proven` and `wrong` exclude each other; where neither holds, `reason` says why."""

    proven: bool
    wrong: bool = False
    units: int = 0
    stages: tuple[int, ...] = ()  # unit calls of each
    gradient_error: float | None = None  # in float32
    float64_error: float | None = None  # where float32 ends above the tolerance; it decides then
    shaken: bool = False  # no farther off than one device whose weights differ in their last bit
    followed: float | None = None  # `followed_share` of the gradients of one device
    sharded_share: float | None = None  # of the parameters of matrix products in blocks
    whole: str = ""  # why the rest of them is not divided
    plan_seconds: float = 0.0  # to find and prove how units are divided
    reference: str = "the model as it is"
    seconds: float = 0.0
    reason: str = ""


def gradients_of(model: Any) -> dict[str, torch.Tensor | None]:
    """By name, of every parameter."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst_error(got: Run, wanted: Run) -> tuple[float, str]:
    """The worst of the loss's error and every gradient's, and where it is."""
    errors = errors_by_name(got, wanted)
    where = max(errors, key=lambda name: errors[name])
    return errors[where], where


def followed_share(gradients: Gradients) -> float:
    """Of the elements of parameters that have a gradient, the share whose gradient is large enough for an error of a
    hundredth to be beyond the tolerance. `errors_of` measures small ones against its floor, so that where one tensor
    holds nearly all of the gradient, equal gradients say little of the others."""
    tensors = [gradient for gradient in gradients.values() if gradient is not None]
    total = sum(tensor.numel() for tensor in tensors)
    norms = [float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors]
    least = 100 * TOLERANCE * FLOOR * math.hypot(*norms)
    followed = (t for t, norm in zip(tensors, norms, strict=True) if norm >= least * math.sqrt(t.numel() / total))
    return sum(tensor.numel() for tensor in followed) / max(total, 1)


def errors_by_name(got: Run, wanted: Run) -> dict[str, float]:
    """The error of the loss, and of the gradient of every parameter by its name."""
    (loss, gradients), (wanted_loss, wanted_gradients) = got, wanted
    sizes = {name: torch.zeros(0) if g is None else torch.zeros(g.shape) for name, g in wanted_gradients.items()}
    found = errors_of(gradients, sizes, wanted_gradients, sizes, by_sign=False)
    return {"the loss": relative(loss, wanted_loss), **{error.name: error.gradient for error in found}}
