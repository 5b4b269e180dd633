"""Ranks as threads: they share what the machine has, and what one raises ends all."""

from __future__ import annotations

import time

import pytest
import torch

from shardwise.parallel.tensor.threads import ThreadGroup, on_threads


def test_ranks_share_the_threads_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert on_threads(2, lambda group: torch.get_num_threads()) == [2, 2]
        assert on_threads(8, lambda group: torch.get_num_threads()) == [1] * 8
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_the_error_of_one_rank_ends_the_others() -> None:
    def work(group: ThreadGroup) -> torch.Tensor:
        if group.rank == 1:
            raise ValueError("rank 1 cannot")
        return group.all_reduce(torch.ones(1))

    with pytest.raises(ValueError, match="rank 1 cannot"):
        on_threads(3, work)


def test_nobody_waits_for_a_rank_that_has_ended() -> None:
    def work(group: ThreadGroup) -> torch.Tensor:
        total = group.all_reduce(torch.ones(1))
        return total if group.rank == 0 else group.all_reduce(total)

    started = time.monotonic()
    with pytest.raises(TimeoutError, match="one of them had ended without it"):
        on_threads(2, work)
    assert time.monotonic() - started < 30.0  # the deadline of a sum is a minute


def test_ranks_meet_as_often_as_they_like() -> None:
    def work(group: ThreadGroup) -> float:
        return sum(float(group.all_reduce(torch.tensor([float(group.rank)]))) for _ in range(50))

    assert on_threads(3, work) == [150.0] * 3


def test_tensors_from_rank_to_rank_arrive_in_order() -> None:
    def work(group: ThreadGroup) -> list[float]:
        after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        value = torch.full((2,), float(group.rank))
        group.isend(value, after).wait()
        value += 10  # what was sent is a copy
        group.isend(value, after).wait()
        rooms = torch.empty(2), torch.empty(2)
        for waited in [group.irecv(room, before) for room in rooms]:
            waited.wait()
        return [room[0].item() for room in rooms]

    assert on_threads(3, work) == [[2.0, 12.0], [0.0, 10.0], [1.0, 11.0]]


def test_a_tensor_of_a_rank_that_has_ended_is_still_there() -> None:
    def work(group: ThreadGroup) -> float:
        if group.rank == 0:
            group.isend(torch.ones(1), 1)
            return 0.0
        time.sleep(0.05)
        room = torch.empty(1)
        group.irecv(room, 0).wait()
        return float(room.item())

    assert on_threads(2, work) == [0.0, 1.0]


def test_nobody_waits_for_a_tensor_of_a_rank_that_has_ended() -> None:
    def work(group: ThreadGroup) -> None:
        if group.rank == 1:
            group.irecv(torch.empty(1), 0).wait()

    with pytest.raises(TimeoutError, match="one of them had ended without it"):
        on_threads(2, work)


def test_a_tensor_of_another_shape_is_refused() -> None:
    def work(group: ThreadGroup) -> None:
        if group.rank == 0:
            group.isend(torch.ones(3), 1)
        else:
            group.irecv(torch.empty(2), 0).wait()

    with pytest.raises(ValueError, match="rank 0 sent"):
        on_threads(2, work)
