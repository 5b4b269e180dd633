"""Ranks that share processors: as slow as all together where all compute, faster where others wait."""

from __future__ import annotations

import dataclasses

import pytest

from shardwise.describe.cluster import Cluster
from shardwise.describe.kernels import Phase
from shardwise.layout import Layout
from shardwise.plan.job import Job
from shardwise.plan.price import price
from shardwise.plan.shared_cores import at_least_s, shared_seconds
from shardwise.schedule import Costs, Kind, generate, simulate
from tests.plan.hand_works import cluster, works


def costs(stages: int, *, send: float = 0.0) -> Costs:
    pairs = [(stage, stage + 1) for stage in range(stages - 1)] if send else []
    return Costs(
        compute_seconds={
            Kind.F: (1.0,) * stages,
            Kind.B: (2.0,) * stages,
            Kind.I: (1.0,) * stages,
            Kind.W: (1.0,) * stages,
        },
        activation_seconds=dict.fromkeys(pairs, send),
        gradient_seconds=dict.fromkeys(pairs, send),
    )


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("interleaved", 2), ("zb-v", 2)])
@pytest.mark.parametrize("send", [0.0, 0.3])
def test_with_a_processor_each_it_is_the_simulation(name: str, chunks: int, send: float) -> None:
    schedule = generate(name, num_ranks=4, num_micro_batches=8, chunks=chunks)
    own = costs(4 * chunks, send=send)
    assert shared_seconds(schedule, own, crowd=1.0) == pytest.approx(simulate(schedule, costs=own).seconds, rel=0.02)


def test_one_micro_batch_alone_has_a_whole_core_all_the_time() -> None:
    schedule = generate("1f1b", num_ranks=4, num_micro_batches=1)
    assert shared_seconds(schedule, costs(4), crowd=2.0) == pytest.approx(4 * 3 / 2)


def test_a_full_pipeline_takes_what_its_work_takes_on_all_cores() -> None:
    """Of 4 ranks on 2 cores: 4 · 64 · 3 s of work at half a core each are 384 s of 2 cores; the rest is the ends."""
    schedule = generate("1f1b", num_ranks=4, num_micro_batches=64)
    seconds = shared_seconds(schedule, costs(4), crowd=2.0)
    assert at_least_s(64 * 3, simulate(schedule, costs=costs(4)).seconds, crowd=2.0) <= seconds
    assert 64 * 3 <= seconds <= 64 * 3 + 3 * 3 / 2


def test_whoever_shares_is_never_slower_than_if_all_computed_all_the_time() -> None:
    schedule = generate("zb-h1", num_ranks=4, num_micro_batches=6)
    alone = simulate(schedule, costs=costs(4)).seconds
    assert alone / 2 < shared_seconds(schedule, costs(4), crowd=2.0) < alone


def priced(layout: Layout, cluster: Cluster, *, exact: bool) -> float:
    stages = works()(layout, 1)
    count = layout.num_micro_batches(16)
    return price(stages, layout, cluster, Job(global_batch=16), num_micro_batches=count, exact=exact).step_s


@pytest.mark.parametrize("exact", [True, False])
def test_a_pipeline_on_shared_processors_is_priced_so_and_replicas_as_before(exact: bool) -> None:
    own = cluster(hosts=1)
    hosts = tuple(dataclasses.replace(each, processors=2) for each in own.hosts)
    crowded = dataclasses.replace(own, hosts=hosts)
    pipeline, replicas = Layout(pp=4, micro_batches=4), Layout(dp=4, micro_batches=4)
    assert priced(replicas, crowded, exact=exact) == priced(replicas, own, exact=exact)
    shared, alone = (priced(pipeline, each, exact=exact) for each in (crowded, own))
    assert 0.5 * alone < shared < 0.9 * alone


def test_a_program_that_asks_for_kernels_delays_a_forward_alone() -> None:
    own = cluster(hosts=1)
    device = own.hosts[0].device
    slow = dataclasses.replace(device, efficiency=dataclasses.replace(device.efficiency, asked_s=1e-3))
    delayed = dataclasses.replace(own, hosts=(dataclasses.replace(own.hosts[0], device=slow),))
    layout = Layout(micro_batches=4)
    asked = sum(k.count for work in works()(layout, 1) for k in work.kernels if k.phase is Phase.FORWARD)
    more = priced(layout, delayed, exact=True) - priced(layout, own, exact=True)
    assert more == pytest.approx(4 * asked * 1e-3, rel=0.01)
