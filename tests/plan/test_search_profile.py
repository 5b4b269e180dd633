"""The search that users call, on a bare profile and on works."""

from __future__ import annotations

import pytest

import shardwise as sw
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.scaled_works import ProfileWorks, ScaledWorks, part_names, scaled_work, traced_samples
from tests.hand_profiles import chain
from tests.plan.hand_works import cluster, limits, works


def test_a_profile_is_searched_over_replicas_and_stages() -> None:
    found = sw.search(chain([100] * 4), sw.Cluster.local(4), global_batch=8)
    assert found[0].layout.world_size == 4
    assert {plan.layout.tp for plan in found} == {1}
    assert "layout" in found[0].explain()


def test_a_profile_has_nothing_to_say_of_divided_units() -> None:
    with pytest.raises(LayoutError, match="tp=1, cp=1 and ep=1"):
        ProfileWorks(profile=chain([100] * 4), traced=8)(Layout(tp=2), 1)


def test_works_are_searched_within_their_limits() -> None:
    found = sw.search(works(), cluster(), global_batch=16, limits=limits())
    assert found[0].layout.world_size == 8
    with pytest.raises(LayoutError, match="give limits"):
        sw.search(works(), cluster(), global_batch=16)


def test_parts_are_named_as_layouts_list_them() -> None:
    profile = chain([1, 1, 1], units=["embed", "layer", "layer"])
    assert part_names(profile) == ("embed", "layer#0", "layer#1")
    assert traced_samples(profile.flow) == 8


def test_twice_the_samples_are_twice_the_work_and_the_same_weights() -> None:
    layout = Layout(pp=2, tp=2)
    scaled, own = ScaledWorks(works(), traced=2)(layout, 4), works()(layout, 4)
    for one, other in zip(scaled, own, strict=True):
        assert one.parameters == other.parameters
        assert one.saved_bytes == pytest.approx(other.saved_bytes)
        assert [k.flops for k in one.kernels] == [k.flops for k in other.kernels]
        assert [k.shape for k in one.kernels] == [k.shape for k in other.kernels]
        assert one.sends == other.sends
    assert scaled_work(own[0], 1) is own[0]
