"""Writes the recipe of every tensor that is made while a model is built, and makes none of them.

Tensors are fake (shape, dtype and device, no memory), so a model of any size is built in seconds. Where the
program looks at a value (`.item()`, `.tolist()`, `.numpy()`, a size that depends on data), that one value is
computed. It knows ops and storages; it knows no parameter names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from shardwise.errors import ModelError
from shardwise.trace.fake_answers import FakeAnswers, moved
from shardwise.trace.op_effects import argument_names, covers, hides, leaves_unwritten, written_storages
from shardwise.trace.random_ops import accepts_generator, draws_numbers
from shardwise.trace.recipe import Op, Recipe, View
from shardwise.trace.replay import replay, without_modes

__all__ = ["BuildRecorder"]

aten = torch.ops.aten

_LIFTS = frozenset({aten.lift_fresh.default, aten.lift.default, aten.lift_fresh_copy.default})
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_TRUNCATED_NORMAL: Callable[..., torch.Tensor] = nn.init._no_grad_trunc_normal_


class BuildRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        """Not for two threads at a time: two functions of torch are replaced that cannot be recorded.

        `nn.init.trunc_normal_` looks at its draws; `Module.to` swaps tensors, which fake ones do not allow.
        """
        truncated = mock.patch.object(nn.init, _TRUNCATED_NORMAL.__name__, self._truncated_normal)
        swapped = mock.patch.object(torch.utils, "swap_tensors", moved)
        # Torch logs what has no fake version; it is made for real then, and the blueprint says why.
        silent = mock.patch.object(logging.getLogger(FakeTensorMode.__module__), "disabled", True)
        with truncated, swapped, silent, self.fake_mode, self, FakeAnswers(self.value):
            yield

    def fake(self, tensor: torch.Tensor) -> FakeTensor:
        """`tensor` itself if it is fake, else its stand-in: its value goes to the recipe as a constant."""
        if isinstance(tensor, FakeTensor):
            return tensor
        with without_modes():
            fake: FakeTensor = self.fake_mode.from_tensor(tensor)
            storage = fake.untyped_storage()
            if storage._cdata not in self._numbers:
                number = self._number(storage)
                if not tensor.is_meta:
                    self.recipe.constants[number] = _copied(tensor)
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
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func in _LIFTS and not isinstance(args[0], FakeTensor):
            return self.fake(args[0])
        if func is aten._local_scalar_dense.default:
            value = self.value(args[0])
            with without_modes():
                return value.item()
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [self.fake(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        views = tree_unflatten([self._leaf(leaf) for leaf in leaves], spec)
        state = self._generator_state(func, *views)
        result = self._run(func, tree_unflatten(leaves, spec), views)
        self._record(func, views, result, state)
        return result

    def _run(self, func: Any, arguments: Any, views: Any) -> Any:
        args, kwargs = arguments
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}  # fake draws have no values, and some refuse a generator
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
        kwargs.pop("pin_memory", None)
        with without_modes():
            return func(*args, **kwargs)

    def _values(self, views: list[View]) -> list[torch.Tensor]:
        for view in views:
            self.recipe.assign_reading_keys(self.recipe.slice_of(view.storage), self._seed)
        return replay(self.recipe, views)

    def _record(self, func: Any, views: Any, result: Any, state: torch.Tensor | None) -> None:
        if torch.Tag.inplace_view in func.tags:  # another geometry, or the storage of another tensor: no content
            return
        args, kwargs = views
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, View)]
        reads = frozenset(view.storage for view in inputs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        made = tuple(self._made(output, reads) for output in outputs)
        writes = written_storages(func, args, kwargs)
        if (not writes and not any(made)) or leaves_unwritten(func):
            return
        kwargs.pop("pin_memory", None)
        if made and not inputs and "dtype" in argument_names(func):
            kwargs["dtype"] = outputs[0].dtype  # as the default dtype is at this moment
        random = draws_numbers(func) and state is None
        if random and not accepts_generator(func):
            raise ModelError(f"{func} cannot be given a generator")
        hiding = bool(inputs) and hides(func, inputs, self.recipe.num_bytes[inputs[0].storage])
        self.recipe.append(
            Op(
                func=func,
                args=args,
                kwargs=kwargs,
                reads=reads,
                writes=writes,
                made=made,
                hides=hiding,
                random=random,
                generator_state=state,
            )
        )

    def _truncated_normal(
        self,
        tensor: torch.Tensor,
        mean: float,
        std: float,
        a: float,
        b: float,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        # torch's own draws until all values lie between a and b, so it looks at values: one op of a recipe
        # instead.
        view = self.view(self.fake(tensor))
        args, kwargs = (view, mean, std, a, b), {"generator": generator}
        state = self._generator_state(_TRUNCATED_NORMAL, args, kwargs)
        storages = frozenset({view.storage})
        self.recipe.append(
            Op(
                func=_TRUNCATED_NORMAL,
                args=args,
                kwargs={},
                reads=storages,
                writes=storages,
                made=(None,),
                hides=covers([view], self.recipe.num_bytes[view.storage]),
                random=state is None,
                generator_state=state,
            )
        )
        return tensor

    def _generator_state(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """The state of the generator given to a call; the generator is moved on as the call would have."""
        generator = kwargs.get("generator")
        if generator is None:
            return None
        if generator.device.type != "cpu":
            raise ModelError(f"{func} draws from a generator on {generator.device}; give it one on the CPU")
        state: torch.Tensor = generator.get_state()
        self._really(func, args, dict(kwargs))
        return state

    def _made(self, output: torch.Tensor, reads: frozenset[int]) -> View | None:
        """The view of a result in a storage of its own; None for one that shows an argument's."""
        assert isinstance(output, FakeTensor)
        number = self._number(output.untyped_storage())
        return None if number in reads else self.view(output)

    def _number(self, storage: torch.UntypedStorage) -> int:
        if storage._cdata not in self._numbers:
            self._alive.append(storage)
            self._numbers[storage._cdata] = self.recipe.new_storage(storage.nbytes())
        return self._numbers[storage._cdata]

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor):
            return self.view(leaf)
        if isinstance(leaf, torch.device) and leaf.type != "meta":
            return torch.device("cpu")
        return leaf


def _copied(tensor: torch.Tensor) -> torch.UntypedStorage:
    """All memory of a real tensor, on the CPU."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return flat.to("cpu", copy=True).untyped_storage()
