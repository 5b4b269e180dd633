"""Random numbers belong to samples: however a batch is cut, every sample draws the same ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch._dynamo  # sets a variable of the environment when it is first imported, which a test must not
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from shardwise.errors import ConfigError, ModelError
from shardwise.trace.absent import Absent
from shardwise.trace.randomness import Generators, RandomMode, Scope, draw, is_random, python_streams

SAMPLES = (3, 1, 4, 15, 9, 2, 6, 5)  # global numbers of the 8 samples of a batch, in no order
CUTS = [(8,), (4, 4), (2, 2, 2, 2), (1,) * 8, (3, 5)]


def scope(samples: Sequence[int] = SAMPLES, *, micro_batch: int = 0, place: str = "layers.0", **changed: int) -> Scope:
    values = {"seed": 7, "step": 2, "call": 0} | changed
    return Scope(samples=tuple(samples), micro_batch=micro_batch, place=place, **values)


def in_pieces(cut: Sequence[int], function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` on consecutive pieces of the batch, each in its own micro-batch; results concatenated."""
    results, start = [], 0
    for micro_batch, size in enumerate(cut):
        k = tensors[0].shape[0] // len(SAMPLES) if tensors else 1
        pieces = [t[start * k : (start + size) * k] for t in tensors]
        with RandomMode(scope(SAMPLES[start : start + size], micro_batch=micro_batch)):
            results.append(function(*pieces) if tensors else function(size))
        start += size
    return torch.cat(results)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)


LSTM = nn.LSTM(6, 6, num_layers=2, dropout=0.5, batch_first=True)
MULTI_HEAD = nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True)

BATCHED: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "nn.Dropout": nn.Dropout(0.5),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, True),
    "in place": lambda x: F.dropout(x.clone(), 0.5, inplace=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "dropout1d": lambda x: F.dropout1d(x, 0.5),
    "dropout2d": lambda x: F.dropout2d(x.unsqueeze(-1), 0.5),
    "dropout3d": lambda x: F.dropout3d(x[..., None, None], 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 100),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "Tensor.bernoulli": lambda x: x.bernoulli(0.5),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.5),
    "bernoulli_ by tensor": lambda x: torch.empty_like(x).bernoulli_(x.sigmoid()),
    "uniform_": lambda x: x.clone().uniform_(-1, 1),
    "normal_": lambda x: x.clone().normal_(),
    "exponential_": lambda x: x.clone().exponential_(),
    "random_": lambda x: x.clone().random_(0, 50),
    "geometric_": lambda x: x.clone().geometric_(0.3),
    "cauchy_": lambda x: x.clone().cauchy_(),
    "log_normal_": lambda x: x.clone().log_normal_(),
    "normal": lambda x: torch.normal(x, 2.0),
    "normal of tensors": lambda x: torch.normal(x, x.abs()[..., :1]),
    "poisson": lambda x: torch.poisson(x.exp()),
    "multinomial": lambda x: x[:, 0].softmax(-1).multinomial(3),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "nn.LSTM": lambda x: LSTM(x)[0],
    "nn.MultiheadAttention": lambda x: MULTI_HEAD(x, x, x)[0],
    "nn.init": lambda x: nn.init.normal_(x.clone()),
    "transposed": lambda x: F.dropout(x.transpose(1, 2), 0.5),
    "transposed in place": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2).uniform_(),
    "flattened tokens": lambda x: F.dropout(x.flatten(0, 1), 0.5),
}


@pytest.mark.parametrize("name", BATCHED)
def test_however_the_batch_is_cut_every_sample_draws_the_same(name: str) -> None:
    x = torch.linspace(-2, 2, 8 * 4 * 6).reshape(8, 4, 6)  # (batch, tokens, hidden)
    whole = in_pieces((8,), BATCHED[name], x)
    assert not torch.equal(whole, in_pieces((8,), BATCHED[name], x.flip(0)).flip(0))  # it does draw, and per sample
    for cut in CUTS:
        # 1e-6: only matmuls of other sizes may round differently; a wrong draw differs by far more.
        torch.testing.assert_close(in_pieces(cut, BATCHED[name], x), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda n: torch.rand(n, 5),
        lambda n: torch.randn(n, 5),
        lambda n: torch.randint(10, (n, 5)),
        lambda n: torch.randint(5, 1000, (n,)),
        lambda n: torch.normal(0.0, 1.0, (n, 5)),
    ],
)
def test_tensors_made_for_the_batch_are_drawn_per_sample(function: Callable[..., Tensor]) -> None:
    whole = in_pieces((8,), function)
    for cut in CUTS:
        assert torch.equal(in_pieces(cut, function), whole)


@pytest.mark.parametrize("cut", CUTS)
def test_attention_dropout_belongs_to_the_sample(cut: Sequence[int]) -> None:
    q, k, v = (torch.randn(8, 2, 5, 4) for _ in range(3))  # (batch, heads, tokens, head_dim)
    torch.testing.assert_close(in_pieces(cut, attention, q, k, v), in_pieces((8,), attention, q, k, v))


