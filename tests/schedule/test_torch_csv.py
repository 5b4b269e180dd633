"""What we write, torch loads and finds valid; what torch dumps, we read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schedule.helpers import schedule_of
from schedule.torch_oracle import STYLES, runnable, runtime
from shardwise.errors import ScheduleError
from shardwise.schedule import GENERATORS, Action, Schedule, check, chunks_of, generate
from shardwise.schedule.passes import with_recompute, with_reductions, with_sharding
from shardwise.schedule.torch_csv import read_csv, write_csv


def loaded(schedule: Schedule, text: str, format_: str, folder: Path) -> Any:
    """Torch's runtime with the CSV in it."""
    file = folder / "schedule.csv"
    file.write_text(text)
    chunks = schedule.num_stages // schedule.num_ranks
    made = runtime(schedule.num_ranks, chunks, schedule.num_micro_batches)
    made._load_csv(str(file), format=format_)
    return made


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("num_ranks, num_micro_batches", [(2, 4), (4, 9)])
def test_torch_loads_what_we_write(name: str, num_ranks: int, num_micro_batches: int, tmp_path: Path) -> None:
    schedule = generate(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    made = loaded(schedule, write_csv(schedule), "compute_only", tmp_path)
    assert tuple(made.stage_index_to_group_rank[s] for s in range(schedule.num_stages)) == schedule.owners
    for r, row in enumerate(schedule.text_rows()):
        assert " ".join(map(str, made.pipeline_order[r])) == row
    assert runnable(made)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("num_ranks, num_micro_batches", [(2, 4), (4, 9)])
def test_torch_loads_and_can_run_our_transfers(
    name: str, num_ranks: int, num_micro_batches: int, tmp_path: Path
) -> None:
    schedule = generate(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    text = write_csv(with_sharding(schedule, most_unsharded=2), transfers=True)
    assert runnable(loaded(schedule, text, "compute_comms", tmp_path))
    for s in range(schedule.num_stages):
        assert text.count(f"{s}REDUCE_GRAD") - text.count(f"1{s}REDUCE_GRAD") == 1


def test_a_cell_is_one_item_and_a_line_one_rank() -> None:
    schedule = generate("zb-h1", num_ranks=2, num_micro_batches=2)
    assert write_csv(schedule) == "0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1F1,1I1,1W0,1W1\n"
    assert write_csv(generate("1f1b", num_ranks=2, num_micro_batches=1), transfers=True) == (
        "0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD\n"
    )


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("format_", ["compute_only", "compute_comms"])
def test_we_read_what_torch_dumps(name: str, format_: str, tmp_path: Path) -> None:
    file = tmp_path / "schedule.csv"
    theirs = runtime(3, 2, 6, STYLES[name])
    theirs._dump_csv(str(file), format=format_)
    schedule = read_csv(file.read_text(), name=name)
    check(schedule)
    for r, row in enumerate(schedule.text_rows()):
        items = [a for cell in theirs.pipeline_order[r] if cell is not None for a in (cell.sub_actions or (cell,))]
        assert row == " ".join(map(str, items))


def test_stage_actions_are_read_if_asked_for() -> None:
    text = "0UNSHARD,0F0,,(0F1;0B0)OVERLAP_F_B,0B1,0REDUCE_GRAD,0RESHARD\n"
    assert read_csv(text, stage_actions=True).text_rows() == ("0U 0F0 0F1 0B0 0B1 0G 0H",)
    assert read_csv(text).text_rows() == ("0F0 0F1 0B0 0B1",)


@pytest.mark.parametrize("name", GENERATORS)
def test_what_is_written_reads_back_the_same(name: str) -> None:
    schedule = generate(name, num_ranks=3, num_micro_batches=4, chunks=chunks_of(name))
    assert read_csv(write_csv(schedule), name=name) == schedule
    assert read_csv(write_csv(schedule, transfers=True, prefetch=1), name=name) == schedule
    reduced = with_reductions(schedule, overlap=False)
    assert read_csv(write_csv(reduced, transfers=True), name=name, stage_actions=True) == reduced


def test_what_has_no_word_in_the_other_language_is_refused() -> None:
    with pytest.raises(ScheduleError, match='rank 1 holds "1X0"; correct it'):
        read_csv("0F0,0B0\n1X0\n")
    with pytest.raises(ScheduleError, match="cells such as 0F0, but there are none"):
        read_csv("\n")
    with pytest.raises(ScheduleError, match="the schedule holds 0C0; leave out the pass"):
        write_csv(with_recompute(schedule_of("0F0 0B0")), transfers=True)
    with pytest.raises(ScheduleError, match="the schedule holds 0G"):
        write_csv(with_reductions(schedule_of("0F0 0B0")))


def test_actions_of_two_files_are_of_one_type() -> None:
    assert all(isinstance(action, Action) for row in read_csv("0F0,0B0\n").actions for action in row)
