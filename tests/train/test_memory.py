"""The peak of a rank's memory counts what is gone again, and forgets it when it is told to."""

from __future__ import annotations

import torch

from shardwise.train.memory import PeakMemory

BLOCK = 64 << 20


def test_a_peak_is_of_what_was_held_since_it_was_begun() -> None:
    peak = PeakMemory(torch.device("cpu"))
    before = peak.nbytes
    block = torch.ones(BLOCK, dtype=torch.uint8)
    del block
    assert peak.nbytes >= before + 0.9 * BLOCK
    peak.begin_again()
    assert peak.nbytes <= before + 0.5 * BLOCK
