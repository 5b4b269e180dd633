"""Traffic tells what passed since it was read last."""

from __future__ import annotations

import torch

from shardwise.comm.point_to_point import Waitable
from shardwise.comm.traffic import CountedTransport, Traffic


class Done:
    def wait(self) -> None:
        pass


class Kept:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[tuple[torch.Tensor, int]] = []
        self.received: list[tuple[torch.Tensor, int]] = []

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable:
        self.sent.append((tensor, peer))
        return Done()

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable:
        self.received.append((tensor, peer))
        return Done()


def test_a_reading_is_what_passed_since_the_last_one() -> None:
    passed = {"tp": 7, "pp": 0, "other": 0}
    traffic = Traffic()
    traffic.add("tp.all_reduce", lambda: passed["tp"])  # what was before is not its affair
    traffic.add("pp.send", lambda: passed["pp"])
    traffic.add("pp.send", lambda: passed["other"])
    passed.update(tp=10, pp=4, other=1)
    assert list(traffic.read().items()) == [("pp.send", 5), ("tp.all_reduce", 3)]
    passed["other"] = 3
    assert traffic.read() == {"pp.send": 2, "tp.all_reduce": 0}


def test_a_counted_transport_counts_what_it_sends_and_sends_it() -> None:
    inner = Kept()
    transport = CountedTransport(inner)
    sent, received = torch.zeros(3), torch.zeros(5)
    transport.isend(sent, 2)
    transport.irecv(received, 1)
    assert transport.sent_bytes == 12
    assert inner.sent[0][0] is sent
    assert inner.sent[0][1] == 2
    assert inner.received[0][0] is received
