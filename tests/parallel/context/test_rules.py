"""Functions of tensors that are dealt out by tokens are those of whole tensors, forward and backward, on any placement.

The ranks' gradients of their mean loss add up to the gradient on one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shardwise.parallel.context.attend import Attention, Gathered
from shardwise.parallel.context.region import ContextRegion
from shardwise.parallel.context.ways import RING, ULYSSES
from shardwise.parallel.tensor.divided_logits import DividedLogits
from shardwise.parallel.tensor.sequence_shard import SequenceShard, shard_of, whole_tokens
from shardwise.parallel.tensor.slices import spread
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads
from shardwise.trace.randomness import RandomMode, Scope

SAMPLES, TOKENS, WIDTH = 2, 11, 8
Function = Callable[[torch.Tensor, torch.Tensor], Any]


def heads(x: torch.Tensor, num: int = 4) -> torch.Tensor:
    return x.view(SAMPLES, x.shape[1], num, -1).transpose(1, 2)


def eager(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q, k, v = heads(x), heads(x * 2), heads(x @ w)
    scores = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf"))
    seen = scores.softmax(-1) @ v
    return seen.transpose(1, 2).reshape(SAMPLES, TOKENS, WIDTH)


def fused(x: torch.Tensor, w: torch.Tensor, **how: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        heads(x), heads(x[..., :4], 2), heads(x @ w, 4)[:, ::2], enable_gqa=True, **how
    )


def hidden(x: torch.Tensor) -> torch.Tensor:
    """A mask of padding: each sample hides some tokens."""
    seen = torch.ones(SAMPLES, 1, 1, TOKENS, dtype=torch.bool)
    seen[0, ..., 7:] = False
    return seen


BIAS = torch.randn(1, 4, TOKENS, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

BY_TOKEN: dict[str, Function] = {
    "eager attention": eager,
    "causal attention": lambda x, w: F.scaled_dot_product_attention(heads(x), heads(x), heads(x @ w), is_causal=True),
    "attention with padding": lambda x, w: F.scaled_dot_product_attention(
        heads(x), heads(x), heads(x @ w), attn_mask=hidden(x)
    ),
    "attention with a bias": lambda x, w: F.scaled_dot_product_attention(heads(x), heads(x), heads(x @ w), BIAS),
    "attention with a learned bias": lambda x, w: F.scaled_dot_product_attention(
        heads(x), heads(x), heads(x), BIAS * w[0, 0]
    ),
    "grouped attention": lambda x, w: fused(x, w, is_causal=True),
    "attention to what is whole": lambda x, w: F.scaled_dot_product_attention(
        heads(x), heads(w.expand(SAMPLES, 8, 8)), heads(w.expand(SAMPLES, 8, 8))
    ),
    "linear attention": lambda x, w: x.softmax(-1) @ (x.transpose(-2, -1) @ (x @ w)),
    "rotation": lambda x, w: torch.cat([-x[..., 4:], x[..., :4]], -1) * torch.arange(88.0).view(11, 8).double(),
    "permutation": lambda x, w: (x.view(SAMPLES, TOKENS, 2, 4).permute(2, 0, 1, 3) * 2).unbind(0)[1],
    "repeated heads": lambda x, w: heads(x)[:, :, None].expand(-1, -1, 3, -1, -1).reshape(SAMPLES, 12, TOKENS, 2),
    "stacked": lambda x, w: torch.stack([x, x * 2], -2).flatten(-2) + torch.stack([x, x * 3], 1)[:, 1].repeat(1, 1, 2),
    "chosen features": lambda x, w: x.topk(3, -1).values.sum(-1, keepdim=True) * x.gather(-1, x.topk(3, -1).indices),
    "runs of tokens": lambda x, w: (x[:, 2:] * 3)[:, :-1] @ w,
    "flat tokens": lambda x, w: F.linear(x.reshape(-1, WIDTH), w).view(SAMPLES, TOKENS, -1),
    "a table's rows": lambda x, w: F.embedding((x[..., 0].abs() * 3).long().clip(0, 7), w),
}
WHOLE: dict[str, Function] = {
    "mean of tokens": lambda x, w: x.mean(1) @ w,
    "sum of all": lambda x, w: (x @ w).square().sum(),
    "mean with a mask": lambda x, w: (x * hidden(x)[:, 0].transpose(-2, -1)).sum(1) / hidden(x).sum((1, 3)),
    "the last token": lambda x, w: x[:, -1] @ w,
    "weights of tokens": lambda x, w: x[..., 0].softmax(-1).unsqueeze(1) @ x,
    "keys times values": lambda x, w: x.transpose(1, 2) @ (x @ w),
}


@pytest.mark.parametrize("cp, zigzag", [(2, True), (3, False), (4, True)])
@pytest.mark.parametrize("name", [*BY_TOKEN, *WHOLE])
def test_a_function_of_own_tokens_is_that_of_all(name: str, cp: int, zigzag: bool) -> None:
    function = {**BY_TOKEN, **WHOLE}[name]
    torch.manual_seed(1)
    x, w = torch.randn(SAMPLES, TOKENS, WIDTH).double(), torch.randn(WIDTH, WIDTH).double()
    given, weight = x.clone().requires_grad_(True), w.clone().requires_grad_(True)
    made = function(given, weight)
    cotangent = torch.randn(made.shape).double()
    wanted = torch.autograd.grad(made, (given, weight), cotangent, allow_unused=True)

    def run(group: ThreadGroup) -> tuple[torch.Tensor, Any, bool, set[str]]:
        region = ContextRegion(group, zigzag=zigzag, attention=RING if zigzag else ULYSSES)
        own, of_rank = x.clone().requires_grad_(True), w.clone().requires_grad_(True)
        out = function(shard_of(own, region), of_rank)
        whole = whole_tokens(out)
        gradients = torch.autograd.grad(whole, (own, of_rank), cotangent / cp, allow_unused=True)
        return whole.detach(), gradients, isinstance(out, SequenceShard), region.joined_at

    ranks = on_threads(cp, run)
    for whole, _, by_token, joined in ranks:
        torch.testing.assert_close(whole, made.detach(), rtol=1e-10, atol=1e-12)
        assert by_token == (name in BY_TOKEN)
        assert not joined - (
            {"softmax", "__getitem__", "repeat"} if name in ("weights of tokens", "stacked") else set()
        )
    for number, gradient in enumerate(wanted):
        parts = [rank[1][number] for rank in ranks]
        if gradient is not None:
            total = sum(part for part in parts if part is not None)
            torch.testing.assert_close(total, gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("attention, zigzag", [(RING, True), (ULYSSES, False), (Gathered(), True)])
def test_dropout_of_attention_is_that_of_one_device(attention: Attention, zigzag: bool) -> None:
    x = torch.randn(SAMPLES, 4, TOKENS, 2).double()
    scope = Scope(seed=0, step=0, micro_batch=0, samples=(0, 1), place="unit")

    def function(x: torch.Tensor) -> torch.Tensor:
        with RandomMode(scope):
            return F.dropout(F.scaled_dot_product_attention(x, x * 2, x + 1, None, 0.3, is_causal=True), 0.5)

    given = x.clone().requires_grad_(True)
    made = function(given)
    (wanted,) = torch.autograd.grad(made.square().sum(), given)

    def run(group: ThreadGroup) -> tuple[torch.Tensor, torch.Tensor]:
        own = x.clone().requires_grad_(True)
        out = whole_tokens(function(shard_of(own, ContextRegion(group, zigzag=zigzag, attention=attention))))
        (gradient,) = torch.autograd.grad(out.square().sum() / 2, own)
        return out.detach(), gradient

    ranks = on_threads(2, run)
    for out, _ in ranks:
        torch.testing.assert_close(out, made.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ranks[0][1] + ranks[1][1], wanted, rtol=1e-9, atol=1e-11)


class One:
    """A group of one shard, which notes what it sums."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.summed: list[tuple[int, ...]] = []

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.summed.append(tuple(tensor.shape))
        return tensor

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.squeeze(0)


