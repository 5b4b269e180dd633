"""A deferred model has the values of its seed and names, whoever asks for which, and no memory before."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch._dynamo  # sets a variable of the environment when it is first imported, which a test must not
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrizations

from shardwise.errors import ModelError
from shardwise.trace.deferred import Blueprint, defer, place


def module_of(**tensors: Callable[[], object]) -> Callable[[], nn.Module]:
    """A factory of a module with these attributes, made in this order."""

    def build() -> nn.Module:
        module = nn.Module()
        for name, make in tensors.items():
            setattr(module, name, make())
        return module

    return build


class HandWritten(nn.Module):
    """Initialises in __init__, in all the ways that people write."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 10)
        self.copied = nn.Linear(20, 10, bias=False)
        self.first.weight.data.normal_(0, 0.02)
        self.copied.weight.data.copy_(self.first.weight.data)
        self.tied = nn.Linear(20, 10, bias=False)
        self.tied.weight = self.copied.weight
        self.small = nn.Parameter(torch.randn(300) * 0.02)
        self.small.no_weight_decay = True  # type: ignore[attr-defined]
        self.frozen = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)
        self.orthogonal = nn.Parameter(torch.empty(6, 4))
        nn.init.orthogonal_(self.orthogonal)
        self.truncated = nn.Parameter(torch.empty(80, 80))
        nn.init.trunc_normal_(self.truncated, std=0.02, a=-0.03, b=0.03)
        self.identity = nn.Parameter(torch.empty(3, 3))
        nn.init.eye_(self.identity)
        self.sparse = nn.Parameter(torch.empty(20, 20))
        nn.init.sparse_(self.sparse, 0.5)
        self.spectral = parametrizations.spectral_norm(nn.Linear(5, 4))
        self.weight_norm = parametrizations.weight_norm(nn.Linear(5, 4))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
        self.embedding = nn.Embedding(7, 3, padding_idx=0)
        self.low = nn.Linear(3, 3).to(torch.bfloat16)
        self.drop_rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
        self.table = torch.arange(4) * 2  # a plain attribute
        self.kept = {"also small": self.small, "ones": torch.ones(2)}
        self.register_buffer("positions", torch.arange(10))
        self.register_buffer("scales", torch.tensor([1.0, 0.5]))
        self.register_buffer("steps", torch.linspace(0, 1, 5), persistent=False)


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    return defer(HandWritten, seed=3)


def values_of(factory: Callable[[], nn.Module], seed: int = 3) -> dict[str, Tensor]:
    blueprint = defer(factory, seed=seed)
    assert blueprint.deferred, blueprint.reason
    return blueprint.materialize(list(blueprint.canonical))


def test_nothing_is_allocated_before_values_are_asked_for(blueprint: Blueprint) -> None:
    assert blueprint.deferred, blueprint.reason
    tensors = [*blueprint.module.parameters(), *blueprint.module.buffers()]
    assert all(isinstance(tensor, FakeTensor) for tensor in tensors)
    assert all(isinstance(parameter, nn.Parameter) for parameter in blueprint.module.parameters())


def test_the_deferred_model_is_the_model_but_for_its_values(blueprint: Blueprint) -> None:
    model = HandWritten()
    described = {name: (p.shape, p.dtype, p.stride(), p.requires_grad) for name, p in model.named_parameters()}
    assert described == {
        name: (p.shape, p.dtype, p.stride(), p.requires_grad) for name, p in blueprint.module.named_parameters()
    }
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in blueprint.module.named_buffers()]
    assert set(model.state_dict()) == set(blueprint.module.state_dict())


def test_a_tensor_alone_equals_the_same_among_all(blueprint: Blueprint) -> None:
    together = blueprint.materialize(list(blueprint.canonical))
    again = defer(HandWritten, seed=3)
    for name, value in together.items():
        assert torch.equal(again.materialize([name])[name], value), name


def test_another_seed_makes_other_values() -> None:
    first, second = values_of(HandWritten, 3), values_of(HandWritten, 4)
    for name in ("first.weight", "small", "truncated", "orthogonal", "encoder.layers.0.linear1.weight"):
        assert not torch.equal(first[name], second[name]), name


def test_what_is_not_random_has_the_values_of_a_plain_build(blueprint: Blueprint) -> None:
    plain, made = HandWritten(), blueprint.materialize(["positions", "scales", "steps", "identity", "frozen"])
    for name, value in made.items():
        assert torch.equal(value, getattr(plain, name)), name


