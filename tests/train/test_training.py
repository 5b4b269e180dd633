"""Training on ranks: the curve does not know the layout, and a resumed run goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from shardwise.checkpoint.source import open_checkpoint
from shardwise.errors import CheckpointError, ConfigError
from shardwise.events import read_events
from shardwise.launch import RankContext
from shardwise.schedule import Schedule
from shardwise.tasks import RandomTokens
from shardwise.testing import on_ranks
from shardwise.train.build import Job
from shardwise.train.run import Trained, prepare, train, train_on_rank
from shardwise.train.run_file import run_from

WIDTH, HEADS, VOCABULARY = 32, 2, 64


class Block(nn.Module):
    """A transformer block with dropout on attention weights and on both residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.heads = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, tokens, WIDTH)
        split = self.heads(self.norm(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)  # (batch, HEADS, 3, tokens, …)
        query, key, value = split.unbind(2)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.1, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.wide(x))


class Decoder(nn.Module):
    """A small language model; its embeddings are dropped out in its own forward, its head is tied to them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        if self.training and len(input_ids) > 1:
            x = x.clone()  # glue that depends on the number of samples must not shift what is drawn
        x = nn.functional.dropout(x, 0.1, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TASK = {"kind": "random_tokens", "num_train": 40, "num_held_out": 16, "ignored_fraction": 0.3}

# Sums of float32 gradients in another order, magnified by 20 updates of Adam; measured 3e-7.
CURVE = 1e-5


def job(folder: Path, *, layout: str = "dp=1", steps: int = 20, **more: object) -> Job:
    written = {
        "folder": str(folder),
        "layout": layout,
        "task": TASK,
        "training": {
            "steps": steps,
            "global_batch": 8,
            "learning_rate": 3e-3,
            "warm_up": min(4, steps),
            "seed": 7,
            "clip": 0.5,
            "evaluate_every": 10,
        },
        **more,
    }
    return prepare(run_from(written), model=Decoder)


def alone(job: Job, rank: int) -> Trained:
    """The same run on one device, in this process; every rank writes its own events."""
    run = job.run.model_copy(update={"folder": f"{job.run.folder}-alone-{rank}", "layout": run_from_layout("dp=1")})
    context = RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused")
    return train_on_rank(context, dataclasses.replace(job, run=run))


def run_from_layout(text: str) -> object:
    return run_from({"layout": text, "training": {"steps": 1, "global_batch": 8}}).layout


def off(losses: tuple[float, ...], reference: tuple[float, ...]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def evaluations(folder: Path) -> list[float]:
    return [float(str(e.data["loss"])) for e in read_events(folder / "events") if e.kind == "evaluation" and not e.rank]


@on_ranks(2, timeout_s=60)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("dp=2", marks=pytest.mark.slow),
        "dp=2,shares=3:1",
        pytest.param("pp=2", marks=pytest.mark.slow),
        "tp=2",
        "pp=2,schedule=zb-v",
        "pp=2,schedule=interleaved,chunks=3",
        "pp=2,schedule=searched",
    ],
)
def test_two_ranks_have_the_loss_curve_of_one_with_dropout_on(rank, tmp_path, layout) -> None:
    check_curve(rank, tmp_path, layout)


@on_ranks(4, timeout_s=60)
@pytest.mark.parametrize("layout", ["dp=2,pp=2", pytest.param("dp=2,tp=2", marks=pytest.mark.slow)])
def test_four_ranks_have_the_loss_curve_of_one_with_dropout_on(rank, tmp_path, layout) -> None:
    check_curve(rank, tmp_path, layout)


def check_curve(rank: RankContext, folder: Path, layout: str) -> None:
    wanted = job(folder / "run", layout=layout)
    curve = train_on_rank(rank, wanted).losses
    reference = alone(wanted, rank.rank).losses
    assert len(curve) == 20
    assert off(curve, reference) <= CURVE
    if rank.rank == 0:
        one = evaluations(folder / "run-alone-0")
        assert len(one) == 2
        assert off(tuple(evaluations(folder / "run")), tuple(one)) <= CURVE


@on_ranks(4, timeout_s=60)
@pytest.mark.parametrize("layout", ["dp=2,pp=2", pytest.param("tp=2,pp=2", marks=pytest.mark.slow)])
def test_a_run_of_four_ranks_is_resumed_bit_by_bit_and_on_one_device_too(rank, tmp_path, layout) -> None:
    checkpoint = {"folder": str(tmp_path / "saved"), "every": 4, "keep": 2}
    whole = train_on_rank(rank, job(tmp_path / "whole", layout=layout, steps=10)).losses
    # A run of 10 steps that ends after 6: the rate of every step is that of the whole run.
    constant = {"steps": 6, "global_batch": 8, "learning_rate": 3e-3, "schedule": "constant", "seed": 7}
    longer = constant | {"steps": 10}
    first = train_on_rank(rank, job(tmp_path / "a", layout=layout, checkpoint=checkpoint, training=constant))
    resumed_job = dataclasses.replace(job(tmp_path / "b", layout=layout, training=longer), resume=True)
    resumed_job = dataclasses.replace(
        resumed_job, run=run_from({**written(resumed_job), "checkpoint": checkpoint | {"every": 0}})
    )
    resumed = train_on_rank(rank, resumed_job)
    uninterrupted = train_on_rank(rank, job(tmp_path / "c", layout=layout, training=longer))
    assert resumed.first_step == 6
    assert first.losses + resumed.losses == uninterrupted.losses
    assert whole != uninterrupted.losses
    on_one = alone(resumed_job, rank.rank)
    assert on_one.first_step == 6
    assert off(on_one.losses, resumed.losses) <= CURVE


@on_ranks(2, timeout_s=60)
def test_a_run_goes_on_with_another_schedule_and_other_stages_a_rank(rank, tmp_path) -> None:
    layouts = ("pp=2,schedule=zb-v", "pp=2,schedule=interleaved,chunks=3", "pp=2,schedule=searched,chunks=2", "pp=2")
    constant = {"global_batch": 8, "learning_rate": 3e-3, "schedule": "constant", "seed": 7}
    losses: tuple[float, ...] = ()
    for number, layout in enumerate(layouts, 1):
        checkpoint = {"folder": str(tmp_path / "saved"), "every": 2, "keep": 2}
        part = job(
            tmp_path / layout.replace("=", ""), layout=layout, checkpoint={}, training=constant | {"steps": 2 * number}
        )
        part = dataclasses.replace(part, run=run_from({**written(part), "checkpoint": checkpoint}), resume=number > 1)
        losses += train_on_rank(rank, part).losses
        torch.distributed.barrier()
    one = alone(job(tmp_path / "whole", training=constant | {"steps": 8}), rank.rank)
    assert off(losses, one.losses) <= CURVE
    if rank.rank == 0:
        found = Schedule.from_json((tmp_path / "pp2,schedulesearched,chunks2" / "schedule.json").read_text())
        assert found.num_stages == 4


def written(job: Job) -> dict[str, object]:
    return {
        "folder": job.run.folder,
        "layout": str(job.run.layout),
        "task": TASK,
        "training": job.run.training.model_dump(),
    }


@on_ranks(1)
def test_a_run_is_not_resumed_with_another_seed_optimizer_or_other_data(rank, tmp_path) -> None:
    saved = job(tmp_path, steps=1, checkpoint={"every": 1})
    train_on_rank(rank, saved)
    for change in ("training.seed=8", "task.num_train=41", "training.global_batch=4", "training.optimizer=momentum"):
        other = run_from({**written(saved), "folder": str(tmp_path)}, [change])
        with pytest.raises(CheckpointError, match="instead of"):
            train_on_rank(rank, prepare(other, model=Decoder, resume=True))


@on_ranks(1)
def test_a_run_that_starts_anew_does_not_touch_an_earlier_checkpoint(rank, tmp_path) -> None:
    train_on_rank(rank, job(tmp_path, steps=1, checkpoint={"every": 1}))
    with pytest.raises(ConfigError, match="step 1; go on from it with --resume"):
        job(tmp_path, steps=1, checkpoint={"every": 1})


class Counted(nn.Module):
    """A module with a buffer that its forward writes, and parameters that `__init__` draws."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 64)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.embed(input_ids))
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        return nn.functional.cross_entropy(self.second(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def own_loss(outputs: torch.Tensor, _batch: object) -> torch.Tensor:
    return outputs


@on_ranks(2)
def test_a_module_of_ones_own_is_trained_and_its_running_statistics_are_saved(rank, tmp_path) -> None:
    options = {"layout": "pp=2", "steps": 2, "checkpoint": {"every": 2}, "task": TASK | {"ignored_fraction": 0.0}}
    trained = job(tmp_path, **options)
    trained = dataclasses.replace(trained, model=Counted, task=ScalarTask())
    losses = train_on_rank(rank, trained).losses
    assert len(losses) == 2
    torch.distributed.barrier()
    saved = open_checkpoint(tmp_path / "checkpoints").manifest.tensors
    assert saved["norm.running_mean"].kind == "buffer"
    assert {name for name in saved if not name.startswith("optimizer/")} == set(Counted().state_dict())


class ScalarTask:
    """Random tokens for a model that returns its loss alone."""

    def __init__(self) -> None:
        self.tokens = RandomTokens()

    def num_samples(self, split):
        return self.tokens.num_samples(split)

    def samples(self, indices, split):
        return self.tokens.samples(indices, split)

    def loss(self, outputs, batch):
        return outputs

    def weight(self, batch):
        return self.tokens.weight(batch)

    def metrics(self, loss):
        return {}


def test_ranks_have_as_many_threads_as_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def instead(*_: object, **options: object) -> list[Trained]:
        asked.append(options["num_threads"])
        return [Trained(folder=tmp_path, first_step=0, losses=())]

    monkeypatch.setattr(importlib.import_module("shardwise.train.run"), "run_ranks", instead)
    told = {"folder": str(tmp_path), "layout": "dp=1", "task": TASK, "training": {"steps": 1, "global_batch": 2}}
    train(told, model=Decoder)
    train({**told, "threads": 3}, model=Decoder)
    assert asked == [None, 3]
