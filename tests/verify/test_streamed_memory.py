"""A streamed reference takes a fraction of the model's memory: measured in a process, and enforced on one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardwise.launch import RankPool, RankStarter
from shardwise.layout import Layout
from shardwise.verify import verify
from shardwise.verify.sides import Job, run_side, run_streamed_side
from streamed_models import Deep, peak_bytes, with_at_most

MIB = 2**20
MICRO_BATCHES, STAGE_BYTES = 2, 40 * MIB  # 40: two layers of the largest model below


def job_of(width: int, depth: int) -> Job:
    return Job(
        model=functools.partial(Deep, width=width, depth=depth),
        batch=(torch.linspace(-1, 1, 4 * width).view(4, width),),
        loss=None,
        layout=Layout(),
        micro_batches=MICRO_BATCHES,
        steps=1,
        optimizer="sgd",
        learning_rate=0.05,
        dtype=None,
        batch_dims={},
        units=(),
        weight=None,
    )


def parameter_bytes(job: Job) -> int:
    with torch.device("meta"):
        return sum(4 * p.numel() for p in job.model().parameters())


@pytest.fixture
def warm(starter: RankStarter, tmp_path: Path) -> Iterator[RankPool]:
    """A rank that has imported, and run once, what a streamed reference needs."""
    with RankPool(1, starter=starter, num_threads=1) as pool:
        for function, more in ((run_streamed_side, (MICRO_BATCHES, 1, tmp_path / "warm")), (run_side, whole())):
            pool.run(function, job_of(8, 3), *more, timeout_s=60)
        yield pool


def whole() -> tuple[Layout, int, bool]:
    return Layout(), MICRO_BATCHES, False


def streamed(folder: Path) -> tuple[int, int, Path]:
    return MICRO_BATCHES, STAGE_BYTES, folder


@pytest.mark.slow
def test_a_hundred_million_parameters_take_less_than_half_of_themselves_and_their_gradients(
    warm: RankPool, tmp_path: Path
) -> None:
    job = job_of(2048, 24)
    model_bytes = parameter_bytes(job)
    assert model_bytes > 400e6
    peak, side = warm.run(peak_bytes, run_streamed_side, job, *streamed(tmp_path / "big"), timeout_s=100)[0]
    assert side.num_stages == 12
    assert peak < 0.5 * (2 * model_bytes), f"{peak / MIB:.0f} MiB of {2 * model_bytes / MIB:.0f} MiB"


def test_a_model_that_cannot_be_built_whole_is_run(warm: RankPool, tmp_path: Path) -> None:
    job = job_of(1024, 64)
    budget = parameter_bytes(job) - 20 * MIB  # 237 MiB
    side = warm.run(with_at_most, budget, run_streamed_side, job, *streamed(tmp_path / "big"), timeout_s=60)[0]
    assert side is not None
    assert len(side.gradients) == 4 * 64
    assert warm.run(with_at_most, budget, run_side, job, *whole(), timeout_s=60) == [None]  # out of memory


def test_a_model_that_is_larger_than_the_budget_is_verified(starter: RankStarter) -> None:
    job = job_of(256, 16)
    budget = parameter_bytes(job) - 1
    comparison = verify(job.model, job.batch, layout="pp=2", memory_bytes=budget, starter=starter, timeout_s=60)
    assert comparison.equal, str(comparison)
    assert "streamed" in comparison.reference
    assert "would not fit" in comparison.reference
