"""Scaling over numbers of devices: read from text, searched, put into a table and a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from shardwise.errors import ConfigError
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.resize import of_devices, usd_per_second
from shardwise.plan.scaling_svg import scaling_svg
from shardwise.plan.what_if import parse_sweep, scaling_table, sweep
from tests.plan.hand_works import cluster, limits, works


@pytest.mark.parametrize(
    "text, devices",
    [("devices=8..64", (8, 16, 32, 64)), ("devices=4..12", (4, 8, 12)), ("devices=3,6,24", (3, 6, 24))],
)
def test_a_sweep_doubles_or_is_listed(text, devices) -> None:
    assert parse_sweep(text) == devices


@pytest.mark.parametrize("text", ["nodes=1..8", "devices=8..", "devices=x", "devices=8,4", "devices=0..8"])
def test_a_sweep_that_cannot_be_read_is_an_error(text) -> None:
    with pytest.raises(ConfigError, match="write devices=8..1024"):
        parse_sweep(text)


def scalings():
    job = Job(global_batch=32, per_parameter=PerParameter.mixed())
    return sweep(works(), cluster(), job, limits=limits(), devices=(1, 2, 4, 8), most=60)


def test_more_devices_are_faster_and_less_efficient() -> None:
    strong, weak = scalings()
    speeds = [point.samples_per_s for point in strong.points]
    assert speeds == sorted(speeds)
    assert strong.efficiency(strong.points[0]) == 1.0
    assert strong.efficiency(strong.points[-1]) <= 1.01
    assert [point.global_batch for point in weak.points] == [4, 8, 16, 32]


def test_the_table_has_a_line_a_point() -> None:
    strong, _ = scalings()
    assert len(scaling_table(strong)) == 2 + len(strong.points)


def test_the_picture_is_svg_with_a_mark_a_point() -> None:
    tree = ET.fromstring(scaling_svg(scalings(), title="layers"))
    marks = [each for each in tree.iter() if each.tag.endswith("circle")]
    assert len(marks) == 8


def test_fewer_devices_are_the_first_hosts() -> None:
    machine = cluster(hosts=4, devices=4)
    assert of_devices(machine, 8).num_devices == 8
    assert of_devices(machine, 2).hosts[0].devices == 2
    assert of_devices(machine, 64).num_devices == 64
    with pytest.raises(ConfigError, match="whole hosts"):
        of_devices(machine, 6)


def test_dollars_are_those_of_all_devices() -> None:
    assert usd_per_second(cluster(hosts=2, devices=4)) == pytest.approx(8 * 2.0 / 3600)
