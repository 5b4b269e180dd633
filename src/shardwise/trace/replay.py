"""Runs slices of a recipe for real, on the CPU, freeing what no later op needs.

On the CPU whatever device the model is for, so that initial values do not depend on the kind of device
either. It knows recipes; what the tensors are called and where they end is known to others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from shardwise.trace.random_ops import with_generator
from shardwise.trace.random_streams import Generators
from shardwise.trace.recipe import Op, Recipe, View

__all__ = ["replay", "without_modes"]


@contextmanager
def without_modes() -> Iterator[None]:
    """Inside, torch computes for real and records nothing, whatever modes the caller is in."""
    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def replay(recipe: Recipe, views: Sequence[View]) -> list[torch.Tensor]:
    """The present values of `views`, new tensors on the CPU that share memory where the views do.

    Memory that was never written is zero. Every random op in the slices must have its key.
    """
    storages = {view.storage for view in views}
    positions = sorted({position for storage in storages for position in recipe.slice_of(storage)})
    with without_modes():
        values = _Values(recipe)
        last_use = {s: at for at in positions for s in recipe.ops[at].reads | recipe.ops[at].made_storages}
        for at in positions:
            op = recipe.ops[at]
            values.run(op, recipe.keys.get(at))
            values.free(s for s in op.reads | op.made_storages if last_use[s] == at and s not in storages)
        return [values.tensor(view) for view in views]


class _Values:
    """The storages that are alive at one moment of a replay."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._alive: dict[int, torch.UntypedStorage] = {}
        self._generators = Generators()

    def tensor(self, view: View, *, read: bool = True) -> torch.Tensor:
        if view.storage not in self._alive:
            self._alive[view.storage] = self._first_content(view.storage, read)
        tensor = torch.empty(0, dtype=view.dtype)
        tensor.set_(self._alive[view.storage], view.offset, view.shape, view.strides)
        tensor = torch._conj(tensor) if view.conjugate else tensor
        return torch._neg_view(tensor) if view.negative else tensor

    def run(self, op: Op, key: int | None) -> None:
        args, kwargs = tree_map_only(
            View, lambda view: self.tensor(view, read=not op.hides), (op.args, dict(op.kwargs))
        )
        if op.generator_state is not None:
            generator = torch.Generator()
            generator.set_state(op.generator_state)
            result = _call(op, args, kwargs, generator)
        elif key is not None:
            result = _call(op, args, kwargs, self._generators.seeded(torch.device("cpu"), key))
        else:
            result = op.func(*args, **kwargs)
        self._keep(op, [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)])

    def free(self, storages: Iterator[int]) -> None:
        for storage in storages:
            self._alive.pop(storage, None)

    def _first_content(self, storage: int, read: bool) -> torch.UntypedStorage:
        constant = self._recipe.constants.get(storage)
        if constant is not None:
            copied: torch.UntypedStorage = constant.clone()  # type: ignore[no-untyped-call]
            return copied
        make = torch.zeros if read else torch.empty
        return make(self._recipe.num_bytes[storage], dtype=torch.uint8).untyped_storage()

    def _keep(self, op: Op, results: list[torch.Tensor]) -> None:
        # A result is taken over as it is where its memory is as recorded, and copied into place where it is
        # not: kernels may choose other strides than their fake versions, or return an argument.
        held = {storage._cdata for storage in self._alive.values()}
        for view, result in zip(op.made, results, strict=True):
            if view is None:
                continue
            storage = result.untyped_storage()
            as_recorded = (
                view.storage not in self._alive
                and storage._cdata not in held
                and storage.nbytes() == self._recipe.num_bytes[view.storage]
                and (result.dtype, result.shape, result.stride(), result.storage_offset())
                == (view.dtype, view.shape, view.strides, view.offset)
            )
            if as_recorded:
                self._alive[view.storage] = storage
            else:
                self.tensor(view).copy_(result)


def _call(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator) -> Any:
    if isinstance(op.func, OpOverload) and "generator" not in kwargs:
        return with_generator(op.func, args, kwargs, generator)
    return op.func(*args, **{**kwargs, "generator": generator})
