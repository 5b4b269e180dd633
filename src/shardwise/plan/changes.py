"""What one change to a layout would buy: every neighbour in one axis, priced, with what has to move along.

An axis that is halved leaves devices over: another one takes them, and the micro-batch may be another; of these the
best is told. Knows layouts and prices; refuses to know how a layout was found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from shardwise.describe.tensor import SequenceParallel
from shardwise.errors import LayoutError, ShardwiseError
from shardwise.layout import Layout, Unshard
from shardwise.plan.placing import ORDER
from shardwise.plan.pricer import Pricer
from shardwise.plan.ranked import Ranked
from shardwise.plan.space import Axes, Limits, Mesh, broken_rule
from shardwise.quantities import format_bytes
from shardwise.schedule import GENERATORS

__all__ = ["Change", "changes_of"]

_AXES = ("tp", "cp", "ep", "pp")
_ORDERS = (  # innermost first: the pipeline inside replicas, replicas inside tp and cp, the pipeline innermost
    ("tp", "cp", "pp", "ep", "fsdp", "dp"),
    ("tp", "pp", "cp", "ep", "fsdp", "dp"),
    ("ep", "tp", "cp", "fsdp", "dp", "pp"),
    ("fsdp", "tp", "cp", "ep", "dp", "pp"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """`what` in words; `gain`: of the step's seconds, the share that it saves (less than 0: costs); `moved`: what else
    has to change; `lacks_bytes`: what the fullest rank would need beyond its memory, 0 where it fits; `broken`: the
    rule that forbids it, with numbers, where nothing can be priced."""

    what: str
    moved: str = ""
    gain: float = 0.0
    lacks_bytes: float = 0.0
    broken: str = ""
    ranked: Ranked | None = None

    def __str__(self) -> str:
        text = f"{self.what} ({self.moved})" if self.moved else self.what
        if self.broken:
            return f"{text}: {self.broken}"
        way = f"saves {self.gain:.1%}" if self.gain >= 0.0005 else f"costs {-self.gain:.1%}"
        way = "changes nothing" if abs(self.gain) < 0.0005 else way
        return (
            f"{text}: does not fit, {format_bytes(self.lacks_bytes)} too much" if self.lacks_bytes else f"{text}: {way}"
        )


def changes_of(layout: Layout, pricer: Pricer, axes: Axes) -> tuple[Change, ...]:
    """Every change of one axis to the next value of `axes`, the best of what may move along; those that save most
    first. All are priced in closed form."""
    found: dict[str, list[Change]] = {}
    base = pricer(layout)
    for what, moved, changed, samples in _neighbours(layout, axes, pricer.limits, pricer.job.global_batch):
        found.setdefault(what, []).append(_priced(base, pricer, what, moved, changed, samples))
    found |= {change.what: [change] for change in (*_placed(base, pricer), *_summed(base, pricer))}
    return tuple(sorted((min(own, key=_order) for own in found.values()), key=_order))


def _placed(base: Ranked, pricer: Pricer) -> Iterator[Change]:
    """Other orders of the axes on the links of the cluster: what a launcher that places ranks so would gain."""
    if not pricer.cluster.is_uniform or len(pricer.cluster.links) == 1:
        return
    sizes = {name: getattr(base.layout, name) for name in ORDER}
    known = {tuple(name for name in ORDER if sizes[name] > 1)}
    for order in _ORDERS:
        shown = tuple(name for name in order if sizes[name] > 1)
        if shown not in known:
            known.add(shown)
            what = f"ranks placed {', '.join(shown)} (innermost first; a launcher's order)"
            ranked = pricer(base.layout, order=order)
            gain = 1 - ranked.price.step_s / base.price.step_s
            yield Change(what=what, gain=gain, lacks_bytes=max(0.0, -ranked.room_bytes), ranked=ranked)


def _summed(base: Ranked, pricer: Pricer) -> Iterator[Change]:
    """Gradients summed inside each host, then between hosts: a setting of the run beside its layout."""
    if len(pricer.cluster.links) == 1 or base.layout.num_replicas == 1:
        return
    job = dataclasses.replace(pricer.job, algorithm="hierarchical")
    ranked = Pricer(pricer.works, pricer.cluster, job, pricer.limits)(base.layout)
    gain = 1 - ranked.price.step_s / base.price.step_s
    yield Change(what="communication.algorithm auto→hierarchical", gain=gain, ranked=ranked)


def _priced(base: Ranked, pricer: Pricer, what: str, moved: str, changed: Layout | str, samples: int) -> Change:
    if isinstance(changed, str):
        return Change(what=what, moved=moved, broken=changed)
    try:
        ranked = pricer(changed, samples)
    except ShardwiseError as error:
        return Change(what=what, moved=moved, broken=str(error))
    gain = 1 - ranked.price.step_s / base.price.step_s
    lacks = max(0.0, -ranked.room_bytes, ranked.host_lacks_bytes)
    return Change(what=what, moved=moved, gain=gain, lacks_bytes=lacks, ranked=ranked)


def _order(change: Change) -> tuple[bool, bool, float]:
    return bool(change.broken), change.lacks_bytes > 0, change.lacks_bytes or -change.gain


_Neighbour = tuple[str, str, Layout | str, int]


def _neighbours(layout: Layout, axes: Axes, limits: Limits, global_batch: int) -> Iterator[_Neighbour]:
    samples = global_batch // (layout.num_replicas * layout.num_micro_batches(global_batch))
    for axis in _AXES:
        yield from _of_axis(layout, axis, axes, limits, global_batch, samples)
    for other in _beside(axes.samples, samples):
        changed = _with(layout, limits, global_batch, other)
        yield f"micro-batch {samples}→{other}", "", changed, other
    for name, chunks in axes.ways if layout.pp > 1 else ():
        own = layout.num_stages // layout.pp
        if (name, chunks) == (layout.schedule, own) or layout.pp * chunks > limits.stages:
            continue
        what = f"schedule {layout.schedule}→{name}" if name != layout.schedule else f"stages a rank {own}→{chunks}"
        moved = f"{chunks} stages a rank" if name != layout.schedule and chunks != own else ""
        fewest = GENERATORS[name].chunks[0]
        given = None if chunks == fewest else chunks
        yield what, moved, _with(layout, limits, global_batch, samples, schedule=name, chunks=given), samples
    for word in axes.recompute:
        if word != layout.recompute:
            what = f"recompute {layout.recompute}→{word}"
            yield what, "", _with(layout, limits, global_batch, samples, recompute=word), samples
    for offload in axes.offload:
        if offload is not layout.offload:
            what = f"offload {layout.offload}→{offload}"
            yield what, "", _with(layout, limits, global_batch, samples, offload=offload), samples
    for context in axes.context if layout.cp > 1 else ():
        if context is not layout.context:
            what = f"context {layout.context}→{context}"
            yield what, "", _with(layout, limits, global_batch, samples, context=context), samples
    yield from _of_state(layout, limits, global_batch, samples)
    if layout.tp > 1 and layout.cp == layout.ep == 1 and len(axes.sequence_parallel) > 1:
        word = SequenceParallel.OFF if layout.sequence_parallel else SequenceParallel.ON
        what = f"sequence_parallel {layout.sequence_parallel}→{word}"
        yield what, "", _with(layout, limits, global_batch, samples, sequence_parallel=word), samples


def _of_axis(
    layout: Layout, axis: str, axes: Axes, limits: Limits, global_batch: int, samples: int
) -> Iterator[_Neighbour]:
    """The next smaller and larger value of an axis; the devices come from, or go to, each other axis in turn."""
    size = getattr(layout, axis)
    for value in _beside(getattr(axes, axis), size):
        for other in (*(name for name in _AXES if name != axis), "replicas"):
            own = layout.dp * layout.fsdp if other == "replicas" else getattr(layout, other)
            moved, rest = divmod(own * size, value)
            if rest or not moved:
                continue
            if other != "replicas" and moved not in getattr(axes, other):
                continue
            sizes = {axis: value} | ({} if other == "replicas" else {other: moved})
            outer = _outer(layout, moved if other == "replicas" else layout.dp * layout.fsdp)
            for each in dict.fromkeys((samples, *_beside(axes.samples, samples))):
                text = f"{other} {own}→{moved}" + (f", micro-batch {samples}→{each}" if each != samples else "")
                changed = _with(layout, limits, global_batch, each, **sizes, **outer)
                yield f"{axis} {size}→{value}", text, changed, each


def _of_state(layout: Layout, limits: Limits, global_batch: int, samples: int) -> Iterator[_Neighbour]:
    outer = layout.dp * layout.fsdp
    if outer == 1:
        return
    now = _state(layout)
    ways = {"undivided": (outer, 1, 3), **{f"zero={zero}": (1, outer, zero) for zero in (1, 2, 3)}}
    for word, (dp, fsdp, zero) in ways.items():
        if word != now:
            changed = _with(layout, limits, global_batch, samples, dp=dp, fsdp=fsdp, zero=zero)
            yield f"state {now}→{word}", "", changed, samples
    if layout.fsdp > 1 and layout.zero == 3:
        old, new = (Unshard.STEP, Unshard.MICRO_BATCH)[:: 1 if layout.unshards_by_step else -1]
        changed = _with(layout, limits, global_batch, samples, unshard=new)
        yield f"unshard {old}→{new}", "", changed, samples


def _state(layout: Layout) -> str:
    if layout.fsdp == 1:
        return "undivided"
    return f"zero={layout.zero}" if layout.dp == 1 else f"zero={layout.zero} inside {layout.fsdp}"


def _outer(layout: Layout, replicas: int) -> dict[str, int]:
    """dp and fsdp of so many replicas, divided as the layout divides state."""
    if layout.fsdp == 1:
        return {"dp": replicas, "fsdp": 1}
    inside = layout.fsdp if layout.dp > 1 and replicas % layout.fsdp == 0 else replicas
    return {"dp": replicas // inside, "fsdp": inside}


def _with(layout: Layout, limits: Limits, global_batch: int, samples: int, **changed: object) -> Layout | str:
    """The layout with other fields, and as many micro-batches as the samples make; the rule it breaks."""
    fields = {**layout.to_dict(), **changed}
    fields.pop("shares", None)  # of other replicas, or another number of micro-batches
    sizes = {name: int(str(fields.get(name, 1))) for name in (*_AXES, "dp", "fsdp")}
    replicas = sizes["dp"] * sizes["fsdp"] * sizes["ep"]
    count, rest = divmod(global_batch, replicas * samples)
    if rest or not count:
        return f"{replicas} replicas × {samples} samples a micro-batch do not divide the global batch of {global_batch}"
    mesh = Mesh(devices=layout.world_size, **{name: sizes[name] for name in _AXES})
    if (rule := broken_rule(mesh, limits)) is not None:
        return rule[1]
    if sizes["pp"] != layout.pp or "schedule" in changed:
        fields.pop("stages", None)  # listed for other stages
    if sizes["tp"] == 1 or sizes["cp"] > 1 or sizes["ep"] > 1:
        fields["sequence_parallel"] = SequenceParallel.OFF
    if sizes["pp"] == 1:
        fields |= {"schedule": "1f1b", "chunks": None}
    elif sizes["pp"] * (layout.num_stages // layout.pp) > limits.stages and "chunks" not in changed:
        own = f"pp={sizes['pp']} × {layout.num_stages // layout.pp} stages a rank"
        return f"{own}, but the model has {limits.stages} units with parameters"
    try:
        return Layout.from_dict({**fields, "micro_batches": count})
    except LayoutError as error:
        return str(error)


def _beside(values: Sequence[int], value: int) -> list[int]:
    """The next smaller and the next larger of some values."""
    smaller = [n for n in values if n < value]
    larger = [n for n in values if n > value]
    return [*([max(smaller)] if smaller else []), *([min(larger)] if larger else [])]
