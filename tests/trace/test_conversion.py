"""Units that convert a module of theirs while they run (`self.router = self.router.to(float32)`)."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from models import Example

import awkward_models as awkward
from one_process import run_whole, traced, worst_error
from shardwise.trace.capture import capture

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
BATCH = (torch.linspace(-2, 2, 8 * awkward.WIDTH).sin().view(8, awkward.WIDTH),)


class Converting(awkward.Layer):
    """Computes its norm in a type of its own."""

    to_dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm = self.norm.to(self.to_dtype)
        return x + torch.tanh(self.linear(self.norm(x.to(self.to_dtype)).to(x.dtype)))


class Converts(awkward.Awkward):
    layer = Converting


class ConvertsForReal(awkward.Awkward):
    class layer(Converting):  # noqa: N801
        to_dtype = torch.float64


def switch_transformers() -> nn.Module:
    """An encoder and a decoder of two layers, one of each with four experts; routers compute in float32."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
    experts = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(
        vocab_size=97, decoder_start_token_id=0, dropout_rate=0.0, router_jitter_noise=0.0, **sizes, **experts
    )
    torch.manual_seed(0)
    return transformers.SwitchTransformersForConditionalGeneration(config).train()


@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_that_convert_to_the_type_they_have_are_the_model(num_stages: int) -> None:
    trace = traced(Example(model=Converts(), batch=BATCH))
    wanted, wanted_gradients = run_whole(trace.example)
    loss, gradients = trace.run(trace.cut(num_stages))
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert worst_error(gradients, wanted_gradients) <= 1e-5


def test_a_recording_converts_no_parameter_of_the_model() -> None:
    model = ConvertsForReal()
    before = dict(model.named_parameters())
    flow = capture(model, (torch.ones(8, awkward.WIDTH),)).tape.flow
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "layers.0.norm.weight" in flow.nodes[0].parameters


def test_switch_transformers_on_two_stages_is_switch_transformers() -> None:
    tokens = torch.randint(3, 95, (8, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens.clone(), "output_router_logits": True}
    trace = traced(Example(model=switch_transformers(), batch=batch))
    wanted, wanted_gradients = run_whole(trace.example)
    loss, gradients = trace.run(trace.cut(2))
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert worst_error(gradients, wanted_gradients) <= 1e-5
    assert any("router.classifier" in name for name, g in gradients.items() if g is not None)
