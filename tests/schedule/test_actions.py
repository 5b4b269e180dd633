"""Actions and transfers are written and read back without loss."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ScheduleError
from shardwise.schedule import Action, Kind, StageAction, StageKind, Transfer, TransferKind, parse, parse_row, print_row

numbers = st.integers(0, 10**6)
actions = st.builds(Action, kind=st.sampled_from(Kind), stage=numbers, micro_batch=numbers)
stage_actions = st.builds(StageAction, kind=st.sampled_from(StageKind), stage=numbers)
transfers = st.builds(
    lambda kind, stages, m: Transfer(
        kind=kind, source=stages[0], target=stages[1], micro_batch=m, gradient=stages[0] > stages[1]
    ),
    st.sampled_from(TransferKind),
    st.tuples(numbers, numbers).filter(lambda stages: stages[0] != stages[1]),
    numbers,
)


@given(st.lists(actions | stage_actions | transfers))
def test_a_row_that_is_printed_and_parsed_is_the_same(row: list[Action | StageAction | Transfer]) -> None:
    assert parse_row(print_row(tuple(row))) == tuple(row)


@given(st.text("0123SRFBIWCOLGUH 9", max_size=7))
def test_what_can_be_parsed_prints_as_it_was_written(text: str) -> None:
    with suppress(ScheduleError):
        assert str(parse(text)) == text


def test_the_stage_that_acts_is_written_first() -> None:
    assert str(Action(kind=Kind.I, stage=2, micro_batch=0)) == "2I0"
    assert str(StageAction(kind=StageKind.G, stage=2)) == "2G"
    there = Transfer(kind=TransferKind.SEND, source=0, target=1, micro_batch=3, gradient=False)
    back = Transfer(kind=TransferKind.RECV, source=1, target=0, micro_batch=3, gradient=True)
    assert (str(there), str(back)) == ("0S1F3", "0R1B3")
    assert there.edge == back.edge == (0, 1)


@pytest.mark.parametrize(
    "text", ["", "2F", "F0", "2X0", "02F0", "2F00", "2f0", "2F0 ", "0S1I3", "0S1F", "-1F0", "²F0", "2G0", "G"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="write for example 2F0"):
        parse(text)


@pytest.mark.parametrize("text", ["1S0F3", "0S1B3", "0R1F3", "1R0B3", "1S1F0", "1R1B0"])
def test_activations_run_up_the_stages_and_gradients_down(text: str) -> None:
    with pytest.raises(ScheduleError, match="runs (up|down) the stage numbers"):
        parse(text)


def test_numbers_below_0_are_refused() -> None:
    with pytest.raises(ScheduleError, match="stage -1 and micro-batch 0"):
        Action(kind=Kind.F, stage=-1, micro_batch=0)
    with pytest.raises(ScheduleError, match="has stage -1; number stages from 0"):
        StageAction(kind=StageKind.U, stage=-1)
    with pytest.raises(ScheduleError, match="micro-batch -2"):
        Transfer(kind=TransferKind.SEND, source=0, target=1, micro_batch=-2, gradient=False)
