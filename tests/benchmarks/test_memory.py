"""The memory benchmark counts what a stage must hold, sees a process's peak, and divides one by the other."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from benchmarks.memory.model import QUICK, save_model, written_run
from benchmarks.memory.run import Case, _figures
from benchmarks.memory.stages import Needs, needs_of_stages
from benchmarks.memory.watch import Sample, Watched, watched_command
from shardwise.checkpoint.source import open_safetensors
from shardwise.train.run_file import Run, load_run

TINY = dataclasses.replace(QUICK, hidden=32, blocks=4, heads=4, kv_heads=2, width=64, vocabulary=64, sequence=8)
MIB = 2**20
GROWS_TO_64_MIB = "import time; held = bytearray(64 << 20); time.sleep(0.3); del held; time.sleep(0.2); print('done')"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "run.toml").write_text(written_run(TINY, tmp_path / "run"))
    return load_run(tmp_path / "run.toml")


def test_stages_together_hold_the_model_once_and_as_many_bytes_of_gradients(run: Run) -> None:
    stages = needs_of_stages(run)
    block = 32 * (2 * 32 + 2 * 16 + 3 * 64 + 2)
    assert sum(stage.num_parameters for stage in stages) == 2 * 64 * 32 + 4 * block + 32
    assert all(stage.gradients == stage.parameters == 4 * stage.num_parameters for stage in stages)


def test_earlier_stages_keep_more_micro_batches(run: Run) -> None:
    stages = needs_of_stages(run)
    assert [stage.in_flight for stage in stages] == [4, 3, 2, 1]
    hidden_state = 4 * TINY.sequence * TINY.hidden
    assert all(stage.activations > stage.in_flight * hidden_state for stage in stages)


def test_the_saved_model_has_every_parameter(run: Run, tmp_path: Path) -> None:
    save_model(run, tmp_path / "weights")
    tensors = open_safetensors(tmp_path / "weights").manifest.tensors
    assert len(tensors) == 3 + 4 * 9
    assert tensors["lm_head.weight"].global_shape == (64, 32)


def test_a_watched_process_shows_the_peak_it_had_and_not_only_its_end() -> None:
    output, processes = watched_command([sys.executable, "-c", GROWS_TO_64_MIB], timeout_s=30)
    (process,) = processes.values()
    assert output == "done\n"
    assert 64 * MIB < process.peak_private <= process.peak_resident < 128 * MIB
    assert process.samples[-1].resident < 64 * MIB


def test_a_command_that_fails_is_an_error_with_what_it_said() -> None:
    with pytest.raises(RuntimeError, match="no such model"):
        watched_command([sys.executable, "-c", "raise SystemExit('no such model')"], timeout_s=30)


def test_a_figure_is_the_ratio_of_the_worst_rank() -> None:
    def process(own: int) -> Watched:
        sample = Sample(seconds=0.0, peak_resident=2**29, resident=0, own=own, private=0)
        return Watched(pid=1, command="", samples=(sample,))

    needs = [
        Needs(num_parameters=1, parameters=40, gradients=40, activations=20, in_flight=1),
        Needs(num_parameters=1, parameters=80, gradients=80, activations=40, in_flight=1),
    ]
    case = Case(
        loss=1.0,
        launcher=process(0),
        zygote=process(0),
        ranks=(process(90), process(220)),
        held_parameters=(1, 1),
        peaks=(130, 240),
    )
    assert _figures({"factory": case}, needs) == {
        "memory_ratio_factory": 1.3,
        "memory_ratio_private_factory": 1.1,
        "launcher_gib": 0.5,
    }
