"""A forward that is run twice updates buffers once, and finds both times what the first run found."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from shardwise.errors import DataflowError
from shardwise.execute.repetition import Repetition


class Counts(nn.Module):
    """Its answer depends on a buffer that it writes, another that it replaces, and a third that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.ones(3))
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = x * self.scale + self.calls + self.last
        self.last = x.detach().clone()
        return y


def test_both_runs_find_the_same_and_buffers_are_written_once() -> None:
    model = Counts()
    repetition = Repetition(model)
    xs = [torch.full((3,), float(number)) for number in range(3)]
    firsts, written = [], []
    for x in xs:
        with repetition.first("stage") as found:
            firsts.append(model(x))
        written.append(found)
    assert [[buffer.name for buffer in found] for found in written] == [["calls", "last"]] * 3
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    versions = {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()}
    for x, first, found in reversed(list(zip(xs, firsts, written, strict=True))):
        with repetition.again(found):
            assert torch.equal(model(x), first)
        assert {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()} == versions
    assert all(torch.equal(buffer, after[name]) for name, buffer in model.named_buffers())


def test_what_a_stage_writes_is_learned_once() -> None:
    model = Counts()
    repetition = Repetition(model)
    with repetition.first("reads") as found:
        model.scale.sum()
    assert found == []
    with repetition.first("reads") as found:
        pass
    assert found == []


class Later(nn.Module):
    """From the second forward on it writes another buffer: replaces it, or writes into it."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self) -> None:
        self.calls += 1
        if self.calls > 1 and self.in_place:
            self.mean += 1
        elif self.calls > 1:
            self.mean = self.mean + 1


def test_a_buffer_that_is_first_replaced_in_a_later_forward_is_written_once_all_the_same() -> None:
    model = Later(in_place=False)
    repetition = Repetition(model)
    for _ in range(4):
        with repetition.first("stage") as found:
            model()
        with repetition.again(found):
            model()
    assert float(model.calls) == 4
    assert model.mean.tolist() == [3.0, 3.0]


def test_a_buffer_that_is_first_written_into_in_a_later_forward_is_an_error_that_names_it() -> None:
    model = Later(in_place=True)
    repetition = Repetition(model)
    with repetition.first("stage") as found:
        model()
    with repetition.again(found):
        model()
    with pytest.raises(DataflowError, match="Later wrote into mean"), repetition.first("stage"):
        model()
