"""One unit and one call of it, made small and real for analysis: a copy in float64 with random numbers everywhere.

Random parameters are stricter than trained or initial ones: a norm's weight is not one, a bias is not zero. Knows
modules and captured calls; nothing of the model around the unit is touched.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.parallel.tensor.extra_outputs import Extra
from shardwise.trace.placing import held_tensors, named_tensors

__all__ = ["Call", "Doubled", "random_copy", "tensors_of", "twin"]

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of a unit as it was captured: arguments with real tensors (random where the model computes them).

    `requires_grad` are the places, among the tensors of the arguments, that a gradient flows back to; `read` the
    places, among the tensors that are returned, that somebody outside reads (None: all); `invented` those whose numbers
    are not known and that no gradient flows to: a mask or a table of positions that the model computes; `counted` whole
    numbers that it computes (see `whole_numbers`). `extras` are places where the unit leaves, outside of what it
    returns, what somebody outside reads.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    requires_grad: frozenset[int]
    read: frozenset[int] | None = None
    invented: frozenset[int] = frozenset()
    counted: frozenset[int] = frozenset()
    extras: frozenset[Extra] = frozenset()

    def fresh(
        self, *, seed: int | None = None, all_gradients: bool = False, fill: float | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of one run: new leaves in float64, containers and caches copied. `seed` draws other numbers.

        With `all_gradients` every floating tensor is a leaf that asks for a gradient. With `fill` what was invented is
        this number everywhere, and other tensors without a gradient are as they were given.
        """
        args, kwargs = copy.deepcopy((self.args, dict(self.kwargs)))
        leaves, spec = tree_flatten((args, kwargs))
        generator = torch.Generator().manual_seed(seed or 0)
        number = 0
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            if leaf.is_floating_point():
                leaf = leaf.double()
                if fill is not None and number not in self.requires_grad:
                    leaf = torch.full_like(leaf, fill) if number in self.invented else leaf
                elif seed is not None:
                    leaf = _other_numbers(leaf, generator, computed=number in self.requires_grad, seed=seed)
                leaves[place] = leaf.detach().requires_grad_(all_gradients or number in self.requires_grad)
            number += 1
        made: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, spec)
        return made

    @property
    def constants(self) -> int:
        """How many floating tensors have no gradient."""
        floating = [tensor.is_floating_point() for tensor in self.tensors]
        return sum(is_floating and place not in self.requires_grad for place, is_floating in enumerate(floating))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors among the arguments, in order."""
        return tensors_of((self.args, dict(self.kwargs)))


def tensors_of(tree: object) -> list[torch.Tensor]:
    """The tensors among the leaves of a structure."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _other_numbers(leaf: torch.Tensor, generator: torch.Generator, *, computed: bool, seed: int) -> torch.Tensor:
    """Activations are drawn anew; masks and positions keep their pattern (what is hidden stays hidden). What is zero
    everywhere is so with every other seed: it may be added, and then has to be seen, or be such a mask."""
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
    if computed:
        return noise
    if bool((leaf * (leaf - 1) == 0).all()) and (bool(leaf.any()) or seed % 2 == 0):
        return leaf  # a mask of zeros and ones: multiplied by a million, noise in it would drown everything else
    return torch.where(leaf.abs() < 1e4, leaf + 0.1 * noise, leaf)


def random_copy(unit: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of `unit` in float64 whose parameters are random and whose buffers are near its own.

    Parameters of `unit` may be absent, fake or on meta; they are not read.
    """
    generator = torch.Generator().manual_seed(seed)
    memo: dict[int, Any] = {}
    for tensor in named_tensors(unit).values():
        if id(tensor) in memo:
            continue
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = _random_parameter(tensor, generator)
        elif tensor.is_floating_point():
            memo[id(tensor)] = _near(tensor, generator)
    for module in unit.modules():
        for _, leaves, _ in held_tensors(module):
            held = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and id(leaf) not in memo}
            memo.update({key: leaf.detach().clone() for key, leaf in held.items()})
    return copy.deepcopy(unit, memo)


def twin(unit: nn.Module) -> nn.Module:
    """A copy of a real `unit` that shares the memory of its parameters, with gradients of its own."""
    memo: dict[int, Any] = {}
    for parameter in unit.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(unit, memo)


def _random_parameter(parameter: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    shape = tuple(parameter.shape)
    if not parameter.is_floating_point():
        return nn.Parameter(torch.zeros(shape, dtype=parameter.dtype), requires_grad=False)
    if len(shape) < 2:
        values = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    else:
        fan = max(parameter.numel() // max(shape[0], 1), 1)
        values = torch.randn(shape, generator=generator, dtype=torch.float64) / fan**0.5
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _near(buffer: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uniform buffers (running means and variances) get numbers of their own, others keep theirs, nearly."""
    values = buffer.detach().double()
    noise = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
    return torch.where(values.abs() < 1e4, values * (1 + 0.1 * noise) + 0.01 * noise * (values == 0), values)


class Doubled(TorchFunctionMode):
    """Inside, every cast to a narrower floating type is one to float64: what is compared is exact to 1e-12."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CASTS:
            return args[0].double()
        if func is torch._grouped_mm and args[0].dtype == torch.float64:
            return _grouped_mm(*args, **(kwargs or {}))  # no kernel for float64
        kwargs = {key: _doubled(value) for key, value in kwargs.items()} if kwargs else {}
        if (
            func in _MAKERS
            and kwargs.get("dtype") is None
            and not (func in _OF_VALUES and not _has_float(args, kwargs))
        ):
            kwargs["dtype"] = torch.float64
        return func(*[_doubled(value) for value in args], **kwargs)


_CASTS = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})
_OF_VALUES = frozenset({torch.tensor, torch.full, torch.arange})  # whose type follows the values that they are given
_ALIGNED = 4  # numbers of 4 bytes
_MAKERS = frozenset({torch.zeros, torch.ones, torch.empty, torch.linspace, *_OF_VALUES})


def _has_float(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(leaf, float) for leaf in tree_flatten((args, kwargs))[0])


def _doubled(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _grouped_mm(
    rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, bias: None = None, out_dtype: None = None
) -> torch.Tensor:
    """`F.grouped_mm` in float64: rows [offs[e - 1], offs[e]) times weights[e]. Refuses what it refuses in float32."""
    if rows.shape[-1] % _ALIGNED or weights.shape[-1] % _ALIGNED:  # the second is asked for by the backward
        raise RuntimeError("grouped_mm: strides should be multiple of 16 bytes")
    ends = offs.tolist()
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    # split at once: an index a group would cost a whole gradient each
    *given, rest = torch.split(rows, [*counts, rows.shape[0] - ends[-1]])
    parts = [group @ weight for group, weight in zip(given, weights.unbind(0), strict=True)]
    return torch.cat([*parts, rest.new_zeros(rest.shape[0], weights.shape[-1])])
