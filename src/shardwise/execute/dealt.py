"""Values that cross between stages as the tokens of each shard, or of each part of a sequence: what a unit returns by
tokens, where the plan says so.

    stage 0, shard t ──own tokens──► stage 1, shard t           all other values cross whole, from every shard

Both sides know it from the plan and the tape. Knows one tape; no transports.
"""

from __future__ import annotations

import torch

from shardwise.parallel.context.install import DealtContext
from shardwise.parallel.tensor.divided import Divided
from shardwise.parallel.tensor.divided_logits import whole_of
from shardwise.parallel.tensor.sequence import Tokens
from shardwise.parallel.tensor.sequence_shard import Region, SequenceShard, whole_tokens
from shardwise.trace.tape import Fixed, Made, Tape

__all__ = ["Dealt"]


class Dealt:
    """The values of `tape` that cross by tokens; without units that are divided, or that work on own tokens, none."""

    def __init__(self, tape: Tape, divided: Divided | None, context: DealtContext | None = None) -> None:
        self._region: Region | None = None if divided is None else divided.region
        self._tokens: dict[int, Tokens] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        if context is not None:
            self._region = context.region
            self._add_contexts(tape, context)
        if divided is None or divided.region is None:
            return
        for node in tape.flow.calls:
            unit = divided.plan.units.get(node.name)
            leaves = [leaf for leaf in tape.records[node.index].answer.leaves if not isinstance(leaf, Fixed)]
            for place in unit.sequence.outputs if unit is not None and unit.sequence is not None else ():
                leaf = leaves[place] if place < len(leaves) else None
                shape = tape.flow.values[leaf.value].shape if isinstance(leaf, Made) else ()
                if isinstance(leaf, Made) and len(shape) > 2 and 0 not in shape:
                    self._add(leaf.value, shape, divided)

    def _add_contexts(self, tape: Tape, context: DealtContext) -> None:
        """What units return by tokens, and what else has a gradient and as many tokens (sums of those, say)."""
        sizes: set[int] = set()
        for node in tape.flow.calls:
            unit = context.plan.units.get(node.name)
            leaves = [leaf for leaf in tape.records[node.index].answer.leaves if not isinstance(leaf, Fixed)]
            for place, dim in unit.outputs.items() if unit is not None else ():
                leaf = leaves[place] if place < len(leaves) else None
                shape = tape.flow.values[leaf.value].shape if isinstance(leaf, Made) else ()
                if isinstance(leaf, Made) and context.tokens_of(shape, dim) is not None:
                    self._add_context(leaf.value, shape, dim, context)
                    sizes.update({shape[dim]} if dim == -2 else ())
        for number, value in enumerate(tape.flow.values):
            if value.requires_grad and len(value.shape) > 2 and value.shape[-2] in sizes and number not in self._tokens:
                self._add_context(number, value.shape, -2, context)

    def _add_context(self, value: int, shape: tuple[int, ...], dim: int, context: DealtContext) -> None:
        tokens = context.tokens_of(shape, dim)
        assert tokens is not None
        self._tokens[value] = tokens
        own = list(shape)
        own[dim] = context.region.num(tokens)
        self._shapes[value] = tuple(own)

    def _add(self, value: int, shape: tuple[int, ...], divided: Divided) -> None:
        tokens = Tokens(-2, shape[-2])
        own = tokens.num(divided.group.rank, divided.group.size)
        self._tokens[value] = tokens
        self._shapes[value] = (*shape[:-2], own, shape[-1])

    def shape(self, value: int) -> tuple[int, ...] | None:
        """What of a value crosses from this shard; None where all of it does."""
        return self._shapes.get(value)

    def leaving(self, value: int, tensor: torch.Tensor) -> torch.Tensor:
        """What is sent of a value."""
        if value not in self._tokens or self._region is None:
            return whole_tokens(whole_of(tensor))  # type: ignore[no-any-return]
        if not (isinstance(tensor, SequenceShard) and tensor.tokens == self._tokens[value]):
            tokens = self._tokens[value]
            tensor = SequenceShard(self._region.scatter(whole_tokens(tensor), tokens), tokens, self._region)
        local: torch.Tensor = whole_of(tensor.local)
        return local.contiguous()

    def arrived(self, value: int, tensor: torch.Tensor) -> torch.Tensor:
        """What the model's code is to see of a value that has been received."""
        if value not in self._tokens or self._region is None:
            return tensor
        return SequenceShard(tensor, self._tokens[value], self._region)
