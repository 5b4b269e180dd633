"""Stage graphs are sets of edges that run up the stage numbers."""

from __future__ import annotations

import pytest

from shardwise.errors import ScheduleError
from shardwise.schedule.graph import chain, checked, predecessors, successors

Y_SHAPED = frozenset({(0, 2), (1, 2), (2, 3)})


def test_the_default_graph_is_the_chain() -> None:
    assert chain(1) == frozenset()
    assert checked(None, 3) == chain(3) == {(0, 1), (1, 2)}


def test_neighbours_are_listed_from_low_to_high() -> None:
    assert predecessors(Y_SHAPED, 4) == ((), (), (0, 1), (2,))
    assert successors(Y_SHAPED, 4) == ((2,), (2,), (3,), ())


@pytest.mark.parametrize("edge", [(1, 0), (1, 1), (0, 4), (-1, 2)])
def test_an_edge_that_does_not_run_up_is_refused(edge: tuple[int, int]) -> None:
    with pytest.raises(ScheduleError, match="number the stages in an order"):
        checked(Y_SHAPED | {edge}, 4)
