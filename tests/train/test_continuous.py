"""Training without a flush is training with gradients that are one step late, on any layout, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from shardwise.checkpoint.source import open_checkpoint
from shardwise.errors import LayoutError
from shardwise.events import read_events
from shardwise.execute.late_updates import LateUpdates
from shardwise.execute.weight_versions import WeightVersions
from shardwise.launch import RankContext
from shardwise.testing import on_ranks
from shardwise.train.build import Job, World, build
from shardwise.train.loop import evaluate
from shardwise.train.model import values_of
from shardwise.train.run import prepare, train_on_rank
from shardwise.train.run_file import run_from
from shardwise.train.update import update
from train.test_training import TASK, Counted, Decoder, ScalarTask, evaluations, off

pytestmark = pytest.mark.slow  # `make verify-all`

STEPS = 14
TWO_STAGES = "pp=2,micro_batches=4,schedule=pipedream-2bw"

# Sums of float32 gradients in another order, magnified by 14 updates; measured 3e-7 of losses, 2e-6 of weights.
CURVE = 1e-5
# The same in float64: measured 1e-15.
EXACT = 1e-12

TRAINING = {
    "steps": STEPS,
    "global_batch": 8,
    "learning_rate": 2e-2,
    "warm_up": 4,
    "seed": 7,
    "clip": 0.5,
    "epsilon": 1e-3,  # AdamW divides by gradients: where those are rounding errors alone, so are its updates
    "evaluate_every": 6,
}


def job(folder: Path, *, layout: str = TWO_STAGES, resume: bool = False, **more: object) -> Job:
    training = {key: more.pop(key) for key in list(more) if key in (*TRAINING, "optimizer", "schedule")}
    written = {"folder": str(folder), "layout": layout, "task": TASK, "training": TRAINING | training, **more}
    return prepare(run_from(written), model=Decoder, resume=resume)


def double() -> nn.Module:
    return Decoder().double()


class Skipping(Decoder):
    """What stage 0 makes is read by the last stage too, past those between."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        first = x = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x + first)


def world_of_one(job: Job, folder: Path) -> World:
    """The run on one device, in this process."""
    count = job.run.num_micro_batches * job.run.layout.num_replicas
    layout = run_from({"layout": f"dp=1,micro_batches={count}", "training": {"steps": 1, "global_batch": 8}}).layout
    run = job.run.model_copy(update={"folder": str(folder), "layout": layout})
    context = RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused")
    return build(dataclasses.replace(job, run=run), context)


def one_step_late(world: World) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """W(t+1) = W(t) - rate * gradient(W(t-1); step t), W(-1) = W(0), as it reads; losses, evaluations, last weights."""
    parameters = list(world.program.parameters.values())
    options = world.run.training
    older = [parameter.detach().clone() for parameter in parameters]
    losses: list[float] = []
    evaluated: list[float] = []
    for step in range(options.steps):
        newest = [parameter.detach().clone() for parameter in parameters]
        put(parameters, older)
        losses.append(world.program.step(world.micro_batches(step), step=step).loss)
        norm = world.program.gradient_norm()
        put(parameters, newest)
        update(world.program, world.optimizer, options, step=step, norm=norm)
        world.program.model.zero_grad()
        older = newest
        if (step + 1) % options.evaluate_every == 0 or step + 1 == options.steps:
            evaluate(world, lambda kind, step, **data: evaluated.append(data["loss"]), step)
    return losses, evaluated, {name: p.detach().clone() for name, p in world.program.parameters.items()}