def test_logits_of_own_tokens_that_shards_divide_too_are_joined_by_nobody() -> None:
    x, labels = torch.randn(SAMPLES, TOKENS, WIDTH).double(), torch.randint(0, WIDTH, (SAMPLES, TOKENS))
    given = x.clone().requires_grad_(True)
    loss = F.cross_entropy(given.view(-1, WIDTH), labels.view(-1))
    (wanted,) = torch.autograd.grad(loss, given)

    def run(group: ThreadGroup) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, ...]]]:
        region, shards = ContextRegion(group, zigzag=True), One()
        own = x.clone().requires_grad_(True)
        dealt = shard_of(own, region)
        assert isinstance(dealt, SequenceShard)
        logits = dealt.carry(DividedLogits(dealt.local, spread(-1, WIDTH, 1), shards))
        made = F.cross_entropy(logits.float().double().view(-1, WIDTH), labels.view(-1)) * 1.0
        (gradient,) = torch.autograd.grad(made / 2, own)
        return made.detach(), gradient, shards.summed

    ranks = on_threads(2, run)
    for made, _, summed in ranks:
        torch.testing.assert_close(made, loss.detach(), rtol=1e-6, atol=1e-7)  # of float32
        assert all(len(shape) < 3 and shape[-1] in (10, 12) for shape in summed)  # numbers for own tokens
    torch.testing.assert_close(ranks[0][1] + ranks[1][1], wanted, rtol=1e-5, atol=1e-7)
