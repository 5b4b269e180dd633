"""What is trained how, as far as a step's price depends on it: samples of a step, and bytes of every kind of state."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from shardwise.describe.profile import ModelProfile
from shardwise.errors import LayoutError
from shardwise.layout import Layout

__all__ = ["Job", "PerParameter", "Profiles"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PerParameter:
    """Bytes of one trained parameter. The default is float32 with AdamW.

    fresh: of the gradient that a backward makes before it is added to the one that is summed, until the backward ends;
        0: where it is added at once.
    wire: of a buffer that replicas exchange gradients in, kept beside them.
    temporary: of what the optimizer makes for all parameters at once, while it runs.
    """

    parameter: int = 4
    gradient: int = 4
    master: int = 0
    optimizer: int = 8
    fresh: int = 0
    wire: int = 0
    temporary: int = 0

    @classmethod
    def mixed(cls) -> PerParameter:
        """16 bits with float32 masters, and gradients summed in float32 (Micikevicius et al. 2018)."""
        return cls(parameter=2, gradient=4, master=4, optimizer=8)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is trained.

    global_batch: samples of a step, of all replicas.
    overlap_replicas: whether gradients of replicas are summed beside the last backward; reduce_bytes: of one element on
        the wire when they are; algorithm: of these sums, "auto" (the fastest that a backend has) or "hierarchical"
        (inside each host, then between hosts).
    gradients_stay: whether gradients have their bytes all the time, in one buffer, and not from a step's first backward
        on.
    step_kernels: that the host starts for one update: many where gradients are clipped, updated and copied one by one.
    reduce_calls: collectives one behind the other that sums of gradients, and gathers of parameters behind an update,
        are made of; each has its own hops.
    """

    global_batch: int
    per_parameter: PerParameter = PerParameter()
    overlap_replicas: bool = True
    reduce_bytes: int = 4
    gradients_stay: bool = False
    algorithm: str = "auto"
    step_kernels: int = 0
    reduce_calls: float = 1.0

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise LayoutError(f"a step has at least one sample, but got global_batch={self.global_batch}; give more")
        if self.reduce_calls < 1:
            raise LayoutError(
                f"gradients are summed in 1 call or more, but got reduce_calls={self.reduce_calls}; mend it"
            )


class Profiles(Protocol):
    """Where profiles come from: traced, shard by shard, or written for an architecture."""

    def shard(self, layout: Layout, samples: int) -> ModelProfile:
        """What one rank of the layout's tensor and context axes computes, holds and exchanges for a micro-batch of
        `samples`. Equal layouts and samples give an equal, cached profile."""
        ...
