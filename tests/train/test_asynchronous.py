"""Workers that meet every so many steps compute what the formula of their rule says, whatever a worker's layout."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardwise.checkpoint.source import open_checkpoint
from shardwise.errors import ConfigError
from shardwise.events import read_events
from shardwise.launch import RankContext, RankPool, RankStarter
from shardwise.train.asynchronous.workers import Workers
from shardwise.train.build import Job, World, build
from shardwise.train.model import values_of
from shardwise.train.run import Trained, prepare, train_on_rank
from shardwise.train.run_file import run_from
from shardwise.train.update import update
from train.test_training import TASK, Decoder, evaluations, off

STEPS = 8

# Sums of float32 gradients in another order, magnified by 8 updates; measured 2e-7.
CURVE = 1e-5

TRAINING = {
    "steps": STEPS,
    "global_batch": 8,
    "learning_rate": 3e-2,
    "seed": 7,
    "clip": 0.0,
    "epsilon": 1e-3,  # AdamW divides by gradients: where those are rounding errors alone, so are its updates
    "evaluate_every": 4,
}
LOCAL_SGD = {"method": "local-sgd", "every": 1}
DILOCO = {"method": "diloco", "every": 3, "outer_learning_rate": 0.6, "outer_momentum": 0.8}


def job(folder: Path, *, layout: str, resume: bool = False, **more: object) -> Job:
    training = {key: more.pop(key) for key in list(more) if key in (*TRAINING, "optimizer", "warm_up")}
    written = {
        "folder": str(folder),
        "layout": layout,
        "task": TASK,
        "training": TRAINING | training,
        "checkpoint": {"every": STEPS},
        **more,
    }
    return prepare(run_from(written), model=Decoder, resume=resume)


@pytest.fixture(scope="module")
def pools(starter: RankStarter) -> Iterator[dict[int, RankPool]]:
    """Ranks without a process group: workers make their own."""
    made = {n: RankPool(n, starter=starter, num_threads=1, process_group_timeout_s=None) for n in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()


def on_rank(context: RankContext, job: Job) -> Trained:
    meeting = Path(job.run.folder).parent / f"meeting-of-{Path(job.run.folder).name}-{job.resume}"
    try:
        return train_on_rank(dataclasses.replace(context, rendezvous=meeting.as_uri()), job)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def trained(pools: Mapping[int, RankPool], job: Job) -> Trained:
    ranks = pools[job.run.layout.world_size].run(on_rank, job, timeout_s=120)
    assert all(rank.losses == ranks[0].losses for rank in ranks)  # of all workers, on every rank
    return ranks[0]


def weights(job: Job) -> dict[str, torch.Tensor]:
    source = open_checkpoint(job.run.checkpoint_folder)
    model = Decoder()
    return dict(values_of(source, model)([name for name, _ in model.named_parameters()]))


def furthest(mine: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    return max(float((mine[name] - value).norm() / value.norm()) for name, value in reference.items())


@pytest.mark.parametrize(
    "layout",
    [
        "dp=2",
        "dp=2,pp=2",
        pytest.param("dp=2,tp=2", marks=pytest.mark.slow),
        pytest.param("dp=2,fsdp=2", marks=pytest.mark.slow),
        pytest.param("dp=2,cp=2", marks=pytest.mark.slow),
    ],
)
def test_local_sgd_that_meets_every_step_is_synchronous_data_parallelism(pools, tmp_path, layout) -> None:
    meeting = job(tmp_path / "meeting", layout=layout, optimizer="sgd", asynchronous=LOCAL_SGD)
    synchronous = job(tmp_path / "synchronous", layout=layout, optimizer="sgd")
    assert off(trained(pools, meeting).losses, trained(pools, synchronous).losses) <= CURVE
    assert furthest(weights(meeting), weights(synchronous)) <= CURVE
    assert off(tuple(evaluations(tmp_path / "meeting")), tuple(evaluations(tmp_path / "synchronous"))) <= CURVE


def test_a_worker_of_two_stages_computes_what_the_formula_of_diloco_says(pools, tmp_path) -> None:
    wanted = job(tmp_path / "run", layout="dp=2,pp=2", warm_up=2, clip=0.5, asynchronous=DILOCO)
    found = trained(pools, wanted)
    losses, last = diloco_as_it_reads(wanted, tmp_path)
    assert off(found.losses, losses) <= CURVE
    assert furthest(weights(wanted), last) <= CURVE


def diloco_as_it_reads(job: Job, folder: Path) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
    """Both workers one behind the other, each on one device; Nesterov's formula on the mean of what they have done."""
    worlds = [world_of_worker(job, folder / str(k), k) for k in range(2)]
    parameters = [dict(world.program.parameters) for world in worlds]
    start = {name: p.detach().clone() for name, p in parameters[0].items()}
    velocity = {name: torch.zeros_like(p) for name, p in start.items()}
    losses: list[float] = []
    tokens = [0.0, 0.0]
    for step in range(STEPS):
        results = [world.program.step(world.micro_batches(step), step=step) for world in worlds]
        total = sum(result.weight for result in results)
        losses.append(sum(result.loss * result.weight for result in results) / total)
        for k, world in enumerate(worlds):
            norm = world.program.gradient_norm()
            update(world.program, world.optimizer, job.run.training, step=step, norm=norm)
            world.program.model.zero_grad()
            tokens[k] += results[k].weight
        if (step + 1) % DILOCO["every"] and step + 1 < STEPS:
            continue
        with torch.no_grad():
            for name, begun in start.items():
                mean = sum(n * (begun - own[name]) for n, own in zip(tokens, parameters, strict=True)) / sum(tokens)
                velocity[name] = 0.8 * velocity[name] + mean
                begun -= 0.6 * (mean + 0.8 * velocity[name])
                for own in parameters:
                    own[name].copy_(begun)
        tokens = [0.0, 0.0]
    return tuple(losses), start


