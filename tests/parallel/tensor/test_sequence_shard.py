"""Activations of which every rank has its tokens: code on them gives the values and gradients of whole ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from shardwise.errors import DataflowError
from shardwise.parallel.tensor.sequence_shard import Region, SequenceShard, shard_of, whole_tokens
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads
from shardwise.trace.randomness import RandomMode, Scope

SAMPLES, TOKENS, WIDTH = 2, 5, 4
Code = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (activations, weight (WIDTH,)) -> anything


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, W = random(SAMPLES, TOKENS, WIDTH), random(WIDTH, seed=1)
OTHER, ROWS = random(SAMPLES, TOKENS, WIDTH, seed=2), random(1, TOKENS, WIDTH, seed=3)
MATRIX = random(WIDTH, 3, seed=4)


def results(code: Code, x: torch.Tensor, region: Region | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the code makes of activations, and the gradients of these and of the weight; weights' are of this rank."""
    whole, weight = x.clone().requires_grad_(True), W.clone().requires_grad_(True)
    scope = Scope(seed=0, step=0, micro_batch=0, samples=tuple(range(SAMPLES)), place="here")
    with RandomMode(scope):
        out = whole_tokens(code(whole if region is None else shard_of(whole, region), weight))
    out.backward(random(*out.shape, seed=9))
    assert whole.grad is not None
    assert weight.grad is not None
    return out.detach(), whole.grad, weight.grad


def assert_equal(code: Code, *, joins: bool, x: torch.Tensor = X) -> None:
    """In a unit, on two ranks: equal to one device; and whether tokens are joined.

    Weights' gradients are parts of a sum, or whole on every rank where all ranks do the same work.
    """
    expected = results(code, x, None)

    def work(group: ThreadGroup) -> torch.Tensor:
        region = Region(group, inside=1)
        out, gradient, of_weight = results(code, x, region)
        assert torch.allclose(out, expected[0], atol=1e-13)  # sums in another order
        assert torch.allclose(gradient, expected[1], atol=1e-13)
        assert bool(region.joined_at) == joins, region.joined_at
        return of_weight

    parts = on_threads(2, work)
    are_parts = torch.allclose(torch.stack(parts).sum(0), expected[2], atol=1e-12)
    assert are_parts or joins or all(torch.allclose(part, expected[2], atol=1e-12) for part in parts)


ALONE: dict[str, Code] = {
    "residual": lambda x, w: x + w * OTHER,
    "rows that all samples share": lambda x, w: (x + ROWS) * w,
    "the other side": lambda x, w: 1.0 - (ROWS * w - x) / 2,
    "rms norm by hand": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "a mean over features": lambda x, w: (x * w).mean(-1),
    "a mean over features, of rows": lambda x, w: (x * w).sum(dim=2).unsqueeze(-1) * 3,
    "layer norm": lambda x, w: F.layer_norm(x, (WIDTH,), w, w),
    "rms norm": lambda x, w: F.rms_norm(x, (WIDTH,), w),
    "a linear layer": lambda x, w: F.linear(x, MATRIX.t() * w, None),
    "a product": lambda x, w: (x * w) @ MATRIX,
    "softmax over features": lambda x, w: torch.softmax(x * w, dim=-1),
    "gates": lambda x, w: F.silu((x * w).chunk(2, dim=-1)[0]) * x[..., :2],
    "dropout": lambda x, w: F.dropout(x * w, 0.4, True),
    "in place": lambda x, w: (x * w).add_(OTHER).mul_(2.0),
    "in place, through a view": lambda x, w: written_through_a_view(x * w),
    "types": lambda x, w: (x * w).to(torch.float64).double().contiguous().type_as(OTHER),
    "samples × tokens": lambda x, w: F.gelu(x.view(-1, WIDTH) * w).reshape(SAMPLES, TOKENS, WIDTH),
    "heads": lambda x, w: (x * w).view(SAMPLES, TOKENS, 2, 2).flatten(2),
    "features of the tokens": lambda x, w: (x * w)[:, :, 1:3],
    "one sample": lambda x, w: (x * w)[1],
    "features joined": lambda x, w: torch.cat([x * w, x], dim=-1),
    "a condition": lambda x, w: torch.where(x > 0, x * w, OTHER),
    "like": lambda x, w: x * w + torch.ones_like(x) + x.new_zeros(x.shape),
    "pieces of features, by another name": lambda x, w: torch.cat((x * w).chunk(2, axis=-1), axis=2),
    "features, made dense": lambda x, w: (x * w)[..., :2].contiguous().view(-1, 2).add_(1.0) * 2,
}
JOINED: dict[str, Code] = {
    "the first token": lambda x, w: (x * w)[:, 0],
    "a mean over tokens": lambda x, w: (x * w).mean(1),
    "a sort": lambda x, w: (x * w).sort(dim=1).values,
    "other order": lambda x, w: (x * w).transpose(0, 1),
    "other tokens": lambda x, w: (x * w).roll(1, dims=1),
    "other dims": lambda x, w: (x * w).reshape(SAMPLES, TOKENS * WIDTH),
    "pieces of tokens": lambda x, w: torch.split(x * w, [2, 3], dim=1)[0] + 1,
    "arguments by name": lambda x, w: torch.softmax(input=x * w, dim=-1),
}
PIECES_OF_TOKENS: dict[str, Code] = {
    "chunk": lambda x, w: (x * w).chunk(2, axis=1)[0] * 2,
    "cat": lambda x, w: torch.cat([x * w, x], axis=1),
}


def written_through_a_view(x: torch.Tensor) -> torch.Tensor:
    x.view(-1, WIDTH).mul_(3.0)
    return x + 1.0


