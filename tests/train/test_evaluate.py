"""Evaluation: all held-out samples, the last ones too, answered in their order; equal figures on every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from shardwise.events import Event, read_events
from shardwise.launch import RankContext
from shardwise.tasks import Answers, RandomTokens, Score, Split
from shardwise.testing import on_ranks
from shardwise.train.build import Job
from shardwise.train.evaluate import held_out_batches
from shardwise.train.run import prepare, train_on_rank
from shardwise.train.run_file import run_from
from train.test_training import Decoder, alone

SCORED = 21  # samples: two batches of 8 and some


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guessed(RandomTokens):
    """Scored by the token that is guessed at every place; a sample's row is as long as its number is odd or even."""

    def answers(self, outputs: object, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        assert isinstance(outputs, torch.Tensor)
        assert type(outputs) is torch.Tensor  # whole, on every layout
        return {"best": outputs.argmax(-1).to(torch.int32), "total": outputs.double().sum((1, 2))}

    def score(self, answers: Answers, indices: Sequence[int], split: Split) -> Score:
        assert list(indices) == list(range(len(indices)))
        labels = self.samples(indices, split)["labels"]
        best, total = torch.stack(list(answers["best"])), torch.stack(list(answers["total"]))
        figures = {"right": float((best == labels).double().mean()), "total": float(total.mean())}
        return Score(figures=figures, report="\n".join(str(row.tolist()) for row in best))


def job(folder: Path, layout: str, **training: object) -> Job:
    told = {
        "steps": 2,
        "global_batch": 8,
        "learning_rate": 3e-2,
        "optimizer": "sgd",
        "seed": 7,
        "evaluate_every": 2,
        **training,
    }
    run = run_from({"folder": str(folder), "layout": layout, "training": told})
    task = Guessed(num_train=40, num_held_out=SCORED, ignored_fraction=0.3)
    return prepare(run, model=Decoder, task=task)


def evaluated(folder: Path, rank: int = 0) -> Event:
    return next(
        event for event in read_events(folder / "events" / f"rank-{rank:05d}.jsonl") if event.kind == "evaluation"
    )


def check(rank: RankContext, folder: Path, layout: str) -> None:
    wanted = job(folder / "run", layout)
    train_on_rank(rank, wanted)
    alone(wanted, rank.rank)
    here, one = evaluated(folder / "run", rank.rank).data, evaluated(folder / f"run-alone-{rank.rank}").data
    assert here["samples"] == one["samples"] == SCORED
    assert here["weight"] == one["weight"]
    assert here["report"] == one["report"]
    assert str(here["report"]).count("\n") == SCORED - 1
    # sums of float32 logits in another order
    assert here["figures"] == pytest.approx(one["figures"], rel=1e-5, abs=1e-4)
    assert here["loss"] == pytest.approx(one["loss"], rel=1e-6)


@on_ranks(2, timeout_s=60)
@pytest.mark.parametrize("layout", ["dp=2", "pp=2", "tp=2", "cp=2", "fsdp=2,zero=3", "pp=2,schedule=zb-v"])
def test_two_ranks_answer_what_one_does(rank, tmp_path, layout) -> None:
    check(rank, tmp_path, layout)


@on_ranks(4, timeout_s=60)
@pytest.mark.parametrize("layout", ["dp=2,pp=2", "tp=2,pp=2"])
def test_four_ranks_answer_what_one_does(rank, tmp_path, layout) -> None:
    check(rank, tmp_path, layout)


def test_a_run_may_evaluate_fewer_samples(tmp_path: Path) -> None:
    context = RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused")
    train_on_rank(context, job(tmp_path, "dp=1", evaluate_batches=1))
    assert evaluated(tmp_path).data["samples"] == 8


@pytest.mark.parametrize(
    "available, size, num_batches, parts, sizes",
    [
        (16, 8, None, 4, [8, 8]),
        (21, 8, None, 4, [7, 7, 7]),
        (21, 8, 2, 4, [8, 8]),
        (13, 8, 2, 4, [6, 7]),
        (9, 8, None, 8, [9]),  # every one of 8 micro-batches has a sample
        (3, 8, None, 8, [3]),
        (0, 8, None, 2, []),
    ],
)
def test_batches_of_held_out_samples_differ_by_one_at_most(
    available: int, size: int, num_batches: int | None, parts: int, sizes: list[int]
) -> None:
    batches = held_out_batches(available, size=size, num_batches=num_batches, parts=parts)
    assert [len(batch) for batch in batches] == sizes
    assert [index for batch in batches for index in batch] == list(range(sum(sizes)))
