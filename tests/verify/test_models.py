"""Models of many architectures, cut into stages, have the gradients of the whole model.

1e-5 is what float32 leaves of sums taken in another order over some tens of layers.
"""

from __future__ import annotations

import pytest
import torch
from models import MODELS, make

from one_process import run_whole, traced, worst_error
from shardwise.launch import RankStarter
from shardwise.verify import verify

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_two_and_three_stages_without_dropout_are_the_model(name: str) -> None:
    example = make(name)
    example.model.eval()
    trace = traced(example)
    assert not trace.tape.random
    wanted, wanted_gradients = run_whole(example)
    for num_stages in (2, 3):
        loss, gradients = trace.run(trace.cut(num_stages))
        assert loss == pytest.approx(wanted, rel=TOLERANCE)
        assert worst_error(gradients, wanted_gradients) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_three_stages_draw_the_dropout_of_one_stage(name: str) -> None:
    example = make(name)
    trace = traced(example)
    loss, gradients = trace.run(trace.cut(3))
    wanted, wanted_gradients = trace.run(trace.cut(1)) if trace.tape.random else run_whole(example)
    assert loss == pytest.approx(wanted, rel=TOLERANCE)
    assert worst_error(gradients, wanted_gradients) <= TOLERANCE


def test_a_row_of_decoder_layers_sends_its_hidden_state_and_no_rotary_tables() -> None:
    trace = traced(make("llama"))
    batch, tokens = trace.example.batch["input_ids"].shape
    hidden_bytes = batch * tokens * 32 * 4
    assert trace.cut(3).edge_bytes == {(0, 1): hidden_bytes, (1, 2): hidden_bytes}


@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_shared_layer_is_called_on_every_stage(num_stages: int) -> None:
    trace = traced(make("albert"))
    nodes = trace.tape.flow.nodes
    cut = trace.cut(num_stages)
    shared = [sum("albert_layer_groups" in nodes[call].name for call in stage.calls) for stage in cut.stages]
    assert sum(shared) == 12
    assert max(shared) <= 1.3 * 12 / num_stages


def test_the_router_loss_of_every_layer_reaches_the_loss() -> None:
    trace = traced(make("mixtral"))
    assert sum(len(record.extras) for record in trace.tape.records) == 4
    _, gradients = trace.run(trace.cut(3))
    trace.example.model.router_aux_loss_coef = 0.0
    _, without = run_whole(trace.example)
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(gradients[gate], without[gate], rtol=1e-3)


def test_an_action_expert_stands_where_the_cache_is_filled_that_it_reads() -> None:
    trace = traced(make("pi0"))
    nodes = trace.tape.flow.nodes
    cut = trace.cut(3)
    (together,) = (stage for stage in cut.stages if any("dit.layers" in nodes[call].name for call in stage.calls))
    names = [nodes[call].name for call in together.calls]
    assert sum("language_model.layers" in name or "dit.layers" in name for name in names) == 8
    loss, gradients = trace.run(cut)
    wanted, wanted_gradients = run_whole(trace.example)
    assert loss == pytest.approx(wanted, rel=TOLERANCE)
    assert worst_error(gradients, wanted_gradients) <= TOLERANCE


@pytest.mark.parametrize("name, layout", [("bert", "dp=2,pp=2"), ("t5", "pp=2"), ("clip", "pp=2"), ("unet", "pp=3")])
def test_real_ranks_are_one_device(name: str, layout: str, starter: RankStarter) -> None:
    example = make(name)
    comparison = verify(example.model, example.batch, layout=layout, loss=example.loss, starter=starter, timeout_s=60)
    assert comparison.equal, str(comparison)
    assert comparison.gradient_error <= TOLERANCE
    assert comparison.edges


@pytest.mark.parametrize(
    "layout",
    [
        "tp=4",
        pytest.param("tp=2,pp=2", marks=pytest.mark.slow),
        pytest.param("tp=2,dp=2", marks=pytest.mark.slow),
        "tp=2,dp=2,pp=2",
        "tp=2,pp=2,sequence_parallel=on",
    ],
)
def test_a_llama_divided_in_every_way_is_one_device(layout: str, starter: RankStarter) -> None:
    example = make("llama")
    comparison = verify(example.model, example.batch, layout=layout, loss=example.loss, starter=starter, timeout_s=90)
    assert comparison.equal, str(comparison)
    assert comparison.tensor is not None
    assert comparison.tensor.sharded_share == 1.0
