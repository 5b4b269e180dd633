"""A run of one rank without values books what the recording of the whole model books, whether blocks repeat or not."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping

import pytest
import torch
import torch.nn as nn
from models import make

from shardwise.describe.profile import ModelProfile
from shardwise.errors import DataflowError
from shardwise.parallel.rank_run import RankRun, segment
from shardwise.trace.capture import own, without_values
from shardwise.trace.install import Switch, installed
from shardwise.trace.objective import Batch, LossFunction, objective
from shardwise.trace.profile import trace
from shardwise.trace.randomness import Scope, python_streams
from shardwise.trace.record import glue_key

torch.set_num_threads(1)
SCOPE = Scope(seed=0, step=0, micro_batch=0, samples=(), place="glue", call=0)


@contextlib.contextmanager
def ready(model: nn.Module, profile: ModelProfile, alike: Mapping[int, Hashable] | None = None) -> Iterator[RankRun]:
    units = {unit.name: model.get_submodule(unit.name) for unit in profile.units}
    switch = Switch()
    with without_values(model) as faked:
        run = RankRun(profile.flow.calls, faked, samples=8, alike=alike)
        with installed(units, switch), switch.on(run), python_streams(glue_key(SCOPE)):
            yield run


def run_of(
    model: nn.Module,
    batch: Batch,
    loss: LossFunction | None,
    profile: ModelProfile,
    alike: Mapping[int, Hashable] | None = None,
) -> RankRun:
    with ready(model, profile, alike) as run:
        run.run(lambda: objective(model, own(batch), loss))
    return run


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "albert", "unet", "mamba"])
def test_a_run_books_what_a_recording_books(name: str) -> None:
    example = make(name)
    profile = trace(example.model, example.batch, loss=example.loss)
    alone = run_of(example.model, example.batch, example.loss, profile)
    alike = {call.node: (type(example.model.get_submodule(call.unit)), call.kernels) for call in profile.calls}
    repeated = run_of(example.model, example.batch, example.loss, profile, alike)
    for call in profile.calls:
        for run in (alone, repeated):
            assert set(run.kernels(call.node)) == set(call.kernels)
            assert run.saved.get(call.node, 0) == call.saved_bytes
            assert run.counter.backward_flops.get(run.source(call.node), 0) == call.backward_flops
    if name in ("llama", "bert", "gpt2", "albert", "mamba"):
        assert any(repeated.source(call.node) != call.node for call in profile.calls)
    for done in range(len(profile.calls) + 1):
        assert set(alone.kernels(segment(done))) == set(repeated.kernels(segment(done)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean()


def test_what_is_alive_at_most_is_known_beside_what_is_kept() -> None:
    model, batch = Stack(), (torch.randn(16, 8),)
    profile = trace(model, batch, units=[f"layers.{i}" for i in range(4)])
    run = run_of(model, batch, None, profile)
    hidden = 16 * 32 * 4
    forward, backward = run.transient_bytes(profile.calls[1].node)
    assert forward == hidden  # what enters the ReLU, when what leaves it is there
    assert backward == 2 * hidden + 4  # gradients of both, when what was kept is there still; the loss
    assert run.counter.alive_bytes == 0


def test_a_rank_that_calls_other_units_is_told_which() -> None:
    model, batch = Stack(), (torch.randn(16, 8),)
    profile = trace(model, batch, units=[f"layers.{i}" for i in range(4)])
    model.forward = lambda x: model.layers[1](x).mean()  # type: ignore[method-assign]
    with ready(model, profile) as run, pytest.raises(DataflowError, match="layers.1 where .* comes to layers.0#0"):
        run.run(lambda: objective(model, own(batch), None))
