"""The units of a program working on own tokens of every sequence: planned by one rank, installed on all.

Knows process groups and layouts; refuses to know stages and schedules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.same_host import SameHostTransport
from shardwise.comm.traffic import Traffic
from shardwise.describe.context import ContextPlan
from shardwise.errors import LayoutError, ShardwiseError
from shardwise.execute import rank_groups
from shardwise.execute.large_blocks import passing
from shardwise.execute.place import Place
from shardwise.layout import Context, Layout
from shardwise.parallel.context.attend import Attention
from shardwise.parallel.context.install import DealtContext
from shardwise.parallel.context.plan_context import plan_context
from shardwise.parallel.context.region import ContextRegion
from shardwise.parallel.context.ways import RING, ULYSSES
from shardwise.trace.objective import LossFunction

__all__ = ["agreed_context", "attention_of", "context_plan", "deal_contexts", "dealt_too"]


def context_plan(
    model: nn.Module, inputs: Any, *, layout: Layout, loss: LossFunction | None, units: Sequence[str] = ()
) -> ContextPlan:
    """How units work on own tokens under `layout`, proven here. Raises what a trace raises."""
    with passing():
        return plan_context(
            model,
            inputs,
            cp=layout.cp,
            attention=attention_of(layout.context),
            zigzag=layout.context is Context.RING,  # where a rank has all tokens of its heads, all work alike
            loss=loss,
            units=units,
        )


def agreed_context(
    model: nn.Module, inputs: Any, *, layout: Layout, rank: int, loss: LossFunction | None, units: Sequence[str] = ()
) -> ContextPlan:
    """The plan of tokens that rank 0 has proven, on every rank. Collective. Raises what the proof raised, on all."""
    told: list[Any] = [None]
    if rank == 0:
        try:
            told = [context_plan(model, inputs, layout=layout, loss=loss, units=units)]
        except ShardwiseError as error:
            told = [error]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], ShardwiseError):
        raise told[0]
    assert isinstance(told[0], ContextPlan)
    return told[0]


def attention_of(context: Context) -> Attention:
    """How ranks attend to each other's tokens."""
    return RING if context is Context.RING else ULYSSES


def deal_contexts(
    model: nn.Module,
    plan: ContextPlan | None,
    *,
    place: Place,
    how: Context,
    units: Collection[str],
    stack: contextlib.ExitStack,
    same_host: SameHostTransport | None,
    traffic: Traffic,
) -> DealtContext | None:
    """The units of the model on this rank's tokens; collective where cp > 1. Raises `LayoutError` for a plan of another
    cp."""
    if place.cp == 1 or plan is None:
        return None
    if plan.cp != place.cp:
        raise LayoutError(
            f"a plan deals tokens out among the contexts of its layout, but this one was made for cp={plan.cp} and the "
            f"layout has cp={place.cp}; make the plan for cp={place.cp}"
        )
    group = rank_groups.context_group(place, same_host, stack)
    traffic.add("cp.all_gather", lambda: group.gathered_bytes)
    traffic.add("cp.reduce_scatter", lambda: group.scattered_bytes)
    traffic.add("cp.all_reduce", lambda: group.reduced_bytes)
    traffic.add("cp.send", lambda: group.sent_bytes)
    dealt = DealtContext(model, plan, ContextRegion(group, zigzag=plan.zigzag, attention=attention_of(how)), units)
    stack.callback(dealt.close)
    return dealt


def dealt_too(
    whole: Callable[[], contextlib.AbstractContextManager[None]], context: DealtContext | None
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Around a trace: all tokens besides."""
    if context is None:
        return whole
    dealt = context

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with dealt.off(), whole():
            yield

    return both
