"""A model's own activation checkpointing (`torch.utils.checkpoint`), seen by whoever runs the forward.

Checkpointing around one unit is moved into the unit, inside a unit it stays; either way the part that is run again in
the backward draws the numbers it drew at first. Knows torch's two implementations; refuses to know units and stages.

    checkpoint(layer, x)       glue ─► unit call          becomes      glue ─► unit call ─► checkpoint(body, x)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import torch.utils.checkpoint as torch_checkpoint

__all__ = ["Checkpoints", "Contexts", "noticed"]

Contexts = Callable[[], tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]]


class Checkpoints(Protocol):
    """Decides what a checkpointed call does. Answers None to run it once and keep everything, or the contexts of the
    forward and of its repetition."""

    def checkpoint(self) -> contextlib.AbstractContextManager[Contexts | None]: ...


@contextlib.contextmanager
def noticed(watcher: Checkpoints) -> Iterator[None]:
    """While open, `watcher` is asked about every checkpointed call, reentrant or not."""
    original = torch_checkpoint._checkpoint_without_reentrant_generator
    reentrant = torch_checkpoint.CheckpointFunction
    before = vars(reentrant).get("apply")  # where one forward is watched inside another

    def generator(
        function: Any,
        preserve: bool,
        contexts: Any,
        determinism_check: str,
        debug: bool,
        early_stop: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Generator[None, None, None]:
        with watcher.checkpoint() as chosen:
            if chosen is None:
                yield
                return
            if contexts is not torch_checkpoint.noop_context_fn:
                chosen = _both(contexts, chosen)
            yield from original(function, preserve, chosen, determinism_check, debug, early_stop, *args, **kwargs)

    def apply(function: Any, preserve: bool, *args: Any) -> Any:
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)

    torch_checkpoint._checkpoint_without_reentrant_generator = generator  # type: ignore[assignment]
    reentrant.apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch_checkpoint._checkpoint_without_reentrant_generator = original
        if before is None:
            del reentrant.apply
        else:
            reentrant.apply = before  # type: ignore[method-assign]


def _both(first: Contexts, second: Contexts) -> Contexts:
    @contextlib.contextmanager
    def together(*parts: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(part)
            yield

    def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        (a, again_a), (b, again_b) = first(), second()
        return together(a, b), together(again_a, again_b)

    return contexts
