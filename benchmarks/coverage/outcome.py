"""What came of one layout beside one device, and how far two runs are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from shardwise.verify.comparison import errors_of, relative

__all__ = ["TOLERANCE", "Gradients", "Outcome", "gradients_of", "worst_error"]

TOLERANCE = 1e-5  # float32: sums of gradients that arrive in another order

Gradients = Mapping[str, torch.Tensor | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One layout beside one device. `proven` and `wrong` exclude each other; where neither holds, `reason` says why."""

    proven: bool
    wrong: bool = False
    units: int = 0
    stages: tuple[int, ...] = ()  # unit calls of each
    gradient_error: float | None = None
    sharded_share: float | None = None  # of the parameters of matrix products in blocks
    reference: str = "the model as it is"
    seconds: float = 0.0
    reason: str = ""


def gradients_of(model: Any) -> dict[str, torch.Tensor | None]:
    """By name, of every parameter."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst_error(got: tuple[float, Gradients], wanted: tuple[float, Gradients]) -> tuple[float, str]:
    """The worst of the loss's error and every gradient's, and where it is."""
    (loss, gradients), (wanted_loss, wanted_gradients) = got, wanted
    sizes = {name: torch.zeros(0) if g is None else torch.zeros(g.shape) for name, g in wanted_gradients.items()}
    worst = max(errors_of(gradients, sizes, wanted_gradients, sizes, by_sign=False), key=lambda one: one.gradient)
    loss_error = relative(loss, wanted_loss)
    return max((loss_error, "the loss"), (worst.gradient, worst.name))
