"""The learning rate: up in a line, down in a cosine, and a pure function of the step."""

from __future__ import annotations

import pytest

from shardwise.train.rate import learning_rate


def rates(**options: object) -> list[float]:
    return [learning_rate(s, peak=1.0, steps=11, warm_up=4, **options) for s in range(11)]  # type: ignore[arg-type]


def test_it_rises_to_the_peak_and_ends_at_the_final_fraction() -> None:
    found = rates(final_fraction=0.2)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[7] == pytest.approx(0.6)  # half way down, from 1 to 0.2
    assert found[-1] == pytest.approx(0.2)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_constant_stays_at_the_peak() -> None:
    assert rates(schedule="constant")[3:] == [1.0] * 8


def test_a_run_of_one_step_has_a_rate() -> None:
    assert learning_rate(0, peak=2.0, steps=1, warm_up=0) == 2.0


def test_linear_falls_in_a_line() -> None:
    found = rates(schedule="linear", final_fraction=0.4)
    assert found[3:5] == [1.0, 1.0]
    assert found[7] == pytest.approx(0.7)
    assert found[-1] == pytest.approx(0.4)


def test_wsd_stays_and_then_falls_to_the_final_fraction_at_the_last_step() -> None:
    found = rates(schedule="wsd", decay=4, final_fraction=0.0)
    assert found[3:7] == [1.0] * 4
    assert found[7:] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert rates(schedule="wsd", final_fraction=0.0)[8:] == pytest.approx([1.0, 0.5, 0.0])  # a fifth of 11 steps


def test_inverse_square_root_falls_from_the_warm_up_on_whatever_the_last_step() -> None:
    found = rates(schedule="inverse-sqrt")
    assert found[3] == 1.0
    assert found[7] == pytest.approx((4 / 8) ** 0.5)
    assert learning_rate(7, peak=1.0, steps=1000, warm_up=4, schedule="inverse-sqrt") == found[7]


def test_a_resumed_run_has_the_rates_of_one_that_was_not_stopped() -> None:
    """A rate follows from the step alone."""
    for schedule in ("cosine", "linear", "wsd", "inverse-sqrt", "constant"):
        assert rates(schedule=schedule)[6] == learning_rate(6, peak=1.0, steps=11, warm_up=4, schedule=schedule)
