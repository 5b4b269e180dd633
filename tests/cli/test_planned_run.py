"""The run file of a plan: as it was written but for its layout and cluster, and trained as it is."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from shardwise.cli import run_command
from shardwise.cli.planned_run import planned_text
from shardwise.describe.cluster import Cluster, Hosts
from shardwise.describe.cluster_file import cluster_text
from shardwise.errors import ConfigError
from shardwise.layout import Layout
from shardwise.train.run_file import load_run

RUN = """# mine
folder = "{folder}"
layout = "auto"  # still to be found
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 4
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


def test_all_but_layout_and_cluster_stays_as_it_was() -> None:
    text = planned_text(RUN, Layout(pp=2, micro_batches=4), "h100x2")
    before, after = tomllib.loads(RUN), tomllib.loads(text)
    assert after == before | {"layout": "dp=1,pp=2,micro_batches=4", "cluster": "h100x2"}
    assert text.startswith("# mine\n")
    assert planned_text(text, Layout(pp=2, micro_batches=4), "h100x2") == text


def test_a_layout_in_a_table_is_refused_with_what_to_write() -> None:
    with pytest.raises(ConfigError, match="as one line"):
        planned_text("[layout]\npp = 2\n", Layout(pp=2), "h100x2")


def mixed(*, ratio: float) -> Cluster:
    """Two ranks, the first of them `ratio` times as slow."""
    fast = Cluster.local(2)
    device = fast.hosts[0].device
    rates = {"float32": device.rate("float32") / ratio}
    slow = dataclasses.replace(device, name="slow", flops_per_s=rates, bytes_per_s=device.bytes_per_s / ratio)
    return dataclasses.replace(fast, hosts=(Hosts(device=slow, devices=1), Hosts(device=device, devices=1)))


@pytest.fixture
def planned(tmp_path, capsys) -> str:
    """A run file that was planned for them."""
    machine, run, planned = tmp_path / "mixed.toml", tmp_path / "run.toml", tmp_path / "planned.toml"
    machine.write_text(cluster_text(mixed(ratio=3)))
    run.write_text(RUN.format(folder=tmp_path / "run"))
    line = ["plan", str(run), "--cluster", str(machine), "--layout", "pp=2,micro_batches=8", "--out", str(planned)]
    assert run_command(line) == 0
    assert f"shardwise train {planned}" in capsys.readouterr().out
    return str(planned)


def test_a_run_file_that_is_planned_for_unequal_devices_lists_stages_by_speed(planned) -> None:
    layout = load_run(planned).layout
    assert isinstance(layout.stages, tuple)
    assert len(layout.stages[0]) < len(layout.stages[1])  # units; the slow one comes first


@pytest.mark.slow
def test_a_run_file_that_is_planned_for_unequal_devices_trains_as_it_is(planned) -> None:
    assert run_command(["train", planned]) == 0


def test_a_run_file_is_written_of_a_plan_alone(tmp_path, capsys) -> None:
    run = tmp_path / "run.toml"
    run.write_text(RUN.format(folder=tmp_path / "run").replace('"auto"', '"pp=2"'))
    assert run_command(["plan", str(run), "--out", str(tmp_path / "planned.toml")]) == 1
    assert "--out is where" in capsys.readouterr().err
