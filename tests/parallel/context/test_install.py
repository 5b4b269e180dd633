"""Units on own tokens, as threads of one process: the ranks' gradients add up to those of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.describe.context import ContextPlan, UnitContext
from shardwise.errors import DataflowError
from shardwise.parallel.context.attend import Attention, Gathered
from shardwise.parallel.context.install import DealtContext
from shardwise.parallel.context.plan_context import plan_context
from shardwise.parallel.context.region import ContextRegion
from shardwise.parallel.context.ways import RING, ULYSSES
from shardwise.parallel.tensor.instance import twin
from shardwise.parallel.tensor.sequence_shard import SequenceShard, shard_of
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads

VOCABULARY, WIDTH, TOKENS, SAMPLES = 11, 8, 13, 2
WAYS = [(RING, True), (ULYSSES, False), (Gathered(), False)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        samples, tokens, _ = x.shape
        q, k, v = (
            part.view(samples, tokens, 2, WIDTH // 2).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Learned positions, the loss of the next token by slices of logits and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        labels = F.pad(ids, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.view(-1, VOCABULARY), labels.reshape(-1))


def made(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()


def dealt(
    model: nn.Module, run: Callable[[nn.Module], Any], plan: ContextPlan, attention: Attention
) -> list[dict[str, torch.Tensor]]:
    """[rank]: gradients of the ranks' mean loss, and the loss as "loss"."""

    def of_rank(group: ThreadGroup) -> dict[str, torch.Tensor]:
        own = twin(model)
        region = ContextRegion(group, zigzag=plan.zigzag, attention=attention)
        DealtContext(own, plan, region, [*plan.units, *plan.whole])
        loss = run(own)
        torch.autograd.backward([loss / plan.cp])
        gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
        return {**gradients, "loss": loss.detach()}

    return on_threads(plan.cp, of_rank)


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("way, zigzag", WAYS)
def test_a_decoder_on_own_tokens_has_the_loss_and_the_gradients_of_all(way: Attention, zigzag: bool, cp: int) -> None:
    model, ids = made(Decoder()), torch.randint(0, VOCABULARY, (SAMPLES, TOKENS))
    plan = plan_context(model, (ids,), cp=cp, attention=way, zigzag=zigzag)
    assert {"embed", "blocks.0", "blocks.1", "head"} <= set(plan.units)
    ranks = dealt(model, lambda own: own(ids), plan, way)
    loss = model(ids)
    loss.backward()
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], loss.detach(), rtol=1e-12, atol=0.0)
    for name, parameter in model.named_parameters():
        total = sum(rank[name] for rank in ranks if name in rank)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_rank_computes_its_own_tokens_alone() -> None:
    model, ids = made(Decoder()), torch.randint(0, VOCABULARY, (SAMPLES, TOKENS))
    plan = plan_context(model, (ids,), cp=2, attention=RING, zigzag=True)
    shapes: list[torch.Size] = []

    def run(own: nn.Module) -> torch.Tensor:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            shapes.append(out.shape)

        own.blocks[0].mlp[0].register_forward_hook(note)  # type: ignore[index, union-attr]
        return own(ids)  # type: ignore[no-any-return]

    dealt(model, run, plan, RING)
    assert sorted(shape[1] for shape in shapes) == [6, 7]


