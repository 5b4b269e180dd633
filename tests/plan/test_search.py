"""A search finds what brute force finds, never what breaks a rule or does not fit, and says why all others lost."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest

from shardwise.describe.cluster import Cluster, HostMemory
from shardwise.describe.kernels import ExchangeKind
from shardwise.errors import ConfigError, LayoutError
from shardwise.layout import Context, Layout, Offload, Unshard
from shardwise.plan.changes import changes_of
from shardwise.plan.collectives import exchange_seconds
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.placing import Span
from shardwise.plan.price import price
from shardwise.plan.pricer import Pricer
from shardwise.plan.ranked import Objective, Rule
from shardwise.plan.room import LEAST_ROOM
from shardwise.plan.search import search_layouts
from shardwise.plan.space import Axes
from tests.plan.hand_works import cluster, device, limits, works

JOB = Job(global_batch=16, per_parameter=PerParameter.mixed())
SMALL = {
    "samples": (1, 2),
    "ways": (("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)),
    "cp": (1,),
    "unshard": (Unshard.MICRO_BATCH,),
}


def small(machine, num_layers: int = 8, **changed):
    own = limits(num_layers)
    return dataclasses.replace(Axes.of(own, machine, global_batch=JOB.global_batch), **(SMALL | changed))


def found(machine=None, *, top: int = 5, num_layers: int = 8, **options):
    machine = machine or cluster()
    axes = options.pop("axes", None) or small(machine, num_layers)
    return search_layouts(works(num_layers), machine, JOB, limits=limits(num_layers), axes=axes, top=top, **options)


def brute_force(search, machine):
    """Seconds of every layout of the space that fits and leaves room, simulated."""
    space, made = search.explorer.space, works()
    seconds = {}
    for row in range(len(space)):
        layout = space.layout(row)
        samples = space.places[space.place[row]].samples
        count = layout.num_micro_batches(JOB.global_batch)
        priced = price(made(layout, samples), layout, machine, JOB, num_micro_batches=count, exact=True)
        if priced.has_room:
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
        assert plan.ranked.peak_bytes <= (1 - LEAST_ROOM) * 3.5e9


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
    crowded = next(search.rejections(Rule.ROOM))
    assert 0 <= crowded.numbers["room"] < LEAST_ROOM
    assert "less than 5%" in crowded.reason
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


def with_host(machine: Cluster, *, memory: float = 1e12, link: float = 20e9) -> Cluster:
    store = HostMemory(memory_bytes=int(memory), link_bytes_per_s=link, bytes_per_s=20e9)
    return dataclasses.replace(machine, hosts=tuple(dataclasses.replace(h, memory=store) for h in machine.hosts))


def tight(**changed):
    """Layouts of one pipeline on devices that are too small for what they keep."""
    axes = small(cluster(), tp=(1,), pp=(4,), states=(0,), ways=(("1f1b", 1),), samples=(1,))
    axes = dataclasses.replace(axes, offload=tuple(Offload), recompute=("none", "full"))
    return dataclasses.replace(axes, **changed)


def test_where_nothing_leaves_room_what_fits_is_taken() -> None:
    peak = found(axes=tight(recompute=("none",), offload=(Offload.NONE,)))[0].ranked.peak_bytes
    machine = cluster(kind=device(memory=peak * 1.02))
    search = found(machine, axes=tight(recompute=("none",), offload=(Offload.NONE,)))
    assert search[0].ranked.fits
    assert not search[0].ranked.has_room
    assert "less than the 5% headroom that a caching allocator needs" in " ".join(search[0].explain().split())


def test_offload_is_chosen_where_its_copies_cost_less_than_computing_again() -> None:
    machine = cluster(kind=device(memory=2.9e9))
    quick, slow = (found(with_host(machine, link=link), axes=tight())[0] for link in (200e9, 0.2e9))
    assert quick.layout.offload is not Offload.NONE
    assert slow.layout.offload is Offload.NONE
    assert slow.layout.recompute != "none"
    assert quick.step_s < slow.step_s


def test_nothing_is_offloaded_where_there_is_room_and_none_waits_on_a_host_that_is_full() -> None:
    machine = cluster(kind=device(memory=2.9e9))
    assert found(with_host(cluster()), axes=tight())[0].layout.offload is Offload.NONE
    full = found(with_host(machine, memory=1e6, link=200e9), axes=tight())
    assert full[0].layout.offload is Offload.NONE
    told = [each for each in full.rejections(Rule.MEMORY) if "host memory is" in each.reason]
    assert all(each.numbers["host_lacks_bytes"] > 0 for each in told)
    assert told


def test_offload_is_tried_only_where_the_host_is_known() -> None:
    own = limits()
    assert Axes.of(own, cluster(), global_batch=16).offload == (Offload.NONE,)
    assert set(Axes.of(own, with_host(cluster()), global_batch=16).offload) == set(Offload)


def test_what_moves_to_the_host_costs_its_copies_and_saves_its_bytes() -> None:
    search = found(with_host(cluster()), axes=tight())
    pricer = search.explorer.pricer
    layout = dataclasses.replace(search[0].layout, offload=Offload.NONE, recompute="none")
    plain, both = (pricer(dataclasses.replace(layout, offload=word)) for word in (Offload.NONE, Offload.BOTH))
    assert both.price.memory[0].optimizer == 0
    assert both.price.memory[0].activations < plain.price.memory[0].activations
    states = 8 * pricer.stages(layout, 1)[0].trained  # AdamW's, in float32
    visit = states / 8 * max(8 / 16e9, 40 / 16e9)  # 4 + 4 bytes over the link, 40 over the host's memory
    assert both.price.time[0].optimizer - plain.price.time[0].optimizer == pytest.approx(visit, rel=0.15)


def test_both_ways_of_attending_and_of_gathering_are_tried() -> None:
    axes = small(cluster(), cp=(1, 2), context=tuple(Context), unshard=tuple(Unshard), states=(2, 3), pp=(1, 2))
    space = found(axes=axes).explorer.space
    layouts = [space.layout(row) for row in range(len(space))]
    assert {layout.context for layout in layouts if layout.cp > 1} == set(Context)
    assert {layout.context for layout in layouts if layout.cp == 1} == {Context.RING}
    assert {layout.unshards_by_step for layout in layouts if layout.fsdp > 1 and layout.zero == 3} == {True, False}
    divided = [layout for layout in layouts if layout.zero == 2 and layout.pp > 1]
    assert divided
    assert not any(layout.unshards_by_step for layout in divided)


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
    for word in ("layout", "step", "memory", "fits", "parameters", "compute", "total", "runner-up", "rejected"):
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


def test_changes_try_the_host_the_way_of_attending_and_how_long_parameters_are_whole() -> None:
    axes = small(cluster(), offload=tuple(Offload), context=tuple(Context), cp=(1, 2), unshard=tuple(Unshard))
    pricer = Pricer(works(), with_host(cluster()), JOB, limits())
    layout = Layout(fsdp=4, cp=2, micro_batches=2)
    told = [str(change) for change in changes_of(layout, pricer, axes)]
    for word in ("offload none→both", "context ring→ulysses", "unshard micro-batch→step", "communication.algorithm"):
        assert any(text.startswith(word) for text in told), word


def test_sums_inside_hosts_first_cost_what_their_three_parts_do() -> None:
    layout, machine = Layout(dp=8, micro_batches=2), cluster()
    job = dataclasses.replace(JOB, algorithm="hierarchical", overlap_replicas=False)
    one = Pricer(works(), machine, job, limits())(layout).price.time[0].replicas
    nbytes = 4.0 * sum(stage.trained for stage in works()(layout, 1))
    inside, between = Span(sizes=(4, 1)), Span(sizes=(1, 2))
    parts = (
        exchange_seconds(ExchangeKind.REDUCE_SCATTER, nbytes, inside, machine),
        exchange_seconds(ExchangeKind.ALL_REDUCE, nbytes / 4, between, machine),
        exchange_seconds(ExchangeKind.ALL_GATHER, nbytes, inside, machine),
    )
    assert one == pytest.approx(sum(parts))
