"""The search that users call: of a traced profile, or of anything that says what stages do.

    profile = shardwise.trace(model, batch)
    plan = shardwise.search(profile, shardwise.Cluster.local(4), global_batch=64)[0]
    print(plan.explain())

Refuses to know torch.
"""

from __future__ import annotations

import dataclasses

from shardwise.describe.cluster import Cluster
from shardwise.describe.profile import ModelProfile
from shardwise.errors import LayoutError
from shardwise.plan.coarse import Works
from shardwise.plan.job import Job
from shardwise.plan.ranked import Objective
from shardwise.plan.scaled_works import ProfileWorks, traced_samples
from shardwise.plan.search import Search, search_layouts
from shardwise.plan.space import Axes, Limits

__all__ = ["search"]


def search(
    model: ModelProfile | Works,
    cluster: Cluster,
    *,
    global_batch: int,
    objective: Objective | str = Objective.TIME,
    top: int = 5,
    job: Job | None = None,
    limits: Limits | None = None,
    axes: Axes | None = None,
    samples: int | None = None,
) -> Search:
    """The best layouts of a model on all devices of a cluster, for steps of `global_batch` samples; best first.

    model: a traced profile, of which replicas and stages are searched (how units are divided only the model tells), or
        works: (layout, samples of a micro-batch) -> what every stage does, with the `limits` of what can be divided.
    objective: "time", "cost", "memory", or a front: "pareto" (time and memory), "pareto-cost" (time and cost).
    job: bytes of every kind of state; float32 with AdamW if not given. samples: of the batch that was traced; the first
        dim of what the first unit makes if not given.
    Raises `LayoutError` where nothing fits or works have no limits, `ConfigError` where cost has no price.
    """
    own = Job(global_batch=global_batch) if job is None else dataclasses.replace(job, global_batch=global_batch)
    if isinstance(model, ModelProfile):
        works = ProfileWorks(profile=model, traced=samples or traced_samples(model.flow))
        return search_layouts(
            works, cluster, own, limits=limits or works.limits, axes=axes, objective=objective, top=top
        )
    if limits is None:
        raise LayoutError("works say what stages do, not what can be divided: give limits, such as Limits(stages=32)")
    return search_layouts(model, cluster, own, limits=limits, axes=axes, objective=objective, top=top)
