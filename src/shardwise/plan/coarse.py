"""What a row of the search's space costs about, for all rows at once: which to price first, and which cannot fit.

A whole model on one place of the pipeline is priced once for every (tp, cp, ep, sequence parallel, context, samples,
recompute); everything else follows in columns. Seconds are a guess that only orders; `at_least_bytes` is a lower bound
of the fullest rank: no partition makes all ranks lighter than their mean, each has a micro-batch in flight at some
time, and all gradients at another.

Legend: p places of the pipeline, v stages a rank, m micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from shardwise.describe.cluster import Cluster
from shardwise.layout import Layout
from shardwise.plan.alike_pipelines import fill_of
from shardwise.plan.alike_rows import alike_rows
from shardwise.plan.coarse_messages import is_whole_for_a_step, messages_of, offloads_of, visit_s
from shardwise.plan.job import Job
from shardwise.plan.memory import share_here, states_of
from shardwise.plan.price import placed_stages
from shardwise.plan.space import Space
from shardwise.plan.stage_seconds import PlacedStage, StageTable, stage_seconds
from shardwise.plan.stage_work import StageWork
from shardwise.schedule import chunks_of

__all__ = ["Coarse", "Works", "coarse_of"]

Works = Callable[[Layout, int], Sequence[StageWork]]
"""(layout, samples of a micro-batch) -> what every stage does, in order. Reads neither dp, fsdp, zero nor offload of
the layout, and of micro-batches only whether there are several."""

# of (p, v): micro-batches of a rank's share that are kept at most, before m limits them (`About.memory`)
_KEPT: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "interleaved": lambda p, v: p + (p - 1) / v,
        "zb-h2": lambda p, v: 2 * p - 1,
        "zb-v-half": lambda p, v: p / 2 + 1,
        "zb-v-min": lambda p, v: p / 3 + 1,
        "dualpipe-v": lambda p, v: p + 0.5,
    }
)
_PLACES, _SHARES = 8, (0.25, 0.5, 1.0, 2.0, 4.0)  # of small pipelines, and micro-batches over them
_MANY = 300  # ways to divide a model, of which fewer numbers of samples are counted
_HERE = 2.0  # micro-batches that are on the device where the others wait in the host's memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coarse:
    """By row: seconds of a step about, bytes of the fullest rank about, and at least."""

    seconds: np.ndarray
    about_bytes: np.ndarray
    at_least_bytes: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Whole:
    """A model on one place of the pipeline: one micro-batch, and what is held for good."""

    busy_s: float
    optimizer_s: float
    parameter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    master_bytes: float
    saved_bytes: float
    here: float  # of what is saved, the share that stays where all of it is sent to the host
    once_bytes: float  # transient, logits
    framework_bytes: float
    trained: int


_KEY = ("tp", "cp", "ep", "samples")


def coarse_of(space: Space, works: Works, cluster: Cluster, job: Job, *, stages: int) -> Coarse:
    """`stages`: consecutive parts of the model, at most. Raises what `works` raises."""
    own = [*(space.of_places(name) for name in _KEY), space.sequence, space.recompute, space.context]
    first, inverse = alike_rows(own)
    keys = np.stack([column[first] for column in own], axis=1)
    numbers = _numbers_of(space, keys, works, cluster, job)

    def of(name: str) -> np.ndarray:
        return np.asarray(numbers[name][inverse])

    p, m = space.of_places("pp").astype(float), space.of_places("micro_batches").astype(float)
    fsdp, zero = space.of_places("fsdp").astype(float), space.of_places("zero")
    v, bubble, kept = _scheduled(space, p, m)
    parts = np.where(p == 1, 1.0, np.ceil(stages / (p * v)) * p * v / stages)
    away, visits = offloads_of(space)
    sent = messages_of(
        space,
        trained=of("trained") / p,
        busy_s=of("busy_s") / p,
        saved_bytes=of("saved_bytes") / p,
        cluster=cluster,
        job=job,
    )
    seconds = (of("busy_s") / p + sent.micro_batch) * (m * np.minimum(parts, 1.5) + bubble) + sent.step
    seconds += np.where(visits, visit_s(of("trained"), cluster, job), of("optimizer_s")) / p / fsdp
    by_step = is_whole_for_a_step(space)
    parameters = of("parameter_bytes") / p / np.where((zero == 3) & ~by_step, fsdp, 1.0)
    gradients = of("gradient_bytes") / p / np.where((zero >= 2) & ~by_step, fsdp, 1.0)
    optimizer = (of("master_bytes") + np.where(visits, 0.0, of("optimizer_bytes"))) / p / fsdp
    saved = of("saved_bytes") / p
    at_least = parameters + optimizer + np.maximum(np.where(away, 0.0, saved / v), gradients) + of("framework_bytes")
    kept = np.where(away, np.where(p > 1, np.minimum(kept, _HERE), of("here")), kept)
    about = parameters + gradients + optimizer + kept * saved + of("once_bytes") + of("framework_bytes")
    return Coarse(seconds=seconds, about_bytes=about, at_least_bytes=at_least)


def _numbers_of(space: Space, keys: np.ndarray, works: Works, cluster: Cluster, job: Job) -> dict[str, np.ndarray]:
    """[name][key]: the numbers of `_Whole`. Of many samples the first, the middle and the last are counted, what is
    between follows on straight lines."""
    samples = _KEY.index("samples")
    values = np.unique(keys[:, samples])
    few = np.unique(values[[0, -1]] if len(keys) > _MANY * len(values) / 2 else values[[0, len(values) // 2, -1]])
    rest = np.delete(keys, samples, axis=1)
    alike, inverse = np.unique(rest, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    counted = [(*key[:samples], int(count), *key[samples:]) for key in alike.tolist() for count in few]
    wholes = _wholes(space, counted, works, cluster, job)
    found: dict[str, np.ndarray] = {}
    for field in dataclasses.fields(_Whole):
        grid = np.array([float(getattr(whole, field.name)) for whole in wholes]).reshape(len(alike), len(few))
        lines = np.stack([np.interp(values, few, row) for row in grid])
        found[field.name] = lines[inverse, np.searchsorted(values, keys[:, samples])]
    return found


def _wholes(space: Space, keys: Sequence[Sequence[int]], works: Works, cluster: Cluster, job: Job) -> list[_Whole]:
    """All of them at once: equal kernels are priced once."""
    placed: list[PlacedStage] = []
    for tp, cp, ep, samples, sequence, recompute, context in keys:
        layout = Layout(
            tp=tp,
            cp=cp,
            ep=ep,
            micro_batches=1,
            sequence_parallel=space.axes.sequence_parallel[sequence],
            recompute=space.axes.recompute[recompute],
            context=space.axes.context[context],
        )
        placed += placed_stages(tuple(works(layout, samples)), layout, cluster, job)
    seconds = stage_seconds(StageTable.of(placed), cluster)
    waits = [pair[0] + pair[1] for pair in seconds.exchanges.values()]
    computing = seconds.forward + seconds.input + seconds.weight + seconds.recompute + sum(waits)
    host = seconds.host_forward + seconds.host_backward
    busy = np.maximum(computing, host) + 2 * cluster.overheads.action_s
    return [
        _whole_of(one, float(busy[index]), float(seconds.optimizer[index]), cluster, job)
        for index, one in enumerate(placed)
    ]


def _whole_of(one: PlacedStage, busy_s: float, optimizer_s: float, cluster: Cluster, job: Job) -> _Whole:
    states = states_of([one.work], one.layout, job)
    return _Whole(
        busy_s=busy_s,
        optimizer_s=optimizer_s,
        parameter_bytes=states.parameters,
        gradient_bytes=states.gradients,
        optimizer_bytes=states.optimizer,
        master_bytes=states.masters,
        saved_bytes=one.work.saved_bytes,
        here=share_here(one.work),
        once_bytes=one.work.transient_bytes + one.work.logits_bytes,
        framework_bytes=cluster.overheads.framework_bytes,
        trained=one.work.trained,
    )


def _scheduled(space: Space, p: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By row: stages a rank, the bubble in a micro-batch's seconds on one rank, and micro-batches kept at most."""
    names = [name for name, _ in space.axes.ways]
    v = np.array([chunks for _, chunks in space.axes.ways], dtype=float)[space.way]
    v = np.where(p == 1, 1.0, v)
    bubble, kept = p - 1, np.minimum(p, m)
    for name in dict.fromkeys(names):
        rows = np.isin(space.way, [way for way, own in enumerate(names) if own == name]) & (p > 1)
        if not rows.any():
            continue
        bubble[rows] = _bubble(name, p[rows], v[rows], m[rows])
        most = _KEPT[name](p[rows], v[rows]) if name in _KEPT else p[rows]
        kept[rows] = np.minimum(most, m[rows])
    return v, np.where(p == 1, 0.0, bubble), np.where(p == 1, 1.0, kept)


def _bubble(name: str, p: np.ndarray, v: np.ndarray, m: np.ndarray) -> np.ndarray:
    """By formula where whole backwards run; else of small pipelines with as many micro-batches a place, F = I = W."""
    if name in ("interleaved", "looped-bfs"):
        return np.asarray((p - 1) / v + np.maximum(p - m, 0.0))  # a round is as long as there are places
    if name in ("1f1b", "gpipe", "naive"):
        return p - 1
    chunks = chunks_of(name)
    fills = [
        fill_of(
            name,
            num_ranks=_PLACES,
            chunks=chunks,
            num_micro_batches=int(_PLACES * share),
            forward=1 / 3,
            weight=1 / 3,
            send=0.0,
        )
        for share in _SHARES
    ]
    return np.asarray(np.interp(m / p, _SHARES, fills) * (p - 1) / (_PLACES - 1))
