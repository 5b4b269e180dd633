"""A picture is well-formed, holds every action once where it ran, and explains itself."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from schedule.helpers import schedule_of
from schedule.strategies import schedules
from schedule.test_waits import timeline_of
from shardwise.errors import ScheduleError
from shardwise.schedule import Costs, Edges, Schedule, Timeline, generate, simulate
from shardwise.schedule.svg import Panel, Unit, to_svg

SVG = "{http://www.w3.org/2000/svg}"


def boxes(picture: str) -> list[tuple[str, float, float, float]]:
    """(class, x, y, width) of every action."""
    found = []
    for rect in ElementTree.fromstring(picture).iter(f"{SVG}rect"):
        if re.fullmatch("[a-z][0-9]", rect.get("class", "")) and rect.get("height") != "12":  # not the legend's
            found.append((rect.get("class", ""), *(float(rect.get(key, "nan")) for key in ("x", "y", "width"))))
    return found


def texts(picture: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_time_runs_to_the_right_and_ranks_downwards() -> None:
    picture = to_svg(timeline_of("0F0:0-1 0B0:3-4", "1F0:1-3"), width=472)  # 100 pixels a second
    (f0, x0, y0, w0), (b0, x1, y1, w1), (f1, x2, y2, w2) = boxes(picture)
    assert (f0, b0, f1) == ("f0", "b0", "f0")
    assert (x1 - x0, x2 - x0) == pytest.approx((300, 100))
    assert (w0, w1, w2) == pytest.approx((100, 100, 200), abs=1)  # but for the border
    assert y0 == y1 < y2


def test_the_title_tells_seconds_and_bubble_and_the_legend_what_is_shown() -> None:
    timeline = simulate(generate("gpipe", num_ranks=2, num_micro_batches=2), costs=Costs.uniform(2))
    told = texts(to_svg(timeline, title="GPipe & friends", unit=Unit(name="F")))
    assert told[0] == "GPipe & friends: 9 F, bubble 33.3 %"
    assert {"rank 0", "rank 1", "forward", "backward"} <= set(told)
    assert not {"weight gradient", "input gradient"} & set(told)


def test_stages_of_a_rank_have_shades_that_the_legend_names() -> None:
    rows = ("0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0")
    timeline = simulate(schedule_of(*rows, ranks=[(0, 2), (1, 3)]), costs=Costs.uniform(4))
    picture = to_svg(timeline)
    assert {name for name, *_ in boxes(picture)} == {"f0", "f1", "b0", "b1"}
    assert "shades: first, second stage of the rank" in texts(picture)
    assert "shades" not in to_svg(timeline_of("0F0:0-1"))


def test_measured_and_predicted_stand_below_each_other_on_one_scale() -> None:
    short, long = timeline_of("0F0:0-1"), timeline_of("0F0:0-4")
    picture = to_svg([Panel(title="measured", timeline=long), Panel(title="predicted", timeline=short)])
    (_, x0, y0, w0), (_, x1, y1, w1) = boxes(picture)
    assert (x0, w0) == pytest.approx((x1, 4 * w1), rel=0.01)
    assert y0 < y1
    assert [text for text in texts(picture) if "bubble" in text] == [
        "measured: 4 s, bubble 0.0 %",
        "predicted: 1 s, bubble 0.0 %",
    ]


@pytest.mark.parametrize(
    "seconds, unit, last", [(4.0, "s", "4"), (0.04, "ms", "40"), (0.0004, "µs", "400"), (123.0, "s", "120")]
)
def test_the_axis_has_round_numbers_in_a_readable_unit(seconds: float, unit: str, last: str) -> None:
    told = texts(to_svg(timeline_of(f"0F0:0-{seconds}")))
    assert unit in told
    assert told[told.index(unit) - 1] == last


def test_a_number_is_written_only_where_it_fits() -> None:
    timeline = timeline_of("0F7:0-100 0F8:100-100.001 0F9:101-101")
    told = texts(to_svg(timeline))
    assert "7" in told
    assert "8" not in told
    assert len(boxes(to_svg(timeline))) == 2  # what took no time has no box


def test_transfers_that_take_time_are_lines_and_free_ones_are_not() -> None:
    schedule, compute = generate("gpipe", num_ranks=2, num_micro_batches=1), Costs.uniform(2).compute_seconds
    slow = Costs(compute_seconds=compute, activation_seconds={(0, 1): 0.5}, gradient_seconds={(0, 1): 0.5})
    assert to_svg(simulate(schedule, costs=slow)).count('class="v"') == 1
    assert 'class="v"' not in to_svg(simulate(schedule, costs=Costs(compute_seconds=compute)))


def test_what_runs_beside_the_computing_is_a_thin_bar_below_it() -> None:
    picture = to_svg(timeline_of("0F0:0-2 0O0:2-3 0B0:2-6 0G:6-7"))
    heights = {rect.get("class"): rect.get("height") for rect in ElementTree.fromstring(picture).iter(f"{SVG}rect")
               if rect.get("height") != "12"}  # fmt: skip
    assert (heights["f0"], heights["b0"], heights["o0"], heights["g0"]) == ("18", "18", "4", "4")
    assert {"sum of gradients", "offload"} <= set(texts(picture))


def test_it_follows_a_dark_page_and_needs_nothing_from_elsewhere() -> None:
    picture = to_svg(timeline_of("0F0:0-1"))
    assert "prefers-color-scheme:dark" in picture
    assert "href" not in picture
    assert "url(" not in picture


@settings(max_examples=30)
@given(schedules())
def test_every_action_of_any_schedule_is_drawn_once_inside_the_picture(made: tuple[Schedule, Edges]) -> None:
    schedule, edges = made
    timeline = simulate(schedule, edges, costs=Costs.uniform(schedule.num_stages, forward=0.3, backward=1.1))
    drawn = boxes(to_svg(timeline))
    assert len(drawn) == sum(map(len, schedule.actions))
    assert all(x >= 0 and x + width <= 960 for _, x, _, width in drawn)


def test_a_picture_of_nothing_is_refused() -> None:
    with pytest.raises(ScheduleError, match="got 0 and width=960"):
        to_svg([])
    with pytest.raises(ScheduleError, match="width=50"):
        to_svg(timeline_of("0F0:0-1"), width=50)
    assert to_svg(Timeline(num_ranks=1, spans=())).startswith("<svg")
