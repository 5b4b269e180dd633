"""What is wrong with a run is told before a rank is started: the key, the rule, the numbers, the repair."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shardwise.checkpoint.manifest import Manifest, Piece, TensorEntry
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import Source
from shardwise.errors import CheckpointError, ConfigError, LayoutError, ShardwiseError
from shardwise.train.checks import check_stages
from shardwise.train.run import prepare, train
from shardwise.train.run_file import run_from
from shardwise.train.state import check_model

RUN: Mapping[str, Any] = {
    "layout": "pp=2",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 64,
        }
    },
    "task": {"kind": "random_tokens"},
    "training": {"steps": 2, "global_batch": 8},
}
LONG = 'task={kind="language_modelling", sources="words.txt", vocabulary_size=260, sequence_length=100000}'


@pytest.fixture
def folder(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("a few words\n" * 40)
    return str(tmp_path / "run")


@pytest.mark.parametrize(
    "override, error, told",
    [
        ("model={}", ConfigError, "neither config nor path nor factory; add one"),
        ("model.config=none.json", ConfigError, "model.config: .*none.json: No such file.*; correct the path"),
        ("model.config={}", ConfigError, "model.config: a config names its model_type"),
        ('model.config.model_type="lama"', ConfigError, "says 'lama'; did you mean llama or"),
        ("model.config.hiden_size=32", ConfigError, "hiden_size = 32 is none; write hidden_size"),
        ("model.config.hidden_size=-1", ConfigError, "model.config: .* takes as llama: .*hidden size"),
        ('model.config.hidden_size="big"', ConfigError, "model.config: .*expected int, got str"),
        ("model.config.num_attention_heads=3", ConfigError, "not a multiple of the number of attention heads"),
        (
            "model.config.max_position_embeddings=8",
            ConfigError,
            "max_position_embeddings=8 and sequence_length=16; set",
        ),
        (
            'model.class="LlamaForCasualLM"',
            ConfigError,
            "no model class 'LlamaForCasualLM'; did you mean LlamaForCausalLM",
        ),
        ('model={factory="nowhere:build"}', ConfigError, "model.factory names a module.*No module named 'nowhere'"),
        ('model.path="/nowhere"', CheckpointError, "model.path: could not read /nowhere"),
        ("device=cuda", ConfigError, "needs a GPU, and torch sees 0 here"),
        ("task.kind=language_modeling", ConfigError, 'write task.kind = "language_modelling"'),
        ("task.kind=nowhere:task", ConfigError, "No module named 'nowhere'"),
        ("task.vocabulary=3", ConfigError, "task.vocabulary is no option; write vocabulary_size"),
        ("task.num_train=many", ConfigError, "task.num_train is a whole number, but got 'many'"),
        ("task.num_train=0", ConfigError, "got vocabulary_size=64, num_train=0.*; use at least 1"),
        ("task.sequence_length=1", ConfigError, "got sequence_length=1; use 2 or more"),
        ("task.vocabulary_size=65", ConfigError, "vocab_size=64 and the task draws from 65 tokens; set model.config"),
        ('task={kind="language_modelling", sources="nowhere/*.txt"}', ConfigError, "a source names at least one file"),
        (LONG, ConfigError, "training tokens are fewer than sequence_length=100000; give more text or shorter"),
    ],
)
def test_a_wrong_run_is_refused_with_its_repair(override, error, told, folder, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(error, match=f"(?s){told}"):
        prepare(run_from({**RUN, "folder": folder}, [override]))


@pytest.mark.parametrize(
    "stages, told",
    [
        ("[model.embed_tokens+layers.0|layers.1+model.nrm+lm_head]", "no 'model.nrm'; did you mean model.norm"),
        ("[model.embed_tokens+layers.0|layers.1+lm_head]", "1 of 5 calls do not: model.norm; add them"),
        ("[model|layers.1+lm_head]", "model.layers.1#0 is named by 'model' on stage 0 and by 'layers.1' on stage 1"),
    ],
)
def test_stages_that_are_not_those_of_the_model_are_refused(stages, told, folder) -> None:
    job = prepare(run_from({**RUN, "folder": folder}, [f"layout=pp=2,stages={stages}"]))
    with pytest.raises(LayoutError, match=told):
        check_stages(job)


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(ConfigError, match="/proc/nowhere/events cannot be made: No such file or directory; set folder"):
        train({**RUN, "folder": "/proc/nowhere"})


def test_a_run_without_a_checkpoint_is_not_resumed(folder) -> None:
    with pytest.raises(ShardwiseError, match="must hold a finished checkpoint, but has none.*start without resuming"):
        prepare(run_from({**RUN, "folder": folder}), resume=True)


@pytest.mark.parametrize(
    "layers, told",
    [
        ([(4, 2), (2, 2)], "have another shape: 0.weight was (3, 2), is (2, 4)"),
        ([(2, 3)], "2 of its 4 are not in the model, such as 1.weight"),
        ([(2, 3), (3, 3), (3, 3)], "2 of the model's 6 are not in it, such as 2.weight"),
    ],
)
def test_a_run_is_not_resumed_with_another_model(layers, told) -> None:
    saved = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    tensors = {
        name: TensorEntry(
            kind="parameter",
            global_shape=tuple(parameter.shape),
            dtype="float32",
            pieces=(Piece(file="a", key=name, region=TensorSlice.whole(tuple(parameter.shape))),),
        )
        for name, parameter in saved.named_parameters()
    }
    source = Source(folder=Path("saved"), manifest=Manifest(step=1, tensors=tensors))
    check_model(source, saved)
    with pytest.raises(CheckpointError, match=re.escape(told)):
        check_model(source, nn.Sequential(*(nn.Linear(*sizes) for sizes in layers)))
