"""The function mode of a recording: every torch function that the model calls between its units becomes a node.

Refuses to know units; what happens below a function is seen by the dispatch mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.trace.draft import Draft
from shardwise.trace.for_real import Twins
from shardwise.trace.functions import as_one_call, loss_of, name_of
from shardwise.trace.randomness import Scope, draw, is_random
from shardwise.trace.running import DataDependent, GlueLooks, GlueOp, Running
from shardwise.trace.writing import write_op

__all__ = ["Glue"]

_SHAPED_BY_VALUES = frozenset(
    "nonzero argwhere unique unique_consecutive masked_select __getitem__ repeat_interleave bincount where".split()
)
_TO_NUMPY: frozenset[Any] = frozenset((torch.Tensor.numpy, torch.Tensor.__array__))


class Glue(TorchFunctionMode):
    """`queries` are the functions that neither read nor made a tensor: they are no nodes. With `whole_loss` the loss is
    one function, run on random real numbers for its gradient's shapes."""

    def __init__(
        self, draft: Draft, running: Running, fake: FakeTensorMode, scope: Scope, *, whole_loss: bool = False
    ) -> None:
        super().__init__()
        self._whole_loss = whole_loss
        self._in_loss = False
        self._draft = draft
        self._running = running
        self._fake = fake
        self._scope = scope
        self._num_draws = 0
        self._queries: set[Any] = set()
        self._recorded: set[Any] = set()

    @property
    def queries(self) -> frozenset[Any]:
        """Functions that were only ever asked about metadata."""
        return frozenset(self._queries - self._recorded)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Not asked inside the block, where nobody has put another mode on top: what a unit does is no glue."""
        if torch.overrides._get_current_function_mode() is not self:  # type: ignore[no-untyped-call]
            yield
            return
        torch.overrides._pop_mode()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            torch.overrides._push_mode(self)  # type: ignore[no-untyped-call]

    def loss(self, function: Callable[[Any, Any], torch.Tensor], outputs: Any, batch: Any) -> torch.Tensor:
        """What the loss computes, as one function if it is known to look at values."""
        if self._whole_loss and self._running.in_glue:
            whole: torch.Tensor = as_one_call(self, loss_of, (function, outputs, batch), {})
            return whole
        self._in_loss = True
        try:
            return function(outputs, batch)
        finally:
            self._in_loss = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function of the glue and record it as a node, unless it is a mere query."""
        kwargs = kwargs or {}
        if not self._running.in_glue:
            return func(*args, **kwargs)
        op = self._running.op = GlueOp()
        try:
            out = self._run(func, args, kwargs, op)
        except DataDependent as error:
            raise self._looks(func, str(error)) from error
        finally:
            self._running.op = None
        leaves, spec = tree_flatten(out)
        if not op.dispatched and not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            self._queries.add(func)
            return out
        self._recorded.add(func)
        write_op(self._draft, func, args, kwargs, op, leaves, spec, draw=self._num_draws)
        self._num_draws += op.random
        return out

    def _looks(self, func: Any, why: str) -> GlueLooks:
        inside = next((name for name in reversed(self._running.open_modules) if name), "")
        where = "the loss" if self._in_loss else f"the glue of {inside or 'the model'}"
        return GlueLooks(inside, f"{name_of(func)} in {where} ({why})", in_loss=self._in_loss)

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], op: GlueOp) -> Any:
        if func is torch.Tensor.tolist:  # it reads memory without dispatching: read a copy of it, which is seen
            return func(args[0].clone())
        if func in _TO_NUMPY and isinstance(args[0], FakeTensor):
            raise self._looks(func, "it has no value in a recording")
        if func is loss_of:
            return self._on_real_numbers(func, args, kwargs, op)
        if is_random(func, tuple(args), kwargs):
            op.random = True
            return draw(func, tuple(args), kwargs, scope=self._scope, index=self._num_draws)
        try:
            return func(*args, **kwargs)
        except DataDependent:
            if name_of(func) in _SHAPED_BY_VALUES:
                raise
            # A kernel that looks at values it is given (ctc_loss at lengths) makes tensors of shapes that it knows.
            out = self._on_real_numbers(func, args, kwargs, op)
            if not any(isinstance(leaf, torch.Tensor) for leaf in tree_flatten(out)[0]):
                raise
            return out

    def _on_real_numbers(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], op: GlueOp) -> Any:
        """What `func` makes of random real numbers, as fake tensors that depend on all fake ones it is given."""
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, FakeTensor)]
        for leaf in given:
            self._draft.read(leaf, op.touched, None)
        out = Twins(self._fake, bear=lambda twin: None).run(func, args, kwargs)
        wanted = [leaf for leaf in given if leaf.requires_grad]
        return tree_map(lambda leaf: _depending(leaf, wanted), out)


def _depending(leaf: object, on: Sequence[torch.Tensor]) -> object:
    """A twin with a gradient as one to which the gradient's path leads on; other leaves are what they are."""
    if not isinstance(leaf, FakeTensor) or not leaf.is_leaf or not leaf.requires_grad or not on:
        return leaf
    return leaf + sum(0 * other.sum() for other in on)
