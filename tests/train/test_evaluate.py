"""Evaluation: all held-out samples, the last ones too, answered in their order; equal figures on every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.events import Event, read_events
from shardwise.execute.batches import MicroBatch
from shardwise.launch import RankContext
from shardwise.tasks import IGNORED_LABEL, Answers, Game, RandomTokens, Score, Split
from shardwise.testing import on_ranks
from shardwise.trace.absent import Absent
from shardwise.train.build import Job
from shardwise.train.evaluate import held_out_batches, seeing
from shardwise.train.run import prepare, train, train_on_rank
from shardwise.train.run_file import run_from
from shardwise.train.shares import micro_batches_of
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continued(Guessed):
    """Scored by its guesses, and besides by what the model says if its own last word is put behind a text."""

    def replies(self, outputs: object, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        assert isinstance(outputs, torch.Tensor)
        return {"next": outputs[:, -1].argmax(-1)}

    def play(self, split: Split) -> Game:
        batch = self.samples(range(7), split)  # seven: micro-batches differ in size
        said = torch.empty(7, 0, dtype=torch.int64)
        for _ in range(3):
            replies = yield batch | {"labels": torch.full_like(batch["labels"], IGNORED_LABEL)}
            assert replies["next"].shape == (7,)
            said = torch.cat([said, replies["next"][:, None]], 1)
            batch["input_ids"] = torch.cat([batch["input_ids"][:, 1:], replies["next"][:, None]], 1)
        return Score(figures={"said": float(said.double().mean())}, report=f"said {said.tolist()}")


def job(folder: Path, layout: str, *, task: type[Guessed] = Guessed, **training: object) -> Job:
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
    made = task(num_train=40, num_held_out=SCORED, ignored_fraction=0.3)
    return prepare(run, model=Decoder, task=made)


def evaluated(folder: Path, rank: int = 0) -> Event:
    return next(
        event for event in read_events(folder / "events" / f"rank-{rank:05d}.jsonl") if event.kind == "evaluation"
    )


def check(rank: RankContext, folder: Path, layout: str, *, task: type[Guessed] = Guessed) -> Event:
    wanted = job(folder / "run", layout, task=task)
    train_on_rank(rank, wanted)
    alone(wanted, rank.rank)
    here, one = evaluated(folder / "run", rank.rank).data, evaluated(folder / f"run-alone-{rank.rank}").data
    assert here["samples"] == one["samples"] == SCORED
    assert here["weight"] == one["weight"]
    assert here["report"] == one["report"]
    assert str(here["report"]).partition("\n\n")[0].count("\n") == SCORED - 1
    # sums of float32 logits in another order
    assert here["figures"] == pytest.approx(one["figures"], rel=1e-5, abs=1e-4)
    assert here["loss"] == pytest.approx(one["loss"], rel=1e-6)
    return evaluated(folder / "run", rank.rank)


@on_ranks(2, timeout_s=60)
@pytest.mark.parametrize("layout", ["dp=2", "pp=2", "tp=2", "cp=2", "fsdp=2,zero=3", "pp=2,schedule=zb-v"])
def test_two_ranks_answer_what_one_does(rank, tmp_path, layout) -> None:
    check(rank, tmp_path, layout)


@on_ranks(4, timeout_s=60)
@pytest.mark.parametrize("layout", ["dp=2,pp=2", pytest.param("tp=2,pp=2", marks=pytest.mark.slow)])
def test_four_ranks_answer_what_one_does(rank, tmp_path, layout) -> None:
    check(rank, tmp_path, layout)


@on_ranks(2, timeout_s=60)
@pytest.mark.parametrize("layout", ["dp=2", "pp=2", "tp=2"])
def test_two_ranks_play_what_one_does(rank, tmp_path, layout) -> None:
    told = check(rank, tmp_path, layout, task=Continued).data
    assert sorted(told["figures"]) == ["right", "said", "total"]
    assert "\n\nsaid [[" in told["report"]


@on_ranks(4, timeout_s=60)
def test_four_ranks_play_what_one_does(rank, tmp_path) -> None:
    check(rank, tmp_path, "dp=2,pp=2", task=Continued)


class Doubting(Decoder):
    """Says at once how hard a text looks, on the first stage; no loss reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.hard = torch.nn.Linear(self.head.in_features, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        hard = self.hard(self.embed(input_ids))
        return {"hard": hard, "said": super().forward(input_ids, labels)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doubted(Guessed):
    """Reads how hard the texts look."""

    def loss(self, outputs: object, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert isinstance(outputs, Mapping)
        return super().loss(outputs["said"], batch)

    def answers(self, outputs: object, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        assert isinstance(outputs, Mapping)
        return {**super().answers(outputs["said"], batch), "hard": outputs["hard"].mean((1, 2))}


def test_an_answer_that_reads_what_is_not_there_is_an_error_that_names_it() -> None:
    there = torch.zeros(2, 3, 5)
    hard = Absent(what="hard#0 output 0", shape=(2, 3, 1), dtype=torch.float32, device="cpu")
    task, batch = Doubted(num_train=40, num_held_out=SCORED), MicroBatch(index=0, samples=(0, 1), inputs={}, weight=1.0)
    with pytest.raises(ConfigError, match=r"Doubted.answers reads hard#0 output 0, which the loss does not need"):
        seeing(task, task.answers, [])(batch, {"said": there, "hard": hard})


@pytest.mark.slow  # a run
def test_what_answers_read_and_the_loss_does_not_is_told_before_the_first_step(tmp_path: Path) -> None:
    wanted = job(tmp_path, "pp=2")
    with pytest.raises(ConfigError, match=r"Doubted.answers reads hard.*, which the loss does not need.*use pp=1"):
        train(wanted.run, model=Doubting, task=Doubted(num_train=40, num_held_out=SCORED))
    kinds = {event.kind for event in read_events(tmp_path / "events" / "rank-00000.jsonl")}
    assert "start" in kinds
    assert "step" not in kinds


def test_rows_of_a_played_batch_are_enough_for_the_replicas() -> None:
    assert [micro_batches_of(rows, replicas=2, at_most=4) for rows in (2, 7, 8, 100)] == [1, 3, 4, 4]
    with pytest.raises(ConfigError, match="1 rows are for 2 replicas; yield as many"):
        micro_batches_of(1, replicas=2, at_most=4)


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
