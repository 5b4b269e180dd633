"""A unit that looks at its own values is run a second time, on random numbers, and nothing of that shows outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from models import Example

import awkward_models as awkward
from one_process import run_whole, traced, worst_error
from shardwise.errors import ModelError
from shardwise.trace.capture import capture
from shardwise.trace.for_real import real_parameters
from shardwise.trace.tape import AtArgument, AtHook, Place, Tape

BATCH = (torch.linspace(-2, 2, 8 * awkward.WIDTH).sin().view(8, awkward.WIDTH),)


class Looking(awkward.Layer):
    """Appends to a list and fills a dictionary, before and after it looks at its own values."""

    seen_in_all = 0

    def __init__(self) -> None:
        super().__init__()
        self.history: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, seen: list[torch.Tensor], notes: dict[str, torch.Tensor]) -> torch.Tensor:
        y = super().forward(x)
        seen.append(y.mean(0))
        self.history.append(y.mean())
        self.seen_in_all = self.seen_in_all + 1
        rows = (y.sum(-1) > 0).nonzero().squeeze(-1)  # shapes depend on values from here on
        y = y.index_add(0, rows, torch.tanh(self.linear(y[rows])))
        notes[f"call {len(seen)}"] = y.square().sum()
        return y


class FillsListsAndLooks(awkward.Awkward):
    layer = Looking

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        notes: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            x = layer(x, seen, notes)
        assert len(seen) == len(notes) == 4
        return x.square().mean() + torch.stack(seen).square().sum() + notes["call 2"]


class ReplacesInLists(awkward.Awkward):
    """A unit puts a tensor where another one was, and its own argument behind it."""

    class Replacing(awkward.Routes):
        def forward(self, state: list[torch.Tensor]) -> None:  # type: ignore[override]
            state.append(state[0])
            state[0] = super().forward(state[0])

    layer = Replacing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = [x]
        for layer in self.layers:
            layer(state)
        assert len(state) == 5
        assert state[1] is x
        return sum((tensor.square().mean() for tensor in state), start=torch.zeros(()))


class TakesWithHooksAndLooks(awkward.TakesWithHooks):
    layer = awkward.Routes


class LooksAndKeeps(awkward.Routes):
    """Leaves its penalty in an attribute."""

    penalty: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.penalty = y.abs().mean()
        return y


def tape_of(model: nn.Module) -> Tape:
    return capture(model, (torch.ones(8, awkward.WIDTH),)).tape


def places(tape: Tape) -> list[Place]:
    return [place for record in tape.records for place in record.extras.values()]


def test_what_it_appends_to_a_list_is_an_extra_output() -> None:
    found = places(tape_of(FillsListsAndLooks()))
    assert all(isinstance(place, AtArgument) for place in found)
    assert {0, 1, 2, 3, "call 2"} <= {place.key for place in found if isinstance(place, AtArgument)}


@pytest.mark.parametrize("kind", [FillsListsAndLooks, TakesWithHooksAndLooks])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_its_stages_are_the_model(kind: type[nn.Module], num_stages: int) -> None:
    trace = traced(Example(model=kind(), batch=BATCH))
    wanted, wanted_gradients = run_whole(trace.example)
    loss, gradients = trace.run(trace.cut(num_stages))
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert worst_error(gradients, wanted_gradients) <= 1e-5


def test_an_argument_that_it_hands_on_is_the_same_object() -> None:
    tape_of(ReplacesInLists())  # asserts in its forward


def test_a_hook_inside_it_is_called_as_often_as_in_the_model() -> None:
    taken: list[torch.Tensor] = []
    model = awkward.LooksInsideUnits()
    model.layers[0].linear.register_forward_hook(lambda module, args, output: taken.append(output))

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            taken.clear()
            loss = self.model(x)
            assert len(taken) == 2
            return loss

    tape_of(Counts())


def test_the_attempt_that_failed_leaves_no_trace_in_attributes() -> None:
    lengths: list[tuple[int, int]] = []

    class Watches(FillsListsAndLooks):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            loss = super().forward(x)
            lengths.extend((len(layer.history), layer.seen_in_all) for layer in self.layers)
            return loss

    tape_of(Watches())
    assert lengths == [(1, 1)] * 4


def test_its_random_numbers_are_not_those_of_the_user() -> None:
    before = torch.get_rng_state()
    tape_of(awkward.LooksInsideUnits())
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_computed_from_random_numbers_is_not_looked_at() -> None:
    class Asks(awkward.ReadsAttributes):
        layer = LooksAndKeeps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            loss = super().forward(x)
            return loss * 2 if bool(self.layers[0].penalty > 0) else loss

    assert all(isinstance(place, AtHook) for place in places(tape_of(TakesWithHooksAndLooks())))
    with pytest.raises(ModelError, match="must not look at a value that a unit computed"):
        tape_of(Asks())


def test_names_of_the_random_parameters_end_with_them() -> None:
    """Another tensor may come to stand where one of them was: it would be taken for a parameter."""
    module = nn.Linear(3, 2)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    before = dict(names)
    with real_parameters(module, names) as swapped:
        assert swapped == {"weight", "bias"}
        assert len(names) == 4
    assert names == before
