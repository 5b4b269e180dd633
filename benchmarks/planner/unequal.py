"""Devices that are not equal, measured: two ranks bound to one core beside one that has a core to itself.

    python -m benchmarks.planner.unequal [--quick] [--rounds N]

    rate of every rank by the clock ─► Cluster of two kinds ─► the planner's stages, and its shares of a batch
                                                                      └─► steps in turn with even ones

Prints a table and one JSON line, and writes results/. Even stages are the planner's for equal devices: as even as units
allow. Every way is held against one process first: loss and gradients.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.circumstances import circumstances
from benchmarks.pipeline.model import Decoder, Shape
from benchmarks.planner.unequal_rank import Way, rate_of, timed_steps
from shardwise.describe.cluster import Cluster, Device, Hosts
from shardwise.describe.cluster_file import cluster_text
from shardwise.launch import RankPool, RankStarter
from shardwise.layout import Layout
from shardwise.plan.job import Job
from shardwise.plan.pricer import Pricer
from shardwise.plan.scaled_works import ProfileWorks
from shardwise.plan.unequal_replicas import shares_of
from shardwise.trace.profile import trace

__all__ = ["cluster_of", "figures_of", "main", "planned"]

RANKS = 3
SHARED, ALONE = 0, 1  # cores
CORES = (SHARED, SHARED, ALONE)  # by rank
SHAPE = Shape(name="unequal", hidden=256, heads=4, width=704, sequence=64, blocks=16, vocabulary=2048)
QUICK = dataclasses.replace(SHAPE, hidden=64, heads=4, width=176, sequence=16, vocabulary=512)
MICRO_BATCHES = 24
ROUNDS = 5
RATE_S = 2.0


def cluster_of(rates: Sequence[float]) -> Cluster:
    """This machine with ranks of the measured rates; neighbours within a tenth of each other are of one kind."""
    local = Cluster.local(1)
    hosts: list[Hosts] = []
    for rate in rates:
        if hosts and abs(hosts[-1].device.rate("float32") / _promised(local, rate) - 1) < 0.1:
            hosts[-1] = dataclasses.replace(hosts[-1], devices=hosts[-1].devices + 1)
        else:
            hosts.append(Hosts(device=_device(local, rate, len(hosts)), devices=1))
    return dataclasses.replace(local, hosts=tuple(hosts), name="two ranks on one core beside one on another")


def _promised(local: Cluster, rate: float) -> float:
    return rate / local.hosts[0].device.efficiency.matmul


def _device(local: Cluster, rate: float, number: int) -> Device:
    """A core that reaches this rate in products; all else that it does is as much slower or faster."""
    one = local.hosts[0].device
    pace = _promised(local, rate) / one.rate("float32")
    reached = dataclasses.replace(one.efficiency, launch_s=one.efficiency.launch_s / pace)
    return dataclasses.replace(
        one,
        name=f"rank {number}",
        flops_per_s={dtype: own * pace for dtype, own in one.flops_per_s.items()},
        bytes_per_s=one.bytes_per_s * pace,
        efficiency=reached,
    )


def planned(shape: Shape, cluster: Cluster) -> tuple[dict[str, Way], dict[str, float]]:
    """Ways to run, and the seconds that the planner predicts for each."""
    sample = torch.zeros(1, shape.sequence, dtype=torch.int64)
    profile = trace(Decoder(shape), {"ids": sample, "labels": sample})
    works = ProfileWorks(profile=profile, traced=1)
    job = Job(global_batch=MICRO_BATCHES)
    pricer = Pricer(works, cluster, job, works.limits)
    pipeline = Layout(pp=RANKS, micro_batches=MICRO_BATCHES)
    even = _listed(pipeline, Pricer(works, _uniform(cluster), job, works.limits))
    by_speed = pricer(pipeline).layout
    replicas = Layout(dp=RANKS, micro_batches=MICRO_BATCHES // RANKS)
    shares = shares_of(pricer, replicas)
    dealt = tuple(own for _, count, own in shares.kinds for _ in range(count))
    ways: dict[str, Way] = {
        "even stages": (str(even), (MICRO_BATCHES,)),
        "stages by speed": (str(by_speed), (MICRO_BATCHES,)),
        "equal shares": (str(replicas), (MICRO_BATCHES // RANKS,) * RANKS),
        "shares by speed": (str(replicas), (*dealt[:-1], MICRO_BATCHES - sum(dealt[:-1]))),
    }
    predicted = {name: pricer(Layout.parse(ways[name][0]), exact=True).price.step_s for name in list(ways)[:2]}
    return ways, predicted | {"equal shares": shares.even_s, "shares by speed": shares.step_s}


def _uniform(cluster: Cluster) -> Cluster:
    """As many devices, all like the last."""
    hosts = dataclasses.replace(cluster.hosts[-1], devices=cluster.num_devices)
    return dataclasses.replace(cluster, hosts=(hosts,))


def _listed(layout: Layout, pricer: Pricer) -> Layout:
    """The layout with the stages that the planner gives equal devices, by unit."""
    names, ends = pricer.limits.names, [0]
    for stage in pricer.stages(layout, 1):
        ends.append(ends[-1] + len(stage.unit_parameters))
    stages = tuple(tuple(names[start:end]) for start, end in itertools.pairwise(ends))
    return dataclasses.replace(layout, stages=stages)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner.unequal", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether everything runs, no figures")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of every way, in turn")
    options = parser.parse_args(arguments)
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("this benchmark binds ranks to two cores, and this process may use one")
    shape, rounds = (QUICK, 2) if options.quick else (SHAPE, options.rounds)
    with (
        RankStarter(preload=("shardwise.execute.assemble", "benchmarks.planner.unequal_rank")) as starter,
        RankPool(RANKS, starter=starter, num_threads=1) as pool,
    ):
        rates = pool.run(rate_of, CORES, 0.2 if options.quick else RATE_S, timeout_s=120)
        cluster = cluster_of(rates)
        ways, predicted = planned(shape, cluster)
        ranks = pool.run(timed_steps, CORES, shape, ways, rounds, timeout_s=1200)
    seconds = {name: [max(step) for step in zip(*(own[name] for own in ranks), strict=True)] for name in ways}
    figures = figures_of(seconds, predicted)
    _table(rates, ways, seconds, predicted)
    record: dict[str, Any] = {
        **circumstances("benchmarks.planner.unequal"),
        "rounds": rounds,
        "rates_flops_per_s": rates,
        "cluster": cluster_text(cluster),
        "layouts": {name: {"layout": layout, "micro_batches": shares} for name, (layout, shares) in ways.items()},
        "seconds": seconds,
        "predicted_s": predicted,
        "figures": figures,
    }
    if not options.quick:
        output = Path(__file__).parent / "results" / "unequal.json"
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {output}")
    print(json.dumps(figures))


def figures_of(seconds: Mapping[str, Sequence[float]], predicted: Mapping[str, float]) -> dict[str, float]:
    """Gains, measured (of the medians, and of every round the least and the most) and predicted."""
    figures: dict[str, float] = {}
    for what, even, uneven in (
        ("stages", "even stages", "stages by speed"),
        ("shares", "equal shares", "shares by speed"),
    ):
        ratios = [one / other for one, other in zip(seconds[even], seconds[uneven], strict=True)]
        figures[f"{what}_gain"] = round(statistics.median(seconds[even]) / statistics.median(seconds[uneven]), 3)
        figures[f"{what}_gain_least"], figures[f"{what}_gain_most"] = round(min(ratios), 3), round(max(ratios), 3)
        figures[f"{what}_gain_predicted"] = round(predicted[even] / predicted[uneven], 3)
    return figures


def _table(
    rates: Sequence[float],
    ways: Mapping[str, Way],
    seconds: Mapping[str, Sequence[float]],
    predicted: Mapping[str, float],
) -> None:
    told = ", ".join(f"rank {rank} on core {CORES[rank]}: {rate / 1e9:.1f}" for rank, rate in enumerate(rates))
    print(f"Gflops/s of products: {told}")
    for name, (layout, shares) in ways.items():
        own = seconds[name]
        print(
            f"{name:16} {statistics.median(own):8.3f} s  ({min(own):.3f} to {max(own):.3f}), predicted "
            f"{predicted[name]:.3f} s; micro-batches {shares}\n{'':16} {layout}"
        )


if __name__ == "__main__":
    main()
