"""Sums of gradients over everyone who holds a parameter: data-parallel replicas and stages that share a weight.

Buckets are reduced as soon as they are full, during the last backward, in one fixed order on all ranks. Gradients
arrive already weighted, so a sum is a mean. A parameter that has a gradient nowhere keeps none.

    backward ──► … w3 w2 │ w1 w0          bucket 0 = {w3, w2} travels while w1 and w0 are computed
                         └ all-reduce
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

__all__ = ["DEFAULT_BUCKET_BYTES", "GradientSum"]

DEFAULT_BUCKET_BYTES = 4 * 2**20


@dataclasses.dataclass(slots=True)
class _Bucket:
    group: dist.ProcessGroup
    parameters: list[nn.Parameter]
    ready: int = 0
    flat: torch.Tensor | None = None
    work: dist.Work | None = None


class GradientSum:
    """Reduces the gradients of one rank's parameters.

    `groups` maps a parameter's name to the process group of everyone who holds it; parameters without an entry have
    one holder. Call `arm()` right before the last backward of a step and `finish()` behind it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Mapping[str, dist.ProcessGroup],
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        shared = [(name, parameters[name]) for name in groups if parameters[name].requires_grad]
        self._buckets = _fill([(p, groups[name]) for name, p in reversed(shared)], bucket_bytes)
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._armed = False
        self._next = 0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]
        self._reduced_bytes: dict[int, int] = {}

    def arm(self) -> None:
        """From here on an accumulated gradient is final."""
        self._armed = True

    def reduced_bytes(self, group: dist.ProcessGroup) -> int:
        """Bytes that this rank has handed over to be summed over a group, so far."""
        return self._reduced_bytes.get(id(group), 0)

    def finish(self) -> None:
        """Reduce what has not been reduced, wait for all, and put the sums into the parameters' `.grad`."""
        for bucket in self._buckets[self._next :]:
            self._launch(bucket)
        for bucket in self._buckets:
            assert bucket.flat is not None
            if bucket.work is not None:
                bucket.work.wait()
            _scatter(bucket)
            bucket.ready, bucket.flat, bucket.work = 0, None, None
        self._next = 0
        self._armed = False

    def close(self) -> None:
        """Take the hooks out of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _ready(self, parameter: torch.Tensor) -> None:
        if not self._armed:
            return
        self._bucket_of[id(parameter)].ready += 1
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.ready < len(bucket.parameters):
                return
            self._launch(bucket)
            self._next += 1

    def _launch(self, bucket: _Bucket) -> None:
        first = bucket.parameters[0]
        size = sum(parameter.numel() for parameter in bucket.parameters)
        # gradients, then one flag a parameter: how many holders have a gradient at all
        flat = torch.empty(size + len(bucket.parameters), dtype=first.dtype, device=first.device)
        start = 0
        for place, parameter in enumerate(bucket.parameters):
            part = flat[start : start + parameter.numel()]
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad.reshape(-1))
            flat[size + place] = 0.0 if parameter.grad is None else 1.0
            parameter.grad = None
            start += parameter.numel()
        bucket.flat = flat
        bucket.work = dist.all_reduce(flat, group=bucket.group, async_op=True)
        self._reduced_bytes[id(bucket.group)] = self.reduced_bytes(bucket.group) + flat.nbytes


def _fill(parameters: Sequence[tuple[nn.Parameter, dist.ProcessGroup]], bucket_bytes: int) -> list[_Bucket]:
    """Buckets of one group and dtype. Each group is filled by itself: its members hold other parameters besides, and
    must still agree on the group's buckets. The largest groups come last: they wait for other stages."""
    by_group: dict[tuple[int, int, torch.dtype], list[nn.Parameter]] = {}
    groups = {id(group): group for _, group in parameters}
    for parameter, group in parameters:
        by_group.setdefault((group.size(), id(group), parameter.dtype), []).append(parameter)
    buckets: list[_Bucket] = []
    for key in sorted(by_group, key=lambda key: key[0]):
        filled = bucket_bytes
        for parameter in by_group[key]:
            if filled >= bucket_bytes:
                buckets.append(_Bucket(groups[key[1]], []))
                filled = 0
            buckets[-1].parameters.append(parameter)
            filled += parameter.numel() * parameter.element_size()
    return buckets


def _scatter(bucket: _Bucket) -> None:
    assert bucket.flat is not None
    size = bucket.flat.numel() - len(bucket.parameters)
    counts = bucket.flat[size:].tolist()
    start = 0
    for parameter, count in zip(bucket.parameters, counts, strict=True):
        part = bucket.flat[start : start + parameter.numel()]
        parameter.grad = part.view(parameter.shape) if count else None
        start += parameter.numel()
