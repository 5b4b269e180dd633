"""The room that a chosen layout leaves: a share of the device, and whoever has it goes before all who have not."""

from __future__ import annotations

import pytest

from shardwise.plan.room import LEAST_ROOM, choosable, has_room, most_bytes


def test_a_twentieth_stays_free() -> None:
    assert has_room(LEAST_ROOM)
    assert not has_room(0.04)
    assert not has_room(-0.1)
    assert most_bytes(80e9) == pytest.approx(76e9)


def test_layouts_with_room_are_chosen_first_and_all_where_none_has_it() -> None:
    assert choosable([0.3, 0.01, 0.06]).tolist() == [True, False, True]
    assert choosable([0.04, 0.01]).tolist() == [True, True]
