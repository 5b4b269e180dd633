"""A dataflow that forgets one read is noticed while running: it never gives a loss.

embed ─v0─► layers.0 ─v1─► layers.1 ─► …        delete any one arrow, cut again, run:
        └────── add ◄──────┘                    an error that names what is missing
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn as nn
from models import MODELS, Example, make

import awkward_models as awkward
from one_process import Traced, traced, worst_error
from shardwise.errors import DataflowError, LayoutError
from shardwise.plan.cut import cut_stages


def edges(trace: Traced) -> list[tuple[int, int]]:
    """(node, value it reads), of all nodes that some stage computes."""
    cut = trace.cut(2)
    computed = set().union(*(stage.computes for stage in cut.stages))
    return [(node.index, read) for node in trace.tape.flow.nodes if node.index in computed for read in node.reads]


def silent(trace: Traced, node: int, value: int, *, tolerance: float = -1.0) -> bool:
    """Whether the stages answer gradients (that are off by more than `tolerance`) although `node` is not known to
    read `value`."""
    placed = {call: stage.stage for stage in trace.cut(2).stages for call in stage.calls}
    flow = trace.tape.flow.without_edge(node, value)
    mutant = dataclasses.replace(trace, tape=dataclasses.replace(trace.tape, flow=flow))
    try:
        _, gradients = mutant.run(cut_stages(flow, placed, 2, idle=True))
    except (DataflowError, LayoutError):
        return False
    finally:
        for parameter in trace.example.model.parameters():
            parameter.grad = None
    return tolerance < 0 or worst_error(gradients, trace.run(trace.cut(2))[1]) > tolerance


@pytest.mark.parametrize("name", MODELS)
def test_no_edge_can_be_forgotten_in_silence(name: str) -> None:
    trace = traced(make(name))
    all_edges = edges(trace)
    assert len(all_edges) >= 10
    unnoticed = [edge for edge in all_edges if silent(trace, *edge)]
    nodes, values = trace.tape.flow.nodes, trace.tape.flow.values
    assert [(nodes[node].label, nodes[values[value].node].label) for node, value in unnoticed] == []


@pytest.mark.parametrize("kind", awkward.ALL, ids=lambda kind: kind.__name__)
def test_an_edge_of_awkward_glue_is_missed_or_did_not_matter(kind: type[nn.Module]) -> None:
    batch = (torch.linspace(-2, 2, 8 * awkward.WIDTH).sin().view(8, awkward.WIDTH),)
    trace = traced(Example(model=kind(), batch=batch))
    assert [edge for edge in edges(trace) if silent(trace, *edge, tolerance=1e-6)] == []
