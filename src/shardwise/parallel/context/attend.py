"""`F.scaled_dot_product_attention` of queries that are dealt out by tokens, as a rule for such tensors.

    queries dealt, keys and values dealt    ring, Ulysses, or keys and values gathered
    queries dealt, keys and values whole    own queries alone: the others are as many elsewhere
    anything else                           all tokens

Masks are given whole. Knows one function of torch; the ways to exchange tokens are given.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from shardwise.parallel.context.placement import Placement
from shardwise.parallel.tensor.sequence import Tokens
from shardwise.parallel.tensor.sequence_ops import Operands
from shardwise.parallel.tensor.sequence_shard import SequenceShard, whole_tokens

__all__ = ["Attention", "Gathered", "Heads", "attend", "attended"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """What attends to what: queries (..., heads, own tokens, d), keys and values (..., kv heads, own tokens, d)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None  # of all tokens; broadcasts to (..., heads, queries, keys)
    is_causal: bool
    scale: float | None
    dropout_p: float  # of weights, drawn by one call of dropout for all of them
    grouped: bool  # several heads of queries share one of keys
    queries: Placement
    keys: Placement
    group: Any  # a `TensorGroup` that sends from rank to rank too (`links.Links`)


class Attention(Protocol):
    """How ranks attend to each other's tokens; None where it does not know how."""

    def __call__(self, heads: Heads) -> torch.Tensor | None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Gathered:
    """Keys and values of all tokens on every rank: knows all masks, and takes the memory of all tokens."""

    def __call__(self, heads: Heads) -> torch.Tensor | None:
        return None


_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in {
            "query": inspect.Parameter.empty,
            "key": inspect.Parameter.empty,
            "value": inspect.Parameter.empty,
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": False,
            "scale": None,
            "enable_gqa": False,
        }.items()
    ]
)


def attend(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Any:
    """The rule: this rank's queries, attending to all keys. Dropout is written out, unless somebody keys its draws."""
    return attended(args, kwargs, drawn=False)


def attended(args: Sequence[Any], kwargs: Mapping[str, Any], *, drawn: bool) -> Any:
    """Own rows of the answer and where they are, or NotImplemented. `drawn`: a call of dropout here is keyed."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    query, key, value = call["query"], call["key"], call["value"]
    if not isinstance(query, SequenceShard) or query.tokens.dim != -2 or (call["dropout_p"] > 0 and not drawn):
        return NotImplemented
    region: Any = query.region
    mask = whole_tokens(call["attn_mask"])
    dealt = [isinstance(each, SequenceShard) and each.tokens.dim == -2 for each in (key, value)]
    if all(dealt) and key.tokens == value.tokens and query.tokens.others == key.tokens.others == 1:
        heads = Heads(
            query=query.local,
            key=key.local,
            value=value.local,
            mask=mask,
            is_causal=call["is_causal"],
            scale=call["scale"],
            dropout_p=call["dropout_p"],
            grouped=call["enable_gqa"],
            queries=region.placement(query.tokens),
            keys=region.placement(key.tokens),
            group=region.group,
        )
        made = region.attention(heads)
        if made is not None:
            return made, query.tokens
    if call["dropout_p"] > 0:
        return NotImplemented
    return _own_queries(query, whole_tokens(key), whole_tokens(value), mask, call), query.tokens


def _own_queries(
    query: SequenceShard, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, call: Mapping[str, Any]
) -> torch.Tensor:
    tokens: Tokens = query.tokens
    region: Any = query.region
    causal = call["is_causal"]
    if causal:
        placement = region.placement(tokens)
        positions = placement.positions(region.group.rank, query.local.device)
        mask = positions[:, None] >= torch.arange(key.shape[-2], device=query.local.device)
    elif mask is not None and mask.dim() > 1 and mask.shape[-2] == tokens.extent:
        mask = region.scatter(mask, tokens)
    return F.scaled_dot_product_attention(
        query.local, key, value, mask, 0.0, False, scale=call["scale"], enable_gqa=call["enable_gqa"]
    )
