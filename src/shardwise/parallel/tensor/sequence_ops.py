"""Functions of torch that work on every token by itself, and how: the tables behind `SequenceShard`.

A rule is given the operands as they are and answers what this rank computes from its own tokens, with where the answer
has its tokens; or NotImplemented, where one token's answer needs another token. Knows functions; no ranks, no models.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from shardwise.parallel.tensor.sequence import Tokens

__all__ = [
    "ASKS",
    "ELEMENTWISE",
    "IN_PLACE",
    "MAKERS",
    "OWN_MEMORY",
    "RULES",
    "SAME_MEMORY",
    "VIEWS",
    "Operands",
    "Rule",
    "Whole",
]


class Operands(Protocol):
    """What a function is given: shards of one dealing-out among other values."""

    tokens: Tokens
    shape: tuple[int, ...]  # of the first shard, whole
    fit: bool  # so far, no tensor has a dim of tokens that is neither theirs nor one

    def is_shard(self, leaf: Any) -> bool: ...

    def local(self, leaf: Any) -> Any:
        """A shard's own tokens; of a whole tensor those that meet them."""
        ...

    def weight(self, leaf: Any, *, matrix: bool = False) -> Any:
        """A tensor that meets every token; its gradient is a sum over all of them."""
        ...

    def saw_runs(self, tokens: Tokens) -> None:
        """Samples and tokens are one dim here."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """An answer that every rank has whole."""

    value: Any


Made = Any  # (local, Tokens), or a list of such, or a Whole, or NotImplemented
Rule = Callable[[Any, Sequence[Any], Mapping[str, Any], Operands], Made]


def _reduction(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Over dims that hold no tokens: mean over features, softmax over the last dim."""
    dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    dims = (dims,) if type(dims) is int else dims
    if not args or not operands.is_shard(args[0]) or not isinstance(dims, (tuple, list)) or not dims:
        return NotImplemented
    num = len(operands.shape)
    counted = {dim % num - num for dim in dims if type(dim) is int}
    if len(counted) != len(dims) or operands.tokens.dim in counted or "out" in kwargs:
        return NotImplemented
    made = func(operands.local(args[0]), *args[1:], **kwargs)
    if not isinstance(made, torch.Tensor):
        return NotImplemented
    behind = sum(dim > operands.tokens.dim for dim in counted) if made.dim() < num else 0
    tokens = operands.tokens
    return made, tokens.at(tokens.dim + behind)


def _pieces(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """chunk and split along a dim that holds no tokens."""
    dim = args[2] if len(args) > 2 else kwargs.get("dim", kwargs.get("axis", 0))
    num = len(operands.shape)
    if not args or not operands.is_shard(args[0]) or dim % num - num == operands.tokens.dim:
        return NotImplemented
    return [(piece, operands.tokens) for piece in func(operands.local(args[0]), *args[1:], **kwargs)]


def _cat(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    num = len(operands.shape)
    if not args or "out" in kwargs or not all(operands.is_shard(each) for each in args[0]):
        return NotImplemented
    if any(each.dim() != num for each in args[0]) or dim % num - num == operands.tokens.dim:
        return NotImplemented
    return func([operands.local(each) for each in args[0]], dim), operands.tokens


def _norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """layer_norm and rms_norm: (input, normalized_shape, weight, bias, eps)."""
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | dict(kwargs)
    if func is not F.layer_norm and len(args) > 3:  # rms_norm has no bias
        given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=True)) | dict(kwargs)
    if not operands.is_shard(given["input"]) or len(given["normalized_shape"]) >= -operands.tokens.dim:
        return NotImplemented
    for name in ("weight", "bias"):
        if name in given:
            given[name] = operands.weight(given[name])
    return func(operands.local(given.pop("input")), given.pop("normalized_shape"), **given), operands.tokens