def test_initialisers_keep_their_statistics_and_promises(blueprint: Blueprint) -> None:
    values = blueprint.materialize(list(blueprint.canonical))
    assert float(values["small"].std()) == pytest.approx(0.02, rel=0.15)  # 300 values: 3.7 standard errors
    assert float(values["first.weight"].std()) == pytest.approx(0.02, rel=0.2)  # 200 values
    assert float(values["encoder.layers.1.linear1.weight"].abs().max()) <= 1 / 8**0.5  # uniform, 1/sqrt(fan in)
    assert float(values["truncated"].abs().max()) <= 0.03
    assert float(values["truncated"].std()) == pytest.approx(0.0149, rel=0.05)  # normal cut at 1.5 sigma
    torch.testing.assert_close(values["orthogonal"].T @ values["orthogonal"], torch.eye(4))
    assert (values["sparse"] == 0).sum(0).tolist() == [10] * 20
    assert values["embedding.weight"][0].tolist() == [0, 0, 0]
    assert values["low.weight"].dtype == torch.bfloat16
    norm = values["weight_norm.parametrizations.weight.original1"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(values["weight_norm.parametrizations.weight.original0"], norm)


def test_a_copied_weight_equals_what_it_was_copied_from() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.copy, self.source = nn.Linear(3, 3), nn.Linear(3, 3)
            self.copy.weight.data.copy_(self.source.weight.data)
            self.layers = nn.ModuleList(copy.deepcopy(self.source) for _ in range(2))

    values = values_of(Twins)
    assert torch.equal(values["copy.weight"], values["source.weight"])
    assert torch.equal(values["layers.1.weight"], values["source.weight"])
    assert not torch.equal(values["copy.bias"], values["source.bias"])


def test_a_copy_keeps_what_was_there_before_its_source_was_drawn_again() -> None:
    values = values_of(HandWritten)
    # first.weight is N(0, 0.02) now; the copy was made after that draw.
    assert torch.equal(values["copied.weight"], values["first.weight"])

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.now = nn.Parameter(torch.zeros(4))
            self.then = nn.Parameter(torch.empty(4))
            self.then.data.copy_(self.now.data)
            self.now.data.add_(1)
            self.now.data[1:3].mul_(5)

    values = values_of(Before)
    assert values["then"].tolist() == [0, 0, 0, 0]
    assert values["now"].tolist() == [1, 5, 5, 1]


def test_tied_parameters_have_one_value_under_each_name(blueprint: Blueprint) -> None:
    values = blueprint.materialize(["tied.weight", "copied.weight"])
    assert values["tied.weight"] is values["copied.weight"]
    assert blueprint.canonical["tied.weight"] == "copied.weight"


def test_a_placed_model_trains_and_keeps_ties_and_attributes() -> None:
    blueprint = defer(HandWritten, seed=3)
    model = blueprint.module
    place(model, blueprint.materialize([name for name in blueprint.canonical if name != "tied.weight"]))
    assert isinstance(model.small, nn.Parameter)
    assert model.small.no_weight_decay
    assert model.kept["also small"] is model.small
    assert model.tied.weight is model.copied.weight
    assert not model.frozen.requires_grad
    loss = model.encoder(torch.ones(3, 2, 8)).square().mean() + model.spectral(torch.ones(2, 5)).sum()
    (loss + model.tied(model.first(torch.ones(20)).repeat(2)).sum()).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.copied.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.copied.weight, before)


def test_plain_attributes_have_their_values_at_once(blueprint: Blueprint) -> None:
    module = blueprint.module
    assert module.table.tolist() == [0, 2, 4, 6]
    assert module.kept["ones"].tolist() == [1, 1]
    assert module.drop_rates == pytest.approx([0, 0.05, 0.1])
    assert not isinstance(module.table, FakeTensor)


def test_looking_at_a_drawn_value_sees_the_value_that_it_will_have() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))
            self.seen = [
                self.weight[0].item(),
                *self.weight.detach().numpy()[1:3].tolist(),
                self.weight.tolist()[3],
            ]
            self.chosen = nn.Parameter(self.weight.detach()[self.weight > self.weight.mean()].clone())

    blueprint = defer(Looks, seed=1)
    values = blueprint.materialize(["weight", "chosen"])
    assert blueprint.deferred
    assert blueprint.module.seen == values["weight"].tolist()
    weight = values["weight"]
    assert torch.equal(values["chosen"], weight[weight > weight.mean()])


def test_draws_of_python_and_numpy_follow_the_seed_and_disturb_nobody() -> None:
    build = module_of(
        a=lambda: nn.Parameter(torch.tensor([random.random()])),
        b=lambda: nn.Parameter(torch.from_numpy(np.random.rand(3))),
    )
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first, second = values_of(build), values_of(build)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert all(torch.equal(first[name], second[name]) for name in "ab")
    assert not torch.equal(first["b"], values_of(build, 4)["b"])


