"""Moments on the host: the same updates as torch's AdamW, from wherever they were restored, and no pages between."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from models import make

from shardwise.errors import ConfigError
from shardwise.launch import RankStarter
from shardwise.parallel.states import State
from shardwise.train.optimizer import optimizer_over, set_rate
from shardwise.train.optimizers.host_adamw import HostAdamW
from shardwise.verify import verify

SHAPES = ((7, 5), (11,), (3, 4, 2))


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def test_updates_are_those_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    host = HostAdamW([{"params": ours, "weight_decay": 0.1}], lr=0.01, chunk_bytes=64)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, fused=True)
    for step in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.full_like(own, step - 1.5)
            other.grad = own.grad.clone()
        if step == 2:  # as restored from a checkpoint
            for own in ours:
                host.state[own] = {name: moment.clone() for name, moment in host.state[own].items()}
        host.step()
        reference.step()
    for own, other in zip(ours, theirs, strict=True):
        assert torch.equal(own, other)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(host.state[own][name], reference.state[other][name])


def test_a_parameter_without_a_gradient_stays() -> None:
    first, second, _ = parameters()
    host = HostAdamW([{"params": [first, second]}], lr=0.1)
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    host.step()
    assert torch.equal(second, before)
    assert second not in host.state


def resident_bytes() -> int:
    """Of this process, files that it maps included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def grown_bytes(on_host: bool) -> int:
    """What this process holds more behind two updates of 16 MiB of parameters."""
    parameter = nn.Parameter(torch.zeros(2**22))
    parameter.grad = torch.ones_like(parameter)
    state = State(parameter=parameter, shape=(2**11, 2**11))
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else free memory of earlier tests is used again, and nothing grows
    before = resident_bytes()
    optimizer = optimizer_over({"w": state}, on_host=on_host)
    assert optimizer is not None
    set_rate(optimizer, 0.1)
    for _ in range(2):
        optimizer.step()
    grown = resident_bytes() - before
    assert float(optimizer.state[parameter]["exp_avg"].mean()) > 0  # they are there all the same
    return grown


def test_the_process_holds_no_page_of_the_moments() -> None:
    moments = 2 * 4 * 2**22
    assert grown_bytes(on_host=False) > 0.9 * moments
    assert grown_bytes(on_host=True) < 0.1 * moments


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(ConfigError, match="use adamw"):
        optimizer_over({}, name="momentum", on_host=True)


def test_a_layout_whose_optimizer_is_on_the_host_is_one_device(starter: RankStarter) -> None:
    example = make("llama")
    comparison = verify(
        example.model, example.batch, layout="dp=2,offload=optimizer", steps=3, optimizer="adamw", starter=starter
    )
    assert comparison.equal, str(comparison)
