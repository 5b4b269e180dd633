"""Tests on ranks: what they are given, how they fail, and that the next one is not harmed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.errors import ConfigError
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

pytest_plugins = ["pytester"]

SESSION = """
import os, threading, time, warnings
import pytest, torch, torch.distributed as dist
from shardwise.testing import on_ranks

@on_ranks(2)
def test_fails_on_one_rank(rank):
    total = torch.tensor(float(rank.rank))
    if rank.rank == 1:
        assert total == 7
    dist.barrier()

@on_ranks(2)
def test_passes_after_a_failure(rank):
    dist.barrier()

@on_ranks(2)
def test_leaves_a_group(rank):
    dist.new_group([0, 1])

@on_ranks(2)
def test_leaves_a_variable(rank):
    os.environ["LEFT"] = "behind"

@on_ranks(2)
def test_is_clean_after_a_leak(rank):
    assert "LEFT" not in os.environ

@on_ranks(2, timeout_s=0.5)
def test_hangs(rank):
    time.sleep(60)

@on_ranks(2)
def test_warns(rank):
    warnings.warn("careful")

@on_ranks(2)
def test_skips(rank):
    pytest.skip("no reason")

@on_ranks(2)
def test_is_killed(rank):
    if rank.rank == 0:
        os.kill(os.getpid(), 9)
    dist.barrier()

def test_needs_no_rank():
    pass
"""


@on_ranks(2)
def test_a_test_knows_its_rank_and_its_peers(rank: RankContext) -> None:
    seen = [torch.zeros(1) for _ in range(rank.world_size)]
    dist.all_gather(seen, torch.tensor([float(rank.rank)]))
    assert torch.cat(seen).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("size", [1, 5])
@on_ranks(2)
def test_parameters_and_fixtures_arrive_as_values(rank: RankContext, size: int, tmp_path: Path) -> None:
    total = torch.ones(size)
    dist.all_reduce(total)
    assert total.tolist() == [2.0] * size
    (tmp_path / str(rank.rank)).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 2


@on_ranks(3)
def test_another_number_of_ranks_is_another_pool(rank: RankContext) -> None:
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == 3


@on_ranks(2)
def test_every_test_starts_from_the_same_seed_with_one_thread(rank: RankContext) -> None:
    assert torch.initial_seed() == 0
    assert torch.get_num_threads() == 1


@on_ranks(2, fresh=True)
def test_fresh_ranks_may_leave_a_group_behind(rank: RankContext) -> None:
    dist.new_group([0, 1])


def test_a_test_within_a_function_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not at the top of its module; move it there"):

        @on_ranks(2)
        def test_inner(rank: RankContext) -> None: ...


def test_a_test_on_no_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs at least 1 rank"):
        on_ranks(0)


def test_a_session_of_bad_tests_fails_each_for_its_own_reason(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nfilterwarnings =\n    error\n")
    pytester.makeconftest('pytest_plugins = ["shardwise.testing.plugin"]')
    pytester.makepyfile(test_bad=SESSION)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rA", timeout=100)
    result.assert_outcomes(passed=3, failed=6, skipped=1)
    text = result.stdout.str()
    for line in (
        "rank 1 of 2 raised:",
        "assert total == 7",
        "where total = tensor(1.)",
        "rank 0: setting number of process groups was 1, is 2",
        "rank 1: variable LEFT='behind' is new",
        "ranks 0, 1 of 2 did not finish within 0.5 s",
        "UserWarning: careful",
        f"rank 0 of 2 was killed by signal {int(signal.SIGKILL)} (SIGKILL)",
    ):
        assert line in text, line
