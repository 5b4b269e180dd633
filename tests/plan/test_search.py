"""A search finds what brute force finds, never what breaks a rule or does not fit, and says why all others lost."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest

from shardwise.errors import ConfigError, LayoutError
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.price import price
from shardwise.plan.ranked import Objective, Rule
from shardwise.plan.search import search_layouts
from shardwise.plan.space import Axes
from tests.plan.hand_works import cluster, device, limits, works

JOB = Job(global_batch=16, per_parameter=PerParameter.mixed())
SMALL = {
    "samples": (1, 2),
    "ways": (("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)),
    "cp": (1,),
}


def small(machine, num_layers: int = 8, **changed):
    own = limits(num_layers)
    return dataclasses.replace(Axes.of(own, machine, global_batch=JOB.global_batch), **(SMALL | changed))


def found(machine=None, *, top: int = 5, num_layers: int = 8, **options):
    machine = machine or cluster()
    axes = options.pop("axes", None) or small(machine, num_layers)
    return search_layouts(works(num_layers), machine, JOB, limits=limits(num_layers), axes=axes, top=top, **options)


def brute_force(search, machine):
    """Seconds of every layout of the space that fits, simulated."""
    space, made = search.explorer.space, works()
    seconds = {}
    for row in range(len(space)):
        layout = space.layout(row)
        samples = space.places[space.place[row]].samples
        count = layout.num_micro_batches(JOB.global_batch)
        priced = price(made(layout, samples), layout, machine, JOB, num_micro_batches=count, exact=True)
        if priced.fits:
            seconds[layout] = priced.step_s
    return seconds


@pytest.mark.parametrize("memory", [16e9, 6e9, 3.5e9])
def test_the_best_is_that_of_brute_force(memory) -> None:
    machine = cluster(kind=device(memory=memory))
    search = found(machine)
    seconds = brute_force(search, machine)
    assert search[0].step_s == pytest.approx(min(seconds.values()))
    assert sorted(plan.step_s for plan in search) == [plan.step_s for plan in search]


def test_a_search_that_prices_few_layouts_is_not_complete_and_comes_close() -> None:
    machine = cluster(kind=device(memory=6e9))
    whole, hasty = found(machine), found(machine, most=6)
    assert not hasty.complete
    assert hasty.num_priced < whole.num_priced < whole.num_layouts
    assert hasty[0].step_s == pytest.approx(whole[0].step_s, rel=0.05)


def test_nothing_that_does_not_fit_is_ranked() -> None:
    machine = cluster(kind=device(memory=3.5e9))
    search = found(machine, top=50)
    assert all(plan.ranked.room_bytes >= 0 and plan.ranked.price.fits for plan in search)
    for plan in search:
        assert plan.ranked.peak_bytes <= 3.5e9


def test_every_layout_is_ranked_or_rejected() -> None:
    search = found(cluster(kind=device(memory=6e9)))
    rejected = [each for each in search.rejections() if each.rule in list(Rule)]
    assert len(rejected) + len(search) == search.num_layouts
    assert sum(count for _, count, _ in search.rejected) == len(list(search.rejections()))


def test_every_reason_has_numbers() -> None:
    search = found(cluster(kind=device(memory=3.5e9)))
    told = list(search.rejections())
    assert {each.rule for each in told} >= {Rule.MEMORY, Rule.SLOWER}
    for each in told:
        assert re.search(r"\d", each.reason) or each.rule == Rule.DOMINATED, each
    slower = next(search.rejections(Rule.SLOWER))
    assert slower.numbers["margin"] >= 0
    lacking = next(search.rejections(Rule.MEMORY))
    assert lacking.numbers["lacks_bytes"] > 0


def test_the_memory_bound_rejects_nothing_that_fits() -> None:
    machine = cluster(kind=device(memory=3.5e9))
    search = found(machine)
    fitting = brute_force(search, machine)
    space = search.explorer.space
    bounded = search.explorer.bounded()
    assert bounded.any()
    assert not [row for row in range(len(space)) if bounded[row] and space.layout(row) in fitting]


def test_recompute_is_chosen_only_where_memory_asks_for_it() -> None:
    assert found()[0].layout.recompute == "none"
    tight = found(cluster(kind=device(memory=1.7e9)), axes=small(cluster(), tp=(1,), pp=(8,), states=(0,)))
    assert tight[0].layout.recompute != "none"


def test_objectives_order_by_what_they_name() -> None:
    time, memory = found(), found(objective=Objective.MEMORY)
    assert memory[0].ranked.peak_bytes < time[0].ranked.peak_bytes
    assert time[0].step_s < memory[0].step_s
    peaks = [plan.ranked.peak_bytes for plan in memory]
    assert peaks == sorted(peaks)


def test_cost_may_choose_fewer_devices() -> None:
    machine = cluster()
    axes = small(machine, devices=(4, 8))
    dear = found(machine, axes=axes, objective="cost")
    assert [plan.ranked.usd for plan in dear] == sorted(plan.ranked.usd for plan in dear)
    assert dear[0].layout.world_size == 4
    assert found(machine, axes=axes)[0].layout.world_size == 8


def test_cost_looks_at_fewer_devices_by_itself() -> None:
    cheapest = search_layouts(works(4), cluster(), JOB, limits=limits(4), objective="cost", top=3)
    assert cheapest.explorer.space.axes.devices == (8, 4, 2, 1)
    assert cheapest[0].layout.world_size < 8


def test_the_front_holds_nothing_that_another_beats_in_both() -> None:
    front = found(objective="pareto")
    assert len(front) > 1
    for one, other in itertools.pairwise(front):
        assert one.step_s < other.step_s
        assert one.ranked.peak_bytes > other.ranked.peak_bytes


def test_cost_without_prices_is_an_error() -> None:
    with pytest.raises(ConfigError, match="usd_per_hour"):
        found(cluster(kind=device(usd=None)), objective="cost")


def test_where_nothing_fits_the_error_says_what_would_need_least() -> None:
    with pytest.raises(LayoutError, match=r"no layout.*GiB|MiB"):
        found(cluster(kind=device(memory=0.6e9)))


def test_margins_are_shares_above_the_best() -> None:
    search = found()
    assert search[0].ranked.margin == 0
    for plan in search[1:]:
        assert plan.ranked.margin == pytest.approx(plan.step_s / search[0].step_s - 1)
        assert math.isfinite(plan.ranked.margin)


def test_the_explanation_says_memory_time_and_why_the_next_one_lost() -> None:
    text = found(cluster(kind=device(memory=6e9)))[0].explain()
    for word in ("layout", "step", "memory", "fits", "parameters", "compute", "together", "runner-up", "rejected"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100


def test_changes_name_what_moves_along_and_what_does_not_fit() -> None:
    search = found(cluster(kind=device(memory=3.5e9)))
    changes = search[0].changes()
    told = [str(change) for change in changes]
    assert any("tp " in text for text in told)
    assert any("micro-batch" in text for text in told)
    fitting = [change for change in changes if not change.broken and not change.lacks_bytes]
    assert all(change.gain <= 0.01 for change in fitting)  # it is the best already


def test_changes_of_a_bad_layout_save() -> None:
    search = found(top=200)
    worst = search[len(search) - 1]
    assert max(change.gain for change in worst.changes() if not change.lacks_bytes) > 0.02
