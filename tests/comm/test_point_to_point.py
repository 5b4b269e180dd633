"""Tensors between ranks: compact, in order, and checked by headers."""

from __future__ import annotations

import pytest
import torch

from shardwise.comm.point_to_point import Expected, ProcessGroupTransport, receive, send
from shardwise.errors import TransferError
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

CPU = torch.device("cpu")


def edge(
    *shape: int, strides: tuple[int, ...] | None = None, check: int = 7, dtype: torch.dtype = torch.float32
) -> Expected:
    return Expected(
        what="layers.1#0 output 0",
        check=check,
        shape=shape,
        strides=strides if strides is not None else torch.empty(shape).stride(),
        dtype=dtype,
    )


@on_ranks(2)
def test_tensors_arrive_in_order(rank: RankContext) -> None:
    transport = ProcessGroupTransport()
    if rank.rank == 0:
        sent = [send(transport, torch.full((2, 3), float(i)), edge(2, 3), 1, headers=i == 0) for i in range(3)]
        for outgoing in sent:
            outgoing.wait()
    else:
        posted = [receive(transport, edge(2, 3), 0, device=CPU, headers=i == 0) for i in range(3)]
        assert [incoming.wait()[0, 0].item() for incoming in posted] == [0.0, 1.0, 2.0]


@on_ranks(2)
def test_a_broadcast_tensor_travels_compactly(rank: RankContext) -> None:
    transport = ProcessGroupTransport()
    repeated = edge(4, 5, 3, strides=(0, 3, 1))
    if rank.rank == 0:
        outgoing = send(transport, torch.arange(15.0).view(1, 5, 3).expand(4, 5, 3), repeated, 1, headers=True)
        outgoing.wait()
        assert outgoing.tensors[0].numel() == 15
    else:
        arrived = receive(transport, repeated, 0, device=CPU, headers=True).wait()
        assert arrived.shape == (4, 5, 3)
        assert torch.equal(arrived[3], torch.arange(15.0).view(5, 3))


@on_ranks(2)
def test_non_contiguous_and_integer_tensors_cross(rank: RankContext) -> None:
    transport = ProcessGroupTransport()
    expected = edge(3, 2, dtype=torch.int64)
    if rank.rank == 0:
        send(transport, torch.arange(6).view(2, 3).t(), expected, 1, headers=True).wait()
    else:
        assert receive(transport, expected, 0, device=CPU, headers=True).wait().tolist() == [[0, 3], [1, 4], [2, 5]]


@on_ranks(2, fresh=True)
def test_another_shape_is_an_error_that_names_the_edge(rank: RankContext) -> None:
    transport = ProcessGroupTransport()
    if rank.rank == 0:
        send(transport, torch.zeros(2, 3), edge(2, 3), 1, headers=True).wait()
    else:
        incoming = receive(transport, edge(3, 2), 0, device=CPU, headers=True)
        with pytest.raises(
            TransferError, match=r"for layers.1#0 output 0 it sent float32 \(2, 3\).*where float32 \(3, 2\)"
        ):
            incoming.wait()


@on_ranks(2, fresh=True)
def test_another_dataflow_is_an_error_even_with_equal_shapes(rank: RankContext) -> None:
    transport = ProcessGroupTransport()
    if rank.rank == 0:
        send(transport, torch.zeros(2), edge(2, check=1), 1, headers=True).wait()
    else:
        with pytest.raises(TransferError, match="same code on the same batch"):
            receive(transport, edge(2, check=2), 0, device=CPU, headers=True).wait()


def test_a_tensor_that_is_not_repeated_as_promised_is_refused() -> None:
    with pytest.raises(TransferError, match="traced as repeated along dim 0 and is not"):
        send(ProcessGroupTransport(), torch.zeros(4, 3), edge(4, 3, strides=(0, 1)), 0, headers=False)
