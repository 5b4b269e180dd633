"""Layouts that divide the state of training are one device: ZeRO 1, 2, 3 and hybrid, alone and with all other axes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sharded_side import TOLERANCE, Decoder, batch_of, compare
from shardwise.errors import LayoutError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.program import Program
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext, RankStarter
from shardwise.layout import Communication, Layout, Precision, Techniques
from shardwise.parallel.sharded.bucket import Bucket
from shardwise.testing import on_ranks
from shardwise.verify import verify


@on_ranks(2, timeout_s=60.0)
@pytest.mark.parametrize(
    "layout",
    [
        "fsdp=2,zero=1,micro_batches=2",
        "fsdp=2,zero=2",
        "fsdp=2,zero=2,micro_batches=2",
        "fsdp=2,zero=3,micro_batches=2",
        "fsdp=2,zero=3,micro_batches=2,unshard=step",
        "fsdp=2,zero=3,recompute=full",
    ],
)
def test_two_ranks_that_divide_the_state_are_one_device(rank: RankContext, layout: str) -> None:
    assert compare(rank.rank, layout).worst <= TOLERANCE


@on_ranks(2, timeout_s=60.0)
@pytest.mark.parametrize(
    "layout", ["fsdp=2,zero=1", "fsdp=2,zero=3,micro_batches=2", "fsdp=2,zero=3,micro_batches=2,unshard=step"]
)
def test_ranks_that_do_not_share_memory_are_one_device(rank: RankContext, layout: str) -> None:
    assert compare(rank.rank, layout, tied=True, algorithm="ring").worst <= TOLERANCE


@on_ranks(2, timeout_s=60.0)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_clipping_is_that_of_the_whole_gradient_with_a_table_at_both_ends(rank: RankContext, zero: int) -> None:
    assert compare(rank.rank, f"fsdp=2,zero={zero}", tied=True, clip=0.1).worst <= TOLERANCE


@on_ranks(4, timeout_s=120.0)
@pytest.mark.parametrize(
    "layout",
    [
        "dp=2,fsdp=2,zero=1",
        "dp=2,fsdp=2,zero=3,micro_batches=2",
        "fsdp=4,zero=2",
        "pp=2,fsdp=2,zero=3",
        "pp=2,fsdp=2,zero=2,schedule=zb-h1",
        "pp=2,fsdp=2,zero=3,schedule=zb-v",
        "pp=2,fsdp=2,zero=3,schedule=zb-v,unshard=micro-batch",
        "tp=2,fsdp=2,zero=3",
    ],
)
def test_four_ranks_on_several_axes_are_one_device(rank: RankContext, layout: str) -> None:
    tied = "pp=2" in layout and "schedule" in layout
    assert compare(rank.rank, layout, tied=tied, clip=0.1).worst <= TOLERANCE


def test_the_public_check_holds_a_divided_layout_against_one_device(starter: RankStarter) -> None:
    comparison = verify(Decoder(), batch_of(), layout="fsdp=2,micro_batches=2", steps=2, starter=starter, timeout_s=60)
    assert comparison.equal, str(comparison)
    assert comparison.gradient_error <= 1e-5


def holds_its_part_alone(program: Program) -> None:
    own = torch.tensor(float(sum(state.parameter.numel() for state in program.states.values())))
    trained = sum(parameter.numel() for parameter in program.parameters.values() if parameter.requires_grad)
    assert own <= 0.55 * trained
    dist.all_reduce(own)
    assert own == trained


@on_ranks(2, timeout_s=60.0)
def test_a_rank_updates_its_share_of_the_elements_and_all_together_each_once(rank: RankContext) -> None:
    assert compare(rank.rank, "fsdp=2,zero=2", change=holds_its_part_alone).worst <= TOLERANCE


def gathers_once_a_step(program: Program) -> None:
    kinds = [str(item.kind) for item in program.row(2)]
    assert (kinds[0], kinds[-1], kinds.count("U"), kinds.count("H")) == ("U", "H", 1, 1)


@on_ranks(2, timeout_s=60.0)
def test_a_stage_is_gathered_and_given_back_by_its_row(rank: RankContext) -> None:
    layout = "fsdp=2,zero=3,micro_batches=2,unshard=step"
    assert compare(rank.rank, layout, change=gathers_once_a_step).worst <= TOLERANCE


def refuses_to_stream(program: Program) -> None:
    with pytest.raises(LayoutError, match="fsdp=2 divides"):
        program.stream(first_step=0, update=lambda step, norm: None)


@on_ranks(2, timeout_s=60.0)
def test_steps_without_a_flush_are_refused(rank: RankContext) -> None:
    assert compare(rank.rank, "fsdp=2,zero=1", change=refuses_to_stream).worst <= TOLERANCE


def curve(rank: int, layout: str, precision: Precision, algorithm: str) -> list[float]:
    """Losses of four steps in 16 bits."""
    torch.manual_seed(0)
    model, laid_out = Decoder(), Layout.parse(layout)
    parts = split(batch_of(), micro_batches=1, replicas=2, weights=weigher(model))
    techniques = Techniques(precision=precision, communication=Communication(algorithm=algorithm))
    program = assemble(model, parts[0][0].inputs, layout=laid_out, rank=rank, techniques=techniques)
    states = [state.parameter for state in program.states.values()]
    assert {parameter.dtype for parameter in states} == {torch.float32}
    optimizer = torch.optim.AdamW(states, lr=1e-2)
    losses = []
    for step in range(4):
        losses.append(program.step(parts[program.place.replica], step=step).loss)
        if program.accepts(program.gradient_norm()):
            optimizer.step()
        optimizer.zero_grad()
        program.updated()
    program.close()
    return losses


@on_ranks(2, timeout_s=90.0)
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_masters_that_are_divided_train_as_masters_that_are_not(rank: RankContext, compute: str) -> None:
    precision = Precision(compute=compute)
    wanted = curve(rank.rank, "dp=2", precision, "auto")
    for layout, algorithm in (("fsdp=2,zero=1", "auto"), ("fsdp=2,zero=3", "auto"), ("fsdp=2,zero=3", "ring")):
        assert curve(rank.rank, layout, precision, algorithm) == pytest.approx(wanted, rel=1e-5)


def keep_own_gradients(program: Program) -> None:
    """A sum that is not made: every rank keeps what it has computed itself."""
    states = program._divided_states
    assert states is not None
    states.parts.__dict__["_settle"] = lambda under_way: (
        None if under_way.reduced.part is None else (under_way.work.wait(), under_way.reduced.part.zero_())
    )


def count_own_part_alone(program: Program) -> None:
    program.__dict__["_squares_of_parts"] = lambda: torch.zeros((), dtype=torch.float64)


def gather_nothing_behind_an_update(program: Program) -> None:
    states = program._divided_states
    assert states is not None
    for bucket in states.buckets:
        bucket.__dict__["refresh"] = lambda: None


def gather_old_values(program: Program) -> None:
    states = program._divided_states
    assert states is not None
    for bucket in states.buckets:
        stale = bucket.own.clone()
        bucket.__dict__["gather"] = lambda bucket=bucket, stale=stale: _gathered(bucket, stale)


def _gathered(bucket: Bucket, own: torch.Tensor) -> None:
    newest, bucket.own = bucket.own, own
    Bucket.gather(bucket)
    bucket.own = newest


@on_ranks(2, timeout_s=60.0)
@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("fsdp=2,zero=2", keep_own_gradients),
        ("fsdp=2,zero=3", count_own_part_alone),
        ("fsdp=2,zero=1", gather_nothing_behind_an_update),
        ("fsdp=2,zero=3", gather_old_values),
    ],
)
def test_a_part_that_is_lost_shows(rank: RankContext, layout: str, change: object) -> None:
    assert compare(rank.rank, layout, change=change, algorithm="ring").worst > 1e-3  # type: ignore[arg-type]
