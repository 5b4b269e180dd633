"""A loss scale halves where gradients overflow and doubles behind enough good steps."""

from __future__ import annotations

import math

import pytest

from shardwise.errors import CheckpointError
from shardwise.parallel.precision.loss_scale import FIRST, LossScale


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    scale = LossScale()
    assert scale.accepts(1.0)
    assert not scale.accepts(math.inf)
    assert scale.value == FIRST / 2
    assert not scale.accepts(math.nan)
    assert scale.value == FIRST / 4
    assert scale.skipped_steps == 2


def test_good_steps_in_a_row_double_it_and_an_overflow_begins_the_count_anew() -> None:
    scale = LossScale(4.0, window=3)
    norms = [1.0, 1.0, math.inf, 1.0, 1.0, 1.0]
    values = [scale.value for norm in norms if scale.accepts(norm) or True]
    assert values == [4.0, 4.0, 2.0, 2.0, 2.0, 4.0]


def test_a_constant_scale_stays_and_still_skips() -> None:
    scale = LossScale(128.0, dynamic=False, window=1)
    assert scale.accepts(1.0)
    assert not scale.accepts(math.inf)
    assert scale.value == 128.0


def test_it_never_gets_to_zero_or_infinity() -> None:
    scale = LossScale(1.0, window=1)
    for _ in range(200):
        scale.accepts(math.inf)
    assert scale.value > 0
    for _ in range(300):
        scale.accepts(1.0)
    assert math.isfinite(scale.value)


def test_what_a_checkpoint_keeps_goes_on_alike() -> None:
    scale = LossScale(8.0, window=3)
    for norm in (1.0, math.inf, 1.0, 1.0):
        scale.accepts(norm)
    other = LossScale(window=3)
    other.from_state(scale.to_state())
    assert other.to_state() == scale.to_state()
    assert other.accepts(1.0)
    assert other.value == 8.0


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match="value, good_steps and skipped_steps"):
        LossScale().from_state({"value": 1.0})
