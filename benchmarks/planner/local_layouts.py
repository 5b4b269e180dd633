"""Every layout of a model on so many ranks, and what is predicted of each: the product's own space, rules and prices.

Micro-batches are of one size and nothing is computed again; all else that the rules allow is there: every product of
axes, every way to divide state among replicas, schedules of each kind. Knows plans; refuses to know the clock.
"""

from __future__ import annotations

import dataclasses

from benchmarks.planner.local_models import GLOBAL_BATCH, SAMPLES, Setting
from shardwise.cli.plan_traced import Traced, job_of, traced_model
from shardwise.describe.cluster import Cluster
from shardwise.describe.context import ContextPlan
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import TensorPlan
from shardwise.layout import Layout, Precision
from shardwise.plan.pricer import Pricer
from shardwise.plan.ranked import Ranked
from shardwise.plan.space import Axes, space_of

__all__ = ["Planned", "Plans"]

WAYS = (("1f1b", 1), ("zb-h1", 1), ("interleaved", 2), ("zb-v", 2))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plans:
    """How the units of one layout are divided, as ranks are told; None where they are not."""

    tensor: TensorPlan | None = None
    experts: ExpertPlan | None = None
    context: ContextPlan | None = None


class Planned:
    """One model on one cluster: traced once, every layout priced when it is asked for."""

    def __init__(self, setting: Setting, cluster: Cluster) -> None:
        model = setting.model()
        self._traced: Traced = traced_model(
            model, setting.batch(), samples=SAMPLES, cluster=cluster, proof_batch=setting.batch(SAMPLES)
        )
        self.job = job_of(GLOBAL_BATCH, precision=Precision(), optimizer="adamw")
        self.pricer = Pricer(self._traced.works, cluster, self.job, self._traced.limits)
        axes = Axes.of(self._traced.limits, cluster, global_batch=GLOBAL_BATCH)
        axes = dataclasses.replace(axes, samples=(SAMPLES,), recompute=("none",), ways=WAYS)
        space = space_of(
            self._traced.limits, axes, global_batch=GLOBAL_BATCH, per_host=min(h.devices for h in cluster.hosts)
        )
        self.layouts: tuple[Layout, ...] = tuple(dict.fromkeys(space.layout(row) for row in range(len(space))))

    def price(self, layout: Layout) -> Ranked:
        """What the planner says of it, by the simulator."""
        return self.pricer(layout, SAMPLES, exact=True)

    def plans(self, layout: Layout) -> Plans:
        """The divisions that were proven while the model was traced."""
        profiles = self._traced.profiles
        return Plans(
            tensor=profiles.tensor_plan(layout.tp, layout.sequence_parallel) if layout.tp > 1 else None,
            experts=profiles.expert_plan(layout.ep) if layout.ep > 1 else None,
            context=profiles.context_plan(layout) if layout.cp > 1 else None,
        )