def world_of_worker(job: Job, folder: Path, index: int) -> World:
    """A worker of the run on one device, in this process, with its own share of every batch."""
    micro_batches = job.run.num_micro_batches
    alone = run_from({"layout": f"micro_batches={micro_batches}", "training": {"steps": 1, "global_batch": 8}}).layout
    context = RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused")
    run = job.run.model_copy(update={"folder": str(folder), "layout": alone, "asynchronous": None})
    world = build(dataclasses.replace(job, run=run), context)
    told = Workers.__new__(Workers)  # without counterparts: it is asked for its number alone
    told.index = index
    return dataclasses.replace(world, run=job.run, workers=told)


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        pytest.param("local-sgd", "dp=2", marks=pytest.mark.slow),
        pytest.param("diloco", "dp=2,fsdp=2", marks=pytest.mark.slow),
        ("delayed", "dp=2"),
        ("eager-diloco", "dp=2,fsdp=2"),
    ],
)
def test_a_resumed_run_goes_on_bit_by_bit_between_two_exchanges(pools, tmp_path, method, layout) -> None:
    def parts(**more: object) -> Job:
        asynchronous = {"method": method, "every": 4, "fragments": 2}
        return job(tmp_path / "run", layout=layout, checkpoint={"every": 5}, asynchronous=asynchronous, **more)

    whole = trained(pools, parts())
    last = weights(parts(resume=True))
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_8")
    (checkpoints / "latest").unlink()
    resumed = trained(pools, parts(resume=True))
    assert resumed.first_step == 5
    assert resumed.losses == whole.losses[5:]
    for name, value in weights(parts(resume=True)).items():
        assert torch.equal(value, last[name]), name


def test_a_run_goes_on_without_workers_and_with_more_of_them(pools, tmp_path) -> None:
    first = job(tmp_path / "run", layout="dp=2", checkpoint={"every": 5}, asynchronous=DILOCO)
    trained(pools, first)
    for layout, asynchronous in (("dp=2", None), ("dp=4", DILOCO), ("dp=2,pp=2", DILOCO)):
        run = dataclasses.replace(first, resume=True).run.model_copy(
            update={
                "layout": run_from({"layout": layout, "training": {"steps": 1, "global_batch": 8}}).layout,
                "training": first.run.training.model_copy(update={"steps": 10}),
                "asynchronous": None if asynchronous is None else first.run.asynchronous,
            }
        )
        on = trained(pools, dataclasses.replace(first, run=run, resume=True))
        assert (on.first_step, len(on.losses)) == (8, 2)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_10")
        (tmp_path / "run" / "checkpoints" / "latest").unlink()


def test_workers_exchange_every_so_many_steps_and_nothing_between(pools, tmp_path) -> None:
    trained(pools, job(tmp_path / "run", layout="dp=2", asynchronous={"method": "diloco", "every": 3}))
    events = [event for event in read_events(tmp_path / "run" / "events") if event.kind == "step"]
    num_parameters = sum(parameter.numel() for parameter in Decoder().parameters())
    for rank in range(2):
        sent = [event.data["sent_bytes"] for event in events if event.rank == rank]
        exchanged = 4 * num_parameters + 16  # and the tokens behind it
        assert [each["dp.exchange"] for each in sent] == [exchanged * (step in (2, 5, 7)) for step in range(STEPS)]
        assert all(each.get("dp.all_reduce", 0) == 0 for each in sent)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"layout": "dp=1"}, "layout.dp=2"),
        ({"layout": "dp=2,pp=2,micro_batches=2,schedule=pipedream-2bw"}, "never between two steps"),
        ({"asynchronous": {"method": "local-sgd", "outer_momentum": 0.5}}, "no outer optimizer"),
        ({"asynchronous": {"every": 2, "fragments": 3}}, "fragments=2"),
    ],
)
def test_what_does_not_go_together_is_said_before_a_rank_is_started(tmp_path, changed, rule) -> None:
    with pytest.raises(ConfigError, match=rule):
        job(tmp_path, **{"layout": "dp=2", "asynchronous": DILOCO, **changed})
