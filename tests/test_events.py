"""Events reach the file at once, survive a killed writer and come back as they went."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.events import Event, JsonlSink, MemorySink, NullSink, Sink, read_events

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
EVENTS = st.builds(
    Event,
    kind=st.text(min_size=1),
    rank=st.integers(min_value=-1, max_value=10**6),
    step=st.none() | st.integers(min_value=0),
    seconds=st.floats(allow_nan=False, allow_infinity=False),
    data=st.dictionaries(st.text(), JSON_VALUES, max_size=3),
)


@given(EVENTS)
def test_an_event_comes_back_from_its_line(event: Event) -> None:
    line = event.to_json()
    assert "\n" not in line
    assert Event.from_json(line) == event


def test_a_loss_that_is_not_a_number_can_be_recorded() -> None:
    event = Event.from_json(Event(kind="step", rank=0, step=1, seconds=0.0, data={"loss": math.nan}).to_json())
    assert math.isnan(event.data["loss"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"kind": ""}, {"rank": -2}, {"step": -1}, {"seconds": math.inf}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_an_impossible_event_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Event(**{"kind": "step", "rank": 0, "step": 0, "seconds": 0.0, **wrong})  # type: ignore[arg-type]


def test_data_that_are_not_json_are_refused_with_the_kind() -> None:
    with pytest.raises(ConfigError, match="'step'.*not JSON"):
        Event(kind="step", rank=0, seconds=0.0, data={"x": object()}).to_json()


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"kind": "x"}', '{"kind":"x","rank":[],"step":0,"seconds":0,"data":{}}']
)
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ConfigError):
        Event.from_json(line)


def test_a_folder_gets_one_file_a_rank_and_is_read_in_order_of_rank(tmp_path: Path) -> None:
    for rank in (1, 0):
        with JsonlSink(tmp_path / "events", rank=rank) as sink:
            sink.emit(Event(kind="a", rank=rank, seconds=1.0))
            sink.emit(Event(kind="b", rank=rank, seconds=2.0))
    read = [(event.rank, event.kind) for event in read_events(tmp_path / "events")]
    assert read == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


def test_a_line_is_in_the_file_before_the_sink_is_closed(tmp_path: Path) -> None:
    with JsonlSink(tmp_path / "run.jsonl") as sink:
        sink.emit(Event(kind="step", rank=0, step=3, seconds=1.0))
        assert [event.step for event in read_events(tmp_path / "run.jsonl")] == [3]


def test_a_line_cut_off_by_a_kill_is_left_out_and_replaced_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    with JsonlSink(file) as sink:
        sink.emit(Event(kind="whole", rank=0, seconds=1.0))
    with file.open("a") as raw:
        raw.write('{"kind": "cut of')
    assert [event.kind for event in read_events(file)] == ["whole"]
    with JsonlSink(file) as sink:
        sink.emit(Event(kind="resumed", rank=0, seconds=2.0))
    assert [event.kind for event in read_events(file)] == ["whole", "resumed"]


def test_a_damaged_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(Event(kind="a", rank=0, seconds=0.0).to_json() + "\ngarbage\n")
    with pytest.raises(ConfigError, match=r"run\.jsonl:2: "):
        list(read_events(file))


def test_reading_where_there_is_nothing_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no events at"):
        list(read_events(tmp_path))


def test_every_sink_takes_events_and_can_be_closed(tmp_path: Path) -> None:
    sinks: list[Sink] = [NullSink(), MemorySink(), JsonlSink(tmp_path)]
    for sink in sinks:
        sink.emit(Event(kind="x", rank=0, seconds=0.0))
        sink.close()
