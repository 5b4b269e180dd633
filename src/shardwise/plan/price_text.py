"""A price in words: memory and time of every rank of the pipeline line by line, and how two prices differ.

Tables of at most 100 columns. Computes nothing but differences, and prints nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from shardwise.plan.lines import MemoryLines, TimeLines
from shardwise.plan.price import Price
from shardwise.quantities import format_bytes, format_seconds

__all__ = ["differences", "memory_table", "time_table", "worst_lines"]

_COLUMNS = 6  # places of the pipeline that a table shows
_CLOSE = 0.002  # of the total: places that differ by less are one column
_LABEL = 16
_ROUNDING = 1e-9  # of the total: what is left of differences that are none

Lines = MemoryLines | TimeLines

_WORDS = {
    "slack": "fragmentation",
    "tp": "tp collectives",
    "cp": "cp collectives",
    "ep": "ep collectives",
    "pipeline": "p2p messages",
    "replicas": "dp collectives",
    "host": "host overhead",
}


def memory_table(price: Price) -> list[str]:
    """One line for every kind of bytes, one column for every place of the pipeline (equal neighbours together)."""
    return _table(price.memory, format_bytes)


def time_table(price: Price) -> list[str]:
    """Likewise for the seconds of a step."""
    return _table(price.time, format_seconds)


def differences(own: Price, other: Price, *, most: int = 5) -> list[str]:
    """Where the seconds of `other` go beyond those of `own`: the largest differences of the mean rank, signed."""
    gaps = {name: _mean(other.time, name) - _mean(own.time, name) for name in _names(own.time)}
    largest = sorted(gaps, key=lambda name: -abs(gaps[name]))
    total = abs(other.step_s - own.step_s) or own.step_s
    shown = [name for name in largest[:most] if abs(gaps[name]) > 0.01 * total]
    return [f"{_word(name)} {'+' if gaps[name] >= 0 else '−'}{format_seconds(abs(gaps[name]))}" for name in shown]


def worst_lines(price: Price, *, most: int = 3) -> list[str]:
    """The largest lines of the fullest rank."""
    fullest = max(price.memory, key=lambda lines: lines.total)
    parts = {name: float(getattr(fullest, name)) for name in _names([fullest])}
    ordered = sorted(parts, key=lambda name: -parts[name])[:most]
    return [f"{_word(name)} {format_bytes(parts[name])}" for name in ordered if parts[name] > 0]


def _table(ranks: Sequence[Lines], text: Callable[[float], str]) -> list[str]:
    columns = _columns(ranks)
    head = [_place(first, last) for first, last in columns]
    rows: list[tuple[str, list[str]]] = []
    least = _ROUNDING * max(lines.total for lines in ranks)
    for name in _names(ranks):
        numbers = [float(getattr(ranks[first], name)) for first, _ in columns]
        if any(float(getattr(lines, name)) > least for lines in ranks):
            rows.append((_word(name), [text(number) if number > least else "-" for number in numbers]))
    rows.append(("total", [text(ranks[first].total) for first, _ in columns]))
    widths = [max(len(head[c]), *(len(cells[c]) for _, cells in rows)) for c in range(len(columns))]
    lines = [" " * _LABEL + "  ".join(word.rjust(width) for word, width in zip(head, widths, strict=True))]
    for label, cells in rows:
        lines.append(label.ljust(_LABEL) + "  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)))
    return lines


def _columns(ranks: Sequence[Lines]) -> list[tuple[int, int]]:
    """(first, last) of neighbours that are equal; where these are many, the first, the largest and the last ones."""
    runs: list[tuple[int, int]] = []
    for place, lines in enumerate(ranks):
        if runs and _equal(ranks[runs[-1][0]], lines):
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((place, place))
    if len(runs) <= _COLUMNS:
        return runs
    largest = max(range(len(runs)), key=lambda index: ranks[runs[index][0]].total)
    busiest = max(range(len(runs)), key=lambda index: max(_parts(ranks[runs[index][0]])))
    middle = len(runs) // 2
    return [runs[index] for index in sorted({0, 1, largest, busiest, middle, len(runs) - 1})]


def _equal(one: Lines, other: Lines) -> bool:
    within = _CLOSE * max(one.total, other.total)
    return all(abs(a - b) <= within for a, b in zip(_parts(one), _parts(other), strict=True))


def _parts(lines: Lines) -> list[float]:
    return [float(getattr(lines, field.name)) for field in dataclasses.fields(lines)]


def _names(ranks: Sequence[Lines]) -> list[str]:
    return [field.name for field in dataclasses.fields(ranks[0])]


def _mean(ranks: Sequence[Lines], name: str) -> float:
    return float(sum(getattr(lines, name) for lines in ranks)) / len(ranks)


def _word(name: str) -> str:
    return _WORDS.get(name, name)


def _place(first: int, last: int) -> str:
    return f"pp rank {first}" if first == last else f"pp ranks {first}-{last}"
