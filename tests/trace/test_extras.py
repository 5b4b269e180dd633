"""What leaves a unit other than by its return value is found, and found again by its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten

from shardwise.trace.extras import changed_attributes, containers_of, follow, grown_containers, place_of
from shardwise.trace.tape import AtArgument, AtAttribute, AtHook, Fixed, HookedCall, Made, Structure


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.kept = torch.ones(2)
        self.losses: list[Any] = []
        self.notes: dict[str, Any] = {}


def names(module: nn.Module) -> dict[nn.Module, str]:
    return {part: f"model.{name}".rstrip(".") for name, part in module.named_modules()}


@pytest.mark.parametrize(
    "change, place",
    [
        (lambda h, t: setattr(h, "kept", t), AtAttribute("model", "kept", ())),
        (lambda h, t: setattr(h.inner, "penalty", t), AtAttribute("model.inner", "penalty", ())),
        (lambda h, t: h.losses.append(t), AtAttribute("model", "losses", (0,))),
        (lambda h, t: h.notes.update(a=t), AtAttribute("model", "notes", ("a",))),
        (lambda h, t: setattr(h, "pair", (1.0, t)), AtAttribute("model", "pair", (1,))),
    ],
    ids=["replaced", "new, below", "in a list", "in a dictionary", "in a tuple"],
)
def test_a_tensor_left_in_an_attribute_is_found(change: Any, place: AtAttribute) -> None:
    holder = Holder()
    after = changed_attributes(holder, names(holder))
    tensor = torch.zeros(3)
    change(holder, tensor)
    assert after() == {id(tensor): place}


def test_attributes_that_stayed_and_parameters_and_buffers_are_not_left_there() -> None:
    holder = Holder()
    holder.register_buffer("count", torch.zeros(1))
    after = changed_attributes(holder, names(holder))
    holder.inner.weight = nn.Parameter(torch.ones(2, 2))
    holder.count = torch.ones(1)
    holder.name = "no tensor"
    assert after() == {}


def test_a_module_outside_the_model_is_not_named() -> None:
    holder = Holder()
    after = changed_attributes(holder, {})
    holder.kept = torch.zeros(2)
    assert after() == {}


def test_what_is_put_into_lists_and_dictionaries_among_the_arguments_is_found() -> None:
    seen, notes = [torch.ones(1)], {"old": torch.ones(1)}
    arguments = ((torch.ones(1), [seen]), {"notes": notes})
    after = grown_containers(arguments)
    appended, noted = torch.zeros(1), torch.zeros(1)
    seen.append(appended)
    notes["new"] = noted
    notes["number"] = 3.0  # type: ignore[assignment]
    found = after()
    assert found == {id(appended): AtArgument((0, 1, 0), 1), id(noted): AtArgument((1, "notes"), "new")}
    assert follow(arguments, (0, 1, 0))[1] is appended


def test_containers_come_with_their_paths_outermost_first() -> None:
    inner: list[int] = []
    tree = ({"a": inner}, (inner,))
    assert [(path, box) for path, box in containers_of(tree)] == [((0,), {"a": []}), ((0, "a"), []), ((1, 0), [])]
    assert all(follow(tree, path) is box for path, box in containers_of(tree))


def structure(*leaves: Any) -> Structure:
    return Structure(tree_flatten(tuple(range(len(leaves))))[1], leaves)


def test_a_tensor_given_to_a_hook_is_picked_up_there_rather_than_elsewhere() -> None:
    tensor = torch.ones(1)
    hooked = [
        HookedCall("a", arguments=structure(Made(3)), output=structure(Fixed(None), Made(4))),
        HookedCall("b", arguments=structure(Made(5)), output=structure(Made(3))),
    ]
    left = {id(tensor): AtAttribute("a", "kept", ())}
    assert place_of(4, tensor, hooked, left) == AtHook(0, 1, True)
    assert place_of(5, tensor, hooked, left) == AtHook(1, 0, False)
    assert place_of(3, tensor, hooked, left) == AtHook(0, 0, False)
    assert place_of(9, tensor, hooked, left) == AtAttribute("a", "kept", ())
    assert place_of(9, torch.ones(1), hooked, left) is None
