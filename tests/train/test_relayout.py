"""A run that goes over to other layouts in memory: the same bits on either side, and the curve of one device."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.matrix.models import TOKENS, VOCABULARY, Reader
from shardwise.checkpoint.manifest import TensorEntry
from shardwise.errors import LayoutError
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.parallel.states import State
from shardwise.testing import on_ranks
from shardwise.train import divisions, held_state
from shardwise.train.build import Candidate, Job, World, build
from shardwise.train.held_state import Side, held_of
from shardwise.train.loop import run_steps
from shardwise.train.relayout import relayout
from shardwise.train.run import prepare
from shardwise.train.run_file import run_from
from train.test_training import Decoder as Tied

CURVE = 1e-5  # float32 sums taken in another order, passed on by some updates of Adam
WORDS = {"num_train": 40, "num_held_out": 8, "ignored_fraction": 0.3}


def job(folder: Path, layout: str, *, steps: int, experts: bool = False, live: bool = False, **more: object) -> Job:
    training = {"steps": steps, "global_batch": 8, "learning_rate": 3e-3, "warm_up": 2, "seed": 7, "clip": 0.5}
    written = {
        "folder": str(folder),
        "layout": layout,
        "task": {"kind": "random_tokens", "vocabulary_size": VOCABULARY, "sequence_length": TOKENS, **WORDS},
        "timeline": {"steps": []},
        **more,
        "training": {**training, **dict(more.get("training", {}))},  # type: ignore[call-overload]
    }
    model = functools.partial(Reader, 2, experts=experts)
    made = prepare(run_from(written), model=model() if live else model)
    own = Candidate(layout=made.run.layout, predicted_s=1.0)
    return dataclasses.replace(made, candidates=(own, own))


def silent(_kind: str, *, step: int | None = None, **_data: object) -> None:
    """Nobody is told."""


def alone(made: Job, steps: int) -> list[float]:
    """The losses of one device, in this process."""
    run = made.run.model_copy(update={"layout": Layout(), "folder": f"{made.run.folder}-alone-{dist.get_rank()}"})
    context = RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused")
    world = build(dataclasses.replace(made, run=run, candidates=()), context)
    try:
        return run_steps(world, silent, until=steps)
    finally:
        world.program.close()


def whole_state(world: World) -> Mapping[str, torch.Tensor]:
    """Every parameter, moment and buffer, put together from all ranks."""
    own = [
        (name, tensor.told.shape, region, view.clone())
        for name, tensor in held_of(Side(program=world.program, optimizer=world.optimizer)).items()
        for region, view in zip(tensor.told.regions, tensor.views, strict=True)
    ]
    of_ranks: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, own)
    found: dict[str, torch.Tensor] = {}
    for name, shape, region, values in (each for rank in of_ranks for each in rank):
        whole = found.setdefault(name, torch.full(shape, -1, dtype=values.dtype))
        view = whole
        for dim, (start, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
            view = view.narrow(dim, start, size)
        view.copy_(values)
    return found


def check_equal(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []


def go_through(rank: RankContext, made: Job, layouts: list[str], *, round_bytes: int = 1 << 12) -> list[float]:
    """One step on each layout, the state compared on both sides of every change; the losses."""
    world = build(made, rank)
    losses = run_steps(world, silent, until=1)
    for step, text in enumerate(layouts, start=1):
        before = whole_state(world)
        world, told = relayout(world, Layout.parse(text), step=step, round_bytes=round_bytes)
        check_equal(before, whole_state(world))
        assert told.state_bytes > told.rounds > 1
        losses += run_steps(world, silent, until=step + 1)
    world.program.close()
    return losses


def off(losses: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


@on_ranks(2, timeout_s=240)
def test_two_ranks_go_from_axis_to_axis_and_have_the_curve_of_one_device(rank, tmp_path) -> None:
    layouts = ["tp=2", "pp=2,schedule=zb-v", "fsdp=2", "cp=2"]
    made = job(tmp_path, "dp=2", steps=5)
    assert off(go_through(rank, made, layouts), alone(made, 5)) < CURVE


@pytest.mark.slow
@on_ranks(2, timeout_s=240)
def test_two_ranks_go_through_what_replicas_divide_and_through_schedules(rank, tmp_path) -> None:
    layouts = ["fsdp=2,zero=1", "tp=2", "pp=2", "fsdp=2", "pp=2,schedule=interleaved,chunks=2", "fsdp=2,zero=2", "dp=2"]
    layouts += ["pp=2,offload=optimizer", "tp=2,sequence_parallel=on,recompute=full"]
    made = job(tmp_path, "dp=2", steps=1 + len(layouts))
    assert off(go_through(rank, made, layouts), alone(made, 1 + len(layouts))) < CURVE


@on_ranks(2, timeout_s=120)
@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_what_other_optimizers_remember_goes_along(rank, tmp_path, optimizer) -> None:
    made = job(tmp_path, "fsdp=2", steps=3, training={"optimizer": optimizer})
    assert off(go_through(rank, made, ["tp=2", "pp=2"]), alone(made, 3)) < CURVE


@on_ranks(4, timeout_s=240)
@pytest.mark.parametrize(
    "layouts",
    [
        ["tp=2,pp=2", "dp=2,fsdp=2"],
        pytest.param(["fsdp=2,tp=2", "fsdp=2,pp=2,schedule=zb-h1", "dp=2,cp=2", "pp=4"], marks=pytest.mark.slow),
    ],
)
def test_products_of_axes_go_over_to_each_other(rank, tmp_path, layouts) -> None:
    steps = 1 + len(layouts)
    made = job(tmp_path, "fsdp=2,pp=2", steps=steps)
    assert off(go_through(rank, made, layouts), alone(made, steps)) < CURVE


@on_ranks(2, timeout_s=120)
def test_experts_that_are_divided_go_over_to_layouts_that_divide_other_things(rank, tmp_path) -> None:
    made = job(tmp_path, "ep=2", steps=4, experts=True)
    assert off(go_through(rank, made, ["fsdp=2", "pp=2", "ep=2"]), alone(made, 4)) < CURVE


@on_ranks(2, timeout_s=120)
def test_a_live_module_goes_over_too(rank, tmp_path) -> None:
    made = job(tmp_path, "dp=2", steps=3, live=True)
    fresh = dataclasses.replace(made, model=copy.deepcopy(made.model))
    assert off(go_through(rank, made, ["tp=2", "pp=2"]), alone(fresh, 3)) < CURVE


def there_and_back(rank: RankContext, made: Job, other: str, *, at: int) -> list[float]:
    """A run that goes over to `other` behind step `at`, and back at once."""
    world = build(made, rank)
    losses = run_steps(world, silent, until=at)
    before = whole_state(world)
    own = world.run.layout
    for layout in (Layout.parse(other), own):
        world, _ = relayout(world, layout, step=at)
    check_equal(before, whole_state(world))
    try:
        return losses + run_steps(world, silent)
    finally:
        world.program.close()


def uninterrupted(rank: RankContext, made: Job) -> list[float]:
    world = build(made, rank)
    try:
        return run_steps(world, silent)
    finally:
        world.program.close()


FLOAT16 = {"compute": "float16", "loss_scale_window": 2}  # the scale moves within the run


@on_ranks(2, timeout_s=120)
@pytest.mark.parametrize(
    "layout, other, emulate",
    [
        ("pp=2,micro_batches=4", "fsdp=2", False),
        pytest.param("dp=2", "pp=2", True, marks=pytest.mark.slow),
    ],
)
def test_in_16_bits_with_ties_accumulation_and_clipping_there_and_back_changes_no_bit(
    rank, tmp_path, layout, other, emulate
) -> None:
    precision = {"precision": FLOAT16 | {"emulate": emulate}}
    made = dataclasses.replace(job(tmp_path, layout, steps=5, **precision), model=Tied)
    assert there_and_back(rank, made, other, at=3) == uninterrupted(rank, made)


@on_ranks(2, timeout_s=120)
def test_what_a_rank_has_no_room_for_is_undone_on_all_ranks_and_training_goes_on(rank, tmp_path) -> None:
    made = job(tmp_path, "fsdp=2", steps=4)
    world = build(made, rank)
    losses = run_steps(world, silent, until=2)
    before, rooms = whole_state(world), []
    own = held_state.room_for

    def little_room(each: str, entry: TensorEntry, state: State) -> torch.Tensor:
        if not state.parameter.is_meta:  # else it only asks how large it would be
            rooms.append(each)
            if rank.rank == 1 and len(rooms) == 8:
                raise MemoryError("nothing is left")
        return own(each, entry, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_state, "room_for", little_room)
        with pytest.raises(LayoutError, match="rank 1 cannot: MemoryError: nothing is left"):
            relayout(world, Layout(pp=2), step=2, round_bytes=1 << 12)
    assert len(rooms) >= 7  # some rounds had been made
    check_equal(before, whole_state(world))
    with pytest.raises(LayoutError, match="of as many ranks"):
        relayout(world, Layout(pp=3), step=2)
    with pytest.raises(LayoutError, match="schedule that flushes"):
        relayout(world, Layout(pp=2, schedule="pipedream-2bw"), step=2)
    losses += run_steps(dataclasses.replace(world, first_step=2), silent)
    world.program.close()
    assert losses == uninterrupted(rank, made)


@on_ranks(2, timeout_s=120)
def test_a_layout_that_rank_0_cannot_divide_is_an_error_on_all_ranks_and_training_goes_on(rank, tmp_path) -> None:
    made = job(tmp_path, "dp=2", steps=2)
    world = build(made, rank)
    losses = run_steps(world, silent, until=1)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of a proof")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divisions, "plan_tensor", broken)
        with pytest.raises(LayoutError, match="of a proof"):
            relayout(world, Layout(tp=2), step=1)
    losses += run_steps(dataclasses.replace(world, first_step=1), silent)
    world.program.close()
    assert losses == uninterrupted(rank, made)


def left_over() -> tuple[int, int]:
    """Process groups, and regions that ranks share."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return len(dist.distributed_c10d._world.pg_map), sum(" rw-s " in line for line in maps.splitlines())


@on_ranks(2, timeout_s=120)
def test_no_group_and_no_shared_memory_stays_behind(rank, tmp_path) -> None:
    world = build(job(tmp_path, "dp=2", steps=2), rank)
    run_steps(world, silent, until=1)
    found = []
    for _ in range(3):
        for layout in (Layout(fsdp=2), Layout(tp=2)):
            world, _ = relayout(world, layout, step=1)
        found.append(left_over())
    world.program.close()
    assert found[1] == found[2]
