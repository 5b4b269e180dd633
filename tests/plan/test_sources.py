"""A layout's schedule is generated, read from a file, or left to a search; what does not fit is said with a repair."""

from __future__ import annotations

import pytest

from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.sources import GivenSource, breadth_first, check_source, source_of
from shardwise.schedule import check, forward_only
from shardwise.schedule.torch_csv import write_csv

V = ((0, 3), (1, 2))
LOOP = ((0, 2), (1, 3))

DRAWN = """\
0F0 0F1 3F0 3F1 3B0 3B1 0B0 0B1
1F0 1F1 2F0 2F1 2B0 2B1 1B0 1B1"""


@pytest.fixture(params=["mine.json", "mine.csv"])
def in_a_file(tmp_path, request):
    path = tmp_path / request.param
    schedule = breadth_first(V, 2)
    path.write_text(schedule.to_json() if path.suffix == ".json" else write_csv(schedule))
    return str(path)


def test_breadth_first_runs_a_stage_after_the_other_there_and_back() -> None:
    assert "\n".join(breadth_first(V, 2).text_rows()) == DRAWN


@pytest.mark.parametrize("ranks", [V, LOOP, ((0, 1, 2),), ((0,), (2, 1), (3,))])
@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_breadth_first_runs_on_any_placement(ranks, num_micro_batches) -> None:
    check(breadth_first(ranks, num_micro_batches))
    check(forward_only(breadth_first(ranks, num_micro_batches)))


def test_a_name_is_generated_for_any_number_of_micro_batches() -> None:
    source = source_of(Layout(pp=2, schedule="gpipe"))
    assert source is not None
    assert [source(number).num_micro_batches for number in (1, 5)] == [1, 5]
    assert source.ranks == ((0,), (1,))


def test_a_file_is_read_and_says_where_stages_stand(in_a_file) -> None:
    source = source_of(Layout(pp=2, chunks=2, schedule=in_a_file))
    assert source is not None
    assert source.ranks == V
    assert source(2).actions == breadth_first(V, 2).actions


def test_another_number_of_micro_batches_is_evaluated_breadth_first_on_the_same_ranks() -> None:
    source = GivenSource(schedule=breadth_first(LOOP, 4))
    assert source(3) == breadth_first(LOOP, 3)


def test_a_search_has_no_source_yet() -> None:
    assert source_of(Layout(pp=2, schedule="searched")) is None
    check_source(Layout(pp=2, schedule="searched"), 4)


def test_a_file_for_other_ranks_or_stages_is_refused_with_what_to_write(in_a_file) -> None:
    with pytest.raises(LayoutError, match="has 4 stages on 2 ranks and .* has 2 on 2; write pp=2,chunks=2"):
        source_of(Layout(pp=2, schedule=in_a_file))
    with pytest.raises(LayoutError, match="has 3 on 3; write pp=2,chunks=2"):
        source_of(Layout(pp=3, schedule=in_a_file))


def test_a_file_for_other_micro_batches_is_refused_before_anything_runs(in_a_file) -> None:
    layout = Layout(pp=2, chunks=2, schedule=in_a_file)
    check_source(layout, 2)
    with pytest.raises(LayoutError, match="is for 2 and a replica has 4; set micro_batches=2"):
        check_source(layout, 4)


@pytest.mark.parametrize(
    "text, message", [(None, "schedule.*: No such file"), ("{", "reading it failed"), ("\udcff", "text in UTF-8")]
)
def test_a_file_that_is_no_schedule_is_one_error(tmp_path, text, message) -> None:
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(LayoutError, match=message):
        source_of(Layout(pp=2, schedule=str(path)))
