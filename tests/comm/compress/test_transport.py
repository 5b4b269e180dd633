"""Messages that travel in fewer bytes: what arrives is close, and what must be exact is."""

from __future__ import annotations

import pytest
import torch

from shardwise.comm.compress.make import compressed_transport
from shardwise.comm.point_to_point import ProcessGroupTransport
from shardwise.comm.traffic import CountedTransport
from shardwise.launch import RankContext
from shardwise.layout import Communication
from shardwise.testing import on_ranks


@on_ranks(2)
@pytest.mark.parametrize("activations, error, share", [("bf16", 2**-8, 2), ("fp16", 2**-11, 2), ("int8", 0.02, 3.9)])
def test_activations_arrive_rounded_and_the_rest_as_it_is(
    rank: RankContext, activations: str, error: float, share: float
) -> None:
    counted = CountedTransport(ProcessGroupTransport())
    transport = compressed_transport(counted, Communication(activations=activations))
    assert transport is not None
    sent = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    exact = [torch.arange(5000), torch.randn(100, generator=torch.Generator().manual_seed(1)), torch.ones(2, 3).bool()]
    if rank.rank == 0:
        for each in (sent, *exact):
            transport.isend(each, 1).wait()
        assert transport.saved_bytes == sent.nbytes + sum(each.nbytes for each in exact) - counted.sent_bytes
        assert transport.saved_bytes > sent.nbytes * (1 - 1.05 / share)
    else:
        got = torch.empty(3, 1000)
        transport.irecv(got, 0).wait()
        assert not torch.equal(got, sent)
        scale = sent.abs() if activations != "int8" else sent.abs().max()
        assert ((got - sent).abs() <= error * scale).all()
        for each in exact:
            buffer = torch.empty_like(each)
            transport.irecv(buffer, 0).wait()
            assert torch.equal(buffer, each)


def test_nothing_is_wrapped_where_nothing_is_asked_for() -> None:
    assert compressed_transport(ProcessGroupTransport(), Communication()) is None
