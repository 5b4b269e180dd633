"""A ranking in words: the table of the best, one of them line by line, why the next one lost, what was rejected.

At most 100 columns. Puts into words what the values say; computes nothing but differences, and prints nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from shardwise.plan.price_text import differences, memory_table, time_table, worst_lines
from shardwise.plan.ranked import Objective, Ranked, Rejected, value_of
from shardwise.plan.room import LEAST_ROOM
from shardwise.quantities import format_bytes, format_seconds

__all__ = ["explain_ranked", "ranking_table", "rejected_lines", "verdict"]

_WIDTH = 100
_LABEL = 14
_BREAK = "\x01"  # in a layout: a line may end here, and no blank is shown

Rejections = Sequence[tuple[str, int, Rejected]]


def ranking_table(ranking: Sequence[Ranked]) -> list[str]:
    """One line a layout: its place, seconds, margin, MFU, bubble, bytes, room, dollars where there are prices."""
    priced = any(ranked.usd is not None for ranked in ranking)
    head = ["", "step", "behind", "MFU", "bubble", "memory", "free", *(["$/step"] if priced else []), "layout"]
    rows = [head]
    for place, ranked in enumerate(ranking, 1):
        rows.append(
            [
                str(place),
                format_seconds(ranked.price.step_s),
                f"{ranked.margin:.1%}" if place > 1 else "",
                f"{ranked.price.mfu:.1%}",
                f"{_waiting(ranked):.1%}",
                format_bytes(ranked.peak_bytes),
                format_bytes(ranked.room_bytes) if ranked.room_bytes >= 0 else "none",
                *([_dollars(ranked.usd)] if priced else []),
                str(ranked.layout),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines: list[str] = []
    for row in rows:
        cells = "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=True))
        lines += textwrap.wrap(
            _layout(row[-1]), _WIDTH, initial_indent=f"{cells}  ", subsequent_indent=" " * (len(cells) + 2)
        )
    return [line.replace(f"{_BREAK} ", "").replace(_BREAK, "") for line in lines]


def explain_ranked(
    ranking: Sequence[Ranked], place: int, rejected: Rejections, objective: Objective = Objective.TIME
) -> str:
    """One layout of a ranking: its verdict, memory and time by line and rank, the next one, and what was rejected."""
    chosen = ranking[place]
    if objective in (Objective.PARETO, Objective.PARETO_COST):
        objective = Objective.TIME
    lines = _labelled("layout", f"{_layout(chosen)} on {chosen.devices} devices")
    lines += _labelled("step", _step(chosen))
    lines += _labelled("memory", verdict(chosen))
    lines += ["", *memory_table(chosen.price), "", *time_table(chosen.price), ""]
    if place > 0:
        lines += _labelled("best", _against(chosen, ranking[0]))
    if place + 1 < len(ranking):
        lines += _labelled("runner-up" if place == 0 else "next", _against(chosen, ranking[place + 1], objective))
    lines += rejected_lines(rejected)
    return "\n".join(line.rstrip() for line in lines)


def verdict(ranked: Ranked) -> str:
    """Whether it fits, by how much, and what is largest on the fullest rank."""
    have = ranked.peak_bytes + ranked.room_bytes
    share = abs(ranked.room_bytes) / have if have else 0.0
    largest = ", ".join(worst_lines(ranked.price))
    peak = f"{format_bytes(ranked.peak_bytes)} of {format_bytes(have)} on the fullest rank"
    if ranked.room_bytes >= 0:
        less = "" if ranked.has_room else f", less than the {LEAST_ROOM:.0%} headroom that a caching allocator needs"
        if ranked.host_lacks_bytes:
            return f"out of host memory: {format_bytes(ranked.host_lacks_bytes)} too much is offloaded; {peak}"
        return f"fits: {peak}, {format_bytes(ranked.room_bytes)} ({share:.0%}) free{less}; largest: {largest}"
    return f"out of memory: {peak}, {format_bytes(-ranked.room_bytes)} ({share:.0%}) too much; largest: {largest}"


def rejected_lines(rejected: Rejections) -> list[str]:
    """One line a rule: how many, and an example with its numbers."""
    lines: list[str] = []
    for place, (rule, count, example) in enumerate(rejected):
        text = f"{count} × {rule}, e.g. {_layout(example.axes)}: {example.reason}"
        lines += _labelled("rejected" if place == 0 else "", text)
    return lines


def _step(ranked: Ranked) -> str:
    cost = "" if ranked.usd is None else f", {_dollars(ranked.usd)}"
    how = "simulated schedule" if ranked.exact else "closed form"
    return (
        f"{format_seconds(ranked.price.step_s)} ({how}){cost}; {ranked.price.mfu:.1%} MFU; "
        f"{_waiting(ranked):.1%} pipeline bubble"
    )


def _against(own: Ranked, other: Ranked, objective: Objective = Objective.TIME) -> str:
    """How another layout compares: by how much, and the lines of its seconds that differ."""
    mine, its = value_of(own, objective), value_of(other, objective)
    gap = its / mine - 1 if mine else 0.0
    more = "more" if gap >= 0 else "less"
    where = differences(own.price, other.price)
    room = format_bytes(abs(other.peak_bytes - own.peak_bytes))
    memory = f"; {room} {'more' if other.peak_bytes >= own.peak_bytes else 'less'} memory"
    text = f"{_layout(other)}: {format_seconds(other.price.step_s)}, {abs(gap):.1%} {more}"
    text += f" {objective}" if objective is not Objective.TIME else ""
    return text + (f" ({', '.join(where)})" if where else "") + memory


def _waiting(ranked: Ranked) -> float:
    """The mean share of bubbles."""
    times = ranked.price.time
    total = sum(lines.total for lines in times)
    return sum(lines.bubble for lines in times) / total if total else 0.0


def _dollars(usd: float | None) -> str:
    return "" if usd is None else f"${usd:.3g}"


def _layout(ranked: Ranked | str) -> str:
    """A layout that lines may break behind its commas, and between listed stages."""
    text = ranked if isinstance(ranked, str) else str(ranked.layout)
    return text.replace(",", f",{_BREAK} ").replace("|", f"|{_BREAK} ")


def _labelled(label: str, text: str) -> list[str]:
    lines = textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_on_hyphens=False,
    )
    return [line.replace(f"{_BREAK} ", "").replace(_BREAK, "") for line in lines]