def test_values_do_not_depend_on_strides() -> None:
    x = torch.ones(8, 3, 4, 5)
    plain, channels_last = (
        in_pieces((8,), BATCHED["dropout"], t) for t in (x, x.to(memory_format=torch.channels_last))
    )
    assert torch.equal(plain, channels_last)
    transposed = torch.empty(8, 5, 4).transpose(1, 2)
    with RandomMode(scope()) as mode:
        transposed.uniform_()
    with RandomMode(scope()):
        assert torch.equal(torch.empty(8, 4, 5).uniform_(), transposed)
    assert mode.index == 1
    drawn = in_pieces((8,), torch.rand_like, x.to(memory_format=torch.channels_last))
    assert torch.equal(drawn, in_pieces((8,), torch.rand_like, x))
    assert drawn.stride() == x.to(memory_format=torch.channels_last).stride()


@pytest.mark.parametrize("changed", [{"seed": 8}, {"step": 3}, {"call": 1}, {"place": "layers.1"}])
def test_another_seed_step_call_or_place_draws_other_numbers(changed: dict[str, int]) -> None:
    with RandomMode(scope()):
        here = torch.rand(8, 3)
    with RandomMode(scope(**changed)):
        assert not torch.equal(torch.rand(8, 3), here)


def test_two_draws_in_one_place_differ_and_come_back_with_the_index() -> None:
    with RandomMode(scope()) as mode:
        first, second = torch.rand(8, 3), torch.rand(8, 3)
        assert mode.index == 2
    assert not torch.equal(first, second)
    with RandomMode(scope(), first_index=1):
        assert torch.equal(torch.rand(8, 3), second)


@pytest.mark.parametrize("function", [lambda: torch.rand(7, 3), lambda: torch.rand(()), lambda: torch.randperm(8)])
def test_a_draw_without_a_sample_dim_belongs_to_the_micro_batch(function: Callable[[], Tensor]) -> None:
    def drawn(samples: Sequence[int], micro_batch: int) -> Tensor:
        with RandomMode(scope(samples, micro_batch=micro_batch)):
            return function()

    assert torch.equal(drawn(SAMPLES, 1), drawn(SAMPLES[::-1], 1))
    assert not torch.equal(drawn(SAMPLES, 1), drawn(SAMPLES, 2))
    assert torch.equal(drawn(SAMPLES, 1).flatten().sort()[0], drawn(SAMPLES, 1).flatten().unique())


def test_the_draws_of_a_call_leave_all_other_generators_alone() -> None:
    before = torch.get_rng_state()
    with RandomMode(scope(), generators=Generators()):
        for function in BATCHED.values():
            function(torch.ones(8, 4, 6))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_of_the_user_is_followed() -> None:
    with RandomMode(scope()) as mode:
        drawn = torch.rand(8, generator=torch.Generator().manual_seed(5))
        assert mode.index == 0
    assert torch.equal(drawn, torch.rand(8, generator=torch.Generator().manual_seed(5)))


def test_no_generator_said_aloud_is_no_generator() -> None:
    with RandomMode(scope(samples=range(4))):
        aloud = torch.randn(4, 3, generator=None)
    with RandomMode(scope(samples=range(4))):
        silent = torch.randn(4, 3)
    assert torch.equal(aloud, silent)


def test_dropout_keeps_with_the_right_probability_and_scale() -> None:
    with RandomMode(scope()):
        y = F.dropout(torch.ones(8, 5000), 0.25)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((y > 0).float().mean()) == pytest.approx(0.75, abs=0.01)  # 40 000 draws: 4.6 standard deviations


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_of_dropout_is_its_mask(p: float, inplace: bool) -> None:
    x = torch.ones(8, 4, requires_grad=True)
    with RandomMode(scope()):
        y = F.dropout(x * 1, p, inplace=inplace)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_dropout_in_place_writes_its_input() -> None:
    x = torch.ones(8, 4)
    with RandomMode(scope()):
        y = F.dropout(x, 0.5, inplace=True)
    assert y is x
    assert float(x.sum()) != 32


def test_a_probability_above_one_is_torchs_own_error() -> None:
    with RandomMode(scope()), pytest.raises(ValueError, match="dropout probability"):
        F.dropout(torch.ones(8), 1.5)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.ones(5, 5).tril().bool()},
    "a query that sees nothing": {"attn_mask": torch.ones(5, 5).tril(-1).bool()},
    "float": {"attn_mask": torch.linspace(-1, 1, 25).reshape(5, 5)},
    "scale": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_with_hardly_any_dropout_is_torchs_attention(name: str, dtype: torch.dtype) -> None:
    kwargs = {k: v.to(dtype) if name == "float" else v for k, v in MASKS[name].items()}
    shapes = [(2, 4, 5, 8)] + [(2, 2 if name == "grouped" else 4, 5, 8)] * 2
    ours = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    with RandomMode(scope((0, 1))) as mode:
        out = F.scaled_dot_product_attention(*ours, dropout_p=1e-9, **kwargs)
        assert mode.index == 1
    expected = F.scaled_dot_product_attention(*theirs, **kwargs)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5  # bfloat16 has 8 bits
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, theirs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_attention_drops_whole_weights_and_scales_the_rest() -> None:
    q, k = torch.zeros(8, 1, 40, 4), torch.zeros(8, 1, 40, 4)
    with RandomMode(scope()):
        out = F.scaled_dot_product_attention(q, k, torch.eye(40).expand(8, 1, 40, 40), dropout_p=0.5)
    assert out.unique().tolist() == pytest.approx([0.0, 2 / 40])
    assert float((out > 0).float().mean()) == pytest.approx(0.5, abs=0.02)


