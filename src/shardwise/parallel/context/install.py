"""The units of a model working on own tokens: arguments dealt out at their entry, outputs as planned at their end.

    unit in the plan   arguments ──own tokens──► its code, modules by token, attention over all ranks ──► own tokens
    any other unit     arguments ──all tokens──► as without

The same code runs in training and in the proof. Knows a plan and one rank of its group; refuses to know how the plan
was found. To be installed behind what wraps the forwards of single layers and before the switch of the units.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shardwise.describe.context import ByToken, ContextPlan, UnitContext
from shardwise.errors import DataflowError
from shardwise.parallel.context.region import ContextRegion
from shardwise.parallel.forwards import Forward, Forwards
from shardwise.parallel.tensor.divided_logits import whole_of
from shardwise.parallel.tensor.sequence import Tokens
from shardwise.parallel.tensor.sequence_shard import SequenceShard, whole_tokens
from shardwise.trace.absent import Absent

__all__ = ["DealtContext", "by_token"]


class DealtContext:
    """The units `units` of `model`, on own tokens in place as `plan` says; the others are given all tokens."""

    def __init__(self, model: nn.Module, plan: ContextPlan, region: ContextRegion, units: Collection[str]) -> None:
        self.plan = plan
        self.region = region
        self._forwards = Forwards()
        self._wrapped: set[int] = set()
        for name in units:
            unit, own = model.get_submodule(name), plan.units.get(name)
            for inner, how in ({} if own is None else own.by_token).items():
                module = unit.get_submodule(inner)
                if inner and id(module) not in self._wrapped:
                    self._wrapped.add(id(module))
                    self._forwards.wrap(module, self._by_token(module.forward, how))
            body = unit.forward
            if own is not None and "" in own.by_token:
                body = self._by_token(body, own.by_token[""])
            self._forwards.wrap(unit, self._unit(body, own))

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The units as they were."""
        before, self._forwards.on = self._forwards.on, False
        try:
            yield
        finally:
            self._forwards.on = before

    def close(self) -> None:
        """Forwards as they were."""
        self._forwards.close()

    def _by_token(self, body: Forward, how: ByToken) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return by_token(body, how, args, kwargs)

        return forward

    def _unit(self, body: Forward, own: UnitContext | None) -> Forward:
        if own is None:
            return lambda *args, **kwargs: _with_all_tokens(body, args, kwargs)
        places = list(inspect.signature(body).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            dealt: list[SequenceShard] = []
            names = (*places[: len(args)], *[""] * (len(args) - len(places)))
            args = tuple(self._given(name, value, own, dealt) for name, value in zip(names, args, strict=True))
            kwargs = {name: self._given(name, value, own, dealt) for name, value in kwargs.items()}
            self.region.inside += 1
            try:
                out = body(*args, **kwargs)
            finally:
                self.region.inside -= 1
            if any(shard.memory.writes for shard in dealt):
                raise DataflowError(
                    "a unit writes into an argument that is dealt out by tokens: others would not see it; lay the "
                    "model out with cp=1"
                )
            return self._left(out, own)

        return forward

    def _given(self, name: str, value: Any, own: UnitContext, dealt: list[SequenceShard]) -> Any:
        """An argument as the unit takes it."""
        dim = own.inputs.get(name)
        if dim is None or not isinstance(value, torch.Tensor) or isinstance(value, (Absent, SequenceShard)):
            return value  # what is absent is asked for its shape alone
        if value.dim() < -dim or not self.region.deals(value.shape[dim]):
            return value
        tokens = Tokens(dim, value.shape[dim])
        made = SequenceShard(self.region.scatter(whole_of(value), tokens), tokens, self.region)
        dealt.append(made)
        return made

    def _left(self, out: Any, own: UnitContext) -> Any:
        """Own tokens where the plan says so, all tokens elsewhere: so that other stages know what comes."""
        leaves, spec = tree_flatten(out)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        for number, place in enumerate(tensors):
            leaves[place] = self.as_planned(leaves[place], own.outputs.get(number))
            if isinstance(leaves[place], SequenceShard):
                leaves[place].watch()
        return tree_unflatten(leaves, spec)

    def as_planned(self, leaf: torch.Tensor, dim: int | None) -> torch.Tensor:
        """By tokens in dim `dim` where there are enough, whole without one."""
        tokens = self.tokens_of(leaf.shape, dim)
        if isinstance(leaf, SequenceShard) and leaf.tokens == tokens:
            return leaf
        whole: torch.Tensor = whole_of(whole_tokens(leaf))
        return whole if tokens is None else SequenceShard(self.region.scatter(whole, tokens), tokens, self.region)

    def tokens_of(self, shape: Sequence[int], dim: int | None) -> Tokens | None:
        """How a tensor of this shape that leaves a unit by tokens in `dim` is dealt out."""
        if dim is None or len(shape) < -dim or not self.region.deals(shape[dim]):
            return None
        return Tokens(dim, shape[dim])


def by_token(body: Forward, how: ByToken, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`body` on plain own tokens; as it is where it is given none, or others than it is known for."""
    values = (*args, *kwargs.values())
    first = next((value for value in values if isinstance(value, SequenceShard)), None)
    if first is None or first.tokens.dim != how.given or not all(_fits(value, first.tokens) for value in values):
        return body(*args, **kwargs)
    out = body(*map(_local, args), **{name: _local(value) for name, value in kwargs.items()})
    if isinstance(out, torch.Tensor):
        return SequenceShard(out, first.tokens.at(how.made[0]), first.region)
    leaves, spec = tree_flatten(out)
    dims = iter(how.made)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[place] = SequenceShard(leaf, first.tokens.at(next(dims)), first.region)
    return tree_unflatten(leaves, spec)


def _fits(value: Any, tokens: Tokens) -> bool:
    """Whether an argument says nothing of other tokens."""
    if isinstance(value, SequenceShard):
        return value.tokens == tokens
    if isinstance(value, torch.Tensor):
        return tokens.size not in value.shape and tokens.extent not in value.shape
    return not isinstance(value, (tuple, list, dict))


def _local(value: Any) -> Any:
    return value.local if isinstance(value, SequenceShard) else value


def _with_all_tokens(body: Forward, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A unit that knows nothing of tokens."""
    joined: list[tuple[torch.Tensor, int]] = []

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, SequenceShard):
            return leaf
        made: torch.Tensor = whole_tokens(leaf)
        joined.append((made, made._version))
        return made

    given, named = tree_map(whole, (tuple(args), kwargs))
    out = body(*given, **named)
    if any(made._version != version for made, version in joined):
        raise DataflowError(
            "a unit writes into an argument that is dealt out by tokens: others would not see it; lay the model out "
            "with cp=1"
        )
    return out
