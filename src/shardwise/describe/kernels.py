"""What a device is asked to do, operation by operation: shapes of products and attentions, bytes of everything else;
and what it exchanges with the ranks that divide a unit with it.

`Kernel` and `Exchange` are values with a count. Refuses to know devices, seconds, layouts and their origin: traced,
or written for an architecture.

    MATMUL      (batch, m, n, k)                        a product of (m, k) with (k, n), `batch` times; convolutions too
    ATTENTION   (batch, queries, keys, width, values)   fused; batch counts samples times heads
    MEMORY      ()                                      priced by the bytes it reads and writes alone
    FUNCTION    ()                                      no work: the program answers it itself, since ranks have dealt
                                                        out what it is asked about by tokens
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum

from shardwise.errors import ModelError

__all__ = ["Exchange", "ExchangeKind", "Kernel", "KernelKind", "Phase"]


class KernelKind(StrEnum):
    """What bounds an operation, and what its shape means."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    MEMORY = "memory"
    FUNCTION = "function"


class Phase(StrEnum):
    """When an operation runs."""

    FORWARD = "forward"
    INPUT = "input"  # of the backward: gradients of inputs, and all that is neither
    WEIGHT = "weight"  # of the backward: gradients of parameters, which a schedule may put off


_RANK = {KernelKind.MATMUL: 4, KernelKind.ATTENTION: 5, KernelKind.MEMORY: 0, KernelKind.FUNCTION: 0}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One kind of operation on one shape, `count` times. Raises `ModelError` where a number is impossible.

    flops: of one, a multiply and an add as two; attention under a causal mask counts the half that is computed.
    nbytes: that one reads and writes, each tensor once.
    batch_dims: dims of `shape` in proportion to the samples of a micro-batch; `batch_bytes`: of `nbytes`, what is
        (the rest is weights).
    """

    kind: KernelKind
    phase: Phase
    dtype: str
    flops: int = 0
    nbytes: int = 0
    shape: tuple[int, ...] = ()
    batch_dims: tuple[int, ...] = (0,)
    batch_bytes: int | None = None  # None: all
    count: int = 1

    def __post_init__(self) -> None:
        if len(self.shape) != _RANK[self.kind]:
            raise ModelError(
                f"the shape of a {self.kind} kernel has {_RANK[self.kind]} numbers, but got {self.shape}; see Kernel"
            )
        if not self.shape and self.batch_dims == (0,):
            object.__setattr__(self, "batch_dims", ())
        if self.batch_dims and not 0 <= min(self.batch_dims) <= max(self.batch_dims) < len(self.shape):
            raise ModelError(f"batch_dims are dims of the shape {self.shape}, but got {self.batch_dims}; see Kernel")
        own = self.batch_bytes or 0
        if min(self.flops, self.nbytes, self.count, own, *self.shape) < 0 or own > self.nbytes:
            raise ModelError(
                f"what a kernel costs is 0 or more, and its batch_bytes a part of its nbytes, not {self}; see Kernel"
            )

    def times(self, number: int) -> Kernel:
        """The same, `number` times as often."""
        return self if number == 1 else dataclasses.replace(self, count=self.count * number)

    def scaled(self, factor: float) -> Kernel:
        """The same with `factor` times the samples. Flops, and what belongs to the batch of shape and bytes, grow."""
        own = self.nbytes if self.batch_bytes is None else self.batch_bytes
        return dataclasses.replace(
            self,
            flops=round(self.flops * factor),
            nbytes=self.nbytes - own + round(own * factor),
            shape=tuple(max(1, round(n * factor)) if d in self.batch_dims else n for d, n in enumerate(self.shape)),
            batch_bytes=None if self.batch_bytes is None else round(own * factor),
        )


class ExchangeKind(StrEnum):
    """What ranks do together. Bytes: of the tensor that every rank has whole (before a reduce-scatter, behind an
    all-gather), of what one rank sends to all others together (all-to-all), of the message (send)."""

    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_TO_ALL = "all-to-all"
    SEND = "send"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One kind of exchange inside a unit, `count` times, over an axis of the layout: "tp", "cp" or "ep".

    hidden: whether what computes meanwhile does not wait for it (the next turn of a ring). again: whether it belongs to
    a forward that is computed again before the backward.
    """

    kind: ExchangeKind
    axis: str
    phase: Phase
    nbytes: int
    count: int = 1
    hidden: bool = False
    again: bool = False

    def __post_init__(self) -> None:
        if self.axis not in ("tp", "cp", "ep"):
            raise ModelError(f'an exchange inside a unit is over "tp", "cp" or "ep", but got {self.axis!r}; name one')
        if self.nbytes < 0 or self.count < 0:
            raise ModelError(f"what an exchange costs is 0 or more: {self}")
