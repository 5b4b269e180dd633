"""Torch's multi-head attention, written out, is torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shardwise.errors import ModelError
from shardwise.trace.multi_head import multi_head_attention
from shardwise.trace.randomness import RandomMode, Scope

L, S, N, E, H = 3, 4, 2, 8, 4


class WrittenOut(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.multi_head_attention_forward:
            return multi_head_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def layer(**settings: Any) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(E, H, **settings).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def assert_equal(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    wanted = module(*args, **kwargs)
    with WrittenOut():
        found = module(*args, **kwargs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(
    "settings", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5, "vdim": 6}, {"bias": False}]
)
def test_it_is_torchs_with_every_kind_of_mask_and_weights(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = layer(**settings)
    query = torch.randn(L, N, E, dtype=torch.float64)
    key = torch.randn(S, N, settings.get("kdim", E), dtype=torch.float64)
    value = torch.randn(S, N, settings.get("vdim", E), dtype=torch.float64)
    hidden = torch.zeros(L, S, dtype=torch.bool)
    hidden[0, 1] = True
    masks = (None, hidden, torch.randn(L, S).double(), torch.randn(N * H, L, S).double())
    paddings = (None, torch.tensor([[False] * S, [False, True, True, False]]))
    for mask, padding, weights, mean in itertools.product(masks, paddings, (True, False), (True, False)):
        asked = {"need_weights": weights, "average_attn_weights": mean}
        assert_equal(module, query, key, value, attn_mask=mask, key_padding_mask=padding, **asked)


def test_a_single_sample_and_attention_to_itself() -> None:
    torch.manual_seed(0)
    one, many = torch.randn(L, E, dtype=torch.float64), torch.randn(N, L, E, dtype=torch.float64)

    assert_equal(layer(), one, one, one)
    assert_equal(layer(batch_first=True).train(), many, many, many)


def test_causal_with_a_mask_is_causal() -> None:
    x = torch.randn(L, N, E, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)

    for weights in (True, False):
        assert_equal(layer(), x, x, x, attn_mask=mask, is_causal=True, need_weights=weights)


def test_causal_without_a_mask_is_refused() -> None:
    module, x = layer(), torch.randn(L, N, E, dtype=torch.float64)

    with WrittenOut(), pytest.raises(ModelError, match="no attn_mask"):
        module(x, x, x, is_causal=True)


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_inside_does_not_depend_on_how_samples_are_split(weights: bool) -> None:
    module = layer(dropout=0.5, batch_first=True).train()
    x = torch.randn(4, L, E, dtype=torch.float64)

    def run(samples: slice) -> torch.Tensor:
        numbers = tuple(range(4))[samples]
        with RandomMode(Scope(seed=0, step=0, micro_batch=0, samples=numbers, place="unit")):
            out: torch.Tensor = module(x[samples], x[samples], x[samples], need_weights=weights)[0]
        return out

    whole = run(slice(0, 4))
    torch.testing.assert_close(torch.cat([run(slice(0, 2)), run(slice(2, 4))]), whole)
    assert not torch.allclose(whole, module.eval()(x, x, x)[0])
