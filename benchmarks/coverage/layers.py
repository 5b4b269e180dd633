"""Which layers a small config keeps: one of every kind. And numbers of layers, told for a model that has fewer.

Knows fields and their meaning; refuses to know widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.coverage.names import Meaning, meaning_of

__all__ = ["Layers", "indices_in", "plan_of_layers"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Which of the `old` layers are `kept`, so that every kind of layer is among them."""

    field: str
    old: int
    new: int
    kept: tuple[int, ...] = ()


def plan_of_layers(values: Mapping[str, Any]) -> Layers:
    """Two layers, or one of each kind; as many as the numbers of layers that are named elsewhere, up to four."""
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers"):
        old = values.get(name)
        if isinstance(old, int) and not isinstance(old, bool) and old > 0:
            break
    else:
        return Layers(field="", old=0, new=2)
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == old and old > 2]
    rows = [tuple(str(value[index]) for value in lists) for index in range(old)]
    kept = sorted({row: index for index, row in reversed(list(enumerate(rows)))}.values())[:4] if lists else []
    named = [
        len(value)
        for field, value in values.items()
        if isinstance(value, list | tuple) and meaning_of(field, value) is Meaning.LAYER_INDEX and len(value) < old
    ]
    new = min(old, max(2, len(kept), *(min(number, 4) for number in named or [0])))
    extra = [index for index in range(old) if index not in kept] if lists else []
    kept = sorted((*kept, *extra[: max(0, new - len(kept))]))
    return Layers(field=name, old=old, new=new, kept=tuple(kept))


def indices_in(value: Any, plan: Layers) -> Any:
    """Numbers of layers, in a model that has fewer of them: the same places, counted from the end too."""
    if not plan.old or plan.old <= plan.new:
        return value

    def moved(index: Any) -> Any:
        if not isinstance(index, int) or isinstance(index, bool):
            return index
        if index < 0:
            return max(index, -plan.new)
        return index if index <= 0 else min(plan.new - (index < plan.old), -(-index * plan.new // plan.old))

    if not isinstance(value, list | tuple):
        return moved(value) if value >= plan.new or value < 0 else value
    if len(value) == plan.old:
        return value
    return type(value)(dict.fromkeys(moved(index) for index in value))
