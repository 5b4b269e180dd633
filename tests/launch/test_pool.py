"""Warm ranks: called, killed, hung, and ready for the next call."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.errors import ConfigError, LaunchError
from shardwise.launch import RankContext, RankPool, RankStarter, init_process_group


@pytest.fixture(scope="module")
def starter() -> Iterator[RankStarter]:
    with RankStarter() as starter:
        yield starter


@pytest.fixture(scope="module")
def pool(starter: RankStarter) -> Iterator[RankPool]:
    with RankPool(2, num_threads=1, starter=starter) as pool:
        yield pool


def sum_of_ranks(context: RankContext) -> float:
    total = torch.tensor(float(context.rank))
    dist.all_reduce(total)
    return total.item()


def test_every_rank_runs_the_call_and_results_come_in_order(pool: RankPool) -> None:
    assert pool.run(lambda context, base: base + context.rank, 10) == [10, 11]


def test_the_process_group_stays_alive_between_calls(pool: RankPool) -> None:
    pids = pool.pids
    assert [pool.run(sum_of_ranks) for _ in range(3)] == [[1.0, 1.0]] * 3
    assert pool.pids == pids or pids == ()


def test_a_warm_call_takes_milliseconds(pool: RankPool) -> None:
    pool.run(sum_of_ranks)
    seconds = []
    for _ in range(10):
        start = time.monotonic()
        pool.run(sum_of_ranks)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.5  # starting ranks anew takes longer


def test_a_function_of_this_file_finds_this_file_on_the_rank(pool: RankPool) -> None:
    def file_of(context: RankContext) -> str:
        return sys.modules[sum_of_ranks.__module__].__file__ or ""

    assert {Path(file).name for file in pool.run(file_of)} == {"test_pool.py"}


def test_messages_reach_us_before_the_call_returns(pool: RankPool) -> None:
    def talk(context: RankContext) -> str:
        context.post({"half": context.rank})
        return "whole"

    heard: list[tuple[int, object]] = []
    assert pool.run(talk, on_message=lambda rank, value: heard.append((rank, value))) == ["whole"] * 2
    assert sorted(heard, key=str) == [(0, {"half": 0}), (1, {"half": 1})]


def test_large_tensors_come_and_go(pool: RankPool) -> None:
    big = torch.ones(1 << 20)
    results = pool.run(lambda context, tensor: tensor.mul_(context.rank + 1), big)
    assert [result.mean().item() for result in results] == [1.0, 2.0]
    assert big.mean() == 1.0


def test_ranks_stand_in_our_folder(pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pool.run(lambda context: os.getcwd()) == [str(tmp_path)] * 2


def test_an_existing_group_is_kept_and_another_worlds_is_refused(pool: RankPool) -> None:
    def join(context: RankContext) -> str:
        init_process_group(context)
        try:
            init_process_group(RankContext(rank=0, world_size=5, local_rank=0, rendezvous="env://"))
        except LaunchError as error:
            return str(error)
        return "accepted"

    assert "rank 0 of 5 already belongs to a group of 2" in pool.run(join)[0]


def test_an_exception_is_raised_here_as_itself_and_names_its_rank(pool: RankPool) -> None:
    def fail(context: RankContext) -> None:
        if context.rank == 1:
            raise ConfigError("three is not four; use four")
        dist.barrier()

    with pytest.raises(ConfigError, match="three is not four") as caught:
        pool.run(fail, timeout_s=20)
    assert "raised on rank 1 of 2" in caught.value.__notes__
    told = str(caught.value.__cause__)
    assert told.startswith("rank 1 of 2 raised:\nTraceback")
    assert "in fail\n" in told
    assert "rank 0 of 2 then lost its peer" in told
    assert pool.run(sum_of_ranks) == [1.0, 1.0]  # on new ranks


def test_an_exception_that_cannot_travel_is_told(pool: RankPool) -> None:
    class AwkwardError(Exception):
        def __init__(self) -> None:
            super().__init__("awkward")
            self.lock = threading.Lock()

    def fail(context: RankContext) -> None:
        raise AwkwardError

    with pytest.raises(LaunchError, match="AwkwardError: awkward"):
        pool.run(fail)


def test_a_rank_that_leaves_does_not_take_us_along(pool: RankPool) -> None:
    with pytest.raises(LaunchError, match="SystemExit: 3"):
        pool.run(lambda context: sys.exit(3))
    with pytest.raises(LaunchError, match=r"rank [01] of 2 ended with exit code 4"):
        pool.run(lambda context: os._exit(4))


def test_a_killed_rank_is_reported_within_two_seconds(pool: RankPool) -> None:
    def wait(context: RankContext) -> None:
        context.post(os.getpid())
        dist.recv(torch.zeros(1), src=1 - context.rank)

    killed_at: list[float] = []

    def kill(rank: int, pid: object) -> None:
        if rank == 1:
            killed_at.append(time.monotonic())
            os.kill(int(str(pid)), signal.SIGKILL)

    with pytest.raises(LaunchError, match=r"^rank 1 of 2 was killed by signal 9 \(SIGKILL\)"):
        pool.run(wait, timeout_s=20, on_message=kill)
    assert time.monotonic() - killed_at[0] < 10


def test_a_rank_killed_while_idle_is_reported_by_the_next_call(pool: RankPool) -> None:
    pool.run(sum_of_ranks)
    os.kill(pool.pids[0], signal.SIGKILL)
    with pytest.raises(LaunchError, match="rank 0 of 2 was killed by signal 9"):
        pool.run(sum_of_ranks)
    assert pool.run(sum_of_ranks) == [1.0, 1.0]


def test_a_hang_ends_at_the_deadline_and_says_where_each_rank_stood(pool: RankPool) -> None:
    def hang(context: RankContext) -> None:
        if context.rank == 0:
            dist.barrier()
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(LaunchError, match=r"ranks 0, 1 of 2 did not finish within 0.5 s.*") as caught:
        pool.run(hang, timeout_s=0.5)
    assert time.monotonic() - start < 15
    first, second = str(caught.value).split("rank 1 stood at:")
    assert "in barrier" in first
    assert "in hang" in second
    assert "barrier" not in second


def test_an_error_in_our_own_listener_ends_the_ranks(pool: RankPool) -> None:
    def talk(context: RankContext) -> None:
        context.post(1)
        time.sleep(60)

    def listen(rank: int, value: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.run(talk, on_message=listen)
    assert pool.pids == ()


def test_two_pools_share_a_starter(starter: RankStarter, pool: RankPool) -> None:
    with RankPool(3, num_threads=1, starter=starter) as other:
        assert other.run(sum_of_ranks) == [3.0] * 3
        assert pool.run(sum_of_ranks) == [1.0] * 2
    assert pool.run(sum_of_ranks) == [1.0] * 2


def test_a_closed_pool_leaves_no_process_behind(starter: RankStarter) -> None:
    with RankPool(2, num_threads=1, starter=starter) as brief:
        pids = brief.run(lambda context: os.getpid())
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_module_that_cannot_be_preloaded_is_named() -> None:
    with (
        RankPool(1, preload=["no_such_module"]) as pool,
        pytest.raises(LaunchError, match=r"preloading \('no_such_module',\) failed: ModuleNotFoundError"),
    ):
        pool.run(sum_of_ranks)


def test_a_pool_whose_starter_ended_says_so() -> None:
    starter = RankStarter()
    with RankPool(1, starter=starter) as pool:
        assert pool.run(lambda context: 1) == [1]
        starter.close()
        with pytest.raises(LaunchError, match="has ended; make a new RankStarter or RankPool"):
            pool.run(lambda context: 1)


def test_a_killed_starter_is_reported_and_takes_its_ranks_along() -> None:
    def wait(context: RankContext) -> None:
        context.post((os.getppid(), os.getpid()))
        time.sleep(60)

    told: list[int] = []

    def kill(rank: int, pids: object) -> None:
        assert isinstance(pids, tuple)
        told.extend(pids)
        os.kill(pids[0], signal.SIGKILL)

    with RankPool(1) as pool, pytest.raises(LaunchError, match="that starts ranks was killed by signal 9"):
        pool.run(wait, on_message=kill)
    limit = time.monotonic() + 10
    while Path(f"/proc/{told[1]}").exists():
        assert time.monotonic() < limit, "the rank outlived its starter"
        time.sleep(0.01)


def test_a_world_has_at_least_one_rank() -> None:
    with pytest.raises(LaunchError, match="world_size=0 must be at least 1"):
        RankPool(0)
