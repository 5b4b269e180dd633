"""What ranks do under mpirun: `mpirun -np 4 python tests/mpi_cases.py RESULTS`. Rank 0 writes what each case said.

A case is a function of this file; its name reads as a sentence. One start serves all, because processes cost seconds.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from shardwise.comm.collective import ProcessGroupCollective
from shardwise.comm.mpi_backend import MPI_BACKEND, start_mpi
from shardwise.errors import TransferError

TIMEOUT_S = 30.0
NUMBERS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)


def own(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a rank has: small whole numbers, which every dtype sums without rounding."""
    numel = int(torch.tensor(shape).prod())
    return ((torch.arange(numel) % 5) + rank).reshape(shape).to(dtype)


def everybody(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same of all ranks, stacked."""
    return torch.stack([own(rank, *shape, dtype=dtype) for rank in range(dist.get_world_size())])


def refused(kind: type[Exception], call: Callable[[], object], *said: str) -> None:
    """The call raises an error of a kind, whose message has all that."""
    with pytest.raises(kind) as raised:
        call()
    assert not [each for each in said if each not in str(raised.value)], raised.value


def a_sum_is_that_of_every_dtype() -> None:
    for dtype in NUMBERS:
        for numel in (1, 1000, 100_003):
            tensor = own(dist.get_rank(), numel, dtype=dtype)
            dist.all_reduce(tensor)
            assert torch.equal(tensor, everybody(numel, dtype=dtype).sum(0).to(dtype)), (dtype, numel)


def other_reductions_are_those_of_torch() -> None:
    rank = dist.get_rank()
    all_of = everybody(7)
    for op, expected in {
        dist.ReduceOp.MAX: all_of.amax(0),
        dist.ReduceOp.MIN: all_of.amin(0),
        dist.ReduceOp.PRODUCT: all_of.prod(0),
        dist.ReduceOp.AVG: all_of.mean(0),
    }.items():
        tensor = own(rank, 7)
        dist.all_reduce(tensor, op=op)
        assert torch.equal(tensor, expected), op
    bits = torch.tensor([1 << rank, 3])
    dist.all_reduce(bits, op=dist.ReduceOp.BOR)
    assert bits.tolist() == [(1 << dist.get_world_size()) - 1, 3]
    flags = torch.tensor([rank == 0, True])
    dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    assert flags.tolist() == [False, True]


def the_largest_is_nan_where_a_rank_has_one() -> None:
    tensor = torch.tensor([float("nan") if dist.get_rank() == 1 else 1.0, 2.0])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    assert tensor[0].isnan()
    assert tensor[1] == 2


def what_mpi_cannot_combine_is_refused_in_words() -> None:
    float8, floats = torch.ones(2, dtype=torch.float8_e4m3fn), torch.ones(2)
    refused(TransferError, lambda: dist.all_reduce(float8), "convert it first")
    refused(TransferError, lambda: dist.all_reduce(floats, op=dist.ReduceOp.BXOR), "bits of floats")


def a_tensor_with_gaps_is_summed_in_place() -> None:
    whole = own(dist.get_rank(), 6, 4)
    dist.all_reduce(whole.t())
    assert torch.equal(whole, everybody(6, 4).sum(0))


def gathers_have_the_order_of_the_ranks() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for dtype in (*NUMBERS, torch.bool):
        flat = torch.empty(size * 3, dtype=dtype)
        dist.all_gather_into_tensor(flat, own(rank, 3, dtype=dtype))
        assert torch.equal(flat.view(size, 3), everybody(3, dtype=dtype))
    uneven = [torch.empty(i + 1) for i in range(size)]
    dist.all_gather(uneven, torch.full((rank + 1,), float(rank)))
    assert all(bool(each.eq(i).all()) for i, each in enumerate(uneven))
    gathered = [torch.empty(2) for _ in range(size)] if rank == 1 else None
    dist.gather(own(rank, 2), gathered, dst=1)
    if gathered is not None:
        assert torch.equal(torch.stack(gathered), everybody(2))


def values_of_any_kind_are_told_to_all() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    told: list[object] = [None] * size
    dist.all_gather_object(told, {"rank": rank})
    assert told == [{"rank": i} for i in range(size)]
    one: list[object] = ["from 1" if rank == 1 else None]
    dist.broadcast_object_list(one, src=1)
    assert one == ["from 1"]
    gathered: list[object] | None = [None] * size if rank == 0 else None
    dist.gather_object(rank, gathered, dst=0)
    assert gathered is None or gathered == list(range(size))


def a_sum_on_one_rank_and_a_scatter_from_it() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensor = own(rank, 5)
    dist.reduce(tensor, dst=1)
    if rank == 1:
        assert torch.equal(tensor, everybody(5).sum(0))
    out = torch.empty(3)
    dist.scatter(out, list(everybody(3).unbind()) if rank == 0 else None, src=0)
    assert torch.equal(out, own(rank, 3))
    assert size > 1


def scattered_sums_may_lie_in_what_is_scattered() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    ours = ProcessGroupCollective(group)
    for dtype in (torch.float32, torch.bfloat16):
        flat = own(rank, size * 4, dtype=dtype)
        part = flat.view(size, 4)[rank]
        ours.reduce_scatter(flat, part).wait()
        assert torch.equal(part, everybody(size * 4, dtype=dtype).sum(0).to(dtype).view(size, 4)[rank])
        ours.all_gather(part, flat).wait()
        assert torch.equal(flat, everybody(size * 4, dtype=dtype).sum(0).to(dtype))
    outs = torch.empty(2)
    dist.reduce_scatter(outs, list(own(rank, size, 2).unbind()))
    assert torch.equal(outs, everybody(size, 2).sum(0)[rank])


def parts_go_to_their_ranks() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    flat = torch.arange(size * 2.0) + 100 * rank
    out = torch.empty_like(flat)
    dist.all_to_all_single(out, flat)
    expected = torch.cat([torch.arange(2 * rank, 2 * rank + 2.0) + 100 * i for i in range(size)])
    assert torch.equal(out, expected)
    rows = torch.full((sum(range(size)), 3), float(rank))  # i rows to rank i
    got = torch.empty(rank * size, 3)
    dist.all_to_all_single(got, rows, [rank] * size, list(range(size)))
    assert torch.equal(got, torch.arange(float(size)).repeat_interleave(rank).unsqueeze(1).expand(-1, 3))


def messages_of_a_pair_keep_their_order() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % size, (rank - 1) % size
    sizes = (3, 200_000, 0, 5)  # small ones leave at once, large ones when they are received
    sent = [torch.full((numel,), float(i + 10 * rank)) for i, numel in enumerate(sizes)]
    works = [dist.isend(each, after) for each in sent]
    came = [torch.empty(numel) for numel in sizes]
    got = [dist.irecv(each, before) for each in came]
    for work in [*works, *got, *got]:  # waiting twice is waiting once
        assert work is not None
        work.wait()
    for i, each in enumerate(came):
        assert bool(each.eq(i + 10 * before).all())


def sends_and_receives_in_one_batch_meet() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    others = [i for i in range(size) if i != rank]
    came = {i: torch.empty(4) for i in others}
    operations = [dist.P2POp(dist.irecv, came[i], i) for i in others]
    operations += [dist.P2POp(dist.isend, torch.full((4,), float(rank)), i) for i in others]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert all(bool(came[i].eq(i).all()) for i in others)


def functional_collectives_are_those_of_the_group() -> None:
    total = funcol.all_reduce(own(dist.get_rank(), 5), "sum", dist.group.WORLD)
    assert torch.equal(funcol.wait_tensor(total), everybody(5).sum(0))


def a_message_of_another_size_is_an_error() -> None:
    if dist.get_rank() == 0:
        dist.send(torch.ones(2), 1)
    if dist.get_rank() == 1:
        refused(RuntimeError, lambda: dist.recv(torch.ones(5), 0), "8 bytes came where 20 were expected")


def a_message_that_is_too_long_is_an_error() -> None:
    """Also where the progress thread is the first to hear of it."""
    for pause_s in (0.0, 0.3):
        dist.barrier()
        if dist.get_rank() == 0:
            dist.send(torch.ones(5), 1)
        if dist.get_rank() == 1:
            work = dist.irecv(torch.ones(2), 0)
            assert work is not None
            time.sleep(pause_s)
            refused(RuntimeError, work.wait, "receiving from rank 0", "TRUNCATE")


def a_message_of_anybody_says_whose_it_is() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        dist.send(torch.tensor([float(rank)]), 0)
        return
    came = [dist.recv(value := torch.empty(1)) == int(value) for _ in range(size - 1)]
    assert all(came)


def a_large_message_leaves_while_its_sender_waits_for_something_else() -> None:
    """Rank 0 computes and does not call MPI; rank 1 has its 8 MB long before rank 0 waits."""
    numel, rank = 2_000_000, dist.get_rank()
    dist.barrier()
    start = time.monotonic()
    if rank == 0:
        work = dist.isend(torch.ones(numel), 1)
        time.sleep(1.5)  # away from MPI
        assert work is not None
        work.wait()
    if rank == 1:
        dist.recv(torch.empty(numel), 0)
        assert time.monotonic() - start < 1.2
    dist.barrier()


def who_waits_too_long_gets_an_error() -> None:
    if dist.get_rank() == 1:
        work = dist.irecv(torch.empty(1), 0, tag=77)
        assert work is not None
        refused(RuntimeError, lambda: work.wait(timedelta(seconds=0.2)), "receiving from rank 0", "0.2 s")
    dist.barrier()
    if dist.get_rank() == 0:
        dist.send(torch.ones(1), 1, tag=77)  # nothing is left behind
    dist.barrier()


def groups_sum_beside_each_other_in_their_own_order() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    halves = [dist.new_group([1, 0], sort_ranks=False), dist.new_group([3, 2], sort_ranks=False)] if size == 4 else []
    halves = halves or [dist.new_group([1, 0], sort_ranks=False)]
    mine = halves[rank // 2]
    assert dist.get_group_rank(mine, rank) == 1 - rank % 2
    tensor = torch.tensor([float(rank)])
    dist.all_reduce(tensor, group=mine)
    assert tensor.item() == (1 if rank < 2 else 5)
    dist.destroy_process_group(mine)
    alone = [dist.new_group([each]) for each in range(size)][rank]
    dist.all_reduce(tensor, group=alone)
    dist.destroy_process_group(alone)


def many_groups_come_and_go() -> None:
    for _ in range(20):
        group = dist.new_group(list(range(dist.get_world_size())))
        dist.barrier(group=group)
        dist.destroy_process_group(group)


def a_default_group_can_be_made_again() -> None:
    dist.destroy_process_group()
    join()
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor.item() == dist.get_world_size()


CASES: tuple[Callable[[], None], ...] = (
    a_sum_is_that_of_every_dtype,
    other_reductions_are_those_of_torch,
    the_largest_is_nan_where_a_rank_has_one,
    what_mpi_cannot_combine_is_refused_in_words,
    a_tensor_with_gaps_is_summed_in_place,
    gathers_have_the_order_of_the_ranks,
    values_of_any_kind_are_told_to_all,
    a_sum_on_one_rank_and_a_scatter_from_it,
    scattered_sums_may_lie_in_what_is_scattered,
    parts_go_to_their_ranks,
    messages_of_a_pair_keep_their_order,
    sends_and_receives_in_one_batch_meet,
    functional_collectives_are_those_of_the_group,
    a_message_of_another_size_is_an_error,
    a_message_that_is_too_long_is_an_error,
    a_message_of_anybody_says_whose_it_is,
    a_large_message_leaves_while_its_sender_waits_for_something_else,
    who_waits_too_long_gets_an_error,
    groups_sum_beside_each_other_in_their_own_order,
    many_groups_come_and_go,
    a_default_group_can_be_made_again,
)


def join() -> None:
    """The default group of all ranks, by MPI alone."""
    store = start_mpi()
    mpi = sys.modules["mpi4py.MPI"]
    rank, size = mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size()
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(MPI_BACKEND, store=store, rank=rank, world_size=size, timeout=timeout)


def main(results: Path) -> None:
    torch.set_num_threads(1)
    join()
    said: dict[str, list[object]] = {}
    for case in CASES:
        error = None
        try:
            case()
        except Exception:
            error = traceback.format_exc()
        of_ranks: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, error)
        said[case.__name__] = of_ranks
    if dist.get_rank() == 0:
        results.write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
