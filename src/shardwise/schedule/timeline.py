"""A Timeline: what each rank did when. Simulated and recorded timelines are of this one type.

It knows neither why something waited nor what it cost to plan; times are seconds on one clock shared by all
ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, parse
from shardwise.schedule.spans import Lanes, Span

__all__ = ["Span", "Timeline"]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The spans of all ranks. Raises ScheduleError if a rank is out of range or a span runs backwards."""

    num_ranks: int
    spans: Sequence[Span]

    def __post_init__(self) -> None:
        if isinstance(self.spans, Lanes):  # of a simulation, which cannot run backwards
            return
        for span in self.spans:
            if not (0 <= span.rank < self.num_ranks and span.start_s <= span.end_s):
                raise ScheduleError(
                    f"a span belongs to one of {self.num_ranks} ranks and ends after it starts, but found "
                    f"{span}; check the rank and the clock"
                )

    @cached_property
    def seconds(self) -> float:
        """From the first start to the last end."""
        if isinstance(self.spans, Lanes):
            return self.spans.end_s - self.start_s
        return max((span.end_s for span in self.spans), default=0.0) - self.start_s

    @cached_property
    def start_s(self) -> float:
        """The first start; 0.0 without spans."""
        if isinstance(self.spans, Lanes):
            return self.spans.start_s
        return min((span.start_s for span in self.spans), default=0.0)

    @cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """What each rank spent computing; transfers run beside it and do not count."""
        if isinstance(self.spans, Lanes):
            return self.spans.busy_seconds(self.num_ranks)
        busy = [0.0] * self.num_ranks
        for span in self.spans:
            if isinstance(span.action, Action) and span.action.kind.computes:
                busy[span.rank] += span.end_s - span.start_s
        return tuple(busy)

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time, 0 to 1, in which they compute nothing.

        Of the whole, as (p-1)/(m+p-1) in GPipe (arXiv:1811.06965, section 2.3); Megatron (arXiv:2104.04473,
        section 2.2) divides by the ideal time instead and gets (p-1)/m.
        """
        total = self.num_ranks * self.seconds
        return 1.0 - sum(self.busy_seconds) / total if total else 0.0

    def __str__(self) -> str:
        return f"{self.num_ranks} ranks, {self.seconds:.6g} s, bubble {100 * self.bubble_fraction:.1f} %"

    def to_json(self) -> str:
        """JSON text, a span as [rank, action, start_s, end_s]; the inverse of `from_json`."""
        spans = [[span.rank, str(span.action), span.start_s, span.end_s] for span in self.spans]
        return json.dumps({"num_ranks": self.num_ranks, "spans": spans})

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """The timeline that `to_json` wrote. Raises ScheduleError."""
        try:
            values: dict[str, Any] = json.loads(text)
            spans = tuple(
                Span(rank=int(rank), action=parse(action), start_s=float(start_s), end_s=float(end_s))
                for rank, action, start_s, end_s in values["spans"]
            )
            return cls(num_ranks=int(values["num_ranks"]), spans=spans)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ScheduleError(
                "a timeline in JSON has num_ranks and spans of [rank, action, start_s, end_s], but reading "
                f"it failed with {type(error).__name__}: {error}; compare with the output of Timeline.to_json"
            ) from error
