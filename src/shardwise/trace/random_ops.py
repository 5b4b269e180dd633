"""Random aten ops, run on a stream of their own: below autograd, one sample after the other.

It knows the schemas of random ops. Gradients are autograd's own, because what is replaced lies beneath it.

    draw over dim 0 of size B·k, samples (7, 4, 9):   rows 0..k-1 | k..2k-1 | 2k..3k-1
                                           stream of     sample 7 | sample 4 | sample 9
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.errors import ModelError
from shardwise.trace.random_streams import Generators, Scope, Stream

__all__ = ["KeyedOps", "accepts_generator", "draws_numbers", "with_generator"]

aten = torch.ops.aten

_Arguments = tuple[Any, ...]
_Keywords = Mapping[str, Any]

# A permutation has no rows that could be drawn apart.
_NEVER_PER_SAMPLE = frozenset({aten.randperm.default, aten.randperm.generator})
_LIKE = frozenset({aten.rand_like, aten.randn_like, aten.randint_like})


def draws_numbers(func: Any) -> bool:
    """Whether an aten op draws random numbers (torch's tag `nondeterministic_seeded`)."""
    return torch.Tag.nondeterministic_seeded in func.tags


def accepts_generator(func: OpOverload) -> bool:
    """Whether the op, or an overload of it, can be given a generator."""
    return _accepting_generator(func) is not None


class KeyedOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every random aten op draws from the stream (scope, index, its number among these ops).

    Masks of dropout have the samples in `sample_dim`, all else in dim 0. Ops that were given a generator by
    the user are left alone. Raises ModelError for a fused op whose numbers cannot be chosen from outside.
    """

    def __init__(self, *, scope: Scope, index: int, generators: Generators, sample_dim: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scope, self._index, self._generators = scope, index, generators
        self._sample_dim = sample_dim
        self._num_ops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: _Arguments = (), kwargs: _Keywords | None = None
    ) -> Any:
        kwargs = kwargs or {}
        fake = any(isinstance(value, FakeTensor) for value in args)  # has no values to choose
        if not draws_numbers(func) or fake or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        stream = Stream(scope=self._scope, index=(self._index, self._num_ops), generators=self._generators)
        self._num_ops += 1
        if func is aten.native_dropout.default:
            return _native_dropout(func, args, kwargs, stream, self._sample_dim)
        if func is aten.bernoulli_.float and args[0].dim() > self._sample_dim:
            _keyed(func, (args[0].transpose(0, self._sample_dim), *args[1:]), kwargs, stream)
            return args[0]
        return _keyed(func, args, kwargs, stream)


def with_generator(func: OpOverload, args: _Arguments, kwargs: _Keywords, generator: torch.Generator) -> Any:
    """`func(*args, **kwargs)`, drawn from `generator`, also where another overload of the op accepts it.

    Raises ModelError where none does.
    """
    accepting = _accepting_generator(func)
    if accepting is None:
        raise ModelError(
            f"{func} cannot be given a generator, so its numbers would depend on the layout; "
            "use an unfused version of this operation, or one without dropout"
        )
    return accepting(*args, **{**kwargs, "generator": generator})


@cache
def _accepting_generator(func: OpOverload) -> Callable[..., Any] | None:
    wanted = _names(func)
    if "generator" in wanted:
        return func
    packet = func.overloadpacket
    for name in packet.overloads():
        overload: OpOverload = getattr(packet, name)
        names = _names(overload)
        if [n for n in names if n != "generator"] == wanted and len(names) > len(wanted):
            return overload
    return None


def _names(func: OpOverload) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _native_dropout(func: OpOverload, args: _Arguments, kwargs: _Keywords, stream: Stream, sample_dim: int) -> Any:
    x, p, train = args[0], args[1], args[2]
    if train is False or p == 0:
        return func(*args, **kwargs)
    dim = sample_dim if x.dim() > sample_dim else 0
    mask = stream.keep_mask(x.new_empty(x.transpose(0, dim).shape, dtype=torch.bool), 1 - p).transpose(0, dim)
    return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


def _keyed(func: OpOverload, args: _Arguments, kwargs: _Keywords, stream: Stream) -> Any:
    # Kernels fill in the order of memory: contiguous operands keep the values independent of the strides.
    in_place = func._schema.name.endswith("_")
    written = _written(func)
    first = args[0] if args else None
    if func.overloadpacket in _LIKE and isinstance(first, torch.Tensor):  # its values are not asked for; may be absent
        args = (torch.empty(first.shape, dtype=first.dtype, device=first.device), *args[1:])
    args = tuple(_contiguous(value) if position not in written else value for position, value in enumerate(args))
    if in_place and not args[0].is_contiguous():
        args[0].copy_(_keyed(func, (args[0].contiguous(), *args[1:]), kwargs, stream))
        return first
    drawn = _drawn(func, args, kwargs, stream)
    return first if in_place else _laid_out_as(first, drawn)


def _drawn(func: OpOverload, args: _Arguments, kwargs: _Keywords, stream: Stream) -> Any:
    shape = _shape(func, args)
    num_rows = stream.num_rows(shape[0]) if shape else 0
    device = next((v.device for v in args if isinstance(v, torch.Tensor)), kwargs.get("device"))
    device = torch.device("cpu" if device is None else device)
    if num_rows == 0:
        return with_generator(func, args, kwargs, stream.shared(device))
    parts = [
        with_generator(func, _rows(func, args, b * num_rows, num_rows), kwargs, generator)
        for b, generator in enumerate(stream.per_sample(device))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _shape(func: OpOverload, args: _Arguments) -> Sequence[int]:
    """The shape of what is drawn; empty where it has no rows that could be drawn apart."""
    tensors = [value.shape for value in args if isinstance(value, torch.Tensor)]
    if func in _NEVER_PER_SAMPLE or (func is aten.multinomial.default and len(tensors[0]) == 1):
        return ()
    if tensors:
        shape: Sequence[int] = torch.broadcast_shapes(*tensors)  # type: ignore[no-untyped-call]
        return shape
    size: Sequence[int] = args[_size_position(func)]
    return size


def _rows(func: OpOverload, args: _Arguments, start: int, num_rows: int) -> _Arguments:
    """The arguments that draw rows [start, start + num_rows): tensors are narrowed, a size is shortened."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if not tensors:
        at = _size_position(func)
        return (*args[:at], [num_rows, *args[at][1:]], *args[at + 1 :])
    dim = max(value.dim() for value in tensors)

    def cut(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < dim or value.shape[0] == 1:
            return value
        return value.narrow(0, start, num_rows)

    return tuple(cut(value) for value in args)


@cache
def _size_position(func: OpOverload) -> int:
    return _names(func).index("size")


@cache
def _written(func: OpOverload) -> frozenset[int]:
    """Positions of the arguments that an op writes. Raises ModelError for `out=`, which may be resized."""
    arguments = func._schema.arguments
    if any(argument.is_out for argument in arguments):
        raise ModelError(f"{func} draws into out=; call the in-place method of the tensor instead")
    return frozenset(
        at for at, argument in enumerate(arguments) if argument.alias_info is not None and argument.alias_info.is_write
    )


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def _laid_out_as(like: Any, drawn: Any) -> Any:
    """`drawn` with the strides of `like`, as the op itself would have returned it."""
    if not isinstance(like, torch.Tensor) or like.shape != drawn.shape or like.is_contiguous():
        return drawn
    return torch.empty_like(like, dtype=drawn.dtype).copy_(drawn)