def test_a_generator_of_the_factory_is_followed_exactly() -> None:
    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(5)
        module = nn.Module()
        module.a = nn.Parameter(torch.empty(3).normal_(generator=generator))
        module.b = nn.Parameter(torch.empty(3).exponential_(generator=generator))
        module.c = nn.Parameter(nn.init.trunc_normal_(torch.empty(3), generator=generator))
        return module

    values, plain = values_of(build), build()
    assert all(torch.equal(value, getattr(plain, name)) for name, value in values.items())


def test_the_default_dtype_of_the_build_is_kept() -> None:
    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return nn.Linear(2, 2)
        finally:
            torch.set_default_dtype(before)

    assert values_of(build)["weight"].dtype == torch.float64


def test_memory_that_is_never_written_is_zero() -> None:
    assert values_of(module_of(a=lambda: nn.Parameter(torch.empty(3))))["a"].tolist() == [0, 0, 0]


def test_parameters_made_outside_of_torchs_ops_keep_their_values() -> None:
    given = torch.tensor([1.0, 2.0])
    values = values_of(module_of(a=lambda: nn.Parameter(given), b=lambda: nn.Parameter(given * 2)))
    assert values["a"].tolist() == [1, 2]
    assert values["b"].tolist() == [2, 4]
    assert values["a"].data_ptr() != given.data_ptr()


def test_a_build_that_cannot_be_recorded_is_made_for_real_and_says_so() -> None:
    def build() -> nn.Module:
        module = nn.Module()
        module.indices = nn.Buffer(torch.eye(3).to_sparse().coalesce().indices())
        module.weight = nn.Parameter(torch.randn(5))
        module.tied = module.weight
        return module

    blueprint, again = defer(build, seed=3), defer(build, seed=3)
    assert not blueprint.deferred
    assert blueprint.reason
    assert isinstance(blueprint.module.weight, FakeTensor)
    values = blueprint.materialize(["weight", "indices", "tied"])
    assert torch.equal(values["weight"], again.materialize(["weight"])["weight"])
    assert not torch.equal(values["weight"], defer(build, seed=4).materialize(["weight"])["weight"])
    place(blueprint.module, values)
    assert blueprint.module.tied is blueprint.module.weight


def test_an_error_of_the_factory_is_the_callers() -> None:
    def build() -> nn.Module:
        raise KeyError("no such model")

    with pytest.raises(KeyError, match="no such model"):
        defer(build, seed=0)
    assert torch.nn.init.trunc_normal_(torch.empty(3)).shape == (3,)  # nothing of the recording is left behind


def test_unknown_names_and_meta_tensors_are_errors(blueprint: Blueprint) -> None:
    with pytest.raises(ModelError, match="no parameter or buffer 'nobody'"):
        blueprint.materialize(["nobody"])
    with pytest.raises(ModelError, match="nobody"):
        place(nn.Linear(2, 2), {"nobody": torch.ones(1)})
    on_meta = defer(module_of(a=lambda: nn.Parameter(torch.empty(2, device="meta"))), seed=0)
    with pytest.raises(ModelError, match="meta device"):
        on_meta.materialize(["a"])


def test_tied_names_take_one_tensor() -> None:
    model = HandWritten()
    one, other = torch.ones(10, 20), torch.zeros(10, 20)
    with pytest.raises(ModelError, match="tied"):
        place(model, {"copied.weight": one, "tied.weight": other})
    place(model, {"copied.weight": one, "tied.weight": one})
    assert model.tied.weight is model.copied.weight
    assert torch.equal(model.tied.weight, one)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fake tensors on CUDA need torch built with it")
