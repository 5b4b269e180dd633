"""One step of a contender by the clock, and whether it computes what one process does. Knows no pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn as nn

__all__ = ["Contender", "assert_same", "timed"]

TOLERANCE = 1e-5  # float32: other orders of summation over the micro-batches


class Contender(Protocol):
    """Takes the whole batch and leaves the gradients of the mean loss in its parameters."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Those of this rank, named as in the whole model."""

    def step(self, batch: Mapping[str, torch.Tensor]) -> float | None:
        """Forward and backward; the mean loss, or None on a rank that does not know it."""


def timed(contender: Contender, batch: Mapping[str, torch.Tensor]) -> float:
    """Seconds of a step on this rank, from a barrier on; gradients start as None."""
    for parameter in contender.parameters.values():
        parameter.grad = None
    dist.barrier()
    start = time.perf_counter()
    contender.step(batch)
    return time.perf_counter() - start


def assert_same(
    name: str,
    contender: Contender,
    batch: Mapping[str, torch.Tensor],
    loss: float,
    expected: Mapping[str, torch.Tensor],
) -> None:
    """Takes a step; raises AssertionError unless the contender's loss and gradients are those of one process."""
    got = contender.step(batch)
    assert got is None or abs(got - loss) <= TOLERANCE * abs(loss), f"{name}: loss {got}, one process {loss}"
    parameters = contender.parameters
    assert parameters, f"{name} has no parameters on this rank"
    assert set(parameters) <= set(expected), f"{name}: parameters {sorted(parameters)}"
    scale = statistics.fmean(gradient.norm().item() for gradient in expected.values())
    for parameter, value in parameters.items():
        assert value.grad is not None, f"{name}: {parameter} has no gradient"
        error = (value.grad - expected[parameter]).norm() / max(expected[parameter].norm().item(), 1e-3 * scale)
        assert error <= TOLERANCE, f"{name}: the gradient of {parameter} differs by {error:.1e} from one process"
