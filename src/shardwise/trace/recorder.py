"""Writes the recipe of every tensor that is made while a model is built, and makes none of them.

Tensors are fake (shape, dtype and device, no memory), so a model of any size is built in seconds. Where the program
looks at a value (`.item()`, `.tolist()`, `.numpy()`, a size that depends on data), that one value is computed. It
knows ops and storages; it knows no parameter names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from shardwise.errors import ModelError
from shardwise.trace.extras_of import extras_of
from shardwise.trace.random_ops import accepts_generator, draws_numbers
from shardwise.trace.recipe import Op, Recipe, View
from shardwise.trace.replay import replay, without_modes

__all__ = ["Recorder"]

aten = torch.ops.aten

_LIFTS = frozenset({aten.lift_fresh.default, aten.lift.default, aten.lift_fresh_copy.default})
# What these return has no content that anyone may rely on; replayed it is zero.
_UNWRITTEN = frozenset(
    {aten.empty, aten.empty_like, aten.empty_strided, aten.empty_permuted, aten.new_empty, aten.new_empty_strided}
)
# In-place ops that do not look at what was there before.
_HIDING = frozenset(
    {aten.zero_, aten.fill_, aten.copy_, aten.normal_, aten.uniform_, aten.bernoulli_, aten.random_}
    | {aten.exponential_, aten.geometric_, aten.cauchy_, aten.log_normal_}
)
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_TRUNCATED_NORMAL: Callable[..., torch.Tensor] = nn.init._no_grad_trunc_normal_


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside `recording()`, every aten op goes to `recipe`. Raises ModelError for what no recipe can hold."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recipe = Recipe()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._seed = seed
        self._numbers: dict[int, int] = {}  # address of a storage -> its number
        self._alive: list[torch.UntypedStorage] = []  # addresses must not be used again

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Not for two threads at a time: `nn.init.trunc_normal_`, which looks at its draws, is replaced."""
        truncated = mock.patch.object(nn.init, _TRUNCATED_NORMAL.__name__, self._truncated_normal)
        with truncated, self.fake_mode, self, _Looks(self):
            yield

    def fake(self, tensor: torch.Tensor) -> FakeTensor:
        """`tensor` itself if it is fake, else its stand-in: its value goes to the recipe as a constant."""
        if isinstance(tensor, FakeTensor):
            return tensor
        with without_modes():
            fake: FakeTensor = self.fake_mode.from_tensor(tensor)
            storage = fake.untyped_storage()
            if storage._cdata not in self._numbers:
                self.recipe.constants[self._number(storage)] = tensor.untyped_storage().cpu().clone()
        return fake

    def view(self, fake: FakeTensor) -> View:
        """Where a fake tensor looks. Raises ModelError for one that was not made while recording."""
        storage = fake.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            raise ModelError(f"a tensor of shape {tuple(fake.shape)} was made where no op could be recorded")
        self.recipe.num_bytes[number] = max(self.recipe.num_bytes[number], storage.nbytes())
        return View(
            storage=number,
            dtype=fake.dtype,
            shape=tuple(fake.shape),
            strides=fake.stride(),
            offset=int(fake.storage_offset()),
            conjugate=fake.is_conj(),
            negative=fake.is_neg(),
        )

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The real value, on the CPU, that `tensor` has at this moment of the build."""
        return self._values([self.view(self.fake(tensor))])[0]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func in _LIFTS and not isinstance(args[0], FakeTensor):
            return self.fake(args[0])
        if func is aten._local_scalar_dense.default:
            return self.value(args[0]).item()
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [self.fake(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
        views = tree_unflatten([self._leaf(leaf) for leaf in leaves], spec)
        generator = self._generator_state(func, *views)
        result = self._run(func, args, kwargs, views)
        self._record(func, *views, result, generator)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], views: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except _NEEDS_VALUES:
            if func._schema.is_mutable or draws_numbers(func):
                raise
        return tree_map_only(torch.Tensor, self.fake_mode.from_tensor, self._really(func, *views))

    def _really(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an op on the values of this moment."""
        leaves, spec = tree_flatten((args, kwargs))
        at = [position for position, leaf in enumerate(leaves) if isinstance(leaf, View)]
        for position, value in zip(at, self._values([leaves[position] for position in at]), strict=True):
            leaves[position] = value
        args, kwargs = tree_unflatten(leaves, spec)
        with without_modes():
            return func(*args, **kwargs)

    def _values(self, views: list[View]) -> list[torch.Tensor]:
        for view in views:
            self.recipe.assign_reading_keys(self.recipe.slice_of(view.storage), self._seed)
        return replay(self.recipe, views)

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, state: torch.Tensor | None) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, View)]
        reads = frozenset(view.storage for view in inputs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        made = tuple(self._made(output, reads) for output in outputs)
        writes = frozenset(view.storage for view in tree_leaves(_written(func, args, kwargs)) if view in inputs)
        if (not writes and not any(made)) or func.overloadpacket in _UNWRITTEN:
            return
        if outputs and not inputs and any(argument.name == "dtype" for argument in func._schema.arguments):
            kwargs = {**kwargs, "dtype": outputs[0].dtype}  # as the default dtype was at that moment
        random = draws_numbers(func) and state is None
        if random and not accepts_generator(func):
            raise ModelError(f"{func} cannot be given a generator")
        first = args[0] if args else None
        hides = func.overloadpacket in _HIDING and self._covers(first) and inputs.count(first) == len(inputs) - sum(
            view.storage != first.storage for view in inputs
        )
        self._append(func, args, kwargs, writes=writes, made=made, hides=hides, random=random, state=state)