def _linear(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    if not operands.is_shard(given["input"]) or operands.tokens.dim == -1:
        return NotImplemented
    weight, bias = (operands.weight(given.get(name), matrix=True) for name in ("weight", "bias"))
    return func(operands.local(given["input"]), weight, bias), operands.tokens


def _matmul(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Tokens times a matrix."""
    if kwargs or len(args) != 2 or operands.is_shard(args[1]) or operands.tokens.dim == -1 or args[1].dim() != 2:
        return NotImplemented
    return func(operands.local(args[0]), operands.weight(args[1], matrix=True)), operands.tokens


def _reshape(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Other dims, the same elements in the same order: a dim of samples × tokens still holds whole runs."""
    if not args or not operands.is_shard(args[0]):
        return NotImplemented
    if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
        return NotImplemented
    tokens, shape = operands.tokens, operands.shape
    others = [arg for arg in args[1:] if isinstance(arg, torch.Tensor)]
    if others:
        return NotImplemented
    new = _reshaped(func, shape, _plain(args[1:]), tuple((name, _plain(value)) for name, value in kwargs.items()))
    behind = math.prod(shape[len(shape) + tokens.dim + 1 :])
    at = next(
        (at for at, size in enumerate(new) if size % tokens.size == 0 and math.prod(new[at + 1 :]) == behind), None
    )
    if at is None or not tokens.size or not math.prod(new):
        return NotImplemented
    made = tokens.at(at - len(new), new[at] // tokens.size)
    operands.saw_runs(made)
    local = operands.local(args[0])
    own = local.shape[tokens.dim] // tokens.others
    sizes = [made.others * own if place == at else size for place, size in enumerate(new)]
    return local.reshape(sizes), made


@functools.lru_cache(maxsize=4096)
def _reshaped(
    func: Any, shape: tuple[int, ...], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> tuple[int, ...]:
    """The shape that a tensor of `shape` has behind it; asked of torch once."""
    return tuple(func(torch.empty(shape, device="meta"), *args, **dict(kwargs)).shape)


def _plain(value: Any) -> Any:
    """Sizes as what can be looked up."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(_plain(each) for each in value) if isinstance(value, (tuple, list)) else value


def _index(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Numbers and slices of other dims; of the tokens' all."""
    parts = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not operands.is_shard(args[0]) or not all(
        p is Ellipsis or isinstance(p, slice) or type(p) is int for p in parts
    ):
        return NotImplemented
    num, named = len(operands.shape), sum(part is not Ellipsis for part in parts)
    if parts.count(Ellipsis) > 1:
        return NotImplemented
    fill = (slice(None),) * (num - named)
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    every = (*parts[:at], *fill, *parts[at + 1 :])
    place = num + operands.tokens.dim
    if len(every) != num or not isinstance(every[place], slice):
        return NotImplemented
    if every[place].indices(operands.tokens.extent) != (0, operands.tokens.extent, 1):
        return NotImplemented
    tokens = operands.tokens
    behind = sum(type(part) is int for part in every[place + 1 :])
    own = (*every[:place], slice(None), *every[place + 1 :])
    return operands.local(args[0])[own], tokens.at(tokens.dim + behind)


def _dropout(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Drawn for all tokens, so that the numbers are those of one device; of the mask, the own part stays."""
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | dict(kwargs)
    x, p, training = given["input"], given.get("p", 0.5), given.get("training", True)
    if not operands.is_shard(x) or given.get("inplace", False):
        return NotImplemented
    local = operands.local(x)
    if not training or p == 0.0:
        return local, operands.tokens
    noise = F.dropout(torch.ones(operands.shape, dtype=local.dtype, device=local.device), p, True)
    return local * operands.local(noise), operands.tokens


def _methods(names: str) -> frozenset[Any]:
    return frozenset(getattr(torch.Tensor, name) for name in names.split())


def _functions(names: str, *, of: Any = torch) -> frozenset[Any]:
    return frozenset(getattr(of, name) for name in names.split())


def _properties(names: str) -> frozenset[Any]:
    return frozenset(getattr(torch.Tensor, name).__get__ for name in names.split())


_BOTH = (
    "abs neg exp expm1 log log1p sqrt rsqrt square sin cos tanh sigmoid relu erf reciprocal pow add sub mul div "
    "true_divide clamp clamp_min clamp_max maximum minimum where masked_fill logical_not logical_and logical_or eq ne "
    "lt le gt ge isfinite isinf isnan lerp addcmul nan_to_num sign round floor clone"
)
_METHODS_ONLY = (
    "float double half bfloat16 to contiguous type_as __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ "
    "__rtruediv__ __pow__ __rpow__ __neg__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __invert__ __and__ __or__ detach"
)
IN_PLACE = _methods(
    "add_ sub_ mul_ div_ clamp_ masked_fill_ relu_ tanh_ sigmoid_ __iadd__ __isub__ __imul__ __itruediv__"
)
ELEMENTWISE = (
    _methods(_BOTH)
    | _functions(_BOTH)
    | _methods(_METHODS_ONLY)
    | IN_PLACE
    | _functions("gelu silu relu relu6 elu selu leaky_relu softplus mish hardtanh hardswish logsigmoid", of=F)
    | _functions("rsub")
)
SAME_MEMORY = _methods("detach float double half bfloat16 to contiguous type_as")  # at times
_REDUCTIONS = (
    _methods("mean sum var std amax amin logsumexp prod softmax log_softmax norm")
    | _functions("mean sum var std amax amin logsumexp prod softmax log_softmax")
    | _functions("softmax log_softmax", of=F)
) - _methods("norm")
_RESHAPES = _methods("view reshape flatten unflatten squeeze unsqueeze") | _functions(
    "reshape flatten unflatten squeeze unsqueeze"
)
_PIECES = _methods("chunk split") | _functions("chunk split")
VIEWS = _RESHAPES | _PIECES | {torch.Tensor.__getitem__}  # of the same memory, at times
RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        **dict.fromkeys(_REDUCTIONS, _reduction),
        **dict.fromkeys(_RESHAPES, _reshape),
        **dict.fromkeys(_PIECES, _pieces),
        **dict.fromkeys(_functions("cat concat"), _cat),
        **dict.fromkeys((F.layer_norm, F.rms_norm), _norm),
        F.linear: _linear,
        **dict.fromkeys(_methods("matmul __matmul__") | _functions("matmul"), _matmul),
        torch.Tensor.__getitem__: _index,
        F.dropout: _dropout,
    }
)
ASKS = _methods(
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex __len__ __hash__"
) | (
    _properties(
        "shape dtype device ndim requires_grad is_leaf layout is_cuda is_meta is_sparse is_nested is_quantized _version"
    )
)
MAKERS = _methods("new_zeros new_ones new_empty new_full new_tensor") | _functions(
    "zeros_like ones_like empty_like full_like"
)
OWN_MEMORY = _methods("untyped_storage data_ptr")
