"""Shards that keep the logits of their vocabulary apart: losses of one device, nothing joined, reads on all or none."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from shardwise.errors import DataflowError, TransferError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.program import Program
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.parallel.tensor.divided_logits import whole_of
from shardwise.parallel.tensor.slices import cut
from shardwise.testing import on_ranks

SAMPLES, TOKENS, WIDTH, VOCABULARY = 4, 5, 8, 811  # odd, and much wider than all else
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def no_labels_at_ends(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[:, 0] = labels[1, 2:] = -100
    return labels


KEPT: dict[str, Loss] = {
    "of every token": lambda z, ids: F.cross_entropy(z.flatten(0, 1), ids.flatten()),
    "of the next token": lambda z, ids: F.cross_entropy(z[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)),
    "without some labels": lambda z, ids: F.cross_entropy(z.view(-1, z.size(-1)), no_labels_at_ends(ids).view(-1)),
    "smooth": lambda z, ids: nn.CrossEntropyLoss(label_smoothing=0.1)(z.float().flatten(0, 1), ids.flatten()),
    "a sum": lambda z, ids: F.cross_entropy(z.flatten(0, 1), ids.flatten(), reduction="sum") / ids.numel(),
    "each by itself": lambda z, ids: F.cross_entropy(z.flatten(0, 1), ids.flatten(), reduction="none").square().mean(),
}
JOINED: dict[str, Loss] = {
    "by hand": lambda z, ids: -z.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).mean(),
    "the vocabulary in front": lambda z, ids: F.cross_entropy(z.transpose(1, 2), ids),
    "with a second term": lambda z, ids: F.cross_entropy(z.flatten(0, 1), ids.flatten()) + z.logsumexp(-1).mean(),
}


class Reader(nn.Module):
    """A table, a block, a head; the loss is whatever it is given."""

    def __init__(self, loss: Loss, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.loss = loss

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.loss(self.head(x), ids)


class Behind(Reader):
    """Layers behind the head, which another stage may hold."""

    def __init__(self) -> None:
        super().__init__(lambda z, ids: z.mean())
        self.after = nn.ModuleList(nn.Sequential(nn.Linear(VOCABULARY, 64), nn.Linear(64, 4)) for _ in range(1))
        self.loss = lambda z, ids: self.after[0](z).square().mean() + z.square().mean()


IDS = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))


def laid_out(rank: RankContext, model: Reader, layout: Layout) -> tuple[Program, Callable[[], float]]:
    parts = split({"ids": IDS}, micro_batches=layout.num_micro_batches(SAMPLES), replicas=1, weights=lambda _: 1.0)
    program = assemble(model, parts[0][0].inputs, layout=layout, rank=rank.rank)

    def step() -> float:
        for parameter in program.parameters.values():
            parameter.grad = None
        return program.step(parts[0], step=0).loss

    return program, step


def crossed(program: Program) -> int:
    """Bytes that this rank has given to sums and joins over its shards."""
    group = program.divided.group
    return group.reduced_bytes + group.gathered_bytes + group.scattered_bytes


def step_equals_one_device(rank: RankContext, make: Callable[[], Reader], layout: Layout) -> int:
    """Bytes that crossed between the shards in the second step."""
    whole = make()
    expected = whole(IDS)
    expected.backward()
    program, step = laid_out(rank, make(), layout)
    for _ in range(2):
        before = crossed(program)
        assert step() == pytest.approx(float(expected.detach()), rel=1e-5)
    assert program.part_of("head.weight") is not None
    for name, parameter in program.parameters.items():
        part, wanted = program.part_of(name), whole.get_parameter(name).grad
        mine = wanted if part is None else cut(wanted, part, program.place.shard)
        # float32: sums over shards in another order
        torch.testing.assert_close(parameter.grad, mine, rtol=2e-4, atol=2e-6, msg=name)
    nbytes = crossed(program) - before
    program.close()
    return nbytes


ONE_ROW_OF_LOGITS = 4 * VOCABULARY


@on_ranks(2)
@pytest.mark.parametrize("loss", KEPT)
def test_a_loss_that_needs_no_other_shards_logits_joins_none(rank: RankContext, loss: str) -> None:
    for tied in (False, True):
        nbytes = step_equals_one_device(rank, lambda tied=tied: Reader(KEPT[loss], tied=tied), Layout(tp=2))
        sums = 4 * SAMPLES * TOKENS * (6 * WIDTH + 4)  # table, two blocks and back, head back; 4 numbers of each token
        assert nbytes <= sums < SAMPLES * TOKENS * ONE_ROW_OF_LOGITS


@on_ranks(2)
@pytest.mark.parametrize("loss", JOINED)
def test_a_loss_that_reads_all_logits_joins_them_on_every_shard(rank: RankContext, loss: str) -> None:
    nbytes = step_equals_one_device(rank, lambda: Reader(JOINED[loss]), Layout(tp=2))
    assert nbytes >= SAMPLES * TOKENS * ONE_ROW_OF_LOGITS


@on_ranks(4)
@pytest.mark.parametrize("layout", ["tp=2,pp=2,micro_batches=2", "tp=4"])
def test_the_last_stage_keeps_them_apart_and_four_shards_do(rank: RankContext, layout: str) -> None:
    nbytes = step_equals_one_device(rank, lambda: Reader(KEPT["of the next token"]), Layout.parse(layout))
    assert nbytes < SAMPLES * TOKENS * ONE_ROW_OF_LOGITS / 2


@on_ranks(4)
def test_logits_that_another_stage_reads_cross_whole(rank: RankContext) -> None:
    stages = (("embed", "blocks.0", "blocks.1", "head"), ("after.0",))
    step_equals_one_device(rank, Behind, Layout(tp=2, pp=2, micro_batches=2, stages=stages))


@on_ranks(2)
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_read_on_one_shard_alone_is_an_error_of_both(rank: RankContext, evaluates: bool) -> None:
    def looks(z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(z.flatten(0, 1), ids.flatten())
        if rank.rank == 0 and looking:
            whole_of(z)
        return loss

    looking = False
    program, step = laid_out(rank, Reader(looks), Layout(tp=2))
    if evaluates:
        parts = split({"ids": IDS}, micro_batches=1, replicas=1, weights=lambda _: 1.0)
        step = functools.partial(program.evaluate, parts[0])
    step()
    looking = True
    with pytest.raises((RuntimeError, TransferError), match="the same in the same order|closed the channel"):
        step()
    if rank.rank == 0:  # the other one has begun to sum the loss over all ranks, which test after this one
        dist.all_reduce(torch.zeros((), dtype=torch.float64))
    program.close()


@on_ranks(2)
def test_a_read_behind_the_step_is_an_error(rank: RankContext) -> None:
    kept: list[torch.Tensor] = []

    def keeps(z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        kept[:] = [z]
        return F.cross_entropy(z.flatten(0, 1), ids.flatten())

    program, step = laid_out(rank, Reader(keeps), Layout(tp=2))
    step()
    assert kept[0].shape == (SAMPLES, TOKENS, VOCABULARY)
    with pytest.raises(DataflowError, match=r"logits \(4, 5, 811\) .* are read after their step"):
        kept[0].argmax(-1)
    program.close()
