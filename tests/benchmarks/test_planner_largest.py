"""The largest searches, on fewer devices: models have their published sizes, and what is found is plausible."""

from __future__ import annotations

import pytest

from benchmarks.planner.largest import DEEPSEEK, LLAMA_405B, limits_of, search_of, works_of
from shardwise.describe.catalogue import named_cluster
from shardwise.layout import Layout


@pytest.mark.parametrize(("model", "billions"), [(LLAMA_405B, 405.9), (DEEPSEEK, 671)])
def test_models_have_about_their_published_parameters(model, billions) -> None:
    (whole,) = works_of(model)(Layout(), 1)
    assert whole.parameters == pytest.approx(billions * 1e9, rel=0.03)


def test_stages_are_one_unit_each_at_most() -> None:
    assert limits_of(LLAMA_405B).stages == 128
    assert len(works_of(LLAMA_405B)(Layout(pp=128), 1)) == 128


def test_a_search_on_a_thousand_devices_finds_layouts_that_fit_and_are_plausible() -> None:
    cluster = named_cluster("h100x8x128")
    found, _, _ = search_of(LLAMA_405B, cluster, top=3)
    assert found.complete
    for plan in found:
        assert plan.layout.world_size == 1024
        assert plan.ranked.room_bytes >= 0
        assert 0.3 < plan.ranked.price.mfu < cluster.hosts[0].device.efficiency.matmul  # without a bubble, all hidden
