"""The layouts, and how each is verified: same model and batch, one device beside the layout, equal loss and gradients.

To add a layout is to add a line here and its name in `run.LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.coverage.case import Case
from benchmarks.coverage.outcome import Outcome
from benchmarks.coverage.sharded import Shards
from benchmarks.coverage.staged import Alone, verify_stages

__all__ = ["layouts"]


def layouts(case: Case) -> dict[str, Callable[[], Outcome]]:
    """Layout -> what verifies it. They share what one device computes; those with shards share a plan."""
    alone = Alone(case)
    shards = Shards(alone)
    return {
        "pp2": lambda: verify_stages(alone),
        "tp2": lambda: shards.verify(num_stages=1),
        "tp2_pp2": lambda: shards.verify(num_stages=2),
    }
