"""Units that are computed again in the backward: of what their forward made, only the inputs are kept, or little more.

    full        keeps the unit's inputs (Chen et al. 2016, arXiv:1604.06174)
    selective   and the products with its weights (Korthikanti et al. 2022, arXiv:2205.05198)

The repetition finds what the forward found: random numbers are keyed, buffers that it wrote are put back and stay
written once, what counts calls pauses; ranks that share a unit repeat what they send together. Autograd's part is
torch's `checkpoint`. Knows units by name; refuses to know why they were chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from shardwise.execute.around import Around, Body
from shardwise.execute.given import Given
from shardwise.execute.kept_results import KeptResults
from shardwise.execute.repetition import Repetition
from shardwise.plan.recompute import How

__all__ = ["Recompute"]

Paused = Callable[[], contextlib.AbstractContextManager[None]]


class Recompute:
    """A wrapper of units (`execute.around`): those in `how` are computed again.

    repeating: around every repetition. to_the_end: a repetition runs the whole unit, not only until all that the
    backward reads is there; for units whose ranks keep different things (experts) and send to each other.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        how: Mapping[str, How],
        *,
        around: Around,
        repeating: Paused = contextlib.nullcontext,
        to_the_end: bool = False,
    ) -> None:
        self._modules = modules
        self._how = how
        self._around = around
        self._repeating = repeating
        self._to_the_end = to_the_end

    def __call__(self, unit: str, body: Body) -> Body:
        """`body`, computed again where the plan says so."""
        how = self._how.get(unit, How.NONE)
        if how is How.NONE:
            return body
        module = self._modules[unit]
        has_buffers = any(True for _ in module.buffers())
        repetition = Repetition(module) if has_buffers else None

        def computed_again(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return body(*args, **kwargs)
            # tensors by position are kept as autograd keeps them, what the unit may write into as it is now
            leaves, spec = tree_flatten((args, tuple(kwargs.values())), is_leaf=_is_leaf)
            given_first = Given(leaves)

            def run(*given: Any) -> Any:
                own_args, values = tree_unflatten(given_first.once_more(given), spec)
                own_kwargs = dict(zip(kwargs, values, strict=True))
                with self._around.keeping():
                    return body(*own_args, **own_kwargs)

            results = _results(how, module)
            contexts = _Contexts(repetition, self._repeating, results)
            with set_checkpoint_early_stop(False) if self._to_the_end else contextlib.nullcontext():
                out = checkpoint(run, *leaves, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)
            if results is not None:
                results.settle()
            return out

        return computed_again


def _is_leaf(value: Any) -> bool:
    return type(value) is not tuple  # others have an identity, and may be written into


def _results(how: How, module: nn.Module) -> KeptResults | None:
    if how is not How.SELECTIVE:
        return None
    return KeptResults(lambda: frozenset(each.untyped_storage().data_ptr() for each in module.parameters()))


class _Contexts:
    """Around the forward of one call, and around its repetition."""

    def __init__(self, repetition: Repetition | None, repeating: Paused, results: KeptResults | None) -> None:
        self._repetition, self._repeating, self._results = repetition, repeating, results
        self._written: Any = ()

    def __call__(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return self._first(), self._again()

    @contextlib.contextmanager
    def _first(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._repetition is not None:
                self._written = stack.enter_context(self._repetition.first("unit"))
            if self._results is not None:
                stack.enter_context(self._results.first())
            yield

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._repetition is not None:
                stack.enter_context(self._repetition.again(self._written))
            stack.enter_context(self._repeating())
            if self._results is not None:
                stack.enter_context(self._results.again())
            yield
