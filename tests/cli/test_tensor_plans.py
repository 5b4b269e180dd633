"""How shards divide a model, on the command line: what `plan` lists of runs and of configs, and what is refused."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from shardwise.cli import run_command

RUN = """
folder = "{folder}"
layout = "tp=2"
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
vocab_size = 64
[task]
kind = "random_tokens"
sequence_length = 8
[training]
steps = 2
global_batch = 4
"""
WRONG = """
[tp_plan]
"layers.*.mlp.gate_proj" = "colwise"
"layers.*.mlp.down_proj" = "rowwise"
"""


def written(folder: Path, text: str) -> str:
    file = folder / "run.toml"
    file.write_text(text.format(folder=folder / "run"))
    return str(file)


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_plan_lists_shares_proofs_and_what_stays_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", written(tmp_path, RUN)]) == 0

    told = one_line(capsys.readouterr().out)
    assert "divided among 2 shards, found by dataflow: 100% of the blocks' matrix products" in told
    assert "proven in model.layers.0 and 1 more: the block, 1 signature, training and evaluation, tp=2: error" in told
    assert "whole in model.norm: " in told


@pytest.mark.parametrize("verb", ["plan", "verify", "train"])
def test_a_wrong_plan_in_a_run_file_is_one_line_before_anything_starts(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("shardwise.train.run"), "run_ranks", None)
    monkeypatch.setattr(import_module("shardwise.verify.verify")._Ranks, "pool", None)

    assert run_command([verb, written(tmp_path, RUN + WRONG)]) != 0
    told = one_line(capsys.readouterr().err)
    assert "the plan of model.layers.0 does not run on 2 ranks: it fails in model.layers.0.mlp" in told


def test_a_bare_config_is_planned_with_proofs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"num_attention_heads": 2, "vocab_size": 64}))

    assert run_command(["plan", "--layout", "tp=2,pp=2", "--model-config", str(file), "--flops", "1T"]) == 0
    told = one_line(capsys.readouterr().out)
    assert "of 2 stages of 2 shards" in told
    assert "how shards divide them found and proven in" in told
