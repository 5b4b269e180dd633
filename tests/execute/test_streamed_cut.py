"""Runs of unit calls whose parameters fit into some bytes."""

from __future__ import annotations

import pytest

from shardwise.describe.flow import Dataflow, Node, NodeKind, Value
from shardwise.execute.streamed_cut import runs_of_calls

#  embed ─► layer 0 ─► layer 1 ─► layer 2 ─► norm ─► head      a bytes each: 4 2 3 3 1 4
NBYTES = {"embed": 4, "layer0": 2, "layer1": 3, "layer2": 3, "norm": 1, "head": 4}


def chain(*parameters: str, uncrossable: int = -1) -> Dataflow:
    """One call after another; the value after call `uncrossable` cannot be handed over."""
    nodes = tuple(
        Node(
            index=i,
            kind=NodeKind.CALL,
            name=f"unit{i}",
            reads=(i - 1,) if i else (),
            makes=(i,),
            parameters=(name,) if name else (),
        )
        for i, name in enumerate(parameters)
    )
    values = tuple(
        Value(
            index=i,
            node=i,
            leaf=0,
            shape=(1,),
            dtype="float32",
            nbytes=4,
            requires_grad=True,
            crossable=i != uncrossable,
        )
        for i in range(len(nodes))
    )
    return Dataflow(nodes=nodes, values=values, results=(len(nodes) - 1,))


def stages(flow: Dataflow, stage_bytes: int) -> list[int]:
    return list(runs_of_calls(flow, NBYTES, stage_bytes).values())


@pytest.mark.parametrize(
    "stage_bytes, expected",
    [
        (5, [0, 1, 1, 2, 2, 3]),
        (1, [0, 1, 2, 3, 4, 5]),  # a unit that is larger than a stage stands alone
        (0, [0, 1, 2, 3, 4, 5]),
        (100, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_stage_is_filled_until_the_next_unit_does_not_fit(stage_bytes: int, expected: list[int]) -> None:
    assert stages(chain(*NBYTES), stage_bytes) == expected


def test_a_unit_that_is_called_again_needs_no_more_bytes() -> None:
    assert stages(chain("layer0", "layer0", "layer0", "layer1", "layer0"), 4) == [0, 0, 0, 1, 2]


def test_calls_without_parameters_stay_with_what_is_before_them() -> None:
    assert stages(chain("embed", "", "layer0", ""), 4) == [0, 0, 1, 1]


def test_a_value_that_cannot_be_handed_over_keeps_its_reader_on_the_stage() -> None:
    assert stages(chain(*NBYTES, uncrossable=1), 1) == [0, 1, 1, 2, 3, 4]
