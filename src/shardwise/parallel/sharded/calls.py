"""Calls of units in forwards and backwards, as those who gather parameters and reduce gradients need to know them.

    forward of micro-batch m     u0 u1 u2                      the first call that reads a bucket is noted
    its backward                       u2 │ u1 │ u0            a hook on what a call returned tells that its backward
                                          └ past the bucket of u2                                            begins

Autograd runs the nodes of one graph in the reverse order of their making, so that the backward of a call begins when
that of all later ones has ended. Knows units, buckets, and which action runs; refuses to know tensors' contents.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from shardwise.parallel.sharded.bucket import Bucket
from shardwise.parallel.sharded.gradients import GradientParts
from shardwise.parallel.sharded.residency import Residency
from shardwise.parallel.tensor.divided_logits import DividedLogits
from shardwise.parallel.tensor.sequence_shard import SequenceShard

__all__ = ["UnitCalls"]

Body = Callable[..., Any]


@dataclasses.dataclass(slots=True, eq=False)
class _Run:
    """A forward of one stage and micro-batch: of each call, in order, what it reads, and what of it is read first."""

    reads: list[Sequence[Bucket]] = dataclasses.field(default_factory=list)
    first: list[list[Bucket]] = dataclasses.field(default_factory=list)
    seen: set[int] = dataclasses.field(default_factory=set)
    position: int = 0  # of the backward: calls from here on are done


class UnitCalls:
    """Follows the units' calls through a step. `buckets_of[unit]` are those that its body reads."""

    def __init__(
        self, buckets_of: Mapping[str, Sequence[Bucket]], residency: Residency, gradients: GradientParts | None
    ) -> None:
        self._buckets_of = buckets_of
        self._residency = residency
        self._gradients = gradients
        self._runs: dict[tuple[int, int], _Run] = {}
        self._forward: _Run | None = None
        self._backward: _Run | None = None
        self._reduces: int | None = None  # the stage whose backward has run

    def around(self, unit: str, body: Body) -> Body:
        """The body of a unit that makes its parameters whole before."""
        own = self._buckets_of.get(unit)
        if not own:
            return body

        @functools.wraps(body)
        def gathered(*args: Any, **kwargs: Any) -> Any:
            repeated = self._backward is not None
            self._residency.turn(own, backward=repeated)
            out = body(*args, **kwargs)
            if not repeated and self._forward is not None and torch.is_grad_enabled():
                self._note(self._forward, own, out)
            return out

        return gathered

    # -- what a step tells ----------------------------------------------------------------------

    def forward(self, stage: int, micro_batch: int) -> None:
        """A forward of a stage begins, or its repetition."""
        self._ended()
        self._forward = _Run()
        if torch.is_grad_enabled():
            self._runs[(stage, micro_batch)] = self._forward

    def backward(self, stage: int, micro_batch: int, *, whole: bool) -> None:
        """A backward of a stage begins; `whole`: none of its weights' gradients is left for later."""
        self._ended()
        self._forward = None
        self._backward = self._runs.pop((stage, micro_batch), None) or _Run()
        self._backward.position = len(self._backward.reads)
        if whole:
            self._reduces = stage
            if self._gradients is not None:
                self._gradients.begin_backward(stage)

    def weights(self, stage: int) -> None:
        """Weight gradients that a backward left begin."""
        self._ended()
        self._reduces = stage

    def finish(self) -> None:
        """The last action has run."""
        self._ended()
        self._forward = None
        self._runs.clear()
        self._residency.rest()

    def forget(self) -> None:
        """The step has ended in an error."""
        self._forward = self._backward = self._reduces = None
        self._runs.clear()

    def _ended(self) -> None:
        """The action before this one is over."""
        self._backward = None
        if self._reduces is not None:
            stage, self._reduces = self._reduces, None
            if self._gradients is not None:
                self._gradients.reduce_stage(stage)

    # -- one call -------------------------------------------------------------------------------

    def _note(self, run: _Run, own: Sequence[Bucket], out: Any) -> None:
        index = len(run.reads)
        run.reads.append(own)
        run.first.append([bucket for bucket in own if id(bucket) not in run.seen])
        run.seen.update(id(bucket) for bucket in own)

        def begins(_: Any) -> None:
            self._begins(run, index)

        leaves = tree_leaves(out)
        for node in _nodes_of(leaves) or _nodes_of(tree_leaves([_attributes(leaf) for leaf in leaves])):
            node.register_prehook(begins)

    def _begins(self, run: _Run, index: int) -> None:
        """The backward of a call begins: that of all later ones has ended."""
        if run is not self._backward or index >= run.position:
            return
        done = [bucket for first in run.first[index + 1 : run.position] for bucket in reversed(first)]
        run.position = index + 1
        if self._gradients is not None:
            self._gradients.past(done)
            self._gradients.open(run.reads[index])
        self._residency.turn(run.reads[index], backward=True)


def _nodes_of(leaves: Sequence[Any]) -> list[Any]:
    """What made the tensors among `leaves`, each once."""
    found: dict[Any, None] = {}
    for leaf in leaves:
        while isinstance(leaf, (SequenceShard, DividedLogits)):
            leaf = leaf.local  # which has the graph
        for tensor in (leaf, leaf._base) if isinstance(leaf, torch.Tensor) else ():
            if tensor is not None and tensor.grad_fn is not None:
                found[tensor.grad_fn] = None
    return list(found)


def _attributes(leaf: object) -> list[Any]:
    """Of an object of the model's own, in which there may be tensors."""
    if dataclasses.is_dataclass(leaf):
        return [getattr(leaf, field.name) for field in dataclasses.fields(leaf)]
    return [] if isinstance(leaf, torch.Tensor) else list(getattr(leaf, "__dict__", {}).values())
