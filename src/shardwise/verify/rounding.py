"""What float32 leaves in doubt, settled in float64. Knows what both sides noted; runs nothing.

BatchNorm over few samples, differences of large numbers, deep stacks: some models lose more of float32 on one device
than sums taken in another order may differ by. An error beyond the tolerance is rounding, and no difference, where

    exact       in float64 the layout equals one device to 1e-9, in every tensor, in loss, norm and updates, and
    no farther  in float32 the layout is at most `MOST` times as far from float64 as one device in float32 is,
                in everything that is beyond the tolerance

A fault of the layout is as large in float64 as in float32 and fails the first; precision that the layout alone loses
(a narrower type, a sum that cancels) fails the second. Errors above `DOUBT` are never put down to rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch

from shardwise.verify.comparison import Rounding, TensorError, errors_of, relative
from shardwise.verify.copies import distances_of
from shardwise.verify.sides import Side
from shardwise.verify.stored import Joined

__all__ = ["DOUBT", "EXACT", "MOST", "rounding_of", "tensor_errors"]

DOUBT = 0.1  # not one digit is left
EXACT = 1e-9  # float64 sums taken in another order
# Two orders of summation are two draws from one distribution of errors: of a tensor, their norms seldom differ by more.
MOST = 4.0


def tensor_errors(
    sides: Sequence[Side], reference: Side, *, by_sign: bool | Collection[str]
) -> tuple[TensorError, ...]:
    """The errors of every parameter of a layout, whose ranks noted `sides`, against `reference`; of what several ranks
    hold, the largest."""
    experts = [(side.expert, side.experts) for side in sides]
    return errors_of(
        Joined([(side.gradients, side.shard, side.tensor) for side in sides], experts),
        cast(Mapping[str, torch.Tensor], Joined([(side.updates, side.shard, side.tensor) for side in sides], experts)),
        reference.gradients,
        reference.updates,
        by_sign=by_sign,
        roundings=reference.roundings,
        distances=distances_of([side.copies for side in sides], reference.gradients),
    )


def rounding_of(
    sides: Sequence[Side],
    reference: Side,
    exact_sides: Sequence[Side],
    exact: Side,
    *,
    tolerance: float,
    by_sign: bool | Collection[str],
) -> Rounding:
    """How far both sides are from `exact`, one device in float64, and the layout in float64 from that."""
    beyond = [what for what, error in _errors(sides, reference, by_sign).items() if not error <= tolerance]
    stored = dataclasses.replace(exact, roundings=reference.roundings)  # of weights in float32
    own = _errors([reference], stored, by_sign)
    layout = _errors(sides, stored, by_sign)
    ratios = {name: _ratio(layout[name], own[name]) for name in beyond}
    worst = max(ratios, key=lambda name: ratios[name], default="")
    return Rounding(
        where=worst,
        one_device=own.get(worst, 0.0),
        layout=layout.get(worst, 0.0),
        most=MOST,
        exact_error=max(_errors(exact_sides, exact, by_sign).values(), default=math.inf),
        exact_tolerance=EXACT,
    )


def _errors(sides: Sequence[Side], reference: Side, by_sign: bool | Collection[str]) -> dict[str, float]:
    """Every error by what it is of."""
    found: dict[str, float] = {}
    for error in tensor_errors(sides, reference, by_sign=by_sign):
        found[f"the gradient of {error.name}"] = error.gradient
        found[f"the update of {error.name}"] = error.update
    losses = zip(sides[0].losses, reference.losses, strict=True)
    found["the loss"] = max(relative(a, b) for a, b in losses)
    found["the gradient norm"] = relative(sides[0].norm, reference.norm) if reference.norm else abs(sides[0].norm)
    return found


def _ratio(layout: float, own: float) -> float:
    if not math.isfinite(layout):
        return math.inf
    return layout / own if own > 0 else (0.0 if layout == 0 else math.inf)