def test_the_fake_model_stands_on_the_device_asked_for() -> None:
    blueprint = defer(lambda: nn.Linear(2, 2), seed=0, device="cuda:0")
    assert blueprint.deferred, blueprint.reason
    assert {parameter.device for parameter in blueprint.module.parameters()} == {torch.device("cuda:0")}


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HALVES = {
    f"{half}_{what}": n
    for half in ("encoder", "decoder")
    for what, n in {"layers": 1, "attention_heads": 4, "ffn_dim": 128}.items()
}
SEQ2SEQ = {"d_model": 64, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | HALVES
IMAGE = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
}
CONFIGS = {
    "llama": ("AutoModelForCausalLM", "LlamaConfig", SMALL),
    "gpt2": (
        "AutoModelForCausalLM",
        "GPT2Config",
        {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": ("AutoModelForMaskedLM", "BertConfig", SMALL),
    "albert": ("AutoModelForMaskedLM", "AlbertConfig", SMALL),
    "t5": (
        "AutoModelForSeq2SeqLM",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 512},
    ),
    "mixtral": ("AutoModelForCausalLM", "MixtralConfig", SMALL | {"num_local_experts": 4}),
    "mamba": (
        "AutoModelForCausalLM",
        "MambaConfig",
        {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 512},
    ),
    "bart": ("AutoModelForSeq2SeqLM", "BartConfig", SEQ2SEQ),
    "whisper": ("AutoModelForSpeechSeq2Seq", "WhisperConfig", SEQ2SEQ | {"decoder_start_token_id": 1}),
    "vit": ("AutoModelForImageClassification", "ViTConfig", IMAGE),
    "resnet": (
        "AutoModelForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
    ),
    "clip": ("AutoModel", "CLIPConfig", {"text_config": SMALL, "vision_config": IMAGE}),
}


def transformers_factory(name: str, **changed: object) -> Callable[[], nn.Module]:
    auto, config, values = CONFIGS[name]
    made = getattr(transformers, config)(**values, **changed)
    return lambda: getattr(transformers, auto).from_config(made)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_own_init_is_deferred(name: str) -> None:
    factory = transformers_factory(name)
    blueprint = defer(factory, seed=1)
    assert blueprint.deferred, blueprint.reason
    values = blueprint.materialize(list(blueprint.canonical))
    for alone in list(values)[::5]:
        assert torch.equal(blueprint.materialize([alone])[alone], values[alone]), alone
    torch.manual_seed(0)
    plain = factory()
    for tensor_name, buffer in plain.named_buffers():
        assert torch.equal(values[tensor_name], buffer), tensor_name
    for tensor_name, parameter in plain.named_parameters(remove_duplicate=False):
        value = values[tensor_name]
        assert (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
        ours, theirs = (
            float(value.float().std(correction=0)),
            float(parameter.detach().float().std(correction=0)),
        )
        assert (ours == 0) == (theirs == 0), tensor_name
        # Two samples of n values: their standard deviations differ by 1/sqrt(n), 5 of these and some more.
        assert ours == pytest.approx(theirs, rel=6 / value.numel() ** 0.5 + 0.01), tensor_name
    place(blueprint.module, values)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in blueprint.module.named_parameters()]  # ties


def test_initializer_range_is_the_standard_deviation() -> None:
    values = values_of(transformers_factory("llama", initializer_range=0.05))
    assert float(values["model.layers.0.mlp.up_proj.weight"].std()) == pytest.approx(0.05, rel=0.05)


def test_a_billion_parameters_are_deferred_without_memory_and_made_one_by_one() -> None:
    config = transformers.LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        intermediate_size=8192,
        vocab_size=32000,
    )
    before = psutil.Process().memory_info().rss
    blueprint = defer(lambda: transformers.AutoModelForCausalLM.from_config(config), seed=1)
    assert sum(parameter.numel() for parameter in blueprint.module.parameters()) > 1.0e9
    name = "model.layers.7.self_attn.q_proj.weight"
    value = blueprint.materialize([name])[name]
    assert float(value.std()) == pytest.approx(0.02, rel=0.01)
    assert psutil.Process().memory_info().rss - before < 100 * 2**20


def test_conversions_of_a_whole_model_are_recorded() -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        model.to_empty(device="cpu")
        model[0].weight.sharded = True
        model[0].reset_parameters()
        model[1].reset_parameters()
        return model.append(nn.utils.skip_init(nn.Linear, 3, 3)).to(torch.float64)

    blueprint = defer(build, seed=0)
    assert blueprint.deferred, blueprint.reason
    assert blueprint.module[0].weight.sharded
    values = blueprint.materialize(list(blueprint.canonical))
    assert values["0.weight"].dtype == torch.float64
    assert values["0.weight"].count_nonzero() == 9
    assert values["1.running_var"].tolist() == [1, 1, 1]
    assert values["2.weight"].tolist() == [[0, 0, 0]] * 3


def test_weights_loaded_in_the_factory_are_those_of_the_file(tmp_path: Path) -> None:
    saved = nn.Linear(3, 3)
    torch.save(saved.state_dict(), tmp_path / "weights.pt")

    def build() -> nn.Module:
        model = nn.Linear(3, 3)
        model.load_state_dict(torch.load(tmp_path / "weights.pt"))
        return model

    values = defer(build, seed=0).materialize(["weight", "bias"])
    assert torch.equal(values["weight"], saved.weight)
    assert torch.equal(values["bias"], saved.bias)
