"""What a recording says of a forward: which node reads what, and what leaves a unit other than by its return value."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import awkward_models as awkward
from shardwise.describe.flow import NodeKind
from shardwise.errors import ModelError
from shardwise.trace.capture import capture
from shardwise.trace.tape import AtArgument, AtAttribute, AtHook, Tape


def tape_of(model: nn.Module) -> Tape:
    return capture(model, (torch.ones(8, awkward.WIDTH),)).tape


def arrows(tape: Tape) -> dict[str, list[str]]:
    """Node -> the nodes whose values it reads."""
    nodes, values = tape.flow.nodes, tape.flow.values
    return {node.label: [nodes[values[read].node].label for read in node.reads] for node in nodes}


def test_a_row_of_layers_is_a_row() -> None:
    tape = tape_of(awkward.Awkward())
    found = arrows(tape)
    assert [found[f"layers.{i}#0"] for i in range(4)] == [[], ["layers.0#0"], ["layers.1#0"], ["layers.2#0"]]
    assert [node.kind for node in tape.flow.nodes] == [NodeKind.CALL] * 4 + [NodeKind.OP] * 2
    assert tape.flow.nodes[0].parameters[0].startswith("layers.0.")


def test_a_layer_reads_the_last_write_into_its_input() -> None:
    found = arrows(tape_of(awkward.WritesInPlace()))
    assert found["layers.1#0"] == ["op 2 __iadd__"] or found["layers.1#0"] == ["op 2 add_"]


def test_a_unit_called_again_is_another_call() -> None:
    calls = [node.label for node in tape_of(awkward.CallsAgain()).flow.calls]
    assert calls[-4:] == ["layers.3#0", "layers.0#1", "layers.1#1", "layers.0#2"]


def test_an_autograd_function_of_the_glue_is_one_node() -> None:
    names = [node.name for node in tape_of(awkward.UsesAnAutogradFunction()).flow.nodes]
    assert names.count("Sign") == 4
    assert "sign" not in names


def test_a_mapped_function_of_the_glue_is_one_node_that_reads_what_it_closes_over() -> None:
    tape = tape_of(awkward.MapsOverSamples())
    mapped = [node for node in tape.flow.nodes if node.name == "vmapped"]
    assert len(mapped) == 4
    assert arrows(tape)[mapped[1].label] == ["op 2 vmapped", "layers.1#0", "op 4 mean"]


def test_numbers_of_a_tensor_that_are_tensors_are_read() -> None:
    found = arrows(tape_of(awkward.MakesATensorOfNumbers()))
    assert [reads for label, reads in found.items() if label.endswith(" tensor")] == [["op 1 max"]] * 4


def test_a_memo_of_the_model_is_empty_in_a_recording_and_after_it() -> None:
    model = awkward.RemembersATable()
    wanted = model(torch.ones(8, awkward.WIDTH))
    tape = tape_of(model)
    assert [node.name for node in tape.flow.nodes].count("arange") == 1
    assert len(tape.memos) == 1
    assert type(model.table(awkward.WIDTH)) is torch.Tensor
    assert torch.equal(model(torch.ones(8, awkward.WIDTH)), wanted)


def test_parameters_of_the_glue_and_views_of_them_are_read_by_their_node() -> None:
    tape = tape_of(awkward.ReadsParametersBetween())
    readers = {name: node.name for node in tape.flow.nodes if node.kind is NodeKind.OP for name in node.parameters}
    assert readers == {"gain": "expand", "layers.3.linear.bias": "add", "layers.0.linear.weight": "linear"}
    assert all("op 0 expand" in arrows(tape)[n.label] for n in tape.flow.nodes if n.name == "__getitem__")


@pytest.mark.parametrize(
    "kind, place",
    [(awkward.ReadsAttributes, AtAttribute), (awkward.FillsLists, AtArgument), (awkward.TakesWithHooks, AtHook)],
)
def test_what_leaves_a_unit_by_another_way_is_an_extra_output(kind: type[nn.Module], place: type) -> None:
    tape = tape_of(kind())
    extras = [where for record in tape.records for where in record.extras.values()]
    assert len(extras) >= 4
    assert all(isinstance(where, place) for where in extras)


def test_a_look_at_the_batch_is_recorded_with_what_was_seen() -> None:
    tape = tape_of(awkward.BranchesOnTheBatch())
    assert [seen for _, seen in tape.looks] == [(True,)] * 4


def test_a_unit_that_looks_at_its_own_values_is_run_for_real() -> None:
    tape = tape_of(awkward.LooksInsideUnits())
    assert [value.shape for value in tape.flow.values if tape.flow.nodes[value.node].kind is NodeKind.CALL] == [
        (8, 6)
    ] * 4


def test_a_recording_leaves_the_model_as_it_was() -> None:
    model = awkward.ReadsAttributes()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    tape_of(model)
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert [layer.penalty for layer in model.layers] == [None] * 4
    assert not any("forward" in vars(module) for module in model.modules())


class Writes(awkward.Awkward):
    """Keeps a count in a buffer between its layers."""

    def through(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1.0
        return super().through(x)


def test_a_buffer_that_glue_writes_is_noted() -> None:
    assert [r.buffers_written for r in tape_of(Writes()).records if r.buffers_written] == [("seen",)]


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(ModelError, match="a loss is needed: Linear returned .*Tensor without one"):
        capture(nn.Linear(6, 6), (torch.ones(8, 6),))


def test_nothing_stays_hooked_to_all_modules() -> None:
    tape_of(awkward.Awkward())
    assert not torch.nn.modules.module._has_any_global_hook()
