"""The cases of the matrix, generated: every way of dividing data, beside every other axis, in every use. Names and
numbers only.

data     dp2 replicas; zero1, zero2, zero3: two replicas that divide optimizer state, gradients too, parameters too;
         hsdp: two groups that hold the same of two replicas that divide everything
beside   nothing; two shards; two pipeline ranks by three schedules; two ranks a sequence, in two ways; two ranks that
         divide experts
use      plain; activations computed again; gradients of more micro-batches, unequal ones; clipped by the norm

In two of the uses replicas of one host reach each other through shared memory, in the other two by messages alone, as
those of several hosts do.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from shardwise.layout import Communication, Layout, Techniques

__all__ = ["BESIDE", "DATA", "USES", "Case", "all_cases", "covering_cases"]

DATA: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "dp2": {"dp": 2},
        "zero1": {"fsdp": 2, "zero": 1},
        "zero2": {"fsdp": 2, "zero": 2},
        "zero3": {"fsdp": 2, "zero": 3},
        "hsdp": {"dp": 2, "fsdp": 2, "zero": 3},
    }
)
BESIDE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "alone": {},
        "tp2": {"tp": 2},
        "pp2-1f1b": {"pp": 2, "schedule": "1f1b"},
        "pp2-zb-h1": {"pp": 2, "schedule": "zb-h1"},
        "pp2-zb-v": {"pp": 2, "schedule": "zb-v"},
        "cp2-ring": {"cp": 2, "context": "ring"},
        "cp2-ulysses": {"cp": 2, "context": "ulysses"},
        "ep2": {"ep": 2},
    }
)
USES = ("plain", "recompute", "accumulation", "clipping")

_SEED = 3
_SAMPLES = 2  # of a micro-batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One way of dividing data, beside another axis, in one use: keys of DATA and BESIDE, and one of USES."""

    data: str
    beside: str
    use: str

    def __str__(self) -> str:
        return f"{self.data}-{self.beside}-{self.use}"

    @property
    def layout(self) -> Layout:
        """What is compared with one device."""
        recompute = "full" if self.use == "recompute" else "none"
        axes = {**DATA[self.data], **BESIDE[self.beside]}
        return Layout(**axes, micro_batches=self.micro_batches, recompute=recompute, seed=_SEED)

    @property
    def world_size(self) -> int:
        """Ranks: 2, 4 or 8."""
        return self.layout.world_size

    @property
    def micro_batches(self) -> int:
        """Of one replica."""
        few, many = (4, 5) if self.beside.startswith("pp") else (1, 3)
        return many if self.accumulates else few

    @property
    def techniques(self) -> Techniques:
        """Messages go round in rings where the memory of the host is not shared."""
        shared = self.use in ("plain", "accumulation")
        return Techniques(communication=Communication(algorithm="auto" if shared else "ring"))

    @property
    def accumulates(self) -> bool:
        """Whether gradients of unequal micro-batches are added up."""
        return self.use == "accumulation"

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped by the norm of all."""
        return self.use == "clipping"

    @property
    def has_experts(self) -> bool:
        """Whether the model's blocks have experts."""
        return self.beside == "ep2"

    @property
    def num_blocks(self) -> int:
        """So many that every stage has one; the two ends come besides."""
        return max(2, self.layout.num_stages)

    @property
    def num_samples(self) -> int:
        """Of the global batch; where gradients are accumulated, micro-batches have one sample more or less."""
        replicas = self.layout.num_replicas
        return _SAMPLES * replicas * self.micro_batches - self.accumulates


def all_cases() -> tuple[Case, ...]:
    """The whole matrix."""
    return tuple(Case(data=data, beside=beside, use=use) for data, beside, use in itertools.product(DATA, BESIDE, USES))


def covering_cases() -> tuple[Case, ...]:
    """As few cases as have every pair of (data, beside), (data, use) and (beside, use): uses go round row by row.

    Each pair of data and beside needs a case of its own, so that there cannot be fewer.
    """
    return tuple(
        Case(data=data, beside=beside, use=USES[(row + column) % len(USES)])
        for row, data in enumerate(DATA)
        for column, beside in enumerate(BESIDE)
    )
