"""What a test left behind: threads, environment variables, and whatever else is counted for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Observation", "left_behind", "observe"]

_THREADS_END_WITHIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The state of a process at one moment; `settings` are named values that a test must put back."""

    threads: frozenset[threading.Thread]
    environment: Mapping[str, str]
    settings: Mapping[str, object] = field(default_factory=dict)


def observe(environment: Mapping[str, str], settings: Mapping[str, object] | None = None) -> Observation:
    """The state now. Threads are Python's; `environment` and `settings` are the caller's to read."""
    return Observation(
        threads=frozenset(threading.enumerate()), environment=dict(environment), settings=dict(settings or {})
    )


def left_behind(before: Observation, after: Observation) -> list[str]:
    """One line for everything that changed between the two; threads get a second to end."""
    lines = [f"thread {thread.name!r} still runs" for thread in _still_alive(after.threads - before.threads)]
    lines += _changes("variable", before.environment, after.environment)
    lines += _changes("setting", before.settings, after.settings)
    return lines


def _still_alive(threads: frozenset[threading.Thread]) -> list[threading.Thread]:
    limit = time.monotonic() + _THREADS_END_WITHIN_S
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, limit - time.monotonic()))
    return sorted((thread for thread in threads if thread.is_alive()), key=lambda thread: thread.name)


def _changes(what: str, before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    lines = []
    for name in sorted({*before, *after}):
        if name not in before:
            lines.append(f"{what} {name}={after[name]!r} is new")
        elif name not in after:
            lines.append(f"{what} {name} is gone; it was {before[name]!r}")
        elif before[name] != after[name]:
            lines.append(f"{what} {name} was {before[name]!r}, is {after[name]!r}")
    return lines
