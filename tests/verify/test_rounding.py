"""Errors beyond float32's tolerance are put down to rounding where float64 says so, and nowhere else."""

from __future__ import annotations

import torch

from shardwise.verify.comparison import Rounding
from shardwise.verify.rounding import rounding_of
from shardwise.verify.sides import Side

VALUE = torch.linspace(1.0, 2.0, 64, dtype=torch.float64)
NOISE = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def side(gradient: torch.Tensor, *, loss: float = 1.0) -> Side:
    """What one device notes of a model of one parameter."""
    return Side(
        losses=[loss],
        norm=float(gradient.norm()),
        gradients={"weight": gradient},
        updates={"weight": -0.05 * gradient},
        roundings={},
        calls=[],
        random=False,
    )


def settled(layout: Side, one: Side, exact_layout: Side) -> Rounding:
    """What float64 says, where one device in float64 has `VALUE`."""
    return rounding_of([layout], one, [exact_layout], side(VALUE), tolerance=1e-5, by_sign=False)


def test_a_layout_as_far_from_float64_as_one_device_rounds_like_it() -> None:
    told = settled(side(VALUE + 5e-5 * NOISE), side(VALUE + 5e-5 * OTHER), side(VALUE))

    assert told.holds
    assert told.where in ("the gradient of weight", "the update of weight")
    assert 1e-5 < told.one_device < 1e-4


def test_what_differs_in_float64_too_is_a_fault_however_small() -> None:
    fault = 1e-4 * torch.ones_like(VALUE)

    told = settled(side(VALUE + fault), side(VALUE + 5e-5 * OTHER), side(VALUE + fault))

    assert not told.holds
    assert told.exact_error > 1e-5
    assert "so this is no rounding" in str(told)


def test_precision_that_the_layout_alone_loses_is_no_rounding_of_the_model() -> None:
    told = settled(side(VALUE + 5e-4 * NOISE), side(VALUE + 1e-6 * OTHER), side(VALUE))

    assert not told.holds
    assert told.exact_error == 0.0


def test_a_loss_that_only_the_layout_has_wrong_is_no_rounding() -> None:
    told = settled(side(VALUE, loss=1.0 + 5e-5), side(VALUE), side(VALUE))

    assert not told.holds
    assert told.where == "the loss"


def test_no_number_is_no_rounding() -> None:
    assert not settled(side(VALUE * float("nan")), side(VALUE + 5e-5 * OTHER), side(VALUE)).holds
