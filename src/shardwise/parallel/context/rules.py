"""Functions of torch that work on own tokens of a sequence, beyond those that tensor parallelism meets: the tables.

Heads and tokens change places here, attention is written out, sums run over all tokens. A rule answers as those of
`parallel.tensor.sequence_ops` do; what is in no table joins the tokens. Knows functions; no models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from shardwise.parallel.context.attend import attend
from shardwise.parallel.context.deal import total
from shardwise.parallel.context.loss import cross_entropy, mse_loss
from shardwise.parallel.context.placement import Placement
from shardwise.parallel.tensor.sequence import Tokens
from shardwise.parallel.tensor.sequence_ops import RULES, Made, Operands, Rule, Whole
from shardwise.parallel.tensor.sequence_shard import SequenceShard, whole_tokens
from shardwise.trace.multi_head import multi_head_attention

__all__ = ["MIXES", "TOKEN_RULES"]


def _transpose(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    given = dict(zip(("dim0", "dim1"), args[1:], strict=False)) | dict(kwargs)
    one = given.get("dim0", given.get("axis0"))
    other = given.get("dim1", given.get("axis1"))
    if type(one) is not int or type(other) is not int:
        return NotImplemented
    num = len(operands.shape)
    one, other, at = one % num - num, other % num - num, operands.tokens.dim
    moved = other if at == one else one if at == other else at
    return operands.local(args[0]).transpose(one, other), operands.tokens.at(moved)


def _permute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    dims = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:] or kwargs.get("dims", ())
    num = len(operands.shape)
    if len(dims) != num:
        return NotImplemented
    order = [dim % num for dim in dims]
    return operands.local(args[0]).permute(order), operands.tokens.at(order.index(num + operands.tokens.dim) - num)


def _mirrored(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """x.mT, and x.T of matrices."""
    if len(operands.shape) < 2 or (func is _T and len(operands.shape) != 2):
        return NotImplemented
    return _transpose(func, (args[0], -2, -1), {}, operands)


def _expand(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    sizes = list(args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:] or kwargs.get("size", ()))
    at = operands.tokens.dim
    if len(sizes) < len(operands.shape) or sizes[at] not in (-1, operands.tokens.extent):
        return NotImplemented
    local = operands.local(args[0])
    sizes[at] = local.shape[at]
    return local.expand(sizes), operands.tokens


def _repeat_interleave(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    given = dict(zip(("repeats", "dim"), args[1:], strict=False)) | dict(kwargs)
    dim, repeats = given.get("dim"), given.get("repeats")
    num = len(operands.shape)
    if type(dim) is not int or type(repeats) is not int or dim % num - num == operands.tokens.dim:
        return NotImplemented
    return operands.local(args[0]).repeat_interleave(repeats, dim), operands.tokens


def _index(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Numbers, slices and new dims; of the tokens' dim all, a run, or one token."""
    source, parts = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    if not operands.is_shard(source) or parts.count(Ellipsis) > 1:
        return NotImplemented
    if any(not (part is None or part is Ellipsis or type(part) in (int, slice)) for part in parts):
        return NotImplemented
    num, named = len(operands.shape), sum(part is not Ellipsis and part is not None for part in parts)
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    every = [*parts[:at], *[slice(None)] * (num - named), *parts[at + 1 :]]
    dims = [number for number, part in enumerate(every) if part is not None]
    place = dims[num + operands.tokens.dim]  # what is said of the tokens' dim
    behind = sum(type(later) is not int for later in every[place + 1 :])  # dims of the answer behind it
    wanted, every[place] = every[place], slice(None)
    local = operands.local(source)[tuple(every)]
    tokens = operands.tokens.at(-1 - behind)
    if isinstance(wanted, slice):
        start, stop, step = wanted.indices(tokens.extent)
        if (start, stop, step) == (0, tokens.extent, 1):
            return local, tokens
        if step != 1 or stop <= start or tokens.others > 1:
            return NotImplemented
        return _run_of(source, local, tokens, start, stop)
    if tokens.others > 1 or not local.is_floating_point() or not -tokens.size <= wanted < tokens.size:
        return NotImplemented
    return _token_of(source, local, tokens, wanted % tokens.size)


def _run_of(source: SequenceShard, local: torch.Tensor, tokens: Tokens, start: int, stop: int) -> Made:
    """Tokens [start, stop), each where it is."""
    runs = _placement(source, tokens).runs(source.region.group.rank)
    before, up_to = (sum(max(0, min(b, end) - a) for a, b in runs) for end in (start, stop))
    own = local.narrow(tokens.dim, before, up_to - before)
    of = tokens.size if tokens.of is None else tokens.of
    return own, dataclasses.replace(tokens, size=stop - start, first=tokens.first + start, of=of)


