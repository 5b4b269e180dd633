"""Units divided among real ranks, with replicas and stages: loss, gradients, norm and updates of one device."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.describe.tensor import Slice, TensorPlan, UnitPlan
from shardwise.errors import LayoutError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.program import Place, Program
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.parallel.tensor.slices import cut
from shardwise.testing import on_ranks

WIDTH, HEADS, KEY_HEADS, HEAD, FFN, VOCABULARY, TOKENS, SAMPLES = 16, 4, 1, 4, 32, 11, 5, 8


class Block(nn.Module):
    """Grouped-query attention with a norm of every head's queries, and an MLP with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * HEAD)
        self.k = nn.Linear(WIDTH, KEY_HEADS * HEAD)
        self.v = nn.Linear(WIDTH, KEY_HEADS * HEAD)
        self.q_norm = nn.RMSNorm(HEAD)
        self.o = nn.Linear(HEADS * HEAD, WIDTH)
        self.up = nn.Linear(WIDTH, FFN)
        self.down = nn.Linear(FFN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, tokens, _ = x.shape
        y = self.norm(x)
        q = self.q_norm(self.q(y).view(samples, tokens, self.heads, HEAD)).transpose(1, 2)
        k = self.k(y).view(samples, tokens, KEY_HEADS, HEAD).transpose(1, 2)
        v = self.v(y).view(samples, tokens, KEY_HEADS, HEAD).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(samples, tokens, self.heads * HEAD))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def plan(tp: int) -> TensorPlan:
    """By hand: queries and the MLP by columns, `o` and `down` by rows, the one key/value head on every rank."""

    def rows(size: int) -> Slice:
        return Slice.even(0, size, tp)

    def columns(size: int) -> Slice:
        return Slice.even(1, size, tp)

    everyone = Slice(dim=0, size=HEAD, ranges=(((0, HEAD),),) * tp)
    unit = UnitPlan(
        copies=("q", "k", "v", "up"),
        reduces=("o", "down"),
        slices={
            "q.weight": rows(HEADS * HEAD),
            "q.bias": rows(HEADS * HEAD),
            **{f"{name}.{tensor}": everyone for name in ("k", "v") for tensor in ("weight", "bias")},
            "o.weight": columns(HEADS * HEAD),
            "up.weight": rows(FFN),
            "up.bias": rows(FFN),
            "down.weight": columns(FFN),
        },
        partial=frozenset({"q_norm.weight"}),
        attributes={("", "heads"): (HEADS // tp,) * tp},
    )
    return TensorPlan(tp=tp, units={f"blocks.{i}": unit for i in range(4)}, reasons={}, sharded_share=1.0)


def batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=random)
    labels[0, :3] = labels[5, 1:] = -100  # micro-batches weigh differently
    return {"ids": torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=random), "labels": labels}


def weight(inputs: dict[str, torch.Tensor]) -> float:
    return float((inputs["labels"] != -100).sum())


def run(rank: int, layout: Layout, *, steps: int = 2) -> Program:
    """Two SGD steps of a layout; the gradients are those of the last."""
    parts = split(batch(), micro_batches=layout.num_micro_batches(SAMPLES), replicas=layout.dp, weights=weight)
    program = assemble(Model(), parts[0][0].inputs, layout=layout, rank=rank, tensor=plan(layout.tp))
    for step in range(steps):
        for parameter in program.parameters.values():
            parameter.grad = None
        assert program.step(parts[program.place.replica], step=step).loss == pytest.approx(
            EXPECTED.losses[step], rel=1e-5
        )
        assert program.gradient_norm() == pytest.approx(EXPECTED.norms[step], rel=1e-5)
        with torch.no_grad():
            for parameter in program.parameters.values():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return program


class Expected:
    """One device, the whole batch at once."""

    def __init__(self) -> None:
        self.model = Model()
        self.losses, self.norms = [], []
        for _ in range(2):
            self.model.zero_grad(set_to_none=True)
            loss = self.model(**batch())
            loss.backward()
            self.losses.append(float(loss.detach()))
            self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.model.parameters()])))
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter -= 0.1 * parameter.grad


EXPECTED = Expected()


def assert_equal_to_one_device(rank: RankContext, layout: Layout) -> None:
    program = run(rank.rank, layout)
    wanted = dict(EXPECTED.model.named_parameters())
    assert program.parameters
    for name, parameter in program.parameters.items():
        part = program.part_of(name)
        for mine, whole in ((parameter.detach(), wanted[name].detach()), (parameter.grad, wanted[name].grad)):
            assert mine is not None
            expected = whole if part is None else cut(whole, part, program.place.shard)
            # float32: sums over shards and micro-batches in another order; a key bias has no true gradient
            torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-6, msg=f"{name}")
    program.close()


@on_ranks(2)
def test_tp_2(rank: RankContext) -> None:
    assert_equal_to_one_device(rank, Layout(tp=2))


@on_ranks(4)
@pytest.mark.parametrize("layout", ["tp=4", "tp=2,pp=2", "tp=2,dp=2", "tp=2,pp=2,schedule=gpipe,micro_batches=2"])
def test_tp_4_and_with_another_axis(rank: RankContext, layout: str) -> None:
    assert_equal_to_one_device(rank, Layout.parse(layout))


@on_ranks(8)
def test_tp_2_pp_2_dp_2(rank: RankContext) -> None:
    assert_equal_to_one_device(rank, Layout(tp=2, pp=2, dp=2, micro_batches=2))


@on_ranks(2)
def test_every_element_is_counted_by_one_rank(rank: RankContext) -> None:
    program = run(rank.rank, Layout(tp=2), steps=1)
    assert program.owns("embed.weight") == (rank.rank == 0)
    assert program.owns("blocks.0.q.weight")
    assert program.part_of("blocks.0.q.weight") == Slice.even(0, HEADS * HEAD, 2)
    program.close()


@on_ranks(2)
def test_a_new_signature_is_traced_on_the_whole_model(rank: RankContext) -> None:
    program = run(rank.rank, Layout(tp=2), steps=1)
    shorter = {name: tensor[:, :3] for name, tensor in batch().items()}
    parts = split(shorter, micro_batches=1, replicas=1, weights=weight)
    model = Model()
    with torch.no_grad():
        model(**batch())  # the weights before the first update
    loss = program.evaluate(parts[0]).loss
    again = run_one_step()
    with torch.no_grad():
        assert loss == pytest.approx(float(again(**shorter)), rel=1e-5)
    program.close()


def run_one_step() -> nn.Module:
    model = Model()
    model(**batch()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    return model


def test_a_plan_for_another_number_of_shards_is_refused() -> None:
    assert Place(rank=5, dp=2, pp=2, tp=2).shard == 1
    with pytest.raises(LayoutError, match="made for tp=4 and the layout has tp=2"):
        assemble(Model(), batch(), layout=Layout(tp=2), rank=0, tensor=plan(4))
