"""Where a run's model and its values come from: configs, factories, folders of safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shardwise.checkpoint.source import open_safetensors
from shardwise.errors import CheckpointError, ConfigError
from shardwise.tasks import ModelHead
from shardwise.trace.deferred import defer
from shardwise.train.build import Job, build_model
from shardwise.train.model import model_factory, names_in, values_of
from shardwise.train.run_file import run_from
from shardwise.train.run_tables import ModelOptions
from shardwise.train.saved_values import new_values_note

LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "vocab_size": 16}


class Tied(nn.Module):
    """A head tied to the embedding, inside a base model, with a persistent buffer."""

    base_model_prefix = "base"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.base = nn.ModuleDict({"embed": nn.Embedding(6, width), "norm": nn.BatchNorm1d(width)})
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.base["embed"].weight


@pytest.mark.parametrize("name_of_the_embedding", ["base.embed.weight", "head.weight", "embed.weight"])
def test_values_are_found_under_a_tied_name_and_without_the_prefix_of_the_base(tmp_path, name_of_the_embedding) -> None:
    wanted = torch.arange(24.0).reshape(6, 4)
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0])
    save_file({name_of_the_embedding: wanted, "norm.running_mean": mean}, tmp_path / "model.safetensors")
    model = defer(Tied, seed=0).module
    source = open_safetensors(tmp_path)
    values = values_of(source, model)
    assert torch.equal(values(["base.embed.weight"])["base.embed.weight"], wanted)
    assert names_in(source, model)["base.norm.running_mean"] == "norm.running_mean"
    with pytest.raises(CheckpointError, match=r"no base\.norm\.bias"):
        values(["base.norm.bias"])


def test_a_checkpoint_of_another_shape_is_refused(tmp_path) -> None:
    save_file({"base.embed.weight": torch.zeros(6, 5)}, tmp_path / "model.safetensors")
    values = values_of(open_safetensors(tmp_path), defer(Tied, seed=0).module)
    with pytest.raises(CheckpointError, match=r"saved shape \(6, 5\), but the model has \(6, 4\)"):
        values(["base.embed.weight"])


def test_a_local_folder_of_transformers_is_a_model_with_its_values(tmp_path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA | {"tie_word_embeddings": False}))
    made = model_factory(ModelOptions(path=str(tmp_path)))()
    assert made.training
    assert not made.config.use_cache
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    save_file({name: value.clone() for name, value in made.state_dict().items()}, tmp_path / "model.safetensors")
    run = run_from({"model": {"path": str(tmp_path)}, "training": {"steps": 1, "global_batch": 1}})
    model, values = build_model(Job(run=run, task_options={}))
    assert values is not None
    for name, value in made.state_dict().items():
        assert torch.equal(values([name])[name], value), name
    assert "LlamaForCausalLM" in type(model).__name__


BERT = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 16, "vocab_size": 16}
TAGS = ModelHead(family="AutoModelForTokenClassification", config={"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}})


def headless(folder: Path) -> nn.Module:
    """Writes a folder with the base of a small BERT; returns the model with a head that tags words."""
    (folder / "config.json").write_text(json.dumps(BERT))
    model = model_factory(ModelOptions(path=str(folder)), TAGS)()
    base = {
        name.removeprefix("bert."): p.detach() + 1 for name, p in model.named_parameters() if "classifier" not in name
    }
    save_file(base, folder / "model.safetensors")
    return model


def test_a_task_says_which_head_a_model_has_where_the_run_does_not(tmp_path) -> None:
    model = headless(tmp_path)
    assert type(model).__name__ == "BertForTokenClassification"
    assert model.get_parameter("classifier.weight").shape == (3, 8)
    written = model_factory(ModelOptions(config=BERT | {"num_labels": 5}), ModelHead(family=TAGS.family))()
    assert written.get_parameter("classifier.weight").shape == (5, 8)
    inputs = ModelHead(family="AutoModelForImageClassification", inputs={"num_channels": 1, "image_size": 8})
    small = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1]}
    config = model_factory(ModelOptions(config={"model_type": "resnet", **small}), inputs)().config
    assert config.num_channels == 1
    assert "image_size" not in vars(config)  # a ResNet takes any


def test_a_head_that_is_not_saved_has_initial_values_and_a_base_that_is_not_is_refused(tmp_path) -> None:
    model = headless(tmp_path)
    source, fresh = open_safetensors(tmp_path), defer(model_factory(ModelOptions(path=str(tmp_path)), TAGS), seed=5)
    values = values_of(source, fresh.module, fresh.materialize)
    assert values.new == ("classifier.weight", "classifier.bias")
    assert "classifier.weight, classifier.bias: not in there" in new_values_note(values, "there")
    assert torch.equal(
        values(["classifier.weight"])["classifier.weight"],
        fresh.materialize(["classifier.weight"])["classifier.weight"],
    )
    saved = model.get_parameter("bert.embeddings.LayerNorm.weight") + 1
    assert torch.equal(values(["bert.embeddings.LayerNorm.weight"])["bert.embeddings.LayerNorm.weight"], saved)
    assert new_values_note(values_of(source, model), "there") == ""
    with pytest.raises(CheckpointError, match=r"no classifier\.weight"):  # nobody asked for a new head
        values_of(source, model)(["classifier.weight"])
    part = {
        name: source_value
        for name, source_value in load_file(tmp_path / "model.safetensors").items()
        if "query" not in name
    }
    save_file(part, tmp_path / "model.safetensors")
    damaged = values_of(open_safetensors(tmp_path), fresh.module, fresh.materialize)
    assert damaged.new == ()
    with pytest.raises(CheckpointError, match=r"no bert\.encoder\.layer\.0\.attention\.self\.query"):
        damaged(["bert.encoder.layer.0.attention.self.query.weight"])


def test_a_folder_may_be_that_of_an_installed_package() -> None:
    found = ModelOptions(path="package:transformers/models/bert").path
    assert found is not None
    assert (Path(found) / "modeling_bert.py").is_file()
    with pytest.raises(ValueError, match="'no_such_package' is none; install it with pip"):
        ModelOptions(path="package:no_such_package/model")


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, "neither config nor path nor factory"),
        ({"factory": "nowhere.at.all:build"}, "nowhere"),
        ({"factory": "json:no_such"}, "no_such"),
        ({"factory": "json.decoder:NaN"}, "a factory is a function, but"),
        ({"config": LLAMA, "class": "LlamaConfig"}, "no model class 'LlamaConfig'"),
        ({"config": {"hidden_size": 3}}, "names its model_type"),
        ({"config": {"model_type": "vit"}}, "name the class"),
        ({"path": "no/such/folder"}, "config.json"),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_name(options, told) -> None:
    with pytest.raises(ConfigError, match=told):
        model_factory(ModelOptions.model_validate(options))


def test_a_factory_gets_its_options_and_must_return_a_module() -> None:
    built = model_factory(ModelOptions(factory="torch.nn:Linear", options={"in_features": 2, "out_features": 3}))()
    assert isinstance(built, nn.Linear)
    with pytest.raises(ConfigError, match="returned a dict"):
        model_factory(ModelOptions(factory="builtins:dict"))()


def test_a_factory_is_told_what_follows_from_the_data_unless_the_run_says_it() -> None:
    head = ModelHead(family="", inputs={"in_features": 2, "out_features": 3, "num_words": 4})
    options = {"out_features": 5}
    built = model_factory(ModelOptions(factory="torch.nn:Linear", options=options), head)()
    assert built.weight.shape == (5, 2)  # and nothing that it has no parameter for


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_safetensors(tmp_path)
