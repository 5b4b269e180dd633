"""A recorded step tells measured beside predicted, and survives its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from schedule.test_waits import timeline_of
from shardwise.errors import ScheduleError
from shardwise.schedule import Costs, Timeline, chain, generate, simulate
from shardwise.schedule.recording import Recording, recordings_in

# the gradient is made at 4 s and read at 4.5 s
MEASURED = timeline_of("0F0:0-1 0B0:4.5-6.5", "1F0:1.5-2.5 1B0:2.5-4")


def recording(*measured: Timeline, step: int = 4, planned: Timeline | None = None) -> Recording:
    schedule = generate("1f1b", num_ranks=2, num_micro_batches=1)
    return Recording(
        step=step,
        layout="pp=2",
        schedule=schedule,
        edges=chain(2),
        measured=measured or (MEASURED,),
        planned=planned,
        sums_s=0.25,
        clock_error_s=1e-5,
    )


def test_waiting_for_each_other_and_for_transfers_are_shares_of_all_time() -> None:
    # rank 0 waits from 1 to 4 s for rank 1, and half a second more; rank 1 until 1 s, half a second, and at the end
    assert recording().bubble == pytest.approx((3.0 + 1.0 + 2.5) / 13)
    assert recording().exposed == pytest.approx((0.5 + 0.5) / 13)


def test_the_simulator_runs_the_step_again_with_its_own_costs() -> None:
    assert recording().simulated.seconds == pytest.approx(6.5)
    assert [str(span.action) for span in recording().simulated.spans if span.rank == 1][:2] == ["1F0", "1B0"]


def test_one_line_tells_measured_beside_predicted() -> None:
    planned = simulate(generate("1f1b", num_ranks=2, num_micro_batches=1), costs=Costs.uniform(2))
    assert str(recording(planned=planned)) == (
        "step 5 took 6.5 s, of which ranks waited 50.0 % for each other and 7.7 % for transfers and the runtime; "
        "predicted from the costs of this step 6.5 s (+0.0 %), bubble 57.7 %, by the plan 6 s (-7.7 %), bubble 50.0 %. "
        "250 ms more went by for sums of gradients."
    )
    assert "plan" not in str(recording())


def test_the_slowest_of_several_pipelines_speaks() -> None:
    slow = timeline_of("0F0:0-1 0B0:8-10", "1F0:1-2 1B0:2-4")
    assert recording(MEASURED, slow, MEASURED).slowest is slow


@pytest.mark.parametrize("planned", [None, MEASURED])
def test_a_recording_survives_its_file(tmp_path: Path, planned: Timeline | None) -> None:
    original = recording(planned=planned)
    path = original.write(tmp_path / "timelines")
    assert path.name == "step-000005.json"
    assert Recording.from_json(path.read_text()) == original
    recording(step=11).write(tmp_path / "timelines")
    assert list(recordings_in(tmp_path / "timelines")) == [5, 12]
    assert recordings_in(tmp_path) == {}


def test_what_is_no_recording_is_refused() -> None:
    with pytest.raises(ScheduleError, match="compare with the output of Recording.to_json"):
        Recording.from_json('{"step": 1}')
    with pytest.raises(ScheduleError, match=r"they have \[1\] and it has 2"):
        recording(timeline_of("0F0:0-1"))
