"""From a model and a batch to how its units work on own tokens: proposed from what they are given, then proven.

Arguments (..., tokens, features) with a gradient are dealt out along dim -2, ids (samples, tokens) along -1, and where
there are none of these, features of tokens that are data. A run on
threads shows what leaves by tokens and which modules work by token; the proof compares with all tokens. Whatever is
not proven is given all tokens. Knows kinds of units; no ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn

from shardwise.describe.context import ContextPlan, UnitContext
from shardwise.errors import ShardwiseError
from shardwise.parallel.context.attend import Attention
from shardwise.parallel.context.prove import Seen, Way, observed, proven
from shardwise.parallel.context.shorten import shortened
from shardwise.parallel.tensor.calls import Kind, kinds_of
from shardwise.parallel.tensor.instance import Call, random_copy
from shardwise.parallel.tensor.narrow import narrowed
from shardwise.parallel.tensor.propose import argument_names
from shardwise.parallel.tensor.prove import Difference
from shardwise.parallel.tensor.prove_vocabulary import is_large_layer, narrow_layer
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers
from shardwise.trace.objective import Batch, LossFunction

__all__ = ["plan_context"]


def plan_context(
    model: nn.Module,
    batch: Batch,
    *,
    cp: int,
    attention: Attention,
    zigzag: bool = False,
    loss: LossFunction | None = None,
    units: Sequence[str] = (),
) -> ContextPlan:
    """What is proven of each kind of unit, for `cp` ranks that attend by `attention`. Raises what a trace raises."""
    way = Way(cp=cp, zigzag=zigzag, attention=attention)
    found: dict[str, UnitContext] = {}
    whole: dict[str, str] = {}
    alike: dict[str, UnitContext] = {}  # a layer that was dropped is as its neighbours
    kinds = kinds_of(model, batch, loss=loss, units=units)
    small = narrowed(model, batch, kinds, tp=cp, loss=loss, units=units).kinds  # a plan of tokens has no other sizes
    for kind in sorted(map(_fitting, small, kinds), key=lambda kind: not kind.calls):
        own, reason = _of_kind(kind, way)
        own = alike.get(_structure(kind.module)) if not kind.calls else own
        if own is None:
            whole.update(dict.fromkeys(kind.units, reason))
        else:
            found.update(dict.fromkeys(kind.units, own))
            alike.setdefault(_structure(kind.module), own)
    return ContextPlan(cp=cp, zigzag=zigzag, units=found, whole=whole)


def _fitting(small: Kind, kind: Kind) -> Kind:
    """The kind in a narrow instance, where its own is too large for a proof; lone tables and heads in few columns."""
    if is_large_layer(kind):
        return narrow_layer(kind)
    return small if small.calls else kind


def _structure(module: nn.Module) -> str:
    """What modules that are alike have in common."""
    tensors = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    return repr((type(module), [(name, type(inner)) for name, inner in module.named_modules()], tensors))


def _of_kind(kind: Kind, way: Way) -> tuple[UnitContext | None, str]:
    """With all candidates dealt out, or else one of them; None and the first reason where that is not equal."""
    if not kind.calls:
        return None, "it is not called"
    names = _candidates(kind, way.cp)
    if not names:
        return None, "it is given no activations and no ids of tokens"
    reasons: list[str] = []
    short = dataclasses.replace(kind, calls=[shortened(kind.module, c, names, ranks=way.cp) for c in kind.calls])
    long = any(one is not other for one, other in zip(short.calls, kind.calls, strict=True))
    choices = (names, *({name: dim} for name, dim in names.items() if len(names) > 1))
    for some, tried in itertools.product(choices, (short, kind) if long else (kind,)):
        try:
            return _proven(tried, UnitContext(inputs=some), way), ""
        except (Difference, ShardwiseError) as difference:
            reasons.append(str(difference).partition("\n")[0])
        except Exception as error:  # whatever a model raises when it is run alone, on random numbers
            reasons.append(f"{type(error).__name__}: {error}".partition("\n")[0])
    return None, reasons[0]


def _candidates(kind: Kind, cp: int) -> dict[str, int]:
    """Arguments to deal out, with their dims of tokens."""
    activations: dict[str, int] = {}
    ids: dict[str, int] = {}
    given: dict[str, int] = {}  # features of tokens that are data
    for call in kind.calls:
        tensors = call.tensors
        for place, name in argument_names(kind.module, call).items():
            tensor = tensors[place]
            if place in call.requires_grad and tensor.dim() > 2 and tensor.shape[-2] >= 2 * cp:
                activations[name] = -2
            elif tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 2 and tensor.shape[-1] >= 2 * cp:
                ids[name] = -1
            elif tensor.is_floating_point() and tensor.dim() == 3 and tensor.shape[-2] >= 2 * cp:
                given[name] = -2
    return activations or ids or given


def _proven(kind: Kind, own: UnitContext, way: Way) -> UnitContext:
    """Raises `Difference`, or whatever the unit raises."""
    unit = random_copy(kind.module)
    calls = with_whole_numbers(unit, kind.calls)
    seen = [observed(unit, call, own, way, training=True) for call in calls]
    outputs = _outputs(seen, calls)
    if not outputs and any(each.joined for each in seen):
        joined = sorted({name for each in seen for name in each.joined})
        raise Difference(f"nothing that it returns is by token: {', '.join(joined)} asks for all tokens")
    found = seen[0].by_token
    for each in seen[1:]:
        found = {name: how for name, how in found.items() if each.by_token.get(name) == how}
    joined = sorted(set[str]().union(*(each.joined for each in seen)))
    own = dataclasses.replace(own, outputs=outputs, by_token=found, joined=tuple(joined))
    worst = 0.0
    for number, (call, each) in enumerate(zip(calls, seen, strict=True)):
        for training in (True, False) if each.draws else (True,):
            worst = max(worst, proven(unit, call, own, way, training=training, seed=2 * number + training))
    return dataclasses.replace(own, error=worst)


def _outputs(seen: Sequence[Seen], calls: Sequence[Call]) -> Mapping[int, int]:
    """Places that leave by tokens in every call, and that somebody reads."""
    places = {
        place: dim for place, dim in seen[0].outputs.items() if all(each.outputs.get(place) == dim for each in seen[1:])
    }
    return {p: dim for p, dim in places.items() if all(call.read is None or p in call.read for call in calls)}