def of_logits(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The next token of all but the last, and what the first and the last say."""
    next_token = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), label_smoothing=0.1)
    smooth = F.mse_loss(logits[:, 2:-3, :4], torch.ones(SAMPLES, TOKENS - 5, 4, dtype=logits.dtype))
    weighted = F.cross_entropy(logits.transpose(1, 2), ids, weight=torch.arange(1.0, 12.0).double(), ignore_index=3)
    each = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return next_token + smooth + weighted + each.mean(1).max() + logits[:, 0].sum() * logits[:, -2].mean()


@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("cp", [2, 3])
def test_losses_of_runs_of_tokens_and_of_single_tokens_are_those_of_all(cp: int, zigzag: bool) -> None:
    logits = torch.randn(SAMPLES, TOKENS, VOCABULARY, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS))
    whole = logits.clone().requires_grad_(True)
    loss = of_logits(whole, ids)
    torch.autograd.backward([loss])

    def run(group: ThreadGroup) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
        region = ContextRegion(group, zigzag=zigzag)
        given = logits.clone().requires_grad_(True)
        made = of_logits(shard_of(given, region), ids)
        torch.autograd.backward([made / cp])
        assert given.grad is not None
        return made.detach(), given.grad, region.joined_at

    ranks = on_threads(cp, run)
    for made, _, joined in ranks:
        torch.testing.assert_close(made, loss.detach(), rtol=1e-12, atol=0.0)
        assert not joined - {"max"}
    torch.testing.assert_close(sum(gradient for _, gradient, _ in ranks), whole.grad, rtol=1e-9, atol=1e-12)


class Shifts(nn.Module):
    """A unit whose tokens read their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(F.pad(x, (0, 0, 1, 0))[:, :-1])  # type: ignore[no-any-return]


class Pools(nn.Module):
    """One answer a sample, of the largest of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.amax(1))  # type: ignore[no-any-return]


class Mixed(nn.Module):
    """Units on own tokens and units that need all, a parameter that both read, a parameter between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.block = Block()
        self.shifts = Shifts()
        self.pools = Pools()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.shifts(self.block(self.embed(ids))) * self.scale
        of_tokens = F.linear(x, self.embed.weight)
        return F.cross_entropy(self.pools(x), labels) + of_tokens.square().mean()


def test_what_needs_all_tokens_gets_them_and_counts_once() -> None:
    model = made(Mixed())
    ids, labels = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS)), torch.randint(0, VOCABULARY, (SAMPLES,))
    plan = plan_context(model, (ids, labels), cp=2, attention=RING, zigzag=True)
    assert "pools" in plan.whole
    assert "pools" in str(plan)
    ranks = dealt(model, lambda own: own(ids, labels), plan, RING)
    loss = model(ids, labels)
    loss.backward()
    for name, parameter in model.named_parameters():
        total = sum(rank[name] for rank in ranks if name in rank)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_sequence_too_short_for_all_ranks_stays_whole() -> None:
    model, ids = made(Decoder()), torch.randint(0, VOCABULARY, (SAMPLES, TOKENS))
    plan = plan_context(model, (ids,), cp=2, attention=RING, zigzag=True)
    short = ids[:, :3]
    ranks = dealt(model, lambda own: own(short), plan, RING)
    loss = model(short)
    loss.backward()
    for name, parameter in model.named_parameters():
        total = sum(rank[name] for rank in ranks if name in rank)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-9, atol=1e-12)


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.mul_(2.0))  # type: ignore[no-any-return]


class Shown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.writes = Writes()


def test_a_write_into_an_argument_that_others_would_not_see_is_refused() -> None:
    plan = ContextPlan(cp=2, units={"writes": UnitContext(inputs={"x": -2}, outputs={0: -2})})
    x = torch.randn(SAMPLES, TOKENS, WIDTH, dtype=torch.float64)
    with pytest.raises(DataflowError, match="writes into an argument"):
        dealt(made(Shown()), lambda own: own.get_submodule("writes")(x.clone()).sum(), plan, RING)


def test_the_units_as_they_were_are_given_all_tokens() -> None:
    model, ids = made(Decoder()), torch.randint(0, VOCABULARY, (SAMPLES, TOKENS))
    plan = plan_context(model, (ids,), cp=2, attention=RING)

    def run(group: ThreadGroup) -> bool:
        own = twin(model)
        installed = DealtContext(own, plan, ContextRegion(group, attention=RING), plan.units)
        on = isinstance(own.get_submodule("embed")(ids), SequenceShard)
        with installed.off():
            off = isinstance(own.get_submodule("embed")(ids), SequenceShard)
        installed.close()
        return on and not off and "forward" not in vars(own.get_submodule("embed"))

    assert on_threads(2, run) == [True, True]
