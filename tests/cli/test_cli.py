"""The command line as a newcomer meets it: help, one-line errors, exit statuses."""

from __future__ import annotations

import json

import pytest

from shardwise.cli import VERBS, run_command
from shardwise.layout import SEARCHED
from shardwise.schedule import GENERATORS

RUN = """
folder = "{folder}"
layout = "pp=2"
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
vocab_size = 64
[task]
kind = "random_tokens"
[training]
steps = 2
global_batch = 8
"""


@pytest.fixture
def run_file(tmp_path) -> str:
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(folder=tmp_path / "run"))
    return str(file)


def test_help_names_every_verb(capsys) -> None:
    assert run_command(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(verb in told for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys) -> None:
    assert run_command([verb, "--help"]) == 0
    assert f"shardwise {verb}" in capsys.readouterr().out


def test_help_of_train_shows_the_tables_of_a_run_file_on_narrow_terminals(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(["train", "--help"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    for key in ("folder", "layout", "balance", "[model]", "[task]", "[training]", "[checkpoint]", "[timeline]"):
        assert f"\n   {key} " in told


def test_help_of_plan_names_every_schedule(capsys) -> None:
    assert run_command(["plan", "--help"]) == 0
    told = capsys.readouterr().out
    assert [name for name in (*GENERATORS, SEARCHED) if name not in told] == []


def test_a_searched_schedule_is_planned_with_what_it_gains(run_file, capsys) -> None:
    assert run_command(["plan", run_file, "--layout", "pp=2,schedule=searched", "--flops", "1G"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "schedule searched: " in told
    assert "less than the best textbook one (" in told


def test_a_schedule_is_drawn(capsys) -> None:
    assert run_command(["draw", "1f1b", "--ranks", "2", "--micro-batches", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["rank 0  0>1>....0<<<2>1<<<..2<<<", "rank 1  ..0>0<<<1>1<<<2>2<<<...."]


def test_a_wrong_command_line_has_status_2(capsys) -> None:
    assert run_command(["train"]) == 2
    assert run_command(["draw", "1f1b", "--ranks", "none"]) == 2
    assert run_command(["trian"]) == 2


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["draw", "2f2b"], 'pipedream-2bw, but got "2f2b"'),
        (["plan"], "a run file or of --model-config FILE.json, but neither of them is given"),
        (["plan", "x.toml", "--flops", "fast"], "--flops: 'fast' is not a number of flops"),
        (["plan", "--model-config", "x.json", "--set", "layout=tp=2"], "--set sets values of a run file"),
        (["train", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_an_error_of_ours_is_one_line_without_a_traceback_and_status_1(arguments, told, capsys) -> None:
    assert run_command(arguments) == 1
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "override, told",
    [
        ("layout=pp=9", "pp=9"),
        ("training.stepss=3", "write steps"),
        ("model.class=LlamaForNothing", "no model class 'LlamaForNothing'"),
        ("task.vocabulary=3", "vocabulary"),
        ("task.kind=chess", "chess"),
    ],
)
def test_a_wrong_run_is_refused_before_a_rank_is_started(run_file, override, told, capsys) -> None:
    assert run_command(["plan", run_file, "--set", override]) == 1
    assert told in capsys.readouterr().err


def test_a_run_is_planned_without_starting_anything(run_file, capsys) -> None:
    assert run_command(["plan", run_file, "--layout", "dp=2,pp=2"]) == 0
    told = capsys.readouterr().out
    assert "LlamaForCausalLM" in told
    assert "stage 1" in told
    assert "rank 1" in told


def test_a_plan_says_what_its_seconds_assume_and_leave_out(run_file, capsys) -> None:
    assert run_command(["plan", run_file, "--layout", "dp=2", "--flops", "400 Tflops"]) == 0
    told = capsys.readouterr().out
    assert "400 Tflops a second on every rank, as given; transfers take no time" in told
    assert "left out    averaging gradients (each rank sends" in told
    assert run_command(["plan", run_file]) == 0
    assert "as float32 matrix products reach here on" in capsys.readouterr().out
    assert run_command(["plan", run_file, "--flops", "0"]) == 1
    assert "more than 0 flops a second, but got 0" in capsys.readouterr().err


def test_a_plan_balanced_by_the_clock_lists_the_stages_that_it_found(run_file, capsys) -> None:
    assert run_command(["plan", run_file, "--set", "balance=measured"]) == 0
    told = capsys.readouterr().out
    assert "dp=1,pp=2,stages=[model.embed_tokens" in told
    assert "the seconds that every unit call took here, alone" in told


def test_a_plan_says_what_running_statistics_mean_with_replicas(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "counted.py").write_text(WITH_STATISTICS)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "run.toml"
    file.write_text(RUN.partition("[model.config]")[0].format(folder=tmp_path / "run") + FACTORY)
    assert run_command(["plan", str(file), "--layout", "dp=2"]) == 0
    assert "running statistics are equal on all" in capsys.readouterr().out
    assert run_command(["plan", str(file), "--layout", "dp=1"]) == 0
    assert "running statistics" not in capsys.readouterr().out


WITH_STATISTICS = """
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(64, 8), nn.BatchNorm1d(16), nn.Linear(8, 64)
    def forward(self, input_ids, labels):
        return self.head(self.norm(self.embed(input_ids)))
"""
FACTORY = """
[model]
factory = "counted:Model"
[task]
kind = "random_tokens"
[training]
steps = 2
global_batch = 8
"""


def test_a_bare_config_is_planned_with_the_seconds_and_the_memory_it_took(tmp_path, capsys) -> None:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 2, "vocab_size": 64}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert run_command(["plan", "--layout", "pp=4", "--model-config", str(file)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("traced ")
    assert "this process held" in last
