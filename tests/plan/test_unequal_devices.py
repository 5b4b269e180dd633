"""Devices of two speeds: stages by speed and memory, against the best layout whose stages are even."""

from __future__ import annotations

import dataclasses

import pytest

from shardwise.describe.cluster import Cluster, Hosts
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.price import price
from shardwise.plan.pricer import Pricer
from shardwise.plan.search import search_layouts
from shardwise.plan.space import Axes
from shardwise.plan.unequal_replicas import shares_of
from tests.plan.hand_works import cluster, device, limits, works

LAYERS = 24
JOB = Job(global_batch=64, per_parameter=PerParameter.mixed())


def mixed(*, slow_memory: float = 64e9) -> Cluster:
    """A host of four fast devices, then one of four that are half as fast."""
    fast = device(name="fast", memory=64e9)
    slow = device(name="slow", flops=5e13, memory=slow_memory)
    slow = dataclasses.replace(slow, bytes_per_s=fast.bytes_per_s / 2)
    hosts = tuple(Hosts(device=kind, devices=4) for kind in (fast, slow))
    return dataclasses.replace(cluster(), hosts=hosts)


def even_stages(pp: int) -> tuple[tuple[str, ...], ...]:
    each = LAYERS // pp
    return tuple((f"layers.{pp_ * each}-{(pp_ + 1) * each - 1}",) for pp_ in range(pp))


def test_a_price_on_unequal_devices_is_that_of_the_slower_ones_where_stages_are_even() -> None:
    machine, made = mixed(), works(LAYERS)
    layout = Layout(pp=8, micro_batches=64, stages=even_stages(8))
    found = Pricer(made, machine, JOB, limits(LAYERS))(layout, exact=True)
    fast = price(made(layout, 1), layout, machine, JOB, num_micro_batches=64, exact=True)  # as if all were the first
    assert found.price.step_s == pytest.approx(2 * fast.step_s, rel=0.15)


def test_stages_by_speed_take_at_most_eight_tenths_of_the_best_even_ones() -> None:
    machine, made = mixed(), works(LAYERS)
    pricer = Pricer(made, machine, JOB, limits(LAYERS))
    even = []
    for pp in (2, 4, 8):
        for schedule in ("1f1b", "zb-h1"):
            for rest in ({"tp": 8 // pp}, {"dp": 8 // pp}):
                count = 64 // (8 // pp if "dp" in rest else 1)
                layout = Layout(pp=pp, micro_batches=count, schedule=schedule, stages=even_stages(pp), **rest)
                even.append(pricer(layout, exact=True).price.step_s)
    replicas = Layout(dp=8, micro_batches=8)  # every replica has as many samples as the others
    even.append(pricer(replicas, exact=True).price.step_s)
    axes = dataclasses.replace(
        Axes.of(limits(LAYERS), machine, global_batch=64), ways=(("1f1b", 1), ("zb-h1", 1)), samples=(1,), cp=(1,)
    )
    found = search_layouts(made, machine, JOB, limits=limits(LAYERS), axes=axes, top=1)
    assert found[0].step_s <= 0.8 * min(even)


def test_faster_places_have_more_layers() -> None:
    pricer = Pricer(works(LAYERS), mixed(), JOB, limits(LAYERS))
    made = pricer(Layout(pp=8, micro_batches=64), exact=True)
    layers = [stage.parameters for stage in pricer.stages(made.layout, 1)]
    assert min(layers[:4]) > max(layers[4:])
    assert made.layout.stages != Layout(pp=8).stages  # listed, so that it can be run as it is


def test_a_device_that_is_short_of_memory_has_fewer_layers_than_its_speed_would_give() -> None:
    roomy = Pricer(works(LAYERS), mixed(), JOB, limits(LAYERS))
    tight = Pricer(works(LAYERS), mixed(slow_memory=2.2e9), JOB, limits(LAYERS))
    layout = Layout(pp=8, micro_batches=64)
    most = [max(s.parameters for s in each.stages(each(layout).layout, 1)[4:]) for each in (roomy, tight)]
    assert most[1] < most[0]
    assert tight(layout, exact=True).room_bytes >= 0


def test_shares_of_replicas_by_speed_take_at_most_eight_tenths_of_equal_ones() -> None:
    pricer = Pricer(works(LAYERS), mixed(), JOB, limits(LAYERS))
    shares = shares_of(pricer, Layout(dp=8, micro_batches=8))
    (_, fast, most), (_, slow, least) = shares.kinds
    assert (fast, slow) == (4, 4)
    assert 10 <= most <= 11
    assert 5 <= least <= 6
    assert shares.step_s <= 0.8 * shares.even_s
    assert shares.layout is not None
    assert shares.layout.shares is not None
    assert (shares.layout.dp, sum(shares.layout.shares), max(shares.layout.shares)) == (8, 64, most)
    divided = shares_of(pricer, Layout(fsdp=8, micro_batches=8))
    assert divided.layout is None  # they meet in every micro-batch


def test_replicas_that_stand_on_both_kinds_have_no_shares() -> None:
    with pytest.raises(LayoutError, match="one kind of device"):
        shares_of(Pricer(works(LAYERS), mixed(), JOB, limits(LAYERS)), Layout(tp=8, micro_batches=64))
