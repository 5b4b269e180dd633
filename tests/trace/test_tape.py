"""A tape says how the answer of a node is built where the node does not run."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from shardwise.describe.flow import Dataflow, Node, NodeKind
from shardwise.trace.absent import Absent
from shardwise.trace.tape import Fixed, FromArgument, Leaf, Made, Record, Structure, Tape, Unseen, stand_in

NOTHING = Structure(tree_flatten(None)[1], (Fixed(None),))


def structure_of(example: Any, *leaves: Leaf) -> Structure:
    return Structure(tree_flatten(example)[1], leaves)


def tape_of(*records: Record, host_random: bool = False) -> Tape:
    nodes = tuple(Node(index=i, kind=NodeKind.READ, name="look") for i, _ in enumerate(records))
    flow = Dataflow(nodes=nodes, values=(), results=())
    return Tape(flow, list(records), [], frozenset(), (), host_random=host_random)


def test_an_answer_is_built_of_values_arguments_constants_and_what_nobody_reads() -> None:
    unseen = stand_in("inside", torch.ones(2))
    answer = structure_of({"a": 0, "b": [0, (0, 0)]}, Made(7), FromArgument(1), Fixed("text"), Unseen(unseen))
    values = {7: torch.ones(3)}
    built = answer.build(["first", "second"], values.__getitem__)
    assert built == {"a": values[7], "b": ["second", ("text", unseen)]}
    assert built["a"] is values[7]


def test_an_answer_that_is_one_value_is_that_value() -> None:
    assert structure_of(0, Made(2)).build([], lambda index: index * 10) == 20


def test_a_stand_in_tells_everything_but_its_value() -> None:
    tensor = torch.empty(4, 6, dtype=torch.float64).t().requires_grad_()
    made = stand_in("layers.3#0 output 0", tensor)
    assert isinstance(made, Absent)
    assert made.what == "layers.3#0 output 0"
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert made.requires_grad


def test_a_stand_in_of_a_sparse_tensor_has_its_shape() -> None:
    assert stand_in("sparse", torch.eye(3).to_sparse()).shape == (3, 3)


def test_a_tape_is_random_if_anything_on_it_draws() -> None:
    quiet = Record(func=None, answer=NOTHING)
    assert not tape_of(quiet, quiet).random
    assert tape_of(quiet, dataclasses.replace(quiet, random=True)).random
    assert tape_of(quiet, dataclasses.replace(quiet, host_random=True)).random
    assert tape_of(quiet, host_random=True).random


def test_looks_come_in_order_with_what_was_seen() -> None:
    quiet = Record(func=None, answer=NOTHING)
    looks = [dataclasses.replace(quiet, look=seen) for seen in ((True,), (3,))]
    assert tape_of(looks[0], quiet, looks[1]).looks == ((0, (True,)), (2, (3,)))
