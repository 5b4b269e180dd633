"""The plan as text, for someone who reads one for the first time: at most 100 columns.

Puts into words what profile, layout, cut and estimate say. Computes nothing of its own, and prints nothing.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from shardwise.describe.flow import NodeKind
from shardwise.describe.profile import ModelProfile
from shardwise.describe.tensor import TensorPlan
from shardwise.layout import Layout, compress, position_ranks
from shardwise.plan.continuous import NOTE
from shardwise.plan.cut import Cut
from shardwise.plan.estimate import EdgeEstimate, Estimate, RankEstimate, StageEstimate
from shardwise.plan.recompute import How, RecomputePlan
from shardwise.quantities import format_bytes, format_count, format_flops, format_seconds
from shardwise.schedule import draw

__all__ = ["explain"]

_WIDTH = 100
_LABEL = 12  # columns of the label in front of a line
_DRAWN = 88  # columns of the drawing


def explain(
    profile: ModelProfile,
    layout: Layout,
    cut: Cut,
    estimate: Estimate,
    *,
    assumes: str = "",
    tensor: TensorPlan | None = None,
    found: str = "",
    again: RecomputePlan | None = None,
) -> str:
    """Model, layout, one paragraph a stage, what several stages hold, and the drawn schedule.

    `assumes` says where the seconds of the estimate come from, `found` what a search for its schedule gained, `tensor`
    how units are divided among shards: profile and estimate are then those of one shard. `again` says what is computed
    again: profile and estimate are then those of a model that does it.
    """
    lines = [*_model(profile, tensor), *_layout(layout, estimate), *_tensor(tensor)]
    if again is not None and layout.recompute != How.NONE:
        lines += [line for told in again.lines() for line in _labelled("recompute", told)]
    for stage in estimate.stages:
        lines += ["", *_stage(profile, layout, cut, estimate, stage)]
    if layout.num_stages > layout.pp:
        lines += ["", *(line for rank in estimate.ranks for line in _rank(layout, rank))]
    lines += ["", *_shared(profile, cut, estimate), *_unread(profile), *_step(layout, estimate, assumes, found)]
    return "\n".join(line.rstrip() for line in lines)


def _labelled(label: str, text: str, *, indent: int = 0) -> list[str]:
    """`label` in the margin and `text` beside it, wrapped."""
    first = f"{' ' * indent}{label}".ljust(_LABEL)
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{first}  ",
        subsequent_indent=" " * (_LABEL + 2),
        break_long_words=True,
        break_on_hyphens=False,
    )


def _tensor(tensor: TensorPlan | None) -> list[str]:
    if tensor is None:
        return []
    first, *rest = tensor.lines()
    lines = _labelled("tensor", first)
    for line in rest:
        lines += _labelled("", line)
    return lines


def _model(profile: ModelProfile, tensor: TensorPlan | None) -> list[str]:
    parameters = format_count(profile.num_parameters, "parameters")
    units = _plural(len(profile.units), "unit")
    calls = "" if len(profile.calls) == len(profile.units) else f" called {len(profile.calls)} times"
    forward, backward = format_flops(profile.forward_flops), format_flops(profile.backward_flops)
    size = f"{parameters}, {format_bytes(profile.parameter_bytes)}"
    of_shard = "" if tensor is None else f" on each of {tensor.tp} shards"
    return [
        *_labelled("model", f"{profile.model_class}: {size}{of_shard}, in {units}{calls}"),
        *_labelled("", f"{forward} forward and {backward} backward for the traced batch"),
    ]


def _layout(layout: Layout, estimate: Estimate) -> list[str]:
    schedule = estimate.schedule
    text = f"{layout}: {_plural(layout.num_replicas, 'replica')} of {_plural(layout.num_stages, 'stage')}"
    if layout.num_stages > layout.pp:
        counts = sorted({len(rank.stages) for rank in estimate.ranks})
        text += f", {counts[0]} a rank," if len(counts) == 1 else f", {counts[0]} to {counts[-1]} a rank,"
    if layout.cp > 1:
        text += f", each sequence on {layout.cp} ranks ({layout.context}),"
    if layout.tp > 1:
        text += f" of {layout.tp} shards"
    ranks = f"{_plural(layout.world_size, 'rank')}; {schedule.name}"
    micro_batches = _plural(schedule.num_micro_batches, "micro-batch", "micro-batches")
    lines = _labelled("layout", f"{text} on {ranks} with {micro_batches} a replica")
    return lines if layout.fsdp == 1 else [*lines, *_labelled("state", _state(layout), indent=2)]


def _state(layout: Layout) -> str:
    """What replicas divide among them."""
    what = ("optimizer state", "gradients", "parameters")[: layout.zero]
    text = f"{' and '.join(filter(None, [', '.join(what[:-1]), what[-1]]))} divided by {layout.fsdp}"
    if layout.zero == 3:
        text += ", parameters whole for a step" if layout.unshards_by_step else ", parameters whole a unit at a time"
    return text if layout.num_replicas == layout.fsdp else f"{text}; {layout.num_replicas // layout.fsdp} such groups"


def _stage(profile: ModelProfile, layout: Layout, cut: Cut, estimate: Estimate, stage: StageEstimate) -> list[str]:
    on = _named(position_ranks(layout, estimate.schedule.owners[stage.stage]))
    total = sum(other.forward_s + other.backward_s for other in estimate.stages)
    share = (stage.forward_s + stage.backward_s) / total if total else 1 / len(estimate.stages)
    count = format_count(stage.num_parameters, "parameters")
    cost = f"{share:.0%} of the time ({format_flops(stage.flops)} a micro-batch)"
    sent = [edge for edge in estimate.edges if edge.source == stage.stage]
    return [
        *_labelled(f"stage {stage.stage}", f"{on}: {count}, {format_bytes(stage.memory_bytes)}, {cost}"),
        *_labelled("runs", ", ".join(_units(profile, cut.stages[stage.stage].calls)), indent=2),
        *_labelled("memory", _memory(stage), indent=2),
        *(line for edge in sent for line in _labelled("sends", _edge(profile, edge), indent=2)),
    ]


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def _rank(layout: Layout, rank: RankEstimate) -> list[str]:
    """What the stages of a rank take together."""
    parts = {
        "parameters": rank.parameter_bytes,
        "gradients": rank.gradient_bytes,
        "optimizer": rank.optimizer_bytes,
        "activations": rank.activation_bytes,
    }
    text = " + ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items() if nbytes)
    stages = f"{'stage' if len(rank.stages) == 1 else 'stages'} {' and '.join(map(str, rank.stages))}"
    on = _named(position_ranks(layout, rank.position))
    return _labelled(on, f"{stages}: {format_bytes(rank.memory_bytes)}: {text}")


def _units(profile: ModelProfile, calls: Sequence[int]) -> tuple[str, ...]:
    """Units by name, calls of a unit that is called several times by number; runs of them as ranges."""
    times = Counter(call.unit for call in profile.calls)
    nodes = (profile.flow.nodes[node] for node in calls)
    return compress([node.name if times[node.name] == 1 else node.label for node in nodes])


def _memory(stage: StageEstimate) -> str:
    parts = {
        "parameters": stage.parameter_bytes,
        "gradients": stage.gradient_bytes,
        "optimizer": stage.optimizer_bytes,
        "activations": stage.activation_bytes,
    }
    text = " + ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items() if nbytes)
    return f"{text} ({stage.in_flight} in flight)" if stage.activation_bytes else text


def _edge(profile: ModelProfile, edge: EdgeEstimate) -> str:
    forward, backward = format_bytes(edge.forward_bytes), format_bytes(edge.backward_bytes)
    names = Counter(_value(profile, value) for value in edge.values)
    crossing = _some([name if times == 1 else f"{times} × {name}" for name, times in names.items()], 6)
    return f"to stage {edge.target}: {forward} forward and {backward} back a micro-batch: {crossing}"


def _value(profile: ModelProfile, value: int) -> str:
    """A value by what made it: `model.layers.3 float32[2×16×64]`, `add (glue 17) float32[2×16×64]`."""
    about = profile.flow.values[value]
    node = profile.flow.nodes[about.node]
    if node.kind is NodeKind.CALL:
        name = node.name if sum(call.unit == node.name for call in profile.calls) == 1 else node.label
    else:
        name = f"{node.name} (glue {node.index})"
    return f"{name} {about.dtype}[{'×'.join(map(str, about.shape))}]"


def _shared(profile: ModelProfile, cut: Cut, estimate: Estimate) -> Iterator[str]:
    owners = estimate.schedule.owners
    holders: dict[str, list[int]] = {}
    for stage in cut.stages:
        for name in sorted(stage.parameters):
            holders.setdefault(name, []).append(stage.stage)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, held in holders.items():
        if len(held) > 1:
            groups.setdefault(tuple(held), []).append(name)
    for stages, names in groups.items():
        nbytes = format_bytes(sum(profile.parameters[name].nbytes for name in names))
        where = ", ".join(map(str, stages))
        summed = len({owners[stage] for stage in stages}) > 1
        how = "gradients are summed" if summed else "stages of one rank, which holds them once"
        text = f"{_together(names)}, {nbytes}: on stages {where}; {how}"
        yield from _labelled("shared", text)


def _together(names: Sequence[str]) -> str:
    """Many parameters of one module as `module.* (16 parameters)`."""
    prefix = names[0].rpartition(".")[0]
    while prefix and not all(name.startswith(prefix + ".") for name in names):
        prefix = prefix.rpartition(".")[0]
    if len(names) > 3 and prefix:
        return f"{prefix}.* ({len(names)} parameters)"
    return _some(names, 4)


def _some(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _unread(profile: ModelProfile) -> Iterator[str]:
    if profile.unread:
        text = f"{_some(profile.unread, 4)}: not read by the forward, held by no stage"
        yield from _labelled("unused", text)


def _step(layout: Layout, estimate: Estimate, assumes: str, found: str) -> list[str]:
    summary = (
        f"{format_seconds(estimate.step_s)} predicted for forwards and backwards, {estimate.bubble_fraction:.0%} of it "
        f"waiting; busiest {'stage' if layout.num_stages == layout.pp else 'rank'} {estimate.imbalance:.2f} × the mean"
    )
    lines = [
        *_labelled("step", summary),
        *(_labelled("schedule", found) if found else []),
        *(_labelled("schedule", NOTE) if estimate.further_s is not None else []),
        *(_labelled("assumes", assumes, indent=2) if assumes else []),
        *_labelled("left out", _left_out(layout, estimate), indent=2),
    ]
    if layout.pp == 1:
        return lines
    one = "one replica:" if layout.num_stages > layout.pp else "one replica, rank r of it is stage r:"
    one = one if layout.num_replicas > 1 else ""
    drawing = draw(estimate.timeline, width=_DRAWN).splitlines()[:-1]
    return [*lines, *filter(None, [one]), *drawing]


def _left_out(layout: Layout, estimate: Estimate) -> str:
    """What a step takes besides."""
    rest = "the optimizer, reading data"
    if layout.tp > 1:
        rest = f"sums over the shards of a unit, {rest}"
    if layout.cp > 1:
        rest = f"keys and values that go to the ranks of a sequence, {rest}"
    if layout.ep > 1:
        rest = f"rows that go to experts and back, {rest}"
    if layout.num_replicas == 1:
        return rest
    reduced = max(stage.all_reduce_bytes for stage in estimate.stages)
    gathering = "averaging gradients" if layout.fsdp == 1 else "averaging gradients and gathering parameters"
    return f"{gathering} (each rank sends {format_bytes(reduced)} at most), {rest}"


def _plural(count: int, one: str, several: str | None = None) -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"
