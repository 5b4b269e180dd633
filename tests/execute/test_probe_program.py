"""What a program costs around its kernels is measured on a program that computes next to nothing."""

from __future__ import annotations

import math

import torch

from shardwise.execute.probe_program import held_bytes, program_seconds
from shardwise.testing import on_ranks


def test_an_action_and_a_step_take_a_time_that_a_program_can_take() -> None:
    waited = []
    found = program_seconds(rounds=2, steps=2, together=lambda: waited.append(1))
    assert len(found.action_s) == len(found.step_s) == 2
    assert all(math.isfinite(seconds) and abs(seconds) < 10 for seconds in (*found.action_s, *found.step_s))
    assert found.layout_s > 0
    assert len(waited) == 6  # two lengths of steps in each of three rounds, the first to warm up


def test_a_process_that_has_imported_torch_is_resident() -> None:
    assert 50 << 20 < held_bytes(torch.device("cpu")) < 1 << 40


@on_ranks(2)
def test_ranks_run_it_together(rank) -> None:
    found = program_seconds(rounds=1, steps=2)
    assert len(found.action_s) == 1
    assert all(math.isfinite(seconds) for seconds in (*found.action_s, *found.step_s))
