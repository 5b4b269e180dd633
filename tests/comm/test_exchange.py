"""One message for each pair of ranks, all at once."""

from __future__ import annotations

import torch

from shardwise.comm.exchange import exchange
from shardwise.testing import on_ranks


@on_ranks(3)
def test_every_pair_exchanges_what_it_agreed_on(rank) -> None:
    sizes = {(0, 1): 5, (1, 0): 3, (1, 2): 1 << 20, (2, 0): 7}  # (from, to): bytes; 0 sends nothing to 2
    sends = {b: torch.full((n,), 10 * a + b, dtype=torch.uint8) for (a, b), n in sizes.items() if a == rank.rank}
    receives = {a: torch.zeros(n, dtype=torch.uint8) for (a, b), n in sizes.items() if b == rank.rank}
    exchange(sends, receives)
    for peer, tensor in receives.items():
        assert set(tensor.unique().tolist()) == {10 * peer + rank.rank}
    exchange({}, {})
