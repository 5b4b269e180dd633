"""Stages balanced by the clock: what is slow and counts no flops gets a stage of its own, on every rank alike."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from hand_profiles import chain
from shardwise.describe.profile import ModelProfile
from shardwise.events import read_events
from shardwise.layout import Layout
from shardwise.plan.partition import place
from shardwise.tasks import RandomTokens
from shardwise.testing import on_ranks
from shardwise.train.balance import layout_for, listed_stages, of_rank_0, profile_for, with_threads
from shardwise.train.build import Job, build_model, first_micro_batch
from shardwise.train.run import prepare, train_on_rank
from shardwise.train.run_file import Run, run_from


class Slow(nn.Module):
    """Hardly any flops, and by far the most time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x * self.scale


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.slow = Slow()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(4))
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.slow(self.embed(input_ids))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def run(folder: object, **more: object) -> Run:
    task = {"kind": "random_tokens", "num_train": 16, "num_held_out": 0}
    training = {"steps": 3, "global_batch": 4, "learning_rate": 1e-2, "seed": 3}
    return run_from({"folder": str(folder), "task": task, "training": training, **more})


def layout_of(run: Run) -> tuple[Layout, ModelProfile]:
    job = Job(run=run, task_options={}, model=Uneven, task=RandomTokens())
    model, values = build_model(job)
    fake = [type(parameter.data) for parameter in model.parameters()]
    inputs = first_micro_batch(run, RandomTokens())
    with with_threads(1):  # as a rank has; threads that wait for a busy machine make a small product slow
        profile = profile_for(run, model, inputs, loss=RandomTokens().loss, values=values)
    assert [type(parameter.data) for parameter in model.parameters()] == fake, "values are given back"
    return layout_for(run, profile), profile


def test_a_slow_unit_without_flops_has_a_stage_of_its_own_only_by_the_clock(tmp_path) -> None:
    measured, profile = layout_of(run(tmp_path, layout="pp=2", balance="measured"))
    assert all(call.forward_s for call in profile.calls)
    assert measured.stages == (("embed", "slow"), ("blocks.0-3", "head"))
    assert measured.seed == 3
    counted, profile = layout_of(run(tmp_path, layout="pp=2"))
    assert counted == Layout(pp=2, seed=3)
    assert place(profile, counted) != place(profile, measured)


@pytest.mark.parametrize("units", [None, ["layer"] * 6, ["a", "b", "b", "a", "c.0", "c.1"]])
def test_listed_stages_are_those_of_the_rule_and_survive_text_and_json(units) -> None:
    profile = chain([1, 2, 3, 1, 1, 2], **({"units": units} if units else {}))
    layout = Layout(dp=2, pp=3, seed=5)
    listed = listed_stages(profile, layout)
    assert place(profile, listed) == place(profile, layout)
    assert Layout.parse(str(listed)) == Layout.from_json(listed.to_json()) == listed


@on_ranks(2, timeout_s=60)
def test_all_ranks_have_the_layout_of_rank_0(rank) -> None:
    torch.distributed.is_initialized() or pytest.fail("this test needs a process group")
    assert of_rank_0(Layout(pp=2, seed=rank.rank)).seed == 0


@on_ranks(2, timeout_s=60)
def test_a_run_balanced_by_the_clock_has_the_curve_of_one_device(rank, tmp_path) -> None:
    def losses(chosen: Run) -> tuple[float, ...]:
        return train_on_rank(rank, prepare(chosen, model=Uneven)).losses

    measured = losses(run(tmp_path / "measured", layout="pp=2", balance="measured"))
    counted = losses(run(tmp_path / "counted", layout="pp=2"))
    # float32 sums in another order at most: the same micro-batches on other stages.
    assert measured == pytest.approx(counted, rel=1e-6)
    if rank.rank == 0:
        (plan,) = (str(e.data["text"]) for e in read_events(tmp_path / "measured" / "events") if e.kind == "plan")
        assert "stages=[embed+slow|blocks.0-3+head]" in plan
        assert "the seconds that every unit call took here" in plan
