"""`shardwise plan --cluster`: layouts searched and priced on a machine that is named, as tables, JSON and pictures."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from shardwise.cli import run_command
from shardwise.layout import Layout

RUN = """
folder = "{folder}"
layout = "{layout}"
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
vocab_size = 64
[task]
kind = "random_tokens"
sequence_length = 8
[training]
steps = 2
global_batch = 8
"""


@pytest.fixture
def run_file(tmp_path):
    def written(layout: str = "auto") -> str:
        file = tmp_path / "run.toml"
        file.write_text(RUN.format(folder=tmp_path / "run", layout=layout))
        return str(file)

    return written


def test_a_search_ranks_layouts_that_fit_and_says_what_it_rejected(run_file, capsys) -> None:
    assert run_command(["plan", run_file(), "--cluster", "local2", "--json", "--top", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 1 <= len(told["ranking"]) <= 3
    seconds = [each["step_s"] for each in told["ranking"]]
    assert seconds == sorted(seconds)
    for each in told["ranking"]:
        assert Layout.parse(each["layout"]).world_size == 2
        assert each["fits"]
        assert sum(each["memory"][0].values()) <= each["peak_bytes"] * 1.001
    assert told["rejected"]
    assert told["changes"]


def test_an_explicit_layout_is_priced_with_its_verdict_and_what_changes_would_buy(run_file, tmp_path, capsys) -> None:
    picture = tmp_path / "step.svg"
    line = ["plan", run_file("pp=2"), "--cluster", "local2", "--layout", "pp=2,micro_batches=4", "--svg", str(picture)]
    assert run_command(line) == 0
    told = capsys.readouterr().out
    for word in ("fits:", "pp rank 0", "pp rank 1", "bubble", "what one change would buy"):
        assert word in told
    assert max(map(len, told.splitlines())) <= 120
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")


def test_a_sweep_shows_strong_and_weak_scaling(run_file, tmp_path, capsys) -> None:
    picture = tmp_path / "scaling.svg"
    line = ["plan", run_file(), "--cluster", "local4", "--sweep", "devices=1..2", "--svg", str(picture)]
    assert run_command(line) == 0
    told = capsys.readouterr().out
    assert "strong scaling" in told
    assert "weak scaling" in told
    assert picture.exists()


def test_options_of_a_cluster_without_one_are_refused(run_file, capsys) -> None:
    assert run_command(["plan", run_file("pp=2"), "--json"]) == 1
    assert "--cluster" in capsys.readouterr().err


def test_an_objective_that_there_is_not_is_refused_with_those_that_there_are(run_file, capsys) -> None:
    assert run_command(["plan", run_file(), "--cluster", "local2", "--objective", "speed"]) == 1
    assert "pareto" in capsys.readouterr().err


def test_a_run_whose_layout_is_still_to_be_found_is_not_rehearsed(run_file, capsys) -> None:
    assert run_command(["rehearse", run_file(), "--world", "2", "--rank", "0"]) == 1
    assert "is found by `shardwise train`, verify and plan" in capsys.readouterr().err


def test_a_bare_config_is_searched_with_a_batch_that_is_named(tmp_path, capsys) -> None:
    config = tmp_path / "config.json"
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 64, **shape}))
    line = ["plan", "--model-config", str(config), "--cluster", "h100x2", "--global-batch", "8", "--json"]
    assert run_command([*line, "--sequence-length", "16"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert Layout.parse(told["ranking"][0]["layout"]).world_size == 2
