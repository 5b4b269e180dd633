"""Short ways to write a schedule and a picture in a test."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import ModuleType

from shardwise.schedule import Action, Costs, Row, Schedule, Transfer, draw, parse_row, print_row, simulate


def schedule_of(*rows: str, ranks: Sequence[Sequence[int]] | None = None) -> Schedule:
    """The schedule with these rows of text, one stage a rank if `ranks` is not given."""
    actions = tuple(tuple(a for a in parse_row(row) if not isinstance(a, Transfer)) for row in rows)
    owned = tuple(map(tuple, ranks)) if ranks else tuple((s,) for s in range(len(rows)))
    return Schedule(
        name="by hand",
        num_stages=sum(map(len, owned)),
        num_micro_batches=1 + max(a.micro_batch for row in actions for a in row if isinstance(a, Action)),
        ranks=owned,
        actions=actions,
    )


def text_of(rows: tuple[Row, ...]) -> list[str]:
    return [print_row(row) for row in rows]


def picture_of(schedule: Schedule) -> str:
    """The rows of its drawing with B = 2 F and free transfers, without the legend."""
    timeline = simulate(schedule, costs=Costs.uniform(schedule.num_stages))
    return draw(timeline).partition("\n\n")[0]


def picture_in(module: ModuleType) -> str:
    """The picture in the docstring of a module."""
    lines = (inspect.getdoc(module) or "").splitlines()
    return "\n".join(line.strip() for line in lines if line.strip().startswith("rank "))
