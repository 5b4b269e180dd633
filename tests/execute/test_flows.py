"""Dataflows are traced once a signature, kept, and placed as the first one was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn as nn

import awkward_models as awkward
from shardwise.errors import LayoutError, ModelError
from shardwise.execute.batches import MicroBatch
from shardwise.execute.flows import Flow, Flows
from shardwise.trace.install import Switch
from shardwise.trace.randomness import Scope

PLACEMENT = {(f"layers.{index}", 0): index // 2 for index in range(4)}


def flows_of(model: nn.Module, placement: dict[tuple[str, int], int] | None = None, *, num_stages: int = 2) -> Flows:
    return Flows(model, switch=Switch(), placement=placement or PLACEMENT, num_stages=num_stages, loss=None)


def ask(flows: Flows, samples: int = 4, *, step: int = 0) -> Flow:
    scope = Scope(seed=0, step=step, micro_batch=0, samples=tuple(range(samples)), place="glue", call=0)
    inputs = (torch.ones(samples, awkward.WIDTH),)
    return flows.flow_of(MicroBatch(index=0, samples=scope.samples, inputs=inputs, weight=1.0), scope)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many samples each trace was made of."""
    seen: list[int] = []
    import shardwise.execute.flows as module

    original = module.capture

    def counted(model, inputs, **options):
        seen.append(inputs[0].shape[0])
        return original(model, inputs, **options)

    monkeypatch.setattr(module, "capture", counted)
    return seen


def test_a_signature_is_traced_once(captures: list[int]) -> None:
    flows = flows_of(awkward.Awkward())
    assert ask(flows) is ask(flows, step=7)
    ask(flows, samples=2)
    ask(flows, samples=2)
    assert captures == [4, 2]


def test_training_and_evaluation_with_and_without_gradients_have_dataflows_of_their_own(captures: list[int]) -> None:
    model = awkward.Awkward()
    flows = flows_of(model)
    training = ask(flows)
    model.eval()
    evaluating = ask(flows)
    with torch.no_grad():
        quiet = ask(flows)
    assert len({id(training), id(evaluating), id(quiet)}) == 3
    assert len(captures) == 3


def test_two_ranks_derive_the_same_digest_and_another_length_another_one() -> None:
    here, there = flows_of(awkward.Awkward()), flows_of(awkward.Awkward())
    assert ask(here).digest == ask(there).digest
    assert ask(here).digest != ask(here, samples=2).digest


def test_a_unit_without_a_stage_is_refused_by_name() -> None:
    with pytest.raises(LayoutError, match="every unit call has a stage: layers.3 was not called"):
        ask(flows_of(awkward.Awkward(), {key: stage for key, stage in PLACEMENT.items() if key[0] != "layers.3"}))


class KeepsState(awkward.Awkward):
    """Glue that counts in a buffer: stages would count differently often."""

    def through(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1.0)
        return super().through(x)


def test_glue_that_keeps_state_is_refused_where_there_are_stages() -> None:
    with pytest.raises(ModelError, match="keeps no state: .* writes buffer seen"):
        ask(flows_of(KeepsState()))
    ask(flows_of(KeepsState(), dict.fromkeys(PLACEMENT, 0), num_stages=1))
