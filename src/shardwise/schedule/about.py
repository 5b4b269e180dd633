"""What to know of a schedule before choosing it; one value in each generator file, shown in the documentation."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["About"]


@dataclass(frozen=True, kw_only=True)
class About:
    """Text about a schedule. Legend: p ranks, m micro-batches, v stages a rank; t_F, t_I, t_W seconds of one F, I and W
    on one rank's share of the model (all its stages), t_B = t_I + t_W.

    source: the papers, with section or equation. bubble: idle time of a rank in a step. memory: most activations kept
    on one rank, in micro-batches of a rank's share of the model. traffic: messages that cross ranks in a step.
    """

    title: str
    source: str
    bubble: str
    memory: str
    traffic: str
