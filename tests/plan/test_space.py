"""The space of a search: every layout in it keeps the rules, none twice, and what is refused says why, in numbers."""

from __future__ import annotations

import dataclasses
import re

import pytest

from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.space import Axes, Limits, divisors, space_of
from tests.plan.hand_works import cluster, limits


def space(num_layers: int = 4, global_batch: int = 16, **changed: object):
    own = limits(num_layers)
    axes = dataclasses.replace(Axes.of(own, cluster(), global_batch=global_batch), **changed)
    return space_of(own, axes, global_batch=global_batch, per_host=4)


def test_every_row_is_a_layout_of_all_devices_whose_micro_batches_are_whole() -> None:
    found = space()
    for row in range(len(found)):
        layout = found.layout(row)
        assert layout.world_size == 8
        samples = found.places[found.place[row]].samples
        assert layout.num_replicas * layout.num_micro_batches(16) * samples == 16
        assert layout.num_stages <= 4
        assert 8 % layout.tp == 0


def test_no_layout_stands_there_twice() -> None:
    found = space()
    layouts = [found.layout(row) for row in range(len(found))]
    assert len(set(layouts)) == len(layouts)


def test_a_small_space_holds_every_layout_that_brute_force_finds() -> None:
    found = space(tp=(1, 2), cp=(1,), pp=(1, 2), samples=(1, 2), ways=(("1f1b", 1),), recompute=("none",), states=(0,))
    layouts = {found.layout(row) for row in range(len(found))}
    expected = set()
    for tp, pp, samples in ((t, p, s) for t in (1, 2) for p in (1, 2) for s in (1, 2)):
        dp = 8 // (tp * pp)
        if 16 % (dp * samples) == 0:
            for word in ("off", "on") if tp > 1 else ("off",):
                layout = Layout(dp=dp, tp=tp, pp=pp, micro_batches=16 // (dp * samples), sequence_parallel=word)
                expected.add(layout)
    assert layouts == expected


def test_what_is_refused_names_its_rule_and_numbers() -> None:
    refused = space(num_layers=4, global_batch=4, tp=(1, 2, 8), pp=(1, 8)).refused
    assert {each.rule for each in refused} >= {"more stages than units", "global batch not divisible"}
    assert all(re.search(r"\d", each.reason) for each in refused)


def test_an_axis_that_does_not_divide_is_refused_by_name() -> None:
    own = Limits(stages=4, tensor={"heads of keys and values": 2})
    axes = Axes(devices=(8,), tp=(4,), cp=(1,), ep=(1,), pp=(1,))
    (refused,) = space_of(own, axes, global_batch=16, per_host=8).refused
    assert refused.reason == "tp=4 does not divide 2 heads of keys and values"


def test_experts_are_divided_among_replicas() -> None:
    own = limits(4, experts=4)
    axes = dataclasses.replace(Axes.of(own, cluster(), global_batch=16), ep=(1, 2, 4), pp=(1,), tp=(1,), cp=(1,))
    found = space_of(own, axes, global_batch=16, per_host=4)
    layouts = [found.layout(row) for row in range(len(found))]
    assert {layout.ep for layout in layouts} == {1, 2, 4}
    assert all(layout.dp * layout.fsdp * layout.ep == 8 for layout in layouts)


def test_a_pipeline_of_one_place_has_no_schedules_to_choose_from() -> None:
    found = space(tp=(8,), pp=(1,), cp=(1,))
    assert {found.layout(row).schedule for row in range(len(found))} == {"1f1b"}


def test_an_axis_without_values_is_an_error() -> None:
    with pytest.raises(LayoutError, match="pp has none"):
        Axes(devices=(8,), tp=(1,), cp=(1,), ep=(1,), pp=())


def test_divisors_ascend() -> None:
    assert divisors(24) == (1, 2, 3, 4, 6, 8, 12, 24)
