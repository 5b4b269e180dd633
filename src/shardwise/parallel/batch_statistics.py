"""BatchNorm on replicas: what a micro-batch is normalised with, and running statistics that are equal on all of them.

    own            every replica normalises with its own micro-batch; behind a step running statistics become those of
                   one device that saw the micro-batches of all replicas, replica after replica
    synchronised   micro-batch m is normalised with that of all replicas together, as one device does that has it whole;
                   the gradient goes through the shared statistics

Running statistics r take in statistics s as r <- (1 - a) r + a s, which is linear: from what n micro-batches made of
them on every replica follows what all would have made of them one after another, by one sum.
Ioffe and Szegedy, "Batch Normalization", ICML 2015; Peng et al., "MegDet", CVPR 2018 (synchronised).

Knows modules and a group of replicas; refuses to know schedules and who else there is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn as nn

__all__ = ["BatchStatistics", "Replicas", "RunningStatistics", "SynchronisedStatistics", "batch_norms"]

BatchNorm = nn.modules.batchnorm._BatchNorm


class Replicas(Protocol):
    """Who has the same modules and other samples."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum, in place."""
        ...


class BatchStatistics(Protocol):
    """What stands around the training steps of a model with BatchNorm on several replicas."""

    def step(self) -> contextlib.AbstractContextManager[None]: ...

    def close(self) -> None: ...


def batch_norms(model: nn.Module) -> tuple[BatchNorm, ...]:
    """The modules that normalise with statistics of a batch."""
    return tuple(module for module in model.modules() if isinstance(module, BatchNorm))


class RunningStatistics:
    """Keeps running statistics of replicas equal: `step()` stands around each step and is collective."""

    def __init__(self, norms: Sequence[BatchNorm], group: Replicas) -> None:
        self._norms = tuple(norm for norm in norms if norm.running_mean is not None)
        self._group = group

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Behind the block the statistics are those of all replicas' micro-batches, in their order."""
        before = [(norm, _statistics(norm), _count(norm)) for norm in self._norms]
        yield
        seen = [
            (norm, statistics, _count(norm) - count, count)
            for norm, statistics, count in before
            if _count(norm) > count  # those of other stages, and in evaluation mode, saw nothing: on every replica
        ]
        if not seen:
            return
        own: list[torch.Tensor] = []
        for norm, old, n, count in seen:
            for was, now in zip(old, _statistics(norm), strict=True):
                own.append(self._own_share(norm, was, now, n, count))
        summed = torch.split(self._group.all_reduce(torch.cat(own)), [part.numel() for part in own])
        for place, (norm, old, n, count) in enumerate(seen):
            for was, buffer, added in zip(old, _buffers(norm), summed[2 * place : 2 * place + 2], strict=True):
                buffer.copy_((self._kept(norm, n, count) * was + added).view_as(buffer))
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.fill_(count + n * self._group.size)

    def close(self) -> None:
        """Nothing is installed."""

    def _own_share(self, norm: BatchNorm, was: torch.Tensor, now: torch.Tensor, n: int, count: int) -> torch.Tensor:
        """What this replica's micro-batches add to the statistics that all make one after another."""
        behind = self._group.size - 1 - self._group.rank  # replicas whose micro-batches come after these
        if norm.momentum is None:  # the mean of all micro-batches so far
            return ((count + n) * now - count * was) / (count + n * self._group.size)
        kept = 1.0 - norm.momentum
        return kept ** (n * behind) * (now - kept**n * was)

    def _kept(self, norm: BatchNorm, n: int, count: int) -> float:
        """What remains of the statistics as they were before the step."""
        total = n * self._group.size
        return count / (count + total) if norm.momentum is None else float((1.0 - norm.momentum) ** total)


class SynchronisedStatistics:
    """Normalises with the micro-batches of all replicas together. Installed when made; `close()` it.

    Only inside `step()` there is anything to sum; elsewhere (a trace, a proof) a module does what it always does.
    """

    def __init__(self, norms: Sequence[BatchNorm], group: Replicas) -> None:
        self._norms = tuple(norms)
        self._group = group
        self._running = False
        for norm in self._norms:
            norm.forward = functools.partial(self._forward, norm, norm.forward)  # type: ignore[method-assign]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Inside, every forward and backward of a module in training mode is collective."""
        self._running = True
        try:
            yield
        finally:
            self._running = False

    def close(self) -> None:
        """The modules are as they were."""
        for norm in self._norms:
            norm.__dict__.pop("forward", None)

    def _forward(self, norm: BatchNorm, plain: Any, x: torch.Tensor) -> torch.Tensor:
        if not self._running or not norm.training:
            return plain(x)  # type: ignore[no-any-return]
        norm._check_input_dim(x)  # type: ignore[no-untyped-call]
        made, mean, var, count = _Synchronised.apply(x, norm.weight, norm.bias, norm.eps, self._group)  # type: ignore[no-untyped-call]
        if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            share = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
            unbiased = var * (count / max(count - 1.0, 1.0))
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)
        return made  # type: ignore[no-any-return]


class _Synchronised(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over all replicas' x (batch, channels, …).

    With h = (x - mean) / sqrt(var + eps) over N elements a channel and g = dL/dy * weight:
    dL/dx = (g - sum(g) / N - h sum(g h) / N) / sqrt(var + eps), sums over all replicas.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, group: Replicas
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        dims = [0, *range(2, x.dim())]
        wide = x.double() if x.dtype == torch.float64 else x.float()
        own = torch.cat([wide.sum(dims), wide.new_full((1,), wide.numel() / wide.shape[1])])  # (channels + 1,)
        total = group.all_reduce(own)
        count = float(total[-1])
        mean = total[:-1] / count
        centred = wide - _along(mean, x)
        var = group.all_reduce(centred.square().sum(dims)) / count
        scale = torch.rsqrt(var + eps)
        hat = centred * _along(scale, x)
        made = hat if weight is None else hat * _along(weight, x)
        made = made if bias is None else made + _along(bias, x)
        ctx.save_for_backward(hat, scale, weight)
        ctx.group, ctx.count, ctx.dims, ctx.has_bias = group, count, dims, bias is not None
        ctx.mark_non_differentiable(mean, var)
        return made.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hat, scale, weight = ctx.saved_tensors
        gradient = gradients[0].to(hat.dtype)
        along_hat, alone = (gradient * hat).sum(ctx.dims), gradient.sum(ctx.dims)  # (channels,), of these samples
        of_weight = along_hat.to(weight.dtype) if weight is not None else None
        of_bias = alone.clone() if ctx.has_bias else None
        means = ctx.group.all_reduce(torch.stack([along_hat, alone])) / ctx.count
        of_hat = gradient - _along(means[1], hat) - hat * _along(means[0], hat)
        factor = scale if weight is None else scale * weight
        return (of_hat * _along(factor, hat)).to(gradients[0].dtype), of_weight, of_bias, None, None


def _along(channels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(channels,) -> (1, channels, 1, …), to meet x (batch, channels, …)."""
    return channels.view(1, -1, *([1] * (x.dim() - 2)))


def _buffers(norm: BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _statistics(norm: BatchNorm) -> tuple[torch.Tensor, ...]:
    """Mean and variance so far, in float64."""
    return tuple(buffer.detach().to(torch.float64, copy=True) for buffer in _buffers(norm))


def _count(norm: BatchNorm) -> int:
    """Micro-batches that it has seen."""
    return 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
