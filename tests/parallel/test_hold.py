"""A rank holds what its stages read and nothing else; every parameter is held by someone."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import awkward_models as awkward
from shardwise.errors import DataflowError
from shardwise.parallel.hold import hold, holders_of, take_own
from shardwise.plan.cut import cut_stages
from shardwise.trace.capture import capture

PLACEMENT = {(f"layers.{index}", 0): index // 2 for index in range(4)}


class ReadsGain(awkward.Awkward):
    """Glue between the last layers reads a parameter; another one is read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))

    def through(self, x: torch.Tensor) -> torch.Tensor:
        return super().through(x) * self.gain


def holders(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tape = capture(model, (torch.ones(8, awkward.WIDTH),)).tape
    stages = {node.index: PLACEMENT[(node.name, node.call)] for node in tape.flow.calls}
    return holders_of(model, tape.flow, cut_stages(tape.flow, stages, 2), tape.units, PLACEMENT)


def test_units_hold_their_own_glue_what_it_reads_and_stage_0_what_nobody_reads() -> None:
    found = holders(ReadsGain())
    assert found["layers.1.linear.weight"] == (0,)
    assert found["layers.2.linear.weight"] == (1,)
    assert found["gain"] == (1,)
    assert found["spare"] == (0,)
    assert set(found) == {name for name, _ in ReadsGain().named_parameters()}


def test_a_weight_tied_across_stages_is_held_by_both() -> None:
    model = awkward.Awkward()
    model.layers[3].linear.weight = model.layers[0].linear.weight
    assert holders(model)["layers.0.linear.weight"] == (0, 1)


def test_what_is_not_held_has_shape_and_dtype_and_no_value() -> None:
    model = awkward.Awkward()
    model.layers[3].linear.weight = model.layers[0].linear.weight
    kept = model.layers[1].linear.weight
    hold(model, ["layers.1.linear.weight"])
    absent = model.layers[0].linear.weight
    assert model.layers[1].linear.weight is kept
    assert absent.shape == (awkward.WIDTH, awkward.WIDTH)
    assert absent.dtype == torch.float32
    assert absent.requires_grad
    assert model.layers[3].linear.weight is absent, "ties stay ties"
    with pytest.raises(DataflowError, match=r"parameter layers\.0\.linear\.weight"):
        absent.sum()


def test_taken_values_are_copies_and_ties_stay_ties() -> None:
    model = awkward.Awkward()
    model.layers[3].linear.weight = model.layers[0].linear.weight
    shared, other = model.layers[0].linear.weight, model.layers[1].linear.weight
    buffer = model.seen
    take_own(model, ["layers.0.linear.weight"], device=torch.device("cpu"))
    mine = model.layers[0].linear.weight
    assert mine.data_ptr() != shared.data_ptr()
    assert torch.equal(mine, shared)
    assert model.layers[3].linear.weight is mine
    assert model.layers[1].linear.weight is other
    assert model.seen.data_ptr() != buffer.data_ptr()
