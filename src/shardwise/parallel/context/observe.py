"""Which modules of a unit work on every token by itself: seen in a run, each given all tokens and its own ones.

A module whose answer for own tokens is the same part of its answer for all, and that draws no random numbers, may be
given own tokens as plain tensors. Outer modules are tried first. Knows one rank of a run on threads; no plans.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten

from shardwise.describe.context import ByToken
from shardwise.parallel.context.install import by_token
from shardwise.parallel.context.region import ContextRegion
from shardwise.parallel.tensor.prove import Draws
from shardwise.parallel.tensor.sequence import Tokens
from shardwise.parallel.tensor.sequence_shard import SequenceShard, whole_tokens
from shardwise.trace.randomness import RandomMode

__all__ = ["Observer"]

_TOLERANCE = 1e-9  # in float64

Forward = Callable[..., Any]


class Observer:
    """Watches the modules of one rank's copy of a unit; `found` are those that work by token, `refused` the others."""

    def __init__(self, unit: nn.Module, region: ContextRegion, mode: RandomMode, *, leaves_only: bool) -> None:
        self.found: dict[str, ByToken] = {}
        self.refused: set[str] = set()
        self._region = region
        self._mode = mode
        self._testing = False
        for name, module in unit.named_modules():
            if not (leaves_only and any(True for child in module.children() for _ in child.parameters())):
                module.__dict__["forward"] = self._watched(name, module, module.forward)

    def _watched(self, name: str, module: nn.Module, body: Forward) -> Forward:
        @functools.wraps(body)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._testing or name in self.refused:
                return body(*args, **kwargs)
            values = (*args, *kwargs.values())
            if not any(isinstance(value, SequenceShard) for value in values):
                return body(*args, **kwargs)
            known = self.found.pop(name, None)
            how = self._tried(module, body, args, kwargs)
            if how is None or (known is not None and known != how):
                self.refused.add(name)
                return body(*args, **kwargs)
            self.found[name] = how
            return by_token(body, how, args, kwargs)

        return forward

    def _tried(
        self, module: nn.Module, body: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> ByToken | None:
        """How the module works by token, the same on every rank; None where it does not."""
        leaves = tree_flatten((tuple(args), dict(kwargs)))[0]
        shards = [leaf for leaf in leaves if isinstance(leaf, SequenceShard)]
        tokens = shards[0].tokens
        others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, SequenceShard)]
        direct = sum(isinstance(value, SequenceShard) for value in (*args, *kwargs.values()))
        if direct < len(shards) or any(shard.tokens != tokens for shard in shards):
            return None
        if any(size in (tokens.size, tokens.extent) for other in others for size in other.shape):
            return None
        if not all(leaf is None or isinstance(leaf, (torch.Tensor, bool, int, float, str)) for leaf in leaves):
            return None  # a cache, say, which it would write into
        wholes = {id(shard): whole_tokens(shard).detach() for shard in shards}
        made = self._run(module, body, args, kwargs, lambda shard: wholes[id(shard)])
        own = self._run(module, body, args, kwargs, lambda shard: shard.local.detach())
        how = None if made is None or own is None else self._compared(tokens, made, own)
        failed = self._region.group.all_reduce_max(torch.tensor([float(how is None)], dtype=torch.float64))
        return None if bool(failed) else how

    def _run(
        self,
        module: nn.Module,
        body: Forward,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        show: Callable[[SequenceShard], torch.Tensor],
    ) -> list[torch.Tensor] | None:
        """What the module returns for its arguments as `show` has them; None where it fails, or draws."""

        def given(value: Any) -> Any:
            return show(value) if isinstance(value, SequenceShard) else value

        draws, index = Draws(), self._mode.index
        try:
            with self._tested(module), torch.no_grad(), draws:
                out = body(*map(given, args), **{name: given(value) for name, value in kwargs.items()})
        except Exception:  # whatever a module raises that needs the others' tokens
            return None
        finally:
            self._mode.index = index
        leaves = tree_flatten(out)[0]
        if draws.shapes or not all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves):
            return None
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    @contextlib.contextmanager
    def _tested(self, module: nn.Module) -> Iterator[None]:
        before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        self._testing = True
        try:
            yield
        finally:
            self._testing = False
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    buffer.copy_(before[name])

    def _compared(self, tokens: Tokens, made: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> ByToken | None:
        dims = [self._dim(tokens, whole, part) for whole, part in itertools.zip_longest(made, own)]
        if not dims or any(dim is None for dim in dims):
            return None
        return ByToken(given=tokens.dim, made=tuple(dim for dim in dims if dim is not None))

    def _dim(self, tokens: Tokens, whole: torch.Tensor | None, own: torch.Tensor | None) -> int | None:
        """The dim in which `own` is this rank's part of `whole`."""
        if whole is None or own is None or whole.dim() != own.dim():
            return None
        dims: list[int] = [tokens.dim, *range(-whole.dim(), 0)]
        for dim in dims:
            if -dim > whole.dim() or whole.shape[dim] != tokens.extent:
                continue
            part = self._region.scatter(whole, tokens.at(dim))
            if part.shape == own.shape and part.dtype == own.dtype and _close(part, own):
                return dim
        return None


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not bool(torch.isfinite(a).all()):
        return False
    return float((a - b).norm()) <= _TOLERANCE * max(float(a.norm()), 1e-30)
