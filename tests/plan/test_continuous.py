"""The estimate of steps without a flush: no bubble in a further step, two versions of the weights."""

from __future__ import annotations

import pytest

from hand_profiles import chain as chain_of_units
from shardwise.errors import ScheduleError
from shardwise.layout import Layout
from shardwise.plan.continuous import further_step_s
from shardwise.plan.cut import cut_stages
from shardwise.plan.estimate import Estimate, estimate
from shardwise.plan.partition import place
from shardwise.schedule import Costs, Kind, chain, generate, simulate


def test_a_further_step_of_even_stages_takes_what_its_micro_batches_take() -> None:
    schedule = generate("pipedream-2bw", num_ranks=4, num_micro_batches=6)
    assert further_step_s(schedule, chain(4), Costs.uniform(4)) == pytest.approx(6 * 3.0)


def test_it_is_never_slower_than_a_step_by_itself_nor_faster_than_its_busiest_rank() -> None:
    seconds = (1.0, 2.5, 1.5)
    costs = Costs(compute_seconds={Kind.F: seconds, Kind.B: tuple(2 * s for s in seconds)})
    schedule = generate("pipedream-2bw", num_ranks=3, num_micro_batches=5)
    alone = simulate(schedule, costs=costs).seconds
    assert 5 * 3 * 2.5 <= further_step_s(schedule, chain(3), costs) < alone


def test_too_few_micro_batches_are_refused() -> None:
    schedule = generate("pipedream-2bw", num_ranks=4, num_micro_batches=3)
    with pytest.raises(ScheduleError, match="3 for 4 stages"):
        further_step_s(schedule, chain(4), Costs.uniform(4))


def estimated(schedule: str) -> Estimate:
    profile, layout = chain_of_units([10**6] * 4, elements=[3, 4, 5, 6]), Layout(pp=2, schedule=schedule)
    cut = cut_stages(profile.flow, place(profile, layout), 2)
    return estimate(profile, layout, cut, num_micro_batches=4, flops_per_s=1e6)


def test_the_estimate_has_no_bubble_and_holds_weights_and_gradients_twice() -> None:
    drained, late = estimated("1f1b"), estimated("pipedream-2bw")
    assert late.bubble_fraction == pytest.approx(0.0, abs=1e-3)
    assert late.step_s == pytest.approx(drained.step_s * 4 / 5, rel=1e-3)
    for one, two in zip(drained.ranks, late.ranks, strict=True):
        assert two.parameter_bytes == 2 * one.parameter_bytes
        assert two.gradient_bytes == 2 * one.gradient_bytes
        assert (two.optimizer_bytes, two.activation_bytes) == (one.optimizer_bytes, one.activation_bytes)
