"""Tokens dealt out among ranks: gathered and reduced, whatever their number, also samples × tokens in one dim."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shardwise.parallel.tensor.sequence import Tokens, gather, gather_copy, reduce, scatter
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads

CASES = [
    (2, (3, 6, 4), Tokens(-2, 6)),
    (2, (1, 6, 4), Tokens(-2, 6)),
    (2, (3, 5, 4), Tokens(-2, 5)),  # 2 and 3 tokens
    (4, (2, 7, 3), Tokens(-2, 7)),
    (4, (2, 3, 3), Tokens(-2, 3)),  # a rank has none
    (2, (12, 4), Tokens(-2, 4, others=3)),  # three samples of four tokens
    (2, (15, 4), Tokens(-2, 5, others=3)),
]


def whole(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `function` makes, and the gradient of its input for a random gradient of its output."""
    x = given.clone().requires_grad_(True)
    y = function(x)
    y.backward(whole(tuple(y.shape), seed))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize(("ranks", "shape", "tokens"), CASES)
def test_ranks_have_disjoint_tokens_that_are_gathered_in_order(
    ranks: int, shape: tuple[int, ...], tokens: Tokens
) -> None:
    x = whole(shape)

    def work(group: ThreadGroup) -> None:
        local = tokens.of_rank(x, group)
        assert local.shape[tokens.dim] == tokens.others * tokens.num(group.rank, ranks)
        assert torch.equal(gather(local, tokens, group), x)
        assert torch.equal(gather_copy(local, tokens, group), x)

    on_threads(ranks, work)


@pytest.mark.parametrize(("ranks", "shape", "tokens"), CASES)
def test_a_gradient_of_what_every_rank_repeats_is_cut_and_of_parts_of_the_work_is_summed(
    ranks: int, shape: tuple[int, ...], tokens: Tokens
) -> None:
    def work(group: ThreadGroup) -> None:
        local = tokens.of_rank(whole(shape), group)
        _, gradient = with_gradient(lambda x: gather(x, tokens, group), local, seed=7)
        assert torch.equal(gradient, tokens.of_rank(whole(shape, 7), group))
        _, gradient = with_gradient(lambda x: gather_copy(x, tokens, group), local, seed=10 + group.rank)
        total = torch.stack([whole(shape, 10 + rank) for rank in range(ranks)]).sum(0)
        assert torch.allclose(gradient, tokens.of_rank(total, group), atol=1e-14)  # the order of a sum

    on_threads(ranks, work)


@pytest.mark.parametrize(("ranks", "shape", "tokens"), CASES)
def test_partial_sums_become_own_tokens_and_their_gradient_is_gathered(
    ranks: int, shape: tuple[int, ...], tokens: Tokens
) -> None:
    total = torch.stack([whole(shape, rank) for rank in range(ranks)]).sum(0)
    gradients = [whole(tuple(tokens_of(total, tokens, rank, ranks)), 20 + rank) for rank in range(ranks)]

    def work(group: ThreadGroup) -> None:
        partial = whole(shape, group.rank)
        kept = partial.clone()
        out, gradient = with_gradient(lambda x: reduce(x, tokens, group), partial, seed=20 + group.rank)
        assert torch.allclose(out, tokens.of_rank(total, group), atol=1e-14)
        assert torch.equal(tokens.of_rank(gradient, group), gradients[group.rank])
        assert torch.equal(partial, kept)

    on_threads(ranks, work)


@pytest.mark.parametrize(("ranks", "shape", "tokens"), CASES)
def test_what_is_dealt_out_gets_a_whole_gradient(ranks: int, shape: tuple[int, ...], tokens: Tokens) -> None:
    def work(group: ThreadGroup) -> torch.Tensor:
        out, gradient = with_gradient(lambda x: scatter(x, tokens, group), whole(shape), seed=30 + group.rank)
        assert torch.equal(out, tokens.of_rank(whole(shape), group))
        assert torch.equal(tokens.of_rank(gradient, group), whole(tuple(out.shape), 30 + group.rank))
        return gradient

    first, *others = on_threads(ranks, work)
    assert all(torch.equal(first, other) for other in others)


def tokens_of(total: torch.Tensor, tokens: Tokens, rank: int, ranks: int) -> list[int]:
    shape = list(total.shape)
    shape[tokens.dim] = tokens.others * tokens.num(rank, ranks)
    return shape
