"""What each stage computes, receives and sends: dataflows drawn by hand, cut in the fewest bytes."""

from __future__ import annotations

import dataclasses

import pytest

from shardwise.describe.flow import Dataflow, Node, NodeKind, Value
from shardwise.errors import LayoutError
from shardwise.plan.cut import Cut, cut_stages

CALL, OP, READ = NodeKind.CALL, NodeKind.OP, NodeKind.READ


class Drawing:
    """Writes a dataflow down line by line; every line makes one value and answers its number."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: list[Value] = []
        self.stages: dict[int, int] = {}

    def call(self, name: str, stage: int, *reads: int, nbytes: int = 4) -> int:
        self.stages[len(self.nodes)] = stage
        number = sum(node.name == name for node in self.nodes)
        return self._line(CALL, name, reads, nbytes, call=number, parameters=(f"{name}.weight",))

    def op(self, name: str, *reads: int, nbytes: int = 4, parameters: tuple[str, ...] = ()) -> int:
        return self._line(OP, name, reads, nbytes, parameters=parameters)

    def look(self, *reads: int) -> None:
        self.nodes.append(Node(index=len(self.nodes), kind=READ, name="__bool__", reads=reads))

    def must_not_cross(self, value: int) -> None:
        self.values[value] = dataclasses.replace(self.values[value], crossable=False)

    def _line(
        self,
        kind: NodeKind,
        name: str,
        reads: tuple[int, ...],
        nbytes: int,
        call: int = 0,
        parameters: tuple[str, ...] = (),
    ) -> int:
        index, value = len(self.nodes), len(self.values)
        self.nodes.append(
            Node(index=index, kind=kind, name=name, call=call, reads=reads, makes=(value,), parameters=parameters)
        )
        self.values.append(
            Value(
                index=value,
                node=index,
                leaf=0,
                shape=(nbytes // 4,),
                dtype="float32",
                nbytes=nbytes,
                requires_grad=True,
            )
        )
        return value

    def flow(self, *results: int) -> Dataflow:
        return Dataflow(nodes=tuple(self.nodes), values=tuple(self.values), results=results)

    def cut(self, *results: int) -> Cut:
        return cut_stages(self.flow(*results), self.stages, max(self.stages.values()) + 1)

    def crossing(self, cut: Cut) -> dict[tuple[int, int], list[str]]:
        """(from stage, to stage) -> names of what crosses."""
        found: dict[tuple[int, int], list[str]] = {}
        for stage in cut.stages:
            for value, source in stage.receives:
                found.setdefault((source, stage.stage), []).append(self.nodes[self.values[value].node].label)
        return found


def test_a_row_sends_what_the_next_stage_reads() -> None:
    # a ─► b │ c ─► loss
    draw = Drawing()
    b = draw.call("b", 0, draw.call("a", 0))
    loss = draw.op("loss", draw.call("c", 1, b))
    cut = draw.cut(loss)
    assert draw.crossing(cut) == {(0, 1): ["b#0"]}
    assert cut.stages[0].sends == ((b, 1),)
    assert (cut.edges, cut.loss_stage, cut.order) == (((0, 1),), 1, (0, 1))
    assert cut.stages[0].last_node == 1  # the forward is left after b
    assert [sorted(stage.parameters) for stage in cut.stages] == [["a.weight", "b.weight"], ["c.weight"]]


def test_24_layers_with_residuals_in_the_top_level_send_one_hidden_state_an_edge() -> None:
    # x ─┬► layer ─► + ─┬► layer ─► + ─► …        the sum crosses, not its 1 + 6 k terms
    #    └───────────┘  └───────────┘
    draw = Drawing()
    x = draw.call("embed", 0, nbytes=4096)
    for number in range(24):
        x = draw.op("add", x, draw.call(f"layers.{number}", number // 6, x, nbytes=4096), nbytes=4096)
    cut = draw.cut(draw.op("loss", x))
    assert cut.edge_bytes == {(0, 1): 4096, (1, 2): 4096, (2, 3): 4096}
    assert draw.crossing(cut) == {(0, 1): ["op 12 add"], (1, 2): ["op 24 add"], (2, 3): ["op 36 add"]}


def test_towers_that_meet_are_a_graph_of_stages() -> None:
    # image 0 ─────────┐
    #                  ├─► head 2 ─► loss
    # words 1 ─────────┘
    draw = Drawing()
    image, words = draw.call("image", 0), draw.call("words", 1)
    cut = draw.cut(draw.op("loss", draw.call("head", 2, image, words)))
    assert draw.crossing(cut) == {(0, 2): ["image#0"], (1, 2): ["words#0"]}
    assert cut.edges == ((0, 2), (1, 2))


def test_a_value_that_several_stages_read_goes_to_each_of_them() -> None:
    # encoder 0 ─┬► decoder.0 1 ─► decoder.1 2
    #            └───────────────────►┘
    draw = Drawing()
    memory = draw.call("encoder", 0)
    last = draw.call("decoder.1", 2, draw.call("decoder.0", 1, memory), memory)
    cut = draw.cut(draw.op("loss", last))
    assert draw.crossing(cut) == {(0, 1): ["encoder#0"], (0, 2): ["encoder#0"], (1, 2): ["decoder.0#0"]}
    assert cut.stages[0].sends == ((memory, 1), (memory, 2))


def test_stages_that_need_each_other_are_refused() -> None:
    # a 0 ─► b 1 ─► c 0
    draw = Drawing()
    c = draw.call("c", 0, draw.call("b", 1, draw.call("a", 0)))
    with pytest.raises(LayoutError, match="in a circle: .*stage 1 needs stage 0 .b#0 reads a#0"):
        draw.cut(draw.op("loss", c))


def test_of_two_places_to_cut_the_smaller_value_crosses() -> None:
    # a (4 kB) ─► mean (4 B) │─► b         or        a (4 B) │─► expand (4 kB) ─► b
    draw = Drawing()
    small = draw.op("mean", draw.call("a", 0, nbytes=4096), nbytes=4)
    cut = draw.cut(draw.op("loss", draw.call("b", 1, small)))
    assert draw.crossing(cut) == {(0, 1): ["op 1 mean"]}
    draw = Drawing()
    large = draw.op("expand", draw.call("a", 0, nbytes=4), nbytes=4096)
    cut = draw.cut(draw.op("loss", draw.call("b", 1, large)))
    assert draw.crossing(cut) == {(0, 1): ["a#0"]}
    assert 1 in cut.stages[1].computes  # the expansion is made where it is read
    assert 1 not in cut.stages[0].computes


def test_what_comes_from_the_batch_alone_is_computed_on_every_stage() -> None:
    # arange ─► cos ─┬► a │ b       a rotary table
    #                └────►┘
    draw = Drawing()
    table = draw.op("cos", draw.op("arange"), nbytes=4096)
    a = draw.call("a", 0, table)
    cut = draw.cut(draw.op("loss", draw.call("b", 1, a, table)))
    assert draw.crossing(cut) == {(0, 1): ["a#0"]}
    assert all({0, 1} <= stage.computes for stage in cut.stages)


def test_what_may_not_cross_is_made_again_from_what_may() -> None:
    # a ─► view ─► b        the view is written in place, a may cross
    draw = Drawing()
    view = draw.op("view", draw.call("a", 0), nbytes=4)
    draw.must_not_cross(view)
    cut = draw.cut(draw.op("loss", draw.call("b", 1, view)))
    assert draw.crossing(cut) == {(0, 1): ["a#0"]}


def test_where_nothing_may_cross_the_stages_are_refused() -> None:
    draw = Drawing()
    a = draw.call("a", 0)
    draw.must_not_cross(a)
    with pytest.raises(LayoutError, match="stage 1 cannot get what b#0 reads: a#0 comes from stages .0."):
        draw.cut(draw.op("loss", draw.call("b", 1, a)))


def test_a_parameter_used_in_the_glue_is_read_where_the_glue_runs() -> None:
    # a 0 ─► scale(gain) ─► b 1 ─► scale(gain)
    draw = Drawing()
    b = draw.call("b", 1, draw.op("mul", draw.call("a", 0, nbytes=4096), nbytes=4096, parameters=("gain",)))
    cut = draw.cut(draw.op("loss", b, parameters=("gain",)))
    assert "gain" in cut.stages[1].parameters
    assert sum("gain" in stage.parameters for stage in cut.stages) >= 1
    assert cut.edge_bytes == {(0, 1): 4096}


def test_python_looks_at_what_every_stage_that_passes_by_can_have() -> None:
    # mask ─► any? ─► a 0 │ b 1
    draw = Drawing()
    mask = draw.op("mask")
    draw.look(mask)
    cut = draw.cut(draw.op("loss", draw.call("b", 1, draw.call("a", 0))))
    assert all({0, 1} <= stage.computes for stage in cut.stages)


def test_python_must_not_look_at_what_only_a_later_stage_has() -> None:
    # b 1 ─► any? ─► a 0          stage 0 passes the question before it is answered
    draw = Drawing()
    b = draw.call("b", 1)
    draw.look(b)
    a = draw.call("a", 0)
    with pytest.raises(LayoutError):
        draw.cut(draw.op("loss", a, b))


def test_every_call_has_a_stage_and_every_stage_a_call() -> None:
    draw = Drawing()
    loss = draw.op("loss", draw.call("a", 0))
    with pytest.raises(LayoutError, match="a#0 has stage None; give it one of 0..0"):
        cut_stages(draw.flow(loss), {}, 1)
    with pytest.raises(LayoutError, match="stages .1. of 2 have none of the 1 calls; use at most 1"):
        cut_stages(draw.flow(loss), {0: 0}, 2)
    assert cut_stages(draw.flow(loss), {0: 0}, 2, idle=True).stages[1].calls == ()


def test_the_loss_is_computed_where_its_last_term_is() -> None:
    # a 0 ─┬► b 1 ─► + ─► loss
    #      └──────────┘
    draw = Drawing()
    a = draw.call("a", 0, nbytes=4096)
    total = draw.op("add", draw.op("mean", a), draw.call("b", 1, a))
    cut = draw.cut(total)
    assert cut.loss_stage == 1
    assert cut.stages[1].last_node == len(draw.nodes)
    assert cut.edge_bytes == {(0, 1): 4096}  # a crosses anyway, so its mean is made here