@pytest.mark.parametrize("name", ALONE)
def test_code_on_each_token_by_itself_runs_on_own_tokens(name: str) -> None:
    assert_equal(ALONE[name], joins=False)


@pytest.mark.parametrize("name", JOINED)
def test_other_code_is_given_all_tokens(name: str) -> None:
    assert_equal(JOINED[name], joins=True)


@pytest.mark.parametrize("name", PIECES_OF_TOKENS)
def test_a_dim_may_be_called_axis_as_in_numpy(name: str) -> None:
    assert_equal(PIECES_OF_TOKENS[name], joins=True)


def test_one_token_on_two_ranks_leaves_a_rank_without_any() -> None:
    assert_equal(lambda x, w: F.layer_norm(x, (WIDTH,), w) + x, joins=False, x=X[:, :1])


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_weight_with_dims_of_its_own_has_a_part_of_its_gradient_also_of_one_token(tokens: int) -> None:
    weight = random(1, 1, WIDTH, seed=5)

    def gradient(x: torch.Tensor, region: Region | None) -> torch.Tensor:
        parameter = torch.nn.Parameter(weight.clone())
        y = (x if region is None else shard_of(x, region)) * parameter
        whole_tokens(y).mul(random(*x.shape, seed=9)).sum().backward()
        assert parameter.grad is not None
        return parameter.grad

    x = X[:, :tokens]
    parts = on_threads(2, lambda group: gradient(x, Region(group, inside=1)))
    assert torch.allclose(torch.stack(parts).sum(0), gradient(x, None), atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_ranks_join_at_the_same_places_also_where_some_have_no_token(tokens: int) -> None:
    def code(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.layer_norm(x * w, (WIDTH,), w)
        total = y.sum()  # joins
        x = x * 1.0
        x += 1.0
        z = (x * w)[..., :2]
        return y.cumsum(-1) * total + x.cumsum(-1) + z.cumsum(-1).sum() + z.contiguous().cumsum(-1).sum()

    assert_equal(code, joins=True, x=X[:, :tokens])


def test_what_is_written_into_all_tokens_is_seen_through_views() -> None:
    def code(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x * w
        rows = y.view(-1, WIDTH)
        y[:, 0] = 1.0
        return rows * 2

    assert_equal(code, joins=True)


def test_a_write_into_a_view_of_all_tokens_is_refused_where_the_tokens_are_used_again() -> None:
    def work(group: ThreadGroup) -> None:
        x = shard_of(X, Region(group)) * 2.0
        x.transpose(0, 1).add_(1.0)
        with pytest.raises(DataflowError, match="was written into"):
            x * 2.0
        with pytest.raises(DataflowError, match="was written into"):
            whole_tokens(x)

    on_threads(2, work)


def test_joins_are_noted_once_however_many_steps_are_run() -> None:
    def work(group: ThreadGroup) -> None:
        region = Region(group)
        for _ in range(3):
            shard_of(X, region).cumsum(1)
        assert region.joined_at == {"cumsum"}

    on_threads(2, work)


def test_a_write_after_a_join_is_seen_by_the_next() -> None:
    def code(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x * w
        first = y.sum()  # joins
        y += OTHER
        return y.sum(1) * first

    assert_equal(code, joins=True)


def test_what_all_ranks_write_into_all_tokens_is_dealt_out_again() -> None:
    def code(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x * w
        y[:, 0] = 1.0
        return y * 2

    assert_equal(code, joins=True)


def test_a_write_that_a_view_of_all_tokens_would_not_see_is_refused() -> None:
    def work(group: ThreadGroup) -> None:
        x = shard_of(X, Region(group)) * 2.0
        x.transpose(0, 1)
        with pytest.raises(DataflowError, match="view of all tokens"):
            x.add_(1.0)

    on_threads(2, work)


def test_an_autograd_function_that_asks_no_one_is_refused_and_not_given_another_number() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * 2

    def work(group: ThreadGroup) -> None:
        x = shard_of(X.clone().requires_grad_(True), Region(group))
        with pytest.raises(DataflowError, match="sequence_parallel=off"):
            Twice.apply(x) + 1.0

    on_threads(2, work)


def test_a_gradient_that_an_autograd_function_would_keep_from_the_tokens_is_refused() -> None:
    class Total(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0].expand(X.shape)

    def work(group: ThreadGroup) -> None:
        x = shard_of(X.clone().requires_grad_(True), Region(group))
        with pytest.raises(DataflowError, match="sequence_parallel=off"):
            Total.apply(x).backward()

    on_threads(2, work)


def test_outside_of_units_gradients_of_weights_are_summed_where_they_are_read() -> None:
    expected = results(lambda x, w: x * w, X, None)

    def work(group: ThreadGroup) -> None:
        _, _, of_weight = results(lambda x, w: x * w, X, Region(group))
        assert torch.allclose(of_weight, expected[2], atol=1e-12)

    on_threads(2, work)


def test_a_shard_tells_the_shape_of_the_whole_and_holds_its_tokens() -> None:
    def work(group: ThreadGroup) -> None:
        shard = shard_of(X, Region(group))
        assert isinstance(shard, SequenceShard)
        assert shard.shape == X.shape
        assert (shard.size(1), len(shard)) == (TOKENS, SAMPLES)
        assert shard.local.shape == (SAMPLES, (2, 3)[group.rank], WIDTH)
        assert shard.local.untyped_storage().nbytes() == shard.local.nbytes  # not a view of the whole
        assert repr(shard) == f"SequenceShard(shape=(2, 5, 4), shard {group.rank} of 2)"

    on_threads(2, work)