def _token_of(source: SequenceShard, local: torch.Tensor, tokens: Tokens, index: int) -> Made:
    """One token, on every rank: a sum to which the others give zeros."""
    runs = _placement(source, tokens).runs(source.region.group.rank)
    before = sum(max(0, min(b, index) - a) for a, b in runs)
    num = int(any(a <= index < b for a, b in runs))
    own = local.narrow(tokens.dim, before if num else 0, num).sum(tokens.dim)  # with a graph, also of nothing
    return Whole(total(own, source.region.group))


def _placement(source: SequenceShard, tokens: Tokens) -> Placement:
    region: Any = source.region
    placement: Placement = region.placement(tokens)
    return placement


def _unbind(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    num = len(operands.shape)
    dim = dim % num - num
    if dim == operands.tokens.dim:
        return NotImplemented
    tokens = operands.tokens.at(operands.tokens.dim + (dim > operands.tokens.dim))
    return [(piece, tokens) for piece in operands.local(args[0]).unbind(dim)]


def _cat(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Along other dims; along the tokens' where all others are empty (a cache that is filled first)."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if "out" in kwargs:
        return NotImplemented
    num = len(operands.shape)
    given = [each for each in args[0] if operands.is_shard(each) or each.numel()]
    if len(given) == 1:
        return operands.local(given[0]), operands.tokens
    if any(each.dim() != num for each in given) or dim % num - num == operands.tokens.dim:
        return NotImplemented
    if any(operands.is_shard(each) and each.tokens != operands.tokens for each in given):
        return NotImplemented
    if any(each.shape[operands.tokens.dim] != operands.tokens.extent for each in given):
        return NotImplemented
    return func([operands.local(each) for each in given], dim), operands.tokens


def _stack(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if "out" in kwargs or not all(operands.is_shard(each) for each in args[0]):
        return NotImplemented
    num = len(operands.shape) + 1
    behind = dim % num - num >= operands.tokens.dim
    at = operands.tokens.dim - 1 if behind else operands.tokens.dim
    return func([operands.local(each) for each in args[0]], dim), operands.tokens.at(at)


def _each(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Element by element, of tensors that meet each other."""
    if kwargs.get("inplace") or kwargs.get("out") is not None:
        return NotImplemented
    own = [operands.local(arg) for arg in args]
    named = {name: operands.local(value) for name, value in kwargs.items()}
    return (func(*own, **named), operands.tokens) if operands.fit else NotImplemented


def _along(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Functions of one tensor along a dim that holds no tokens, the last where they name none."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    num = len(operands.shape)
    if type(dim) is not int or dim % num - num == operands.tokens.dim or not operands.is_shard(args[0]):
        return NotImplemented
    return func(operands.local(args[0]), *args[1:], **kwargs), operands.tokens


def _chosen(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """topk, sort: values and places along a dim that holds no tokens. As torch names them."""
    given = dict(zip(("k", "dim") if "topk" in func.__name__ else ("dim",), args[1:], strict=False)) | dict(kwargs)
    dim = given.get("dim", -1)
    num = len(operands.shape)
    if type(dim) is not int or dim % num - num == operands.tokens.dim or "out" in kwargs:
        return NotImplemented
    source = args[0]
    made = func(operands.local(source), *args[1:], **kwargs)
    return Whole(type(made)([SequenceShard(each, operands.tokens, source.region) for each in made]))


def _gather(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """x.gather(dim, index) along a dim that holds no tokens."""
    if kwargs or len(args) != 3 or not operands.is_shard(args[0]) or not operands.is_shard(args[2]):
        return NotImplemented
    num = len(operands.shape)
    if args[1] % num - num == operands.tokens.dim or args[2].dim() != num:
        return NotImplemented
    return func(operands.local(args[0]), args[1], operands.local(args[2])), operands.tokens


def _summed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """sum and mean: over dims without tokens by token, over tokens (or all dims) by a sum over the ranks."""
    mean = func in (torch.mean, torch.Tensor.mean)
    given = dict(zip(("dim", "keepdim"), args[1:], strict=False)) | dict(kwargs)
    dims = given.pop("dim", given.pop("axis", None))
    keep, dtype = given.pop("keepdim", False), given.pop("dtype", None)
    if given or not operands.is_shard(args[0]):
        return NotImplemented
    num, tokens = len(operands.shape), operands.tokens
    listed = range(-num, 0) if dims is None or dims == () else (dims,) if type(dims) is int else dims
    counted = {dim % num - num for dim in listed}
    if tokens.dim not in counted:
        return RULES[func](func, args, kwargs, operands)
    local = operands.local(args[0])
    if dtype is not None:
        local = local.to(dtype)
    if mean and not local.is_floating_point():
        return NotImplemented
    made = total(local.sum(sorted(counted), keepdim=keep), args[0].region.group)
    return Whole(made / math.prod(operands.shape[dim] for dim in counted) if mean else made)


def _embedding(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    given = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | dict(kwargs)
    if not operands.is_shard(given["input"]) or given.get("max_norm") is not None or operands.is_shard(given["weight"]):
        return NotImplemented
    given["input"] = operands.local(given["input"])
    return func(**given) if kwargs else func(given["input"], *args[1:]), operands.tokens.at(operands.tokens.dim - 1)


def _matmul(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    """Own rows times all columns; a sum over tokens is one over the ranks."""
    if kwargs or len(args) != 2 or min(args[0].dim(), args[1].dim()) < 2:
        return NotImplemented
    left, right = args
    dims = [each.tokens.dim if operands.is_shard(each) else 0 for each in args]
    region = (left if dims[0] else right).region
    if dims[0] == -2:  # own rows of the answer
        return func(left.local, whole_tokens(right)), left.tokens
    if dims[1] == -1 and dims[0] == 0:  # own columns
        return func(left, right.local), right.tokens
    if dims[0] == -1 and dims[1] == -2 and left.tokens.at(-2) == right.tokens:
        return Whole(total(func(left.local, right.local), region.group))
    if dims[0] == -1 and dims[1] == 0:
        own = region.scatter(right, left.tokens.at(-2))
        return Whole(total(func(left.local, own), region.group))
    if dims[1] == -2 and dims[0] == 0:
        own = region.scatter(left, right.tokens.at(-1))
        return Whole(total(func(own, right.local), region.group))
    if dims[0] < -2 and dims[0] == dims[1] and left.tokens == right.tokens:
        return func(left.local, right.local), left.tokens
    if dims[0] < -2 and dims[1] == 0 and left.dim() >= right.dim():
        own = operands.local(right)
        return (func(left.local, own), left.tokens) if operands.fit else NotImplemented
    return NotImplemented


def _multi_head(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Operands) -> Made:
    with torch._C._EnableTorchFunction():  # its operations are asked one by one
        return Whole(multi_head_attention(*args, **kwargs))


def _functions(names: str, *, of: Any = torch) -> frozenset[Any]:
    return frozenset(getattr(of, name) for name in names.split())


def _both(names: str) -> frozenset[Any]:
    """Functions of torch and methods of tensors by the same names."""
    return _functions(names) | _functions(names, of=torch.Tensor)


def _property(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


_T = _property("T")
_ELEMENTS = (
    _functions("sigmoid tanh hardsigmoid softsign threshold celu", of=F)
    | _functions("selu celu")
    | _functions("__mod__ __floordiv__ __rfloordiv__ __rsub__ int long bool", of=torch.Tensor)
    | _both(
        "square clip sin cos tan atan log2 exp2 expm1 sgn heaviside floor_divide remainder fmod logaddexp bitwise_and "
        "bitwise_or bitwise_not isclose ceil trunc negative greater less greater_equal less_equal not_equal"
    )
)
_MATMULS = _both("matmul bmm") | {torch.Tensor.__matmul__}
_ATTENTION = F.scaled_dot_product_attention

TOKEN_RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        **RULES,
        **dict.fromkeys(_ELEMENTS, _each),
        **dict.fromkeys(_both("transpose swapaxes swapdims"), _transpose),
        **dict.fromkeys(_both("permute"), _permute),
        **dict.fromkeys((_property("mT"), _T), _mirrored),
        **dict.fromkeys(_functions("expand", of=torch.Tensor), _expand),
        **dict.fromkeys(_both("repeat_interleave"), _repeat_interleave),
        **dict.fromkeys(_both("unbind"), _unbind),
        **dict.fromkeys(_functions("cat concat"), _cat),
        **dict.fromkeys(_functions("stack"), _stack),
        **dict.fromkeys(_both("cumsum cumprod") | {torch._safe_softmax}, _along),
        F.glu: _along,
        **dict.fromkeys(_both("topk sort"), _chosen),
        **dict.fromkeys(_both("gather"), _gather),
        **dict.fromkeys(_both("sum mean"), _summed),
        **dict.fromkeys(_MATMULS, _matmul),
        torch.Tensor.__getitem__: _index,
        F.embedding: _embedding,
        F.cross_entropy: cross_entropy,
        F.mse_loss: mse_loss,
        _ATTENTION: attend,
        F.multi_head_attention_forward: _multi_head,
    }
)
MIXES = frozenset({*_MATMULS, _ATTENTION, F.multi_head_attention_forward, F.cross_entropy})
