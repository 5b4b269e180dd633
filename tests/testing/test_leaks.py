"""What a test leaves behind is named."""

from __future__ import annotations

import threading

from shardwise.testing import left_behind, observe


def test_nothing_changed_is_nothing_left() -> None:
    assert left_behind(observe({"A": "1"}), observe({"A": "1"})) == []


def test_variables_and_settings_are_named_with_their_values() -> None:
    before = observe({"A": "1", "B": "2"}, {"groups": 1})
    after = observe({"A": "3", "C": "4"}, {"groups": 2})
    assert left_behind(before, after) == [
        "variable A was '1', is '3'",
        "variable B is gone; it was '2'",
        "variable C='4' is new",
        "setting groups was 1, is 2",
    ]


def test_a_thread_that_runs_on_is_named_and_one_that_ends_is_not() -> None:
    before = observe({})
    stop = threading.Event()
    stays = threading.Thread(target=stop.wait, name="stays")
    ends = threading.Thread(target=lambda: None, name="ends")
    stays.start()
    ends.start()
    assert left_behind(before, observe({})) == ["thread 'stays' still runs"]
    stop.set()
    stays.join()
