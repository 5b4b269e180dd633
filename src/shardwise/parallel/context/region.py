"""What the tensors of one rank that are dealt out by tokens share: who has the others' tokens, and how they attend.

Knows a group of ranks and a way to place tokens; refuses to know models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from shardwise.parallel.context.attend import Attention, Gathered, attended
from shardwise.parallel.context.deal import deal, join
from shardwise.parallel.context.placement import Placement
from shardwise.parallel.context.rules import MIXES, TOKEN_RULES
from shardwise.parallel.context.window import Window
from shardwise.parallel.tensor.divided_logits import whole_of
from shardwise.parallel.tensor.sequence import Tokens
from shardwise.parallel.tensor.sequence_ops import Rule
from shardwise.parallel.tensor.sequence_shard import Region, SequenceShard

__all__ = ["ContextRegion"]


@dataclasses.dataclass(slots=True)
class ContextRegion(Region):
    """The region of ranks that divide sequences. Gradients are what reaches the loss through this rank (`deal`)."""

    zigzag: bool = False
    attention: Attention = dataclasses.field(default_factory=Gathered)
    read: Any = dataclasses.field(default_factory=WeakIdKeyDictionary)  # whole operand -> own parts of it
    placements: dict[tuple[int, int, int | None], Placement] = dataclasses.field(default_factory=dict)

    def placement(self, tokens: Tokens) -> Placement:
        """Where the tokens of a sequence are."""
        key = (tokens.size, tokens.first, tokens.of)
        known = self.placements.get(key)
        if known is None:
            contexts = self.group.size
            if tokens.of is None:
                known = Placement(size=tokens.size, contexts=contexts, zigzag=self.zigzag)
            else:
                known = Window(
                    size=tokens.size, contexts=contexts, zigzag=self.zigzag, first=tokens.first, of=tokens.of
                )
            self.placements[key] = known
        return known

    def num(self, tokens: Tokens) -> int:
        """How many elements of a dim of tokens this rank has."""
        return tokens.others * self.placement(tokens).num(self.group.rank)

    def deals(self, size: int) -> bool:
        """Whether every rank gets tokens of a sequence of `size`, both an early and a late one."""
        return size >= 2 * self.group.size

    @property
    def rules(self) -> Mapping[Any, Rule]:
        return TOKEN_RULES

    def attend(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        made = attended(args, kwargs, drawn=True)
        if made is NotImplemented:
            return made
        local, tokens = made
        return SequenceShard(local, tokens, self)

    def mixes(self, func: Any) -> bool:
        return func in MIXES

    def scatter(self, whole: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Raises nothing: a rank without tokens gets none."""
        return deal(whole, tokens, self.placement(tokens), self.group.rank)

    def meeting(self, whole: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Of a table that many layers read (positions, a mask) once while it lives."""
        if whole.requires_grad:
            return self.scatter(whole, tokens)
        base = whole if whole._base is None else whole._base
        known = self.read.setdefault(base, {})
        key = (base._version, whole.storage_offset(), tuple(whole.shape), whole.stride(), tokens)
        own: torch.Tensor | None = known.get(key)
        if own is None:
            own = known[key] = self.scatter(whole, tokens)
        return own

    def gather(self, local: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        return join(whole_of(local), tokens, self.placement(tokens), self.group)

    def weight(self, leaf: torch.Tensor, *, matrix: bool) -> torch.Tensor:
        return leaf

    def tokens_of(self, shape: Sequence[int]) -> Tokens | None:
        """Tokens in dim -2, where there are enough of them."""
        return Tokens(-2, shape[-2]) if len(shape) > 2 and self.deals(shape[-2]) else None
