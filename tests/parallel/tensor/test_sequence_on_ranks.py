"""Sequence parallelism on real ranks, with dropout, stages and replicas: the loss and every gradient of one device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from parallel.tensor.blocks import Block
from shardwise.describe.tensor import SequenceParallel
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.program import Program
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.parallel.tensor.slices import cut
from shardwise.testing import on_ranks

pytestmark = pytest.mark.slow  # `make verify-all`

WIDTH, VOCABULARY, TOKENS, SAMPLES = 16, 40, 5, 4  # 2 and 3 tokens on two ranks


class Reader(nn.Module):
    """Residual blocks with dropout between a table and a head; code between units works on tokens too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.blocks = nn.ModuleList(Block(dropout=0.1) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.double()

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.embed(ids), 0.1, self.training) * self.scale
        skip = x
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x + 0.5 * skip))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {
        "ids": torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=random),
        "labels": torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=random),
    }


def weight(inputs: dict[str, torch.Tensor]) -> float:
    return float(inputs["labels"].numel())


def stepped(layout: Layout, rank: int) -> tuple[Program, float]:
    """A program after one step, and its loss."""
    parts = split(batch(), micro_batches=layout.num_micro_batches(SAMPLES), replicas=layout.dp, weights=weight)
    program = assemble(Reader(), parts[0][0].inputs, layout=layout, rank=rank)
    return program, program.step(parts[program.place.replica], step=3).loss


def assert_equal_to_one_device(rank: RankContext, layout: Layout) -> None:
    one, expected = stepped(Layout(micro_batches=layout.num_micro_batches(SAMPLES) * layout.dp), 0)
    program, loss = stepped(layout, rank.rank)
    assert program.divided is not None
    assert program.divided.plan.deals_tokens
    assert not program.divided.plan.all_tokens
    assert loss == pytest.approx(expected, rel=1e-12)
    norm = torch.stack([p.grad.norm() for p in one.parameters.values() if p.grad is not None]).norm()
    assert program.gradient_norm() == pytest.approx(float(norm), rel=1e-10)
    for name, parameter in program.parameters.items():
        part, wanted = program.part_of(name), one.parameters[name].grad
        assert wanted is not None, name
        assert parameter.grad is not None, name
        wanted = wanted if part is None else cut(wanted, part, program.place.shard)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12, msg=name)  # sums in another order
    program.close()
    one.close()


@on_ranks(2, timeout_s=90.0)
@pytest.mark.parametrize("how", ["on", "regather"])
def test_tp_2(rank: RankContext, how: str) -> None:
    assert_equal_to_one_device(rank, Layout(tp=2, sequence_parallel=SequenceParallel(how)))


@on_ranks(4, timeout_s=90.0)
@pytest.mark.parametrize("axes", [{"pp": 2}, {"dp": 2}])
def test_tp_2_with_another_axis(rank: RankContext, axes: dict[str, int]) -> None:
    assert_equal_to_one_device(rank, Layout(tp=2, sequence_parallel=SequenceParallel.ON, **axes))


