"""How the tokens of sequences are dealt out among the ranks of the context axis, as a value. Knows no torch.

arguments ──own tokens──► norm, projections ──► attention: tokens of all ranks ──► own tokens ──► … ──► own tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["ByToken", "ContextPlan", "UnitContext"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ByToken:
    """A module that works on every token by itself: given own tokens in dim `given` of its arguments, it returns those
    of the answer in dims `made`, one of each tensor that it returns. Dims are negative."""

    given: int
    made: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UnitContext:
    """How one unit works on own tokens. Names of modules are relative to the unit.

    inputs: arguments of its forward that are dealt out where they arrive whole, with the dim of tokens.
    outputs: places among the returned tensors that leave by tokens, with their dims of tokens.
    by_token: modules that are given own tokens as plain tensors; between them operations are asked one by one.
    joined: operations that asked for all tokens.
    error: the largest relative error of the proof, in float64.
    """

    inputs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    outputs: Mapping[int, int] = dataclasses.field(default_factory=dict)
    by_token: Mapping[str, ByToken] = dataclasses.field(default_factory=dict)
    joined: tuple[str, ...] = ()
    error: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ContextPlan:
    """The units of a model by name; those in `whole` are given all tokens on every rank, for the reason given.

    zigzag: every rank has an early and a late part of each sequence, so that causal attention is the same work on all.
    """

    cp: int
    zigzag: bool = False
    units: Mapping[str, UnitContext] = dataclasses.field(default_factory=dict)
    whole: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """A line of numbers, then every kind of reason once."""
        order = "an early and a late part of each sequence" if self.zigzag else "a part of each sequence"
        lines = [
            f"cp={self.cp}: {len(self.units)} of {len(self.units) + len(self.whole)} units work on own tokens "
            f"({order} on every rank)"
        ]
        by_reason: dict[str, list[str]] = {}
        for unit, reason in self.whole.items():
            by_reason.setdefault(reason, []).append(unit)
        lines += [f"  all tokens: {_some(units)} ({reason})" for reason, units in by_reason.items()]
        by_joined: dict[tuple[str, ...], list[str]] = {}
        for unit, own in self.units.items():
            if own.joined:
                by_joined.setdefault(own.joined, []).append(unit)
        lines += [f"  {', '.join(joined)} of all tokens in {_some(units)}" for joined, units in by_joined.items()]
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _some(units: list[str]) -> str:
    return ", ".join(units) if len(units) < 4 else f"{units[0]} and {len(units) - 1} more"
