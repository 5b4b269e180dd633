"""`F.multi_head_attention_forward` written out in the calls that it is made of: products, masks, attention, dropout.

Torch's own answers as one call, and whoever watches calls (draws keyed by sample, heads divided among ranks) does not
see inside of it. Knows torch's arguments and shapes; refuses to know who watches.

    t queries, s keys, n samples, h heads, d the size of one, e = h · d (of a share of the heads: less)
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from shardwise.errors import ModelError

__all__ = ["MultiHead", "attended", "masked", "multi_head_attention", "projected", "returned"]

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MultiHead:
    """The arguments of one call by torch's names, (tokens, samples, features) even where there is no dim of samples."""

    query: torch.Tensor  # (t, n, e)
    key: torch.Tensor  # (s, n, features)
    value: torch.Tensor  # (s, n, features)
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: torch.Tensor | None  # (3e, e); None where the three stand apart
    in_proj_bias: torch.Tensor | None  # (3e,)
    bias_k: torch.Tensor | None  # (1, 1, e)
    bias_v: torch.Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: torch.Tensor  # (e, e)
    out_proj_bias: torch.Tensor | None
    training: bool
    key_padding_mask: torch.Tensor | None  # (n, s)
    need_weights: bool
    attn_mask: torch.Tensor | None  # (t, s) or (n·h, t, s)
    is_causal: bool
    q_proj_weight: torch.Tensor | None
    k_proj_weight: torch.Tensor | None
    v_proj_weight: torch.Tensor | None
    average_attn_weights: bool
    batched: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MultiHead:
        """From what torch's function is given. Raises `ModelError` for keys and values that are given ready."""
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given: dict[str, Any] = dict(bound.arguments)
        if given.pop("static_k") is not None or given.pop("static_v") is not None:
            raise ModelError("attention with static_k or static_v is not written out; give key and value")
        if given.pop("use_separate_proj_weight"):
            given["in_proj_weight"] = None
        batched = given["query"].dim() == 3
        if not batched:
            tensors = {id(given[name]): given[name].unsqueeze(1) for name in ("query", "key", "value")}
            given.update({name: tensors[id(given[name])] for name in ("query", "key", "value")})  # one stays one
            if given["key_padding_mask"] is not None:
                given["key_padding_mask"] = given["key_padding_mask"].unsqueeze(0)
        return cls(**given, batched=batched)

    @property
    def head_dim(self) -> int:
        return self.embed_dim_to_check // self.num_heads


def multi_head_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `F.multi_head_attention_forward` returns for these arguments."""
    call = MultiHead.of(args, kwargs)
    out, weights = attended(call, *projected(call), *masked(call))
    return returned(call, F.linear(out, call.out_proj_weight, call.out_proj_bias), weights)


def projected(
    call: MultiHead, read: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (t, n, e), keys and values (s, n, e). `read` is applied once to each tensor that they come from."""
    distinct = {id(x): read(x) for x in (call.query, call.key, call.value)}
    query, key, value = (distinct[id(x)] for x in (call.query, call.key, call.value))
    weights: tuple[torch.Tensor | None, ...]
    if call.in_proj_weight is None:
        weights = (call.q_proj_weight, call.k_proj_weight, call.v_proj_weight)
    elif query is key and key is value:
        q, k, v = F.linear(query, call.in_proj_weight, call.in_proj_bias).chunk(3, -1)
        return q, k, v
    else:
        weights = call.in_proj_weight.chunk(3)
    biases = (None, None, None) if call.in_proj_bias is None else call.in_proj_bias.chunk(3)
    made: list[torch.Tensor] = []
    for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
        assert weight is not None
        made.append(F.linear(x, weight, bias))
    return made[0], made[1], made[2]


def masked(call: MultiHead) -> tuple[torch.Tensor | None, bool]:
    """What is added to scores, (1 or n, 1 or h, 1 or t, s) or None, and whether attention is to be causal besides."""
    mask, padding, causal = call.attn_mask, call.key_padding_mask, call.is_causal
    if causal and mask is None:
        raise ModelError("is_causal is a hint beside attn_mask, but there is no attn_mask; give one")
    if causal and padding is None and not call.need_weights:
        return None, True
    dtype, samples = call.query.dtype, call.query.shape[1]
    if mask is not None:
        mask = _added(mask, dtype)
        mask = mask[None, None] if mask.dim() == 2 else mask.view(samples, -1, *mask.shape[-2:])
    if padding is not None:
        padding = _added(padding, dtype).view(samples, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    more = int(call.bias_k is not None) + int(call.add_zero_attn)
    return (F.pad(mask, (0, more)) if mask is not None and more else mask), False


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask whose True hides, as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def attended(
    call: MultiHead,
    q: torch.Tensor,  # (t, n, e)
    k: torch.Tensor,  # (s, n, e)
    v: torch.Tensor,  # (s, n, e)
    mask: torch.Tensor | None,  # broadcasts to (n, h, t, s)
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the heads of `q` see (t, n, e), in front of the output's projection; weights (n, h, t, s) if asked for."""
    if call.bias_k is not None and call.bias_v is not None:
        k = torch.cat([k, call.bias_k.expand(1, k.shape[1], -1)])
        v = torch.cat([v, call.bias_v.expand(1, v.shape[1], -1)])
    q, k, v = (x.reshape(*x.shape[:2], -1, call.head_dim).permute(1, 2, 0, 3) for x in (q, k, v))  # (n, h, tokens, d)
    if call.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    dropout = call.dropout_p if call.training else 0.0
    weights = None
    if call.need_weights:
        scores = (q * math.sqrt(1.0 / call.head_dim)) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout > 0 else weights
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return out.permute(2, 0, 1, 3).flatten(-2), weights


def returned(
    call: MultiHead, out: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The answer of torch's function: `out` (t, n, e), weights of all heads (n, h, t, s) averaged if asked for."""
    if weights is not None and call.average_attn_weights:
        weights = weights.mean(1)
    if call.batched:
        return out, weights
    return out.squeeze(1), None if weights is None else weights.squeeze(0)
