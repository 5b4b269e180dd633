"""Stages of a chain are sums of its units, however they are cut."""

from __future__ import annotations

import pytest

from shardwise.errors import LayoutError
from shardwise.layout import Layout
from tests.plan.hand_works import works


def flops(stages) -> int:
    return sum(kernel.flops * kernel.count for stage in stages for kernel in stage.kernels)


@pytest.mark.parametrize("layout", ["pp=1", "pp=4", "pp=3", "pp=2,schedule=interleaved,chunks=2"])
def test_the_whole_is_the_same_in_every_cut(layout) -> None:
    made = works()
    whole, cut = made(Layout(), 2), made(Layout.parse(layout), 2)
    assert len(cut) == Layout.parse(layout).num_stages
    assert flops(cut) == flops(whole)
    assert sum(stage.parameters for stage in cut) == whole[0].parameters
    assert sum(stage.saved_bytes for stage in cut) == pytest.approx(whole[0].saved_bytes)
    assert [stage.stage for stage in cut] == list(range(len(cut)))


def test_every_stage_but_the_last_sends_to_the_next() -> None:
    stages = works()(Layout(pp=4), 1)
    assert [tuple(stage.sends) for stage in stages] == [(1,), (2,), (3,), ()]


def test_stages_listed_by_hand_are_those_that_are_made() -> None:
    layout = Layout(pp=2, stages=(("layers.0-5",), ("layers.6-7",)))
    first, second = works()(layout, 1)
    assert first.parameters == 3 * second.parameters


def test_stages_out_of_order_are_refused() -> None:
    with pytest.raises(LayoutError, match="in order"):
        works()(Layout(pp=2, stages=(("layers.4-7",), ("layers.0-3",))), 1)


def test_more_stages_than_units_are_refused() -> None:
    with pytest.raises(LayoutError, match="8 units"):
        works()(Layout(pp=9), 1)


def test_a_heavy_unit_gets_a_stage_with_fewer_others() -> None:
    stages = works(8, heavier_last=3.0)(Layout(pp=2), 1)
    assert stages[0].parameters > stages[1].parameters