def put(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


@on_ranks(2, timeout_s=120)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_stages_train_as_one_device_with_gradients_one_step_late(rank, tmp_path, optimizer) -> None:
    check(rank, job(tmp_path / "run", optimizer=optimizer, checkpoint={"every": STEPS}), CURVE)


@on_ranks(4, timeout_s=120)
@pytest.mark.parametrize("layout", ["pp=4,micro_batches=4", "dp=2,pp=2,micro_batches=2", "tp=2,pp=2"])
def test_four_ranks_do_so_exactly_in_float64(rank, tmp_path, layout) -> None:
    wanted = job(tmp_path / "run", layout=f"{layout},schedule=pipedream-2bw", checkpoint={"every": STEPS})
    check(rank, dataclasses.replace(wanted, model=double), EXACT)


@on_ranks(4, timeout_s=120)
def test_a_value_may_skip_stages_and_micro_batches_be_of_unequal_size(rank, tmp_path) -> None:
    layout = "pp=4,micro_batches=5,schedule=pipedream-2bw"  # 8 samples: 1, 2, 1, 2, 2
    wanted = job(tmp_path / "run", layout=layout, checkpoint={"every": STEPS})
    check(rank, dataclasses.replace(wanted, model=Skipping), EXACT)


def check(rank: RankContext, wanted: Job, tolerance: float) -> None:
    trained = train_on_rank(rank, wanted)
    assert len(trained.losses) == STEPS
    if rank.rank > 0:
        return
    folder = Path(wanted.run.folder)
    losses, evaluated, weights = one_step_late(world_of_one(wanted, folder / "alone"))
    assert off(trained.losses, tuple(losses)) <= tolerance
    assert off(tuple(evaluations(folder)), tuple(evaluated)) <= tolerance  # of the newest weights
    steps = [event.step for event in read_events(folder / "events") if event.kind == "step" and not event.rank]
    assert steps == list(range(STEPS))
    saved = saved_weights(wanted)
    for name, weight in weights.items():
        error = (saved[name] - weight).norm() / weight.norm()
        assert error <= tolerance, f"{name} differs by {error:.1e}"


def saved_weights(job: Job) -> Mapping[str, torch.Tensor]:
    model = Decoder() if not callable(job.model) else job.model()
    return values_of(open_checkpoint(job.run.checkpoint_folder), model)([name for name, _ in model.named_parameters()])


@on_ranks(2, timeout_s=120)
@pytest.mark.parametrize("wrong", ["an update too late", "gradients of two steps in one"])
def test_the_comparison_sees_what_could_go_wrong(rank, tmp_path, monkeypatch, wrong) -> None:
    if wrong == "an update too late":
        show = WeightVersions.show
        monkeypatch.setattr(WeightVersions, "show", lambda self, version: show(self, max(version - 1, self.newest - 1)))
    else:
        replaced = LateUpdates._replaced

        def kept(self: LateUpdates, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
            had = [None if p.grad is None else p.grad.clone() for p in self._trained]
            return had if all(g is None for g in gradients) else replaced(self, gradients)

        monkeypatch.setattr(LateUpdates, "_replaced", kept)
    wanted = job(tmp_path / "run", steps=6, evaluate_every=0)
    losses = train_on_rank(rank, wanted).losses
    monkeypatch.undo()
    if rank.rank == 0:
        alone = job(tmp_path / "again", steps=6, evaluate_every=6)
        error = off(losses, tuple(one_step_late(world_of_one(alone, tmp_path / "alone"))[0]))
        assert error > 10 * CURVE, error


@on_ranks(2, timeout_s=120)
def test_a_gradient_that_is_late_makes_another_curve_than_one_that_is_not(rank, tmp_path) -> None:
    late = train_on_rank(rank, job(tmp_path / "late", steps=4, evaluate_every=0)).losses
    drained = train_on_rank(rank, job(tmp_path / "drained", layout="pp=2,micro_batches=4", steps=4, evaluate_every=0))
    assert off(late[:1], drained.losses[:1]) <= CURVE
    assert off(late[1:2], drained.losses[1:2]) > 100 * CURVE  # both steps are computed with the initial weights


@on_ranks(2, timeout_s=120)
def test_neither_evaluations_nor_checkpoints_change_the_steps_that_follow(rank, tmp_path) -> None:
    never = train_on_rank(rank, job(tmp_path / "never", steps=9, evaluate_every=0))
    often = train_on_rank(rank, job(tmp_path / "often", steps=9, evaluate_every=3, checkpoint={"every": 2}))
    assert often.losses == never.losses


@on_ranks(2, timeout_s=120)
@pytest.mark.parametrize("at", [3, 4])
def test_a_resumed_run_goes_on_bit_by_bit(rank, tmp_path, at) -> None:
    constant = {"schedule": "constant", "warm_up": 2, "evaluate_every": 0}
    whole = train_on_rank(rank, job(tmp_path / "whole", steps=8, **constant)).losses
    first = train_on_rank(rank, job(tmp_path / "run", steps=at, checkpoint={"every": at}, **constant))
    resumed = train_on_rank(rank, job(tmp_path / "run", steps=8, resume=True, **constant))
    assert resumed.first_step == at
    assert first.losses + resumed.losses == whole


@on_ranks(2, timeout_s=120)
def test_a_run_goes_over_from_a_drained_schedule_and_back(rank, tmp_path) -> None:
    """From one, the newest weights are all there is, so the first step is not late; to one, they are what counts."""
    constant = {"schedule": "constant", "warm_up": 2, "evaluate_every": 0}
    drained = "pp=2,micro_batches=4"
    every = {"every": 3}
    train_on_rank(rank, job(tmp_path / "run", layout=drained, steps=3, checkpoint=every, **constant))
    late = train_on_rank(rank, job(tmp_path / "run", steps=6, checkpoint=every, resume=True, **constant))
    back = train_on_rank(rank, job(tmp_path / "run", layout=drained, steps=7, resume=True, **constant))
    same = train_on_rank(rank, job(tmp_path / "same", layout=drained, steps=7, **constant)).losses
    assert (late.first_step, back.first_step) == (3, 6)
    assert off(late.losses[:1], same[3:4]) <= CURVE
    assert off(late.losses[1:2], same[4:5]) > 100 * CURVE
    assert len(back.losses) == 1


@on_ranks(2, timeout_s=120)
def test_running_statistics_are_those_of_one_device(rank, tmp_path) -> None:
    """Forwards of two steps overlap in time on different stages, and yet each stage sees them in order."""
    no_gaps = {"task": TASK | {"ignored_fraction": 0.0}, "steps": 6, "evaluate_every": 0, "checkpoint": {"every": 6}}
    found = {}
    for name, layout in (("two", TWO_STAGES), ("one", "pp=1,micro_batches=4,schedule=pipedream-2bw")):
        wanted = dataclasses.replace(job(tmp_path / name, layout=layout, **no_gaps), model=Counted, task=ScalarTask())
        if name == "two":
            train_on_rank(rank, wanted)
        elif rank.rank == 0:
            train_on_rank(RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused"), wanted)
        else:
            continue
        model = Counted()
        buffers = [key for key, _ in model.named_buffers()]
        found[name] = values_of(open_checkpoint(wanted.run.checkpoint_folder), model)(buffers)
    for key, value in found.get("one", {}).items():
        torch.testing.assert_close(found["two"][key], value, rtol=1e-5, atol=1e-7)


def test_too_few_micro_batches_are_refused_before_ranks_are_started(tmp_path) -> None:
    with pytest.raises(LayoutError, match="there are 2 for 4 stages; use 4 micro-batches or more"):
        job(tmp_path, layout="pp=4,micro_batches=2,schedule=pipedream-2bw")
