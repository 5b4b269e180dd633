"""The peak of a rank's memory counts what is gone again, and forgets it when it is told to."""

from __future__ import annotations

import gc

import torch

from shardwise.train.memory import PeakMemory

BLOCK = 128 << 20  # much more than what the process may give back to the system meanwhile


def test_a_peak_is_of_what_was_held_since_it_was_begun() -> None:
    gc.collect()
    peak = PeakMemory(torch.device("cpu"))
    before = peak.nbytes
    block = torch.ones(BLOCK, dtype=torch.uint8)
    del block
    assert peak.nbytes >= before + 0.75 * BLOCK
    peak.begin_again()
    assert peak.nbytes <= before + 0.5 * BLOCK