X = torch.ones(2, 4, 4)


@pytest.mark.parametrize(
    "func, args, kwargs, expected",
    [
        (F.dropout, (X, 0.1), {}, True),
        (F.dropout, (X,), {"p": 0.1, "training": False}, False),
        (F.dropout, (X,), {"p": 0.0, "training": True}, False),
        (torch.dropout, (X, 0.1, False), {}, False),
        (F.alpha_dropout, (X, 0.1), {}, False),
        (F.alpha_dropout, (X, 0.1, True), {}, True),
        (F.scaled_dot_product_attention, (X, X, X), {"is_causal": True}, False),
        (F.scaled_dot_product_attention, (X, X, X, None, 0.1), {}, True),
        (F.rrelu, (X,), {"training": False}, False),
        (torch.rand, (3,), {}, True),
        (torch.rand, (3,), {"generator": torch.Generator()}, False),
        (torch.Tensor.uniform_, (X,), {}, True),
        (torch.add, (X, X), {}, False),
        (F.linear, (X, X[0]), {}, False),
    ],
)
def test_what_is_random(
    func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object], expected: bool
) -> None:
    assert is_random(func, args, kwargs) is expected


def test_dropout_that_is_off_is_not_counted() -> None:
    heads, lstm = nn.MultiheadAttention(4, 2, dropout=0.5), nn.LSTM(4, 4, num_layers=2, dropout=0.5)
    with RandomMode(scope()) as mode:
        nn.Dropout(0.5).eval()(X)
        heads.eval()(X, X, X)
        lstm.eval()(X)
        assert mode.index == 0
        heads.train()(X, X, X)
        lstm.train()(X)
        assert mode.index == 2


def test_one_call_can_be_drawn_outside_a_mode() -> None:
    drawn = draw(F.dropout, (torch.ones(8, 3), 0.5), None, scope=scope(), index=0)
    with RandomMode(scope()):
        assert torch.equal(F.dropout(torch.ones(8, 3), 0.5), drawn)


def test_drawing_into_out_is_refused() -> None:
    with RandomMode(scope()), pytest.raises(ModelError, match="out="):
        torch.normal(torch.zeros(8), 1.0, out=torch.empty(8))


def test_a_scope_refuses_samples_counted_twice_and_negative_numbers() -> None:
    with pytest.raises(ConfigError, match="own number"):
        scope((1, 2, 1))
    with pytest.raises(ConfigError, match="count from 0"):
        scope(step=-1)


def test_python_numpy_and_torch_streams_follow_the_key_and_go_on_afterwards() -> None:
    def three() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    undisturbed = three(), three()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = three()
    with python_streams(2**62 + 5):
        inside = three()
    assert (first, three()) == undisturbed
    with python_streams(2**62 + 5):
        assert three() == inside
    with python_streams(2**62 + 6):
        assert not any(math.isclose(a, b) for a, b in zip(three(), inside, strict=True))


def test_a_part_that_is_computed_again_in_backward_draws_the_same() -> None:
    x = torch.ones(8, 4, requires_grad=True)
    with RandomMode(scope()) as mode:
        torch.rand(8)
        y = checkpoint(
            lambda t: F.dropout(t, 0.5) ** 2,
            x,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), mode.again()),
        )
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * y.detach())  # y = (x m)^2 at x = 1, so dy/dx = 2 m^2


def test_draws_on_fake_tensors_stay_fake() -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.ones(8, 2, 4, 4))
    with RandomMode(scope()):
        drawn = [F.dropout(fake, 0.5), torch.rand_like(fake), F.gumbel_softmax(fake), F.dropout2d(fake, 0.5)]
        drawn.append(F.scaled_dot_product_attention(fake, fake, fake, dropout_p=0.5))
    assert all(isinstance(tensor, FakeTensor) for tensor in drawn)


def test_what_is_drawn_like_a_tensor_does_not_need_its_values() -> None:
    present = torch.ones(8, 3, 2).transpose(1, 2)
    absent = Absent(what="x", shape=present.shape, dtype=present.dtype, device="cpu", strides=present.stride())
    for function in (torch.rand_like, torch.randn_like, lambda t: torch.randint_like(t, 9)):
        with RandomMode(scope()):
            wanted = function(present)
        with RandomMode(scope()):
            drawn = function(absent)
        assert type(drawn) is torch.Tensor
        assert torch.equal(drawn, wanted)
        assert drawn.stride() == wanted.stride()
