"""Losses of predictions that are dealt out by tokens: each rank sums its own tokens', and the ranks add.

No rank has more than its tokens' logits. Targets are whole, and cut. Knows functions of torch; no models.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from shardwise.parallel.context.deal import total
from shardwise.parallel.tensor.sequence_ops import Operands, Whole
from shardwise.parallel.tensor.sequence_shard import SequenceShard, whole_tokens

__all__ = ["cross_entropy", "mse_loss"]

_CROSS_ENTROPY = inspect.signature(F.cross_entropy)
_MSE = inspect.signature(F.mse_loss)


def cross_entropy(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Any:
    """The rule of `F.cross_entropy` for logits by tokens and ids of classes as targets."""
    bound = _CROSS_ENTROPY.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    logits, target = call["input"], whole_tokens(call["target"])
    weight, smoothing, ignored = call["weight"], call["label_smoothing"], call["ignore_index"]
    if not isinstance(logits, SequenceShard) or target.is_floating_point() or target.dim() != logits.dim() - 1:
        return NotImplemented
    if call["size_average"] is not None or call["reduce"] is not None or (weight is not None and smoothing):
        return NotImplemented
    at = logits.dim() + logits.tokens.dim
    if at == 1:  # the dim of classes
        return NotImplemented
    dim = logits.tokens.dim if at > 1 else logits.tokens.dim + 1
    tokens = logits.tokens.at(dim)
    region: Any = logits.region
    own = region.scatter(target, tokens)
    reduction = "sum" if call["reduction"] == "mean" else call["reduction"]
    made = F.cross_entropy(
        logits.local, own, weight, ignore_index=ignored, reduction=reduction, label_smoothing=smoothing
    )
    if call["reduction"] == "none":
        return made, tokens
    made = total(made, region.group)
    if call["reduction"] == "mean":
        counted = target != ignored
        made = made / (counted.sum() if weight is None else weight[target[counted]].sum())
    return Whole(made)


def mse_loss(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Any:
    """The rule of `F.mse_loss` for predictions and targets of one shape."""
    bound = _MSE.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    x, y = call["input"], call["target"]
    if tuple(x.shape) != tuple(y.shape) or any(call.get(name) is not None for name in ("size_average", "reduce")):
        return NotImplemented
    if call.get("weight") is not None or any(
        isinstance(each, SequenceShard) and each.tokens != operands.tokens for each in (x, y)
    ):
        return NotImplemented
    made = F.mse_loss(operands.local(x), operands.local(y), reduction="sum" if call["reduction"] != "none" else "none")
    if call["reduction"] == "none":
        return made, operands.tokens
    made = total(made, _group(x, y))
    return Whole(made / torch.Size(operands.shape).numel() if call["reduction"] == "mean" else made)


def _group(*tensors: Any) -> Any:
    return next(each.region.group for each in tensors if isinstance(each, SequenceShard))
