"""Clusters are written as people write them, and read back without a digit lost."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.describe.catalogue import named_cluster
from shardwise.describe.cluster import Cluster, Device, Efficiency, Hosts, Link, Overheads
from shardwise.describe.cluster_file import cluster_text, clusters_from, read_clusters
from shardwise.errors import ConfigError

TEXT = """
name = "two boxes"

[[hosts]]
devices = 2
count = 2

[hosts.device]
name = "card"
memory_bytes = "24 GB"
bytes_per_s = "1.01 TB/s"
flops_per_s = { float32 = "82.6 Tflops/s" }

[[links]]
name = "PCIe"
bytes_per_s = "31 GB/s"
latency_s = "5 us"
ranks = 2

[[links]]
name = "network"
bytes_per_s = 3.125e9
latency_s = 2e-5
"""


def parsed(text: str) -> Cluster:
    (cluster,) = clusters_from(tomllib.loads(text))
    return cluster


def test_a_file_reads_as_it_looks() -> None:
    cluster = parsed(TEXT)
    device = cluster.hosts[0].device
    assert (cluster.name, cluster.num_devices) == ("two boxes", 4)
    assert (device.memory_bytes, device.bytes_per_s, device.flops_per_s) == (
        24_000_000_000,
        1.01e12,
        {"float32": 8.26e13},
    )
    assert [(link.bytes_per_s, link.latency_s, link.ranks) for link in cluster.links] == [
        (31e9, 5e-6, 2),
        (3.125e9, 2e-5, None),
    ]
    assert device.efficiency == Efficiency()
    assert cluster.overheads == Overheads()


def test_numbers_are_written_with_their_units() -> None:
    text = cluster_text(parsed(TEXT), comment="measured\non a Sunday")
    assert text.startswith("# measured\n# on a Sunday\n")
    for line in ('memory_bytes = "24 GB"', 'float32 = "82.6 Tflops/s"', 'latency_s = "20 us"', "ranks = 2"):
        assert line in text.splitlines()
    assert "usd_per_hour" not in text  # None


@pytest.mark.parametrize("name", ["h100x8x4", "a100x8x2+v100x8x2", "local3", "mi300xx8", "l4"])
def test_named_clusters_survive_a_round_trip(name) -> None:
    assert parsed(cluster_text(named_cluster(name))) == named_cluster(name)


def _numbers(kind: type, **given: Any) -> st.SearchStrategy[Any]:
    """A dataclass with any number in every field that is one: shares in their range."""
    shares = {"matmul", "attention", "memory", "efficiency", "overlap", "update"}
    counts = {"memory_bytes", "framework_bytes", "processors"}
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in dataclasses.fields(kind):
        if field.name in given:
            fields[field.name] = given[field.name]
        elif field.name in counts:
            fields[field.name] = st.integers(1, 2**48)
        elif field.name in shares:
            fields[field.name] = st.floats(1e-3, 1.0)
        elif isinstance(field.default, bool):
            fields[field.name] = st.booleans()
        else:
            fields[field.name] = st.floats(1e-9, 1e18)
    return st.builds(kind, **fields)


DEVICES = _numbers(
    Device,
    name=st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8),
    flops_per_s=st.dictionaries(
        st.sampled_from(["float32", "bfloat16", "an odd name"]), st.floats(1.0, 1e18), min_size=1
    ),
    efficiency=_numbers(Efficiency),
)
LINKS = _numbers(Link, name=st.just("any"), ranks=st.none())
CLUSTERS = _numbers(
    Cluster,
    name=st.sampled_from(["", 'a "quoted" \\ name']),
    hosts=st.lists(st.builds(Hosts, device=DEVICES, devices=st.integers(1, 99)), min_size=1, max_size=2).map(tuple),
    links=LINKS.map(lambda link: (link,)),
    overheads=_numbers(Overheads),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # both go by the clock of a busy machine
@given(CLUSTERS)
def test_any_cluster_survives_a_round_trip(cluster) -> None:
    assert parsed(cluster_text(cluster)) == cluster


def test_a_file_of_several_clusters_keeps_their_order() -> None:
    several = (named_cluster("local2"), named_cluster("h100x8x2"))
    assert clusters_from(tomllib.loads(cluster_text(several))) == several


@pytest.mark.parametrize(
    "old, new, told",
    [
        ('name = "card"', 'nmae = "card"', r"hosts\[0\].device has .*, but got nmae; did you mean name"),
        ("devices = 2", "", r"hosts\[0\] needs devices, and has"),
        ('latency_s = "5 us"', 'latency_s = "5 parsecs"', r"links\[0\].latency_s: '5parsecs' is not a duration; .*us"),
        ('bytes_per_s = "31 GB/s"', 'bytes_per_s = "31 GB"', r"links\[0\].bytes_per_s: '31 GB' is not a rate; .*GB/s"),
        ('{ float32 = "82.6 Tflops/s" }', '"82.6 Tflops/s"', r"flops_per_s is a table of names and numbers"),
        ("devices = 2", "devices = 2.5", r"hosts\[0\].devices is a whole number, but got 2.5"),
        ("devices = 2", 'devices = "2"', r"hosts\[0\].devices: it is a number, but got '2'"),
        ("devices = 2", "devices = true", r"hosts\[0\].devices: it is a number, but got True"),
        ("ranks = 2", "ranks = 2\nreduces = 1", r"links\[0\].reduces is true or false, but got 1"),
        ("ranks = 2", "ranks = 2\nefficiency = 1.5", "efficiency is a share"),
        ("ranks = 2", "", "every link but the last"),
        ('name = "two boxes"', 'name = "x"\noverheads = 3', "overheads is a table of .*but got 3"),
        ('name = "two boxes"', "name = 3", "name is text, but got 3"),
    ],
)
def test_what_a_cluster_does_not_have_is_refused_with_its_place_and_repair(tmp_path, old, new, told) -> None:
    assert old in TEXT
    file = tmp_path / "cluster.toml"
    file.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ConfigError, match=told) as raised:
        read_clusters(file)
    assert str(raised.value).startswith(str(file))


def test_files_that_cannot_be_read_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: No such file"):
        read_clusters(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("hosts = [")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_clusters(tmp_path / "broken.toml")
    with pytest.raises(ConfigError, match=r"has \[\[clusters\]\] alone, but got \['name'\]"):
        clusters_from({"clusters": [], "name": "x"})
