"""This machine is measured with as many ranks as asked for, within its time."""

from __future__ import annotations

import dataclasses
import time

import pytest

from shardwise.describe.kernels import KernelKind
from shardwise.errors import ConfigError
from shardwise.plan.fit_cluster import fit_cluster
from shardwise.train.probe import default_ranks, probe
from shardwise.train.probe_rank import Thoroughness

TINY = dataclasses.replace(Thoroughness.quickly(), rounds=2, kernel_s=1e-3, exchange_s=1e-3, models=0, visits=0)


def test_two_ranks_measure_a_machine_that_can_be() -> None:
    told = []
    (times,) = probe([2], how=dataclasses.replace(TINY, visits=2), tell=told.append)
    assert (times.ranks, told[0]) == (2, "starting ranks")
    assert len(times.kernels[0].seconds) == 2
    for alone, together in zip(times.alone, times.kernels, strict=True):
        assert alone.kernel == together.kernel
        assert 1e-8 < alone.median_s < 60
        assert 1e-8 < together.median_s < 60
        if together.kernel.kind is KernelKind.MATMUL:
            assert 1e6 < together.kernel.flops / together.median_s < 1e14  # of one core
    assert {time.group for time in times.exchanges} == {2}
    assert {len(time.seconds) for time in times.exchanges} == {2}
    assert len({(time.kind, time.nbytes, time.way) for time in times.exchanges}) == len(times.exchanges)
    assert [time.what for time in times.divided] == [
        "dp=2",
        "dp=1,tp=2",
        "dp=1,tp=2,sequence_parallel=on",
        "dp=1,cp=2",
        "dp=1,cp=2,context=ulysses",
    ]
    assert {len(time.seconds) for time in times.divided} == {2}
    assert times.program.framework_bytes > 50 << 20
    assert times.program.start_s > 0
    fitted = fit_cluster(times)
    assert fitted.cluster.num_devices == 2
    assert fitted.cluster.hosts[0].device.memory_bytes > 100 << 20
    assert 0 < fitted.cluster.hosts[0].device.efficiency.matmul <= 1
    assert fitted.cluster.links[0].latency_s > 0
    assert {"dealt_s", "interrupted_s", "message_s"} <= {each.name for each in fitted.coefficients}


@pytest.mark.slow
def test_steps_of_models_tell_what_a_rank_holds_before_a_model_and_besides_its_tensors() -> None:
    (times,) = probe([2], how=dataclasses.replace(TINY, models=1))
    assert len(times.peaks) == 2
    assert times.peaks[0].passing < times.peaks[1].passing
    assert sum("of a model" in time.what for time in times.blocks) == 4
    fitted = fit_cluster(times).cluster.overheads
    assert 50 << 20 < fitted.framework_bytes < 1 << 30
    assert 0 <= fitted.slack < 3


@pytest.mark.slow
def test_rounds_end_when_the_time_is_over() -> None:
    started = time.perf_counter()
    (times,) = probe([1], how=dataclasses.replace(TINY, rounds=1000, budget_s=0.0))
    assert len(times.kernels[0].seconds) == 2  # one would have no spread
    assert times.exchanges == ()
    assert time.perf_counter() - started < 100


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="ranks of 1 or more, but got"):
        probe([])
    with pytest.raises(ConfigError, match="ranks of 1 or more"):
        probe([0])
    with pytest.raises(ConfigError, match='"cpu" or "cuda"'):
        probe([1], device="abacus")
    with pytest.raises(ConfigError, match="need as many GPUs"):
        probe([4096], device="cuda")


def test_by_default_there_are_as_many_ranks_as_cores_and_twice_as_many() -> None:
    few, many = default_ranks()
    assert many == 2 * few >= 2
