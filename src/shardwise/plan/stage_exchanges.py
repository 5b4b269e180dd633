"""What a stage exchanges, by what it is added up as: inside its units, with other stages, and among its replicas.

    PlacedStage ──exchanges_of──► (name, (kind, bytes, span, count)) of a micro-batch and of a step

Refuses to know how long any of it takes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from shardwise.describe.kernels import Exchange, ExchangeKind, Phase
from shardwise.layout import Layout
from shardwise.plan.job import Job
from shardwise.plan.placing import Span, Spans
from shardwise.plan.stage_work import StageWork

__all__ = [
    "SIDES",
    "Entry",
    "PlacedStage",
    "Waits",
    "exchanges_of",
    "names_of",
    "phase_of",
    "side_of",
    "waits_in",
    "waits_of",
]

SIDES = ("forward", "again", "backward")  # of a micro-batch: phases, in each of which the host runs ahead of the device
Entry = tuple[ExchangeKind, float, Span, float]  # kind, bytes, span, count


class Waits(NamedTuple):
    """Other ranks, which have computed meanwhile, that a rank meets in collectives; messages that it exchanges."""

    others: int
    messages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedStage:
    """A stage, where its groups stand, and the level of the link to the stages that it sends to."""

    work: StageWork
    layout: Layout
    job: Job
    spans: Spans
    send_levels: tuple[int, ...] = ()  # in the order of work.sends

    def shown(self) -> tuple[tuple[ExchangeKind, float, Span], ...]:
        """Exchanges of a step behind the last backward: gradients summed, parameters gathered."""
        return tuple(entry for entry in (*_reduces(self), *_gathers(self)) if entry[2].num_ranks > 1)


def side_of(part: str) -> str:
    """The phase of what computes."""
    return {"forward": "forward", "recompute": "again"}.get(part, "backward")


def phase_of(exchange: Exchange) -> str:
    """The phase in which it is started."""
    return "again" if exchange.again else side_of(exchange.phase.value)


def names_of(exchange: Exchange) -> tuple[str, ...]:
    """What an exchange inside a unit is added up as."""
    side = "forward" if exchange.phase is Phase.FORWARD else "backward"
    if exchange.hidden:
        return (f"hidden_{side}",)
    return (f"{exchange.axis}_{side}", *(("again",) if exchange.again else ()))


def waits_of(one: PlacedStage) -> list[tuple[str, Waits]]:
    """By what exchanges are added up as: what a rank waits for in them."""
    spans = one.spans
    return [
        (name, waits)
        for exchange in one.work.exchanges
        if any(waits := waits_in(exchange, getattr(spans, exchange.axis).num_ranks))
        for name in names_of(exchange)
    ]


def waits_in(exchange: Exchange, group: int) -> Waits:
    """Of one among `group` ranks."""
    if exchange.kind is ExchangeKind.SEND:
        return Waits(0, exchange.count)
    if exchange.kind is ExchangeKind.ALL_TO_ALL:
        return Waits(0, exchange.count * (group - 1))
    return Waits(exchange.count * (group - 1), 0)


def exchanges_of(one: PlacedStage) -> list[tuple[str, Entry]]:
    """All that a stage exchanges, by what it is added up as."""
    spans = {"tp": one.spans.tp, "cp": one.spans.cp, "ep": one.spans.ep}
    entries: list[tuple[str, Entry]] = []
    for exchange in one.work.exchanges:
        entry = exchange.kind, exchange.nbytes, spans[exchange.axis], exchange.count
        entries += [(name, entry) for name in names_of(exchange)]
        if one.spans.pipeline_crosses:  # the host waits for its hops
            entries.append(
                (f"crowded_{phase_of(exchange)}", (exchange.kind, 0.0, spans[exchange.axis], exchange.count))
            )
    sides = (("send", one.work.sends), ("back", one.work.gradients))
    for name, sent in sides:
        for level, nbytes in zip(one.send_levels, sent.values(), strict=False):
            entries.append((name, (ExchangeKind.SEND, nbytes, _over(level), 1)))
    for name, kind, nbytes, span in (
        *(("reduce", *entry) for entry in _reduces(one)),
        *(("gather", *entry) for entry in _gathers(one)),
        *_unshards(one),
        *_shared(one),
    ):
        calls = one.job.reduce_calls if name in ("reduce", "gather") else 1.0
        if span.num_ranks > 1 and nbytes:
            entries.append((name, (kind, nbytes / calls, span, calls)))
    return entries


def _over(level: int) -> Span:
    """Two ranks that a link of this level joins."""
    return Span(sizes=tuple(2 if at == level else 1 for at in range(max(level + 1, 2))))


def _reduces(one: PlacedStage) -> list[tuple[ExchangeKind, float, Span]]:
    """Gradients behind a step: scattered among those that divide the state, then summed among those that do not."""
    work, layout, size = one.work, one.layout, one.job.reduce_bytes
    own, experts = float((work.trained - work.expert_trained) * size), float(work.expert_trained * size)
    found: list[tuple[ExchangeKind, float, Span]] = []
    if layout.fsdp > 1:
        if layout.zero < 2 or layout.unshards_by_step:
            found.append((ExchangeKind.REDUCE_SCATTER, own + experts, one.spans.states))
        found.append((ExchangeKind.ALL_REDUCE, own / layout.fsdp, one.spans.outer))
        found.append((ExchangeKind.ALL_REDUCE, experts / layout.fsdp, one.spans.expert_outer))
    else:
        found.append((ExchangeKind.ALL_REDUCE, own, one.spans.replicas))
        found.append((ExchangeKind.ALL_REDUCE, experts, one.spans.expert_copies))
    return [part for entry in found for part in _by_level(*entry)] if one.job.algorithm == "hierarchical" else found


def _by_level(kind: ExchangeKind, nbytes: float, span: Span) -> list[tuple[ExchangeKind, float, Span]]:
    """A sum as `comm.hierarchical` does it: scattered inside each host, summed between hosts, gathered inside."""
    inside = span.sizes[0]
    if kind is not ExchangeKind.ALL_REDUCE or inside in (1, span.num_ranks):
        return [(kind, nbytes, span)]
    ones = (1,) * (len(span.sizes) - 1)
    here, there = Span(sizes=(inside, *ones)), Span(sizes=(1, *span.sizes[1:]))
    return [
        (ExchangeKind.REDUCE_SCATTER, nbytes, here),
        (ExchangeKind.ALL_REDUCE, nbytes / inside, there),
        (ExchangeKind.ALL_GATHER, nbytes, here),
    ]


def _gathers(one: PlacedStage) -> list[tuple[ExchangeKind, float, Span]]:
    """Parameters that each rank has updated a part of."""
    layout = one.layout
    if layout.fsdp == 1 or (layout.zero == 3 and not layout.unshards_by_step):
        return []
    return [(ExchangeKind.ALL_GATHER, float(one.work.parameters * one.job.per_parameter.parameter), one.spans.states)]


def _unshards(one: PlacedStage) -> list[tuple[str, ExchangeKind, float, Span]]:
    """At zero=3 by micro-batch: parameters for the forward, again for the backward, and gradients divided behind it; at
    zero=2 the gradients alone (as `divide_states.sent_bytes` counts them)."""
    layout = one.layout
    if layout.fsdp == 1 or layout.zero < 2 or layout.unshards_by_step:
        return []
    units = one.work.unit_parameters or (one.work.parameters,)
    entries: list[tuple[str, ExchangeKind, float, Span]] = []
    for unit in units:
        gathered = float(unit * one.job.per_parameter.parameter) if layout.zero == 3 else 0.0
        entries.append(("unshard_forward", ExchangeKind.ALL_GATHER, gathered, one.spans.states))
        entries.append(("unshard_backward", ExchangeKind.ALL_GATHER, gathered, one.spans.states))
        reduced = float(unit * one.job.reduce_bytes)
        entries.append(("unshard_backward", ExchangeKind.REDUCE_SCATTER, reduced, one.spans.states))
    return entries


def _shared(one: PlacedStage) -> list[tuple[str, ExchangeKind, float, Span]]:
    """Gradients of what two stages hold, over the link between the ends of the pipeline."""
    if not one.work.shared_parameters:
        return []
    nbytes = float(one.work.shared_parameters * one.job.reduce_bytes)
    return [("shared", ExchangeKind.ALL_REDUCE, nbytes, _over(1 if one.spans.pipeline_crosses else 0))]
