"""A transformers config alone is enough for a profile, of any size, in seconds and without memory."""

from __future__ import annotations

import json
import resource

import pytest
import torch

from shardwise.errors import ConfigError, ModelError
from shardwise.layout import Layout
from shardwise.plan.cut import cut_stages
from shardwise.plan.estimate import estimate
from shardwise.plan.partition import place
from shardwise.trace.model_config import empty_model, read_config, synthetic_batch, trace_config

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTRAL = {"model_type": "mixtral", **SMALL, "num_key_value_heads": 2, "num_local_experts": 4}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize(
    "config, model_class",
    [
        ({"model_type": "llama", **SMALL, "vocab_size": 99}, "LlamaForCausalLM"),
        ({"model_type": "bert", **SMALL, "vocab_size": 99}, "BertForMaskedLM"),
        ({"model_type": "vit", **SMALL, "image_size": 32, "patch_size": 8}, "ViTForImageClassification"),
        (MIXTRAL, "MixtralForCausalLM"),
        (T5, "T5ForConditionalGeneration"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_becomes_a_profile(config, model_class) -> None:
    profile = trace_config(config, sequence_length=8)
    assert profile.model_class == model_class
    assert profile.backward_flops > profile.forward_flops > 0
    assert profile.saved_bytes > 0


def test_the_architecture_that_a_config_names_goes_first() -> None:
    config = {"model_type": "llama", **SMALL, "architectures": ["LlamaForSequenceClassification"]}
    assert type(empty_model(read_config(config))).__name__ == "LlamaForSequenceClassification"


def test_buffers_are_those_of_the_model_and_real() -> None:
    config = transformers.LlamaConfig(**SMALL, vocab_size=99)
    want = dict(transformers.LlamaForCausalLM(config).named_buffers())
    made = dict(empty_model(config).named_buffers())
    assert made.keys() == want.keys()
    assert all(torch.equal(made[name], want[name]) for name in want)


def test_a_config_is_read_from_a_file(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SMALL}))
    assert read_config(path).hidden_size == 32


@pytest.mark.parametrize(
    "config, message",
    [
        ("no/such/file.json", "No such file"),
        ({"hidden_size": 3}, "model_type"),
        ({"model_type": "llamma"}, "says .llamma.; did you mean llama"),
    ],
    ids=["file", "type", "name"],
)
def test_a_config_that_cannot_be_read_is_refused(config, message) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(config)


def test_inputs_that_cannot_be_made_up_are_refused() -> None:
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SMALL, num_conv_pos_embedding_groups=2))
    with pytest.raises(ModelError, match=r"takes 'input_values'; use trace\(model, batch\)"):
        synthetic_batch(model, batch_size=1, sequence_length=8)


def test_a_model_far_larger_than_memory_is_traced_without_it() -> None:
    config = transformers.DeepseekV3Config(dtype="bfloat16", num_hidden_layers=5)  # two of them of experts
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    profile = trace_config(config)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # bytes
    assert profile.parameter_bytes > 40 * 2**30
    assert grown < 2**30
    tokens = 128
    active = profile.forward_flops / (2 * tokens)  # parameters that a token meets
    assert 3e9 < active < 5e9  # 256 experts are held, 8 and a shared one are met


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_the_calls_of_albert_are_spread_evenly(pp) -> None:
    config = {"model_type": "albert", "vocab_size": 2000, "hidden_size": 256, "num_attention_heads": 4}
    profile = trace_config({**config, "intermediate_size": 1024, "num_hidden_layers": 12})
    layout = Layout(pp=pp)
    stage_of = place(profile, layout)
    cut = cut_stages(profile.flow, stage_of, pp)
    found = estimate(profile, layout, cut, num_micro_batches=2 * pp, flops_per_s=1e9)
    layers = {stage_of[call.node] for call in profile.calls if "albert_layer" in call.unit}
    assert layers == set(range(pp))
    assert found.imbalance <= 1.3
