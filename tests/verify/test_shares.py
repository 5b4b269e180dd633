"""Replicas that have unequal numbers of micro-batches are one device: dropout, weights of tokens and all.

1e-5 is what float32 leaves of sums taken in another order over some tens of layers.
"""

from __future__ import annotations

import pytest
from models import make

from shardwise.launch import RankStarter
from shardwise.verify import verify


@pytest.mark.parametrize(
    "layout",
    [
        "dp=2,shares=3:1",
        "dp=2,pp=2,shares=1:3",
        pytest.param("dp=2,pp=2,shares=3:1,schedule=zb-v", marks=pytest.mark.slow),
        pytest.param("dp=2,tp=2,shares=3:1", marks=pytest.mark.slow),
    ],
)
def test_replicas_with_shares_are_one_device(starter: RankStarter, layout: str) -> None:
    example = make("llama")
    labels = example.batch["labels"].clone()
    labels[0, 1:] = -100  # tokens count, and not samples
    batch = {**example.batch, "labels": labels}
    found = verify(example.model, batch, layout=layout, steps=2, starter=starter)
    assert found.equal, str(found)
    assert found.worst_error <= 1e-5
