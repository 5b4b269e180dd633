"""Training with experts divided among ranks: the curve of one device, events with loads, checkpoints for any layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from parallel.expert.models import Block, ListedMix, StackedMix
from shardwise.checkpoint.source import open_checkpoint
from shardwise.errors import LayoutError
from shardwise.events import read_events
from shardwise.launch import RankContext
from shardwise.testing import on_ranks
from shardwise.train.build import Job
from shardwise.train.checks import check_experts
from shardwise.train.run import prepare, train_on_rank
from shardwise.train.run_file import run_from

pytestmark = pytest.mark.slow  # `make verify-all`

WIDTH, VOCABULARY, STEPS = 8, 16, 6

# Sums of float32 gradients in another order, magnified by the updates of Adam.
CURVE = 1e-5


class Reader(nn.Module):
    """Blocks with stacked and with listed experts, and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(mix) for mix in (StackedMix, ListedMix, StackedMix, ListedMix))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = self.dropout(block(x))
        return self.head(x)


def job(folder: Path, layout: str, *, steps: int = STEPS, saved: Path | None = None, resume: bool = False) -> Job:
    run = {
        "folder": str(folder),
        "layout": layout,
        "task": {"kind": "random_tokens", "num_train": 40, "num_held_out": 16, "ignored_fraction": 0.3,
                 "vocabulary_size": VOCABULARY, "sequence_length": 8},
        "training": {"steps": steps, "global_batch": 8, "learning_rate": 3e-3, "schedule": "constant", "seed": 7,
                     "clip": 0.5, "evaluate_every": 3},
        "checkpoint": {} if saved is None else {"folder": str(saved), "every": 0 if resume else 3},
    }  # fmt: skip
    return prepare(run_from(run), model=Reader, resume=resume)


def alone(wanted: Job, rank: int) -> tuple[float, ...]:
    """The losses of the same run on one device, in this process."""
    one = run_from({"layout": "dp=1", "training": {"steps": 1, "global_batch": 8}}).layout
    run = wanted.run.model_copy(update={"folder": f"{wanted.run.folder}-alone-{rank}", "layout": one})
    context = RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused")
    return train_on_rank(context, dataclasses.replace(wanted, run=run)).losses


def off(losses: tuple[float, ...], reference: tuple[float, ...]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


@on_ranks(4, timeout_s=110)
def test_experts_saved_by_one_layout_are_resumed_by_another(rank, tmp_path) -> None:
    saved = tmp_path / "saved"
    uninterrupted = alone(job(tmp_path / "whole", "dp=1"), rank.rank)
    first = train_on_rank(rank, job(tmp_path / "first", "ep=2,dp=2", steps=3, saved=saved))
    assert off(first.losses, uninterrupted[:3]) <= CURVE
    resumed = train_on_rank(rank, job(tmp_path / "resumed", "ep=2,tp=2", saved=saved, resume=True))
    assert resumed.first_step == 3
    assert off(resumed.losses, uninterrupted[3:]) <= CURVE
    assert off(alone(job(tmp_path / "one", "dp=1", saved=saved, resume=True), rank.rank), uninterrupted[3:]) <= CURVE
    if rank.rank == 0:
        shapes = {name: tuple(t.global_shape) for name, t in open_checkpoint(saved).manifest.tensors.items()}
        assert shapes["blocks.0.mix.experts.up"] == (5, 8, 12)
        assert shapes["optimizer/exp_avg/blocks.0.mix.experts.up"] == (5, 8, 12)
        assert shapes["blocks.1.mix.experts.4.up.weight"] == (12, 8)


@on_ranks(2, timeout_s=60)
def test_the_load_of_every_expert_is_an_event(rank, tmp_path) -> None:
    train_on_rank(rank, job(tmp_path, "ep=2", steps=2))
    if rank.rank == 0:
        told = [event for event in read_events(tmp_path / "events") if event.kind == "experts" and not event.rank]
        assert [event.step for event in told] == [0, 1]
        for event in told:
            rows = event.data["rows"]
            assert list(rows) == [f"blocks.{i}.mix.experts" for i in range(4)]
            assert all(sum(of_layer) == 8 * 8 * 2 for of_layer in rows.values())
            assert event.data["dropped"] == 0
            assert event.data["all_to_all_bytes"] > 0
            assert event.data["imbalance"] == max(max(each) * 5 / sum(each) for each in rows.values())


def test_more_ranks_than_experts_are_refused_before_any_is_started(tmp_path) -> None:
    with pytest.raises(LayoutError, match="there are 5 experts and ep=6"):
        check_experts(job(tmp_path, "ep=6"))
