"""How people write many unit calls in few words, and how such words are read.

    model.layers.0-3          the units model.layers.0, .1, .2 and .3
    model.layers.0            that unit, or all units inside it
    layers.0                  the same, where only one path ends so
    albert_layer#3-5          calls 3, 4 and 5 of a unit that is called several times

Knows names only, of units as `unit` and of calls as `unit#call`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from shardwise.errors import LayoutError

__all__ = ["compress", "expand"]

_NUMBERED = re.compile(r"(.*[.#])(\d+)")
_RANGE = re.compile(r"(.*[.#])(\d+)-(\d+)")


def compress(names: Sequence[str]) -> tuple[str, ...]:
    """`layers.0, layers.1, layers.2, norm` -> `layers.0-2, norm`; the order is kept."""
    runs: list[tuple[str, int, int] | str] = []  # (stem, first, last), or a name without a number
    for name in names:
        match = _NUMBERED.fullmatch(name)
        before = runs[-1] if runs else None
        if match is None:
            runs.append(name)
            continue
        stem, number = match[1], int(match[2])
        if isinstance(before, tuple) and before[0] == stem and before[2] + 1 == number:
            runs[-1] = (stem, before[1], number)
        else:
            runs.append((stem, number, number))
    return tuple(run if isinstance(run, str) else _written(*run) for run in runs)


def _written(stem: str, first: int, last: int) -> str:
    return f"{stem}{first}" if first == last else f"{stem}{first}-{last}"


def expand(text: str, calls: Sequence[str]) -> tuple[str, ...]:
    """The calls, of all `calls` (`unit#call`), that `text` stands for, in the order of `calls`.

    Raises `LayoutError`, with suggestions, where `text` stands for nothing or for two different things.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        return _matching(text, calls)
    numbers = range(int(match[2]), int(match[3]) + 1)
    if not numbers:
        raise LayoutError(f"a range runs from low to high, but got {text!r}; swap its ends")
    chosen = {call for number in numbers for call in _matching(f"{match[1]}{number}", calls)}
    return tuple(call for call in calls if call in chosen)


def _matching(text: str, calls: Sequence[str]) -> tuple[str, ...]:
    exact = tuple(call for call in calls if _covers(text, call))
    if exact:
        return exact
    paths: dict[str, list[str]] = {}  # what stands before `text` in the full name -> calls
    for call in calls:
        parts = call.split(".")
        for place in range(1, len(parts)):
            if _covers(text, ".".join(parts[place:])):
                paths.setdefault(".".join(parts[:place]), []).append(call)
                break
    if len(paths) == 1:
        return tuple(next(iter(paths.values())))
    if paths:
        full = [f"{path}.{text}" for path in paths][:4]
        raise LayoutError(f"a unit name means one thing, but {text!r} may be {' or '.join(full)}; say which")
    raise LayoutError(f"stages name units of the model, but there is no {text!r}; {_suggestion(text, calls)}")


def _covers(text: str, call: str) -> bool:
    """Whether `text` is the call, its unit, or a module around its unit."""
    unit = call.rpartition("#")[0]
    return text in (call, unit) or unit.startswith(text + ".")


def _suggestion(text: str, calls: Sequence[str]) -> str:
    units = list(dict.fromkeys(call.rpartition("#")[0] for call in calls))
    close = get_close_matches(text, [*units, *calls], n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(compress(units)[:8])}"
