"""Which links the groups of a layout span, on hosts of 8."""

from __future__ import annotations

import pytest

from shardwise.describe.cluster import Cluster, Device, Hosts, Link
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.placing import ORDER, send_level, spans_of

CARD = Device(name="card", memory_bytes=1 << 34, flops_per_s={"float32": 1e12}, bytes_per_s=1e12)
LINKS = (Link(name="in", bytes_per_s=1e11, latency_s=1e-6, ranks=8), Link(name="out", bytes_per_s=1e10, latency_s=1e-5))
CLUSTER = Cluster(hosts=(Hosts(device=CARD, devices=8, count=8),), links=LINKS)


def sizes(layout: Layout, axis: str, order: tuple[str, ...] = ORDER) -> tuple[int, ...]:
    found: tuple[int, ...] = getattr(spans_of(layout, CLUSTER, order=order), axis).sizes
    return found


def test_shards_stand_side_by_side_and_replicas_behind_them() -> None:
    layout = Layout(tp=4, dp=4, pp=2)
    assert sizes(layout, "tp") == (4, 1)
    assert sizes(layout, "replicas") == (2, 2)  # ranks 0, 4 | 8, 12


def test_more_shards_than_a_host_has_span_hosts() -> None:
    assert sizes(Layout(tp=16, dp=2), "tp") == (8, 2)
    assert sizes(Layout(tp=16, dp=2), "replicas") == (1, 2)


def test_ranks_with_other_tokens_sum_gradients_too() -> None:
    assert sizes(Layout(cp=2, dp=4), "replicas") == (8, 1)
    assert sizes(Layout(cp=2, fsdp=4), "states") == (4, 1)
    assert sizes(Layout(cp=2, fsdp=4), "outer") == (2, 1)


def test_a_pipeline_stays_in_a_host_where_its_stages_fit() -> None:
    assert [send_level(Layout(pp=4, tp=2), CLUSTER, place) for place in range(3)] == [0, 0, 0]
    assert [send_level(Layout(pp=4, tp=4), CLUSTER, place) for place in range(3)] == [0, 1, 0]
    assert not spans_of(Layout(pp=4, tp=2), CLUSTER).pipeline_crosses
    assert spans_of(Layout(pp=2, dp=8), CLUSTER).pipeline_crosses


def test_another_order_of_the_axes_places_other_ranks_side_by_side() -> None:
    pipeline_inside = ("tp", "pp", "cp", "ep", "fsdp", "dp")
    layout = Layout(tp=2, pp=4, dp=4)
    assert sizes(layout, "replicas", pipeline_inside) == (1, 4)
    assert send_level(layout, CLUSTER, 0, order=pipeline_inside) == 0
    assert send_level(layout, CLUSTER, 0) == 1


def test_an_order_names_every_axis_once() -> None:
    with pytest.raises(LayoutError, match="each once"):
        spans_of(Layout(), CLUSTER, order=("tp", "dp"))
