"""The cut: what crosses between stages, in the fewest bytes. Pure: no torch, dataflows written by hand."""

from __future__ import annotations

import re

import pytest

from shardwise.describe.flow import Dataflow, Node, NodeKind, Value
from shardwise.errors import LayoutError
from shardwise.plan.cut import Cut, cut_stages


class Sketch:
    """Writes a dataflow down line by line: `x = sketch.call("unit", reads)`."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: list[Value] = []

    def _node(self, kind: NodeKind, name: str, reads: tuple[int, ...], nbytes: int | None, crossable: bool) -> int:
        index, makes = len(self.nodes), ()
        if nbytes is not None:
            makes = (len(self.values),)
            self.values.append(
                Value(
                    index=makes[0],
                    node=index,
                    leaf=0,
                    shape=(nbytes,),
                    dtype="uint8",
                    nbytes=nbytes,
                    requires_grad=False,
                    crossable=crossable,
                )
            )
        call = sum(1 for node in self.nodes if node.name == name)
        self.nodes.append(Node(index=index, kind=kind, name=name, call=call, reads=reads, makes=makes))
        return makes[0] if makes else -1

    def call(self, name: str, *reads: int, nbytes: int = 100, crossable: bool = True) -> int:
        return self._node(NodeKind.CALL, name, reads, nbytes, crossable)

    def op(self, name: str, *reads: int, nbytes: int = 100, crossable: bool = True) -> int:
        return self._node(NodeKind.OP, name, reads, nbytes, crossable)

    def look(self, *reads: int) -> None:
        self._node(NodeKind.READ, "any", reads, None, True)

    def cut(self, result: int, stages: dict[str, int], num_stages: int) -> Cut:
        flow = Dataflow(nodes=tuple(self.nodes), values=tuple(self.values), results=(result,))
        return cut_stages(flow, {node.index: stages[node.name] for node in flow.calls}, num_stages)


def crossing(cut: Cut) -> list[tuple[int, int, int]]:
    """(value, from, to) of everything that crosses."""
    return [(value, source, plan.stage) for plan in cut.stages for value, source in plan.receives]


def test_a_chain_sends_each_output_to_the_next_stage() -> None:
    #   a ─x─► b ─y─► c ─z
    sketch = Sketch()
    x = sketch.call("a")
    y = sketch.call("b", x)
    z = sketch.call("c", y)

    cut = sketch.cut(z, {"a": 0, "b": 1, "c": 2}, 3)

    assert crossing(cut) == [(x, 0, 1), (y, 1, 2)]
    assert cut.edge_bytes == {(0, 1): 100, (1, 2): 100}
    assert cut.loss_stage == 2
    assert [plan.sends for plan in cut.stages] == [((x, 1),), ((y, 2),), ()]


def test_residuals_at_the_top_level_send_one_hidden_state_an_edge() -> None:
    #   h0 ─┬─► f1 ─(+)─┬─► f2 ─(+)─┬─► … 24 layers on 4 stages
    #       └─────┘     └─────┘
    sketch = Sketch()
    h = sketch.call("embed")
    stages = {"embed": 0}
    for layer in range(24):
        f = sketch.call(f"f{layer}", h)
        h = sketch.op("add", h, f)
        stages[f"f{layer}"] = layer // 6

    cut = sketch.cut(h, stages, 4)

    assert {edge: count for edge, count in cut.edge_bytes.items()} == {(0, 1): 100, (1, 2): 100, (2, 3): 100}
    assert all(sketch.nodes[sketch.values[value].node].name == "add" for value, _, _ in crossing(cut))


def test_a_small_result_of_glue_crosses_instead_of_its_large_input() -> None:
    sketch = Sketch()
    large = sketch.call("a", nbytes=1000)
    small = sketch.op("mean", large, nbytes=8)
    out = sketch.call("b", small)

    assert crossing(sketch.cut(out, {"a": 0, "b": 1}, 2)) == [(small, 0, 1)]


def test_a_large_result_of_glue_is_computed_where_it_is_needed() -> None:
    sketch = Sketch()
    small = sketch.call("a", nbytes=8)
    large = sketch.op("expand", small, nbytes=1000)
    out = sketch.call("b", large)

    cut = sketch.cut(out, {"a": 0, "b": 1}, 2)

    assert crossing(cut) == [(small, 0, 1)]
    assert 1 in cut.stages[1].computes


def test_what_comes_from_the_batch_alone_never_crosses() -> None:
    sketch = Sketch()
    mask = sketch.op("mask", nbytes=10_000)
    x = sketch.call("a", mask)
    y = sketch.call("b", x, mask)

    cut = sketch.cut(y, {"a": 0, "b": 1}, 2)

    assert crossing(cut) == [(x, 0, 1)]
    assert all(0 in plan.computes for plan in cut.stages)


def test_two_towers_meet_without_a_chain() -> None:
    #   vision ─┐
    #           ├─► fuse        the towers do not wait for each other
    #   text ───┘
    sketch = Sketch()
    vision = sketch.call("vision")
    text = sketch.call("text")
    fused = sketch.call("fuse", vision, text)

    cut = sketch.cut(fused, {"vision": 0, "text": 1, "fuse": 2}, 3)

    assert cut.edges == ((0, 2), (1, 2))


def test_a_skip_connection_goes_straight_to_its_reader() -> None:
    sketch = Sketch()
    a = sketch.call("a")
    b = sketch.call("b", a)
    c = sketch.call("c", b, a)

    assert crossing(sketch.cut(c, {"a": 0, "b": 1, "c": 2}, 3)) == [(a, 0, 1), (a, 0, 2), (b, 1, 2)]


def test_every_call_has_a_stage_and_every_stage_a_call() -> None:
    sketch = Sketch()
    y = sketch.call("b", sketch.call("a"))

    with pytest.raises(LayoutError, match=r"b#0 has stage 5; give it one of 0..1"):
        sketch.cut(y, {"a": 0, "b": 5}, 2)
    with pytest.raises(LayoutError, match=r"stages \[1, 2\] of 3 have none of the 2 calls"):
        sketch.cut(y, {"a": 0, "b": 0}, 3)


def test_stages_in_a_circle_are_refused_by_name() -> None:
    sketch = Sketch()
    a = sketch.call("a")
    b = sketch.call("b", a)
    c = sketch.call("c", b)

    with pytest.raises(LayoutError, match=re.escape("stage 0 needs stage 1 (c#0 reads b#0)")):
        sketch.cut(c, {"a": 0, "b": 1, "c": 0}, 2)


def test_a_value_that_may_not_cross_keeps_its_calls_together() -> None:
    sketch = Sketch()
    a = sketch.call("a", crossable=False)
    b = sketch.call("b", a)

    with pytest.raises(LayoutError, match=r"stage 1 cannot get what b#0 reads: a#0 comes from stages \[0\]"):
        sketch.cut(b, {"a": 0, "b": 1}, 2)


def test_an_uncrossable_sum_is_made_of_what_may_cross() -> None:
    sketch = Sketch()
    a = sketch.call("a")
    b = sketch.call("b", a)
    total = sketch.op("add_", a, b, crossable=False)
    c = sketch.call("c", total)

    assert crossing(sketch.cut(c, {"a": 0, "b": 0, "c": 1}, 2)) == [(a, 0, 1), (b, 0, 1)]


def test_what_python_looks_at_is_needed_by_every_stage_that_passes() -> None:
    sketch = Sketch()
    mask = sketch.op("mask")
    sketch.look(mask)
    b = sketch.call("b", sketch.call("a"))

    cut = sketch.cut(b, {"a": 0, "b": 1}, 2)

    assert all({0, 1} <= plan.computes for plan in cut.stages)


def test_a_look_at_a_unit_of_a_later_stage_is_refused() -> None:
    sketch = Sketch()
    a = sketch.call("a")
    scores = sketch.call("scores", a)
    sketch.look(scores)
    b = sketch.call("b", a)

    with pytest.raises(LayoutError, match="any"):
        sketch.cut(b, {"a": 0, "scores": 1, "b": 0}, 2)
