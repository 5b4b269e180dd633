"""Stages of a model that was traced with one number of samples, for any other number; and those of a bare profile.

What belongs to samples grows with them (`Kernel.scaled`), weights stay: exact for everything but what depends on
samples in steps. Refuses to know torch, and where profiles come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shardwise.describe.flow import Dataflow
from shardwise.describe.profile import ModelProfile
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.layout.rules import RECOMPUTE
from shardwise.plan.coarse import Works
from shardwise.plan.cut import Cut, cut_stages
from shardwise.plan.partition import place
from shardwise.plan.recompute import How, computed_again, plan_recompute
from shardwise.plan.sources import source_of
from shardwise.plan.space import Limits
from shardwise.plan.stage_work import StageWork
from shardwise.plan.works import stage_works
from shardwise.quantities import parse_bytes

__all__ = ["ProfileWorks", "ScaledWorks", "part_names", "scaled_work", "traced_samples"]


class ScaledWorks:
    """`works(layout, samples)` from works that are asked for `traced` samples alone."""

    def __init__(self, works: Works, *, traced: int) -> None:
        self.works, self.traced = works, traced

    def __call__(self, layout: Layout, samples: int) -> tuple[StageWork, ...]:
        """The stages of a layout, scaled. Raises what tracing them raises."""
        factor = samples / self.traced
        return tuple(scaled_work(work, factor) for work in self.works(_budgeted(layout, factor), self.traced))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileWorks:
    """`works(layout, samples)` of one traced profile of a whole model, with `traced` samples: layouts of replicas and
    stages. Raises `LayoutError` where units would be divided: how, only the model tells."""

    profile: ModelProfile
    traced: int

    @property
    def limits(self) -> Limits:
        """What can be divided: the row of unit calls."""
        names = part_names(self.profile)
        count = sum(bool(node.parameters) for node in self.profile.flow.calls)
        return Limits(stages=max(1, count), names=names if len(names) == count else (), budgets=True)

    def __call__(self, layout: Layout, samples: int) -> tuple[StageWork, ...]:
        """The stages of a layout."""
        if layout.tp * layout.cp * layout.ep > 1:
            raise LayoutError(
                f"a profile says what whole units do, but {layout} divides them; search with what was traced of the "
                "model itself, or use tp=1, cp=1 and ep=1"
            )
        cut = cut_stages(self.profile.flow, place(self.profile, layout), layout.num_stages)
        scale = samples / self.traced
        again = _again(self.profile, cut, _budgeted(layout, scale))
        return stage_works(self.profile, cut, recompute=again, scale=scale)


def _budgeted(layout: Layout, factor: float) -> Layout:
    """Bytes that a rank may keep of activations, for micro-batches of 1 / `factor` of the samples."""
    if layout.recompute in RECOMPUTE or factor == 1:
        return layout
    return dataclasses.replace(layout, recompute=f"{int(parse_bytes(layout.recompute) / factor)}B")


def _again(profile: ModelProfile, cut: Cut, layout: Layout) -> dict[str, How]:
    """How units are computed again. Raises `LayoutError` where a budget suffices for none of it."""
    if layout.recompute in RECOMPUTE:
        return computed_again(profile, cut, layout.recompute)
    source = source_of(layout)
    if source is None:
        raise LayoutError(f"recompute={layout.recompute} follows from a schedule, and {layout} has none; name one")
    count = layout.micro_batches or (1 if layout.pp == 1 else 2 * layout.pp)
    return dict(plan_recompute(profile, cut, source(count), layout.recompute).units)


def part_names(profile: ModelProfile) -> tuple[str, ...]:
    """Unit calls in their order, as layouts list them."""
    times: dict[str, int] = {}
    for call in profile.calls:
        times[call.unit] = times.get(call.unit, 0) + 1
    return tuple(node.name if times[node.name] == 1 else node.label for node in profile.flow.calls)


def traced_samples(flow: Dataflow) -> int:
    """The first dim of what the first unit call makes: samples come first in a batch that nothing else is said of."""
    made = [flow.values[value].shape for node in flow.calls for value in node.makes]
    return next((shape[0] for shape in made if shape), 1)


def scaled_work(work: StageWork, factor: float) -> StageWork:
    """The same stage with `factor` times the samples: kernels by their batch dims, activations and messages whole."""
    if factor == 1:
        return work
    return dataclasses.replace(
        work,
        kernels=tuple(kernel.scaled(factor) for kernel in work.kernels),
        recomputed=tuple(kernel.scaled(factor) for kernel in work.recomputed),
        exchanges=tuple(
            dataclasses.replace(exchange, nbytes=round(exchange.nbytes * factor)) for exchange in work.exchanges
        ),
        saved_bytes=work.saved_bytes * factor,
        unit_saved_bytes=work.unit_saved_bytes * factor,
        weight_bytes=work.weight_bytes * factor,
        transient_bytes=work.transient_bytes * factor,
        logits_bytes=work.logits_bytes * factor,
        sends=_grown(work.sends, factor),
        gradients=_grown(work.gradients, factor),
    )


def _grown(sent: Mapping[int, float], factor: float) -> dict[int, float]:
    return {target: nbytes * factor for target, nbytes in sent.items()}
