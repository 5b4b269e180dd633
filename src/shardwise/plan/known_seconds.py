"""Seconds of stages for many layouts of one search: what they share is made once, and equal stages once.

    part          depends on                                          so that it is shared by
    micro-batch   what the stage does, links of tp, cp, ep and pp     all divisions of state, schedules, batches
    step          its parameters, links of replicas                   all recomputation, samples, schedules

On clusters of several kinds of devices every place of the pipeline computes as the slowest of its devices does. Both
parts are `stage_seconds` of half a stage; refuses to know how a step is made of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from shardwise.describe.cluster import Cluster, Device
from shardwise.layout import Layout, Offload
from shardwise.plan.job import Job
from shardwise.plan.placing import Span, Spans, send_level, spans_of
from shardwise.plan.stage_seconds import PlacedStage, StageSeconds, StageTable, offloaded_bytes, stage_seconds
from shardwise.plan.stage_work import StageWork

__all__ = ["KnownSeconds"]

_OF_STEP = ("unshard_forward", "unshard_backward", "reduce", "shared", "gather", "optimizer")
_Key = tuple[object, ...]


class KnownSeconds:
    """Stages of a layout -> their seconds. A resource of one cluster and job: it keeps what it has made by the identity
    of kernels and exchanges, so that whoever calls it keeps these alive."""

    def __init__(self, cluster: Cluster, job: Job) -> None:
        self.cluster, self.job = cluster, job
        self._micro_batch: dict[_Key, StageSeconds] = {}
        self._step: dict[_Key, StageSeconds] = {}
        self._spans: dict[_Key, Spans] = {}

    def __call__(
        self, stages: Sequence[StageWork], layout: Layout, places: Sequence[int], devices: Sequence[Device]
    ) -> StageSeconds:
        """places[s]: of the pipeline, that stage s stands on; devices[place]: that computes there."""
        spans = self._spans_of(layout)
        kinds: dict[_Key, int] = {}
        first: list[int] = []
        index = np.zeros(len(stages), dtype=np.int64)
        for stage, work in enumerate(stages):
            levels = tuple(self._level(layout, places[stage], places[target]) for target in work.sends)
            key = (*_identity(work), levels, devices[places[stage]].name)
            if key not in kinds:
                kinds[key] = len(first)
                first.append(stage)
            index[stage] = kinds[key]
        chosen = [stages[stage] for stage in first]
        of_micro_batch = self._of_micro_batch(list(kinds), chosen, layout, spans, [devices[places[s]] for s in first])
        of_step = self._of_step(chosen, layout, spans)
        names = [field.name for field in dataclasses.fields(StageSeconds) if field.name != "exchanges"]
        values = {n: getattr(of_step if n in _OF_STEP else of_micro_batch, n)[index] for n in names}
        if layout.offloads_activations and (store := self.cluster.hosts[0].memory) is not None:
            values["offload"] = np.array([store.copy_s(offloaded_bytes(work, layout)) for work in stages])
        exchanges = {axis: (pair[0][index], pair[1][index]) for axis, pair in of_micro_batch.exchanges.items()}
        return StageSeconds(**values, exchanges=exchanges)

    def _of_micro_batch(
        self, kinds: list[_Key], works: list[StageWork], layout: Layout, spans: Spans, devices: list[Device]
    ) -> StageSeconds:
        alone = dataclasses.replace(layout, dp=1, shares=None, fsdp=1, offload=Offload.NONE)
        one = Span(sizes=(1,) * len(spans.tp.sizes))
        inside = dataclasses.replace(spans, states=one, outer=one, replicas=one, expert_copies=one, expert_outer=one)
        links = (inside.tp, inside.cp, inside.ep, inside.pipeline_crosses)
        own = [(kind, links) for kind in kinds]
        for device in dict.fromkeys(device.name for device in devices):
            missing = [i for i, key in enumerate(own) if key not in self._micro_batch and devices[i].name == device]
            if not missing:
                continue
            placed = [
                PlacedStage(
                    work=dataclasses.replace(works[i], shared_parameters=0),
                    layout=alone,
                    job=self.job,
                    spans=inside,
                    send_levels=_levels(kinds[i]),
                )
                for i in missing
            ]
            made = stage_seconds(StageTable.of(placed), _with_device(self.cluster, devices[missing[0]]))
            for place, i in enumerate(missing):
                self._micro_batch[own[i]] = _one(made, place)
        return _joined([self._micro_batch[key] for key in own])

    def _of_step(self, works: list[StageWork], layout: Layout, spans: Spans) -> StageSeconds:
        division = (
            *(layout.dp, layout.fsdp, layout.zero, layout.unshards_by_step, layout.tp, layout.cp, layout.ep),
            layout.offloads_optimizer,
        )
        where = (
            spans.states,
            spans.outer,
            spans.replicas,
            spans.expert_copies,
            spans.expert_outer,
            spans.pipeline_crosses,
        )
        own = [(_held(work), division, where) for work in works]
        missing = [i for i, key in enumerate(own) if key not in self._step]
        if missing:
            placed = [
                PlacedStage(work=_without_work(works[i]), layout=layout, job=self.job, spans=spans) for i in missing
            ]
            made = stage_seconds(StageTable.of(placed), self.cluster)
            for place, i in enumerate(missing):
                self._step[own[i]] = _one(made, place)
        return _joined([self._step[key] for key in own])

    def _spans_of(self, layout: Layout) -> Spans:
        key = (layout.dp, layout.fsdp, layout.ep, layout.cp, layout.tp, layout.pp)
        if key not in self._spans:
            self._spans[key] = spans_of(layout, self.cluster)
        return self._spans[key]

    def _level(self, layout: Layout, place: int, target: int) -> int:
        return 0 if place == target else send_level(layout, self.cluster, place, target)


def _identity(work: StageWork) -> _Key:
    """What a stage does, without its number. Kernels and exchanges by identity: equal stages of a chain share them."""
    return (
        *(id(work.kernels), id(work.recomputed), id(work.exchanges), work.accumulation),
        *(tuple(work.sends.values()), tuple(work.gradients.values()), _held(work)),
    )


def _levels(kind: _Key) -> tuple[int, ...]:
    levels = kind[-2]
    assert isinstance(levels, tuple)
    return levels


def _held(work: StageWork) -> _Key:
    return (
        *(work.parameters, work.trained, work.expert_parameters, work.expert_trained, work.shared_parameters),
        work.unit_parameters,
    )


def _without_work(work: StageWork) -> StageWork:
    return dataclasses.replace(work, kernels=(), recomputed=(), accumulation=(), exchanges=(), sends={}, gradients={})


def _with_device(cluster: Cluster, device: Device) -> Cluster:
    if cluster.hosts[0].device == device:
        return cluster
    return dataclasses.replace(cluster, hosts=(dataclasses.replace(cluster.hosts[0], device=device),))


def _one(seconds: StageSeconds, place: int) -> StageSeconds:
    """Those of one stage, arrays of one."""
    chosen = slice(place, place + 1)
    values = {f.name: getattr(seconds, f.name)[chosen] for f in dataclasses.fields(seconds) if f.name != "exchanges"}
    exchanges = {axis: (pair[0][chosen], pair[1][chosen]) for axis, pair in seconds.exchanges.items()}
    return StageSeconds(**values, exchanges=exchanges)


def _joined(parts: Sequence[StageSeconds]) -> StageSeconds:
    """Several stages, in order."""
    names = [field.name for field in dataclasses.fields(parts[0]) if field.name != "exchanges"]
    values = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    zero = np.zeros(1)
    axes = sorted({axis for part in parts for axis in part.exchanges})
    exchanges = {
        axis: (
            np.concatenate([part.exchanges.get(axis, (zero, zero))[0] for part in parts]),
            np.concatenate([part.exchanges.get(axis, (zero, zero))[1] for part in parts]),
        )
        for axis in axes
    }
    return StageSeconds(**values, exchanges=exchanges)
