"""Rows of experts are counted once a forward, however often it is run."""

from __future__ import annotations

import torch

from shardwise.parallel.expert.load import Loads


def test_a_forward_that_is_run_again_counts_once() -> None:
    loads = Loads()
    loads.declare("layer", 2)
    rows = torch.tensor([3, 1, 0])
    loads.add("layer", rows)
    with loads.paused():
        loads.add("layer", rows)
    assert loads.take()["layer"].tolist() == [3, 1, 0]
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: loads.add("layer", rows))  # in a backward
    y.sum().backward()
    assert loads.take()["layer"].tolist() == [0, 0, 0]
