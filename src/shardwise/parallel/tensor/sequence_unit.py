"""What a unit does with activations that are dealt out by tokens: at its entry, behind its rows, at its end.

    with a sequence plan   arguments ──own tokens──► … columns ◄─ all-gather, rows ─ reduce-scatter ─► … own tokens
    any other unit         arguments ──all tokens──► as without

So what runs is what was proven, whoever stands before the unit. Knows one unit's plan; no modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shardwise.describe.tensor import SequencePlan
from shardwise.errors import DataflowError
from shardwise.parallel.tensor.collectives import reduce_from
from shardwise.parallel.tensor.sequence import Regathered, gather_copy, reduce
from shardwise.parallel.tensor.sequence_shard import Region, SequenceShard, shard_of, whole_tokens

__all__ = ["UnitTokens"]


class UnitTokens:
    """One unit's part of the work; without a plan the unit is given all tokens."""

    def __init__(self, plan: SequencePlan | None, region: Region) -> None:
        self.plan = plan
        self.region = region
        self._gathered: tuple[torch.Tensor, Regathered] | None = None  # the last for columns, where these regather

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Around the unit's body."""
        self.region.inside += self.plan is not None
        try:
            yield
        finally:
            self.region.inside -= self.plan is not None
            self._gathered = None

    def given(self, places: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments as the unit takes them, and the whole tensors that it is given for shards."""
        wholes: list[tuple[torch.Tensor, int]] = []
        named = {} if self.plan is None else self.plan.inputs

        def own(name: str, value: Any) -> Any:
            if name in named and isinstance(value, torch.Tensor):
                return self._dealt(value)
            if isinstance(value, (SequenceShard, tuple, list, dict)):
                return tree_map(lambda leaf: _noted(leaf, wholes), value)
            return value

        names = (*places[: len(args)], *[""] * (len(args) - len(places)))
        own_args = tuple(own(name, value) for name, value in zip(names, args, strict=True))
        return own_args, {name: own(name, value) for name, value in kwargs.items()}, wholes

    def left(self, out: Any, wholes: Sequence[tuple[torch.Tensor, int]]) -> Any:
        """What the unit returns: tokens of this rank where the plan says so, all tokens elsewhere."""
        if any(whole._version != version for whole, version in wholes):
            raise DataflowError(
                "a unit writes into an argument that is dealt out by tokens: others would not see it; lay the model "
                "out with sequence_parallel=off"
            )
        if self.plan is None:
            return out
        leaves, spec = tree_flatten(out)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        for number, place in enumerate(tensors):
            leaf = leaves[place]
            if isinstance(leaf, SequenceShard):
                self.region.left.add(number)
            leaves[place] = self._dealt(leaf) if number in self.plan.outputs else whole_tokens(leaf)
            if isinstance(leaves[place], SequenceShard):
                leaves[place].watch()
        return tree_unflatten(leaves, spec)

    def reduced(self, partial: torch.Tensor, *, features: int = -1) -> torch.Tensor:
        """The sum of the ranks' `partial`, features in that dim: own tokens under a plan, all of them without."""
        tokens = None if self.plan is None else self.region.tokens_of(partial.shape)
        if tokens is None or features != -1:
            return reduce_from(partial, self.region.group)
        return SequenceShard(reduce(partial, tokens, self.region.group), tokens, self.region)

    def copied(self, shard: SequenceShard) -> torch.Tensor:
        """All tokens, read by this rank's part of the work."""
        whole = gather_copy(shard.local, shard.tokens, self.region.group)
        if self.plan is not None and self.plan.regather and torch.is_grad_enabled():
            self._gathered = whole, Regathered(shard.local, shard.tokens, self.region.group)
        return whole

    def saving(self, args: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
        """Around a column that is given `args`: how its backward keeps what was gathered last."""
        if self._gathered is None or not any(arg is self._gathered[0] for arg in args):
            return contextlib.nullcontext()
        whole, source = self._gathered
        return source.instead_of(whole)

    def _dealt(self, value: torch.Tensor) -> torch.Tensor:
        return value if isinstance(value, SequenceShard) else shard_of(value, self.region)


def _noted(leaf: Any, wholes: list[tuple[torch.Tensor, int]]) -> Any:
    if not isinstance(leaf, SequenceShard):
        return leaf
    whole: torch.Tensor = whole_tokens(leaf)
    wholes.append((whole, whole._version))
    return whole
