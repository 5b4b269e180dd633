"""Sequences that are divided among ranks are those of one device: loss, gradients, norm and weights after some steps.

1e-5 is what float32 leaves of sums taken in another order over some tens of layers.
"""

from __future__ import annotations

import pytest
from models import make

from shardwise.launch import RankStarter
from shardwise.verify import verify

TOLERANCE = 1e-5


@pytest.mark.parametrize(
    "name, layout, steps",
    [
        ("llama", "cp=2", 3),
        ("llama", "cp=2,context=ulysses", 3),
        ("llama", "cp=2,dp=2", 1),
        ("llama", "cp=2,pp=2,schedule=zb-h1", 2),
        ("llama", "cp=2,fsdp=2", 3),
        ("llama", "cp=2,recompute=full", 1),
        ("bert", "cp=3", 1),  # dropout, of attention too, and a mask of padding
        pytest.param(
            "t5", "cp=2,tp=2", 1, marks=pytest.mark.slow
        ),  # cross attention, relative positions that are learned
        ("bart", "cp=2,pp=2", 1),
        ("mixtral", "cp=3,context=ulysses", 1),
        ("mamba", "cp=2", 1),  # convolutions and scans over tokens get all of them
        ("clip", "cp=2", 1),
    ],
)
def test_ranks_that_divide_sequences_are_one_device(name: str, layout: str, steps: int, starter: RankStarter) -> None:
    example = make(name)
    comparison = verify(
        example.model, example.batch, layout=layout, loss=example.loss, steps=steps, starter=starter, timeout_s=100
    )
    assert comparison.equal, str(comparison)
    assert comparison.gradient_error <= TOLERANCE