class Tied(nn.Module):
    """An odd vocabulary, one table for words and logits, one block at two depths, a loss that also reads all logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY + 1, WIDTH, padding_idx=3)
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList([Block(dropout=0.1)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY + 1, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions
        for _ in range(2):
            x = self.blocks[0](x)
        logits = self.head(self.norm(x)).flatten(0, 1)
        entropy = F.cross_entropy(logits, labels.flatten(), ignore_index=7, label_smoothing=0.1)
        return entropy + 1e-2 * logits.logsumexp(-1).square().mean()  # z-loss


@on_ranks(2, timeout_s=90.0)
@pytest.mark.parametrize("how", ["on", "regather"])
def test_ties_a_block_at_two_depths_smoothing_and_a_z_loss_in_training_and_evaluation(
    rank: RankContext, how: str
) -> None:
    parts = split(batch(), micro_batches=1, replicas=1, weights=weight)[0]
    layout = Layout(tp=2, sequence_parallel=SequenceParallel(how))
    one = assemble(Tied(), parts[0].inputs, layout=Layout(), rank=0)
    program = assemble(Tied(), parts[0].inputs, layout=layout, rank=rank.rank)
    assert program.divided is not None
    assert program.divided.plan.deals_tokens
    assert program.part_of("embed.weight") is not None
    loss = program.step(parts, step=3).loss
    assert loss == pytest.approx(one.step(parts, step=3).loss, rel=1e-12)
    norm = torch.stack([p.grad.norm() for p in one.parameters.values() if p.grad is not None]).norm()
    assert program.gradient_norm() == pytest.approx(float(norm), rel=1e-10)
    for name, parameter in program.parameters.items():
        part, wanted = program.part_of(name), one.parameters[name].grad
        assert wanted is not None, name
        wanted = wanted if part is None else cut(wanted, part, program.place.shard)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12, msg=name)  # sums in another order
    for each in (one, program):
        each.model.eval()
    assert program.evaluate(parts).loss == pytest.approx(one.evaluate(parts).loss, rel=1e-12)
    program.close()
    one.close()


@on_ranks(4, timeout_s=90.0)
@pytest.mark.parametrize("tokens", [1, 3])
def test_stages_of_two_shards_where_one_has_fewer_tokens_or_none(rank: RankContext, tokens: int) -> None:
    layout = Layout(tp=2, pp=2, sequence_parallel=SequenceParallel.ON)
    program, _ = stepped(layout, rank.rank)
    shorter = {name: tensor[:, :tokens] for name, tensor in batch().items()}
    parts = split(shorter, micro_batches=layout.num_micro_batches(SAMPLES), replicas=1, weights=weight)
    for parameter in program.parameters.values():
        parameter.grad = None
    loss = program.step(parts[0], step=4).loss
    one = assemble(Reader(), parts[0][0].inputs, layout=Layout(), rank=0)
    assert loss == pytest.approx(one.step(parts[0], step=4).loss, rel=1e-12)
    for name, parameter in program.parameters.items():
        part, wanted = program.part_of(name), one.parameters[name].grad
        assert parameter.grad is not None, name
        assert wanted is not None, name
        wanted = wanted if part is None else cut(wanted, part, program.place.shard)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12, msg=name)  # sums in another order
    program.close()
    one.close()


@on_ranks(2, timeout_s=90.0)
def test_it_moves_the_bytes_of_tensor_parallelism_and_saves_less(rank: RankContext) -> None:
    moved, saved = {}, {}
    for how in SequenceParallel:
        layout = Layout(tp=2, sequence_parallel=how)
        program, _ = stepped(layout, rank.rank)
        assert program.divided is not None
        group = program.divided.group
        even = {name: tensor[:, :4] for name, tensor in batch().items()}
        parts = split(even, micro_batches=1, replicas=1, weights=weight)
        program.step(parts[0], step=4)  # what is new is compared, and sent twice
        before = counts(group)
        program.step(parts[0], step=4)
        after = counts(group)
        moved[how] = 2 * (after.reduced - before.reduced) + after.halves - before.halves
        saved[how] = kept_by_a_forward(program.model, even)
        program.close()
    of_scale = 2 * 2 * WIDTH * 8  # the gradient of the parameter that is used between units: forward and backward
    off, on, regather = moved.values()
    assert off <= on <= off + of_scale
    assert on < regather < 1.3 * on
    off, on, regather = saved.values()
    assert regather < 0.95 * on < 0.95 * off


@on_ranks(4, timeout_s=90.0)
def test_what_a_unit_returns_by_tokens_crosses_to_the_next_stage_by_tokens(rank: RankContext) -> None:
    sent = {}
    for how in (SequenceParallel.OFF, SequenceParallel.ON):
        program, _ = stepped(Layout(tp=2, pp=2, micro_batches=2, sequence_parallel=how), rank.rank)
        even = {name: tensor[:, :4] for name, tensor in batch().items()}
        parts = split(even, micro_batches=2, replicas=1, weights=weight)
        program.step(parts[0], step=4)  # messages of what is new have headers
        sent[how] = program.step(parts[0], step=5).sent_bytes["pp.send"]
        program.close()
    a_value = SAMPLES * 4 * WIDTH * 8
    assert sent[SequenceParallel.OFF] == 2 * a_value  # of the last block, and what goes around the blocks
    assert sent[SequenceParallel.ON] == a_value // 2 + a_value  # the second is made between units


def kept_by_a_forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that are allocated in a forward and still there when it has ended."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = model(**inputs)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


@dataclasses.dataclass
class Counts:
    reduced: int
    halves: int  # an all-gather or a reduce-scatter is half an all-reduce


def counts(group: object) -> Counts:
    reduced, gathered, scattered = (getattr(group, f"{name}_bytes") for name in ("reduced", "gathered", "scattered"))
    return Counts(reduced, gathered + scattered)
