"""A rehearsal in words: peak and lines beside what was predicted, memory over the actions, traffic, seconds.

    memory over the actions     one row an action: ▒ what stays behind it, ░ what is alive besides while it runs

Tables of at most 100 columns; `record` is the same as plain numbers. Computes nothing but shares, prints nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.quantities import format_bytes, format_seconds
from shardwise.verify.rehearse import Behind, Rehearsed
from shardwise.verify.rehearse_predicted import Foretold

__all__ = ["lines_told", "record", "words"]

_LINES = ("parameters", "masters", "gradients", "optimizer", "buffers", "activations")
_WIDTH = 48
_ROWS = 32  # of the plot
_KINDS = {"F": "forward", "B": "backward", "I": "inputs", "W": "weights", "C": "again"}


def lines_told(rehearsed: Rehearsed, foretold: Foretold) -> list[tuple[str, float, float]]:
    """(line, predicted, rehearsed) bytes; logits are transient."""
    rows = [(name, getattr(foretold.lines, name), getattr(rehearsed.lines, name)) for name in _LINES]
    passing = foretold.lines.transient + foretold.lines.logits
    return [*rows, ("transient", passing, rehearsed.lines.transient)]


def words(rehearsed: Rehearsed, foretold: Foretold) -> str:
    """Everything, for people."""
    stages = ", ".join(map(str, rehearsed.stages))
    on = "fake tensors, nothing is computed" if rehearsed.device == "fake" else rehearsed.device
    told = [
        f"rank {rehearsed.rank} of {rehearsed.layout.world_size}: {rehearsed.layout}",
        f"stage {stages}, {rehearsed.num_micro_batches} micro-batches a step; on {on}",
        "",
        f"peak of a step {format_bytes(rehearsed.peak_bytes)}, in {rehearsed.peak_at or 'the first action'}; predicted "
        f"{format_bytes(foretold.lines.total)} ({_error(foretold.lines.total, rehearsed.peak_bytes)})",
        *_memory(rehearsed, foretold),
        "",
        "memory over the actions",
        *_plot(rehearsed.actions),
        "",
        *_traffic(rehearsed.sent_bytes, foretold.sent_bytes),
        *_seconds(rehearsed, foretold),
    ]
    return "\n".join(told)


def record(rehearsed: Rehearsed, foretold: Foretold) -> dict[str, Any]:
    """The same as numbers, for JSON."""
    return {
        "rank": rehearsed.rank,
        "layout": rehearsed.layout.to_dict(),
        "stages": list(rehearsed.stages),
        "device": rehearsed.device,
        "micro_batches": rehearsed.num_micro_batches,
        "peak_bytes": rehearsed.peak_bytes,
        "peak_at": rehearsed.peak_at,
        "allocated_bytes": rehearsed.allocated_bytes,
        "reserved_bytes": rehearsed.reserved_bytes,
        "predicted_bytes": round(foretold.lines.total),
        "error": foretold.lines.total / rehearsed.peak_bytes - 1.0 if rehearsed.peak_bytes else None,
        "lines": {
            name: {"predicted": round(predicted), "rehearsed": round(found)}
            for name, predicted, found in lines_told(rehearsed, foretold)
        },
        "actions": [dataclasses.asdict(behind) for behind in rehearsed.actions],
        "sent_bytes": {
            kind: {"predicted": foretold.sent_bytes.get(kind, 0), "rehearsed": rehearsed.sent_bytes.get(kind, 0)}
            for kind in _kinds(rehearsed.sent_bytes, foretold.sent_bytes)
        },
        "seconds": {"step": rehearsed.step_s, **rehearsed.seconds},
        "predicted_seconds": None
        if foretold.time is None
        else {"step": foretold.step_s, **dataclasses.asdict(foretold.time)},
    }


def _memory(rehearsed: Rehearsed, foretold: Foretold) -> list[str]:
    rows = [(name, predicted, found) for name, predicted, found in lines_told(rehearsed, foretold) if predicted + found]
    rows.append(("together", foretold.lines.total, float(rehearsed.peak_bytes)))
    told = [f"  {'':<14}{'predicted':>12}{'rehearsed':>12}{'error':>9}"]
    for name, predicted, found in rows:
        told.append(f"  {name:<14}{format_bytes(predicted):>12}{format_bytes(found):>12}{_error(predicted, found):>9}")
    if rehearsed.reserved_bytes is not None:
        allocated, reserved = format_bytes(rehearsed.allocated_bytes or 0), format_bytes(rehearsed.reserved_bytes)
        told.append(
            f"  the allocator says {allocated} at most, workspaces of kernels with it, and has taken {reserved}"
        )
    return told


def _plot(actions: Sequence[Behind]) -> list[str]:
    highest = max((behind.highest for behind in actions), default=0) or 1
    told: list[str] = []
    before = 0
    for place in _shown(actions):
        behind = actions[place]
        if place > before:
            told.append("  …")
        stays = round(_WIDTH * behind.alive / highest)
        bar = "▒" * stays + "░" * (round(_WIDTH * behind.highest / highest) - stays)
        told.append(f"  {behind.action:<10}{bar:<{_WIDTH}} {format_bytes(behind.highest):>10}")
        before = place + 1
    return told


def _shown(actions: Sequence[Behind]) -> list[int]:
    """Places of the actions that are drawn: all, or the first, the last and those around the peak."""
    if len(actions) <= _ROWS:
        return list(range(len(actions)))
    peak = max(range(len(actions)), key=lambda place: actions[place].highest)
    third = _ROWS // 3
    chosen = {*range(third), *range(len(actions) - third, len(actions)), *range(peak - third // 2, peak + third // 2)}
    return sorted(place for place in chosen if 0 <= place < len(actions))


def _traffic(rehearsed: Mapping[str, int], foretold: Mapping[str, int]) -> list[str]:
    kinds = [kind for kind in _kinds(rehearsed, foretold) if rehearsed.get(kind, 0) + foretold.get(kind, 0)]
    if not kinds:
        return ["it sends nothing"]
    told = [f"  {'sent in a step':<20}{'predicted':>12}{'rehearsed':>12}{'error':>9}"]
    for kind in kinds:
        predicted, found = foretold.get(kind, 0), rehearsed.get(kind, 0)
        told.append(f"  {kind:<20}{format_bytes(predicted):>12}{format_bytes(found):>12}{_error(predicted, found):>9}")
    return told


def _seconds(rehearsed: Rehearsed, foretold: Foretold) -> list[str]:
    told: list[str] = []
    if rehearsed.step_s is not None:
        kinds = [f"{_KINDS.get(k, k)} {format_seconds(s)}" for k, s in rehearsed.seconds.items()]
        told += ["", f"a step takes {format_seconds(rehearsed.step_s)} without waiting for anyone: {', '.join(kinds)}"]
    if foretold.time is not None and foretold.step_s is not None:
        own = foretold.time.compute + foretold.time.recompute + foretold.time.optimizer + foretold.time.host
        told += ["", f"predicted {format_seconds(foretold.step_s)}, of which {format_seconds(own)} are its own work"]
    return told


def _kinds(rehearsed: Mapping[str, int], foretold: Mapping[str, int]) -> list[str]:
    return sorted({*rehearsed, *foretold})


def _error(predicted: float, found: float) -> str:
    return f"{predicted / found - 1.0:+.1%}" if found else "-"
