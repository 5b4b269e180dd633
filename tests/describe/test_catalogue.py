"""Devices and clusters are found by the names that people give them, with the numbers that their makers promise."""

from __future__ import annotations

import pytest

from shardwise.describe.catalogue import entries, find_device, load_cluster, named_cluster
from shardwise.describe.cluster import Cluster
from shardwise.describe.cluster_file import cluster_text
from shardwise.errors import ConfigError

# device, dense Tflops/s in 16 bits, in float32; GB as sold; GB/s of memory, of a link; share that products reach
PROMISED = [
    ("gb300", 2500, 80, 288, 8000, 900, None),
    ("gb200", 2500, 80, 186, 8000, 900, 0.729),
    ("b300", 2250, 80, 288, 8000, 900, 0.786),
    ("b200", 2250, 80, 180, 8000, 900, 0.776),
    ("h200", 989, 67, 141, 4800, 450, 0.803),
    ("h100", 989, 67, 80, 3350, 450, 0.803),
    ("h100 pcie", 756, 51, 80, 2000, 63, None),
    ("gh200", 989, 67, 141, 4800, 450, 0.838),
    ("h800", 989, 67, 80, 3350, 200, None),
    ("a100", 312, 19.5, 80, 2000, 300, 0.869),
    ("a100-40gb", 312, 19.5, 40, 1555, 300, None),
    ("a100 pcie", 312, 19.5, 80, 1940, 31, 0.811),
    ("v100", 125, 15.7, 32, 900, 150, None),
    ("v100-16gb", 125, 15.7, 16, 900, 150, None),
    ("v100 pcie", 112, 14, 32, 900, 16, None),
    ("mi355x", 2500, 157.3, 288, 8000, 535.5, 0.626),
    ("mi325x", 1300, 163.4, 256, 6000, 448, 0.604),
    ("mi300x", 1300, 163.4, 192, 5300, 448, 0.514),
    ("mi250x", 191.5, 23.95, 64, 1640, 175, None),
    ("l40s", 362, 91.6, 48, 860, 31, None),
    ("l4", 121, 30.3, 24, 300, 31, None),
    ("a10", 125, 31.2, 24, 600, 31, None),
    ("rtx 4090", 165.2, 82.6, 24, 1010, 31, None),
    ("rtx 3090", 71, 35.6, 24, 936, 31, None),
    ("t4", 65, 8.1, 16, 300, 16, None),
]


@pytest.mark.parametrize("name, half, single, sold_gb, memory, link, matmul", PROMISED, ids=lambda v: str(v))
def test_a_device_has_the_numbers_of_its_datasheet(name, half, single, sold_gb, memory, link, matmul) -> None:
    found = find_device(name)
    device = found.device
    assert device.flops_per_s["float16"] == pytest.approx(half * 1e12)
    assert device.flops_per_s["float32"] == pytest.approx(single * 1e12)
    assert device.bytes_per_s == pytest.approx(memory * 1e9)
    assert found.inside.bytes_per_s == pytest.approx(link * 1e9)
    assert 0.85 * sold_gb * 2**30 < device.memory_bytes <= sold_gb * 2**30  # what torch sees of it
    if matmul is not None:
        assert device.efficiency.matmul == matmul


def test_every_device_says_where_its_numbers_are_from_and_what_an_hour_of_it_costs() -> None:
    for each in entries():
        assert each.sources["rates"]
        assert each.device.processors > 1
        assert each.device.usd_per_hour
        assert each.device.flops_per_s["float32"] <= each.device.flops_per_s["float16"]


def test_names_are_not_those_of_two_devices() -> None:
    for each in entries():
        for name in (each.device.name, *each.names):
            assert find_device(name) == each


@pytest.mark.parametrize(
    "told, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2 16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_what_torch_calls_a_device_is_found(told, name) -> None:
    assert find_device(told).device.name == name


def test_a_v100_computes_in_bfloat16_as_slowly_as_in_float32() -> None:
    device = find_device("v100").device
    assert device.rate("bfloat16") == device.rate("float32") < device.rate("float16")


@pytest.mark.parametrize(
    "text, per_host, joined",
    [
        ("h100", [(1, 1)], [None]),
        ("h100x8", [(8, 1)], [8, None]),
        ("h100x8x4", [(8, 4)], [8, None]),
        ("h100x64", [(8, 8)], [8, None]),
        ("rtx4090x8", [(8, 1)], [8, None]),
        ("rtx4090x8x2", [(8, 2)], [8, None]),
        ("h100x8x2+a100x8x2", [(8, 2), (8, 2)], [8, None]),
        ("l4x1x4", [(1, 4)], [None]),
        ("gb200x72x2", [(72, 2)], [72, None]),
    ],
)
def test_a_cluster_is_named_by_its_devices_hosts_and_kinds(text, per_host, joined) -> None:
    cluster = named_cluster(text)
    assert [(hosts.devices, hosts.count) for hosts in cluster.hosts] == per_host
    assert [link.ranks for link in cluster.links] == joined
    assert cluster.num_devices == sum(devices * count for devices, count in per_host)
    assert cluster.name == text


def test_hosts_of_one_device_meet_over_the_network() -> None:
    assert named_cluster("l4x1x4").links[0] == find_device("l4").between


def test_mixed_kinds_are_as_fast_as_the_slowest_link() -> None:
    mixed = named_cluster("h100x8x2+a100x8x2")
    assert mixed.links[0].name == find_device("a100").inside.name
    assert [mixed.device_of(rank).name[:4] for rank in (0, 15, 16, 31)] == ["H100", "H100", "A100", "A100"]
    assert not mixed.is_uniform


@pytest.mark.parametrize(
    "text, told",
    [
        ("h1000x8", "did you mean H100"),
        ("abacus", "write a cluster file"),
        ("h100x0", "no devices"),
        ("h100x12", "no whole number of hosts of 8"),
        ("h100x8x4x2", "is no cluster; write DEVICEx"),
        ("", "no device"),
    ],
)
def test_a_name_that_is_none_is_refused_with_what_to_write(text, told) -> None:
    with pytest.raises(ConfigError, match=told):
        named_cluster(text)


def test_ranks_that_share_cores_share_their_rates() -> None:
    few, many = Cluster.local(1), named_cluster("local4096")
    assert many.num_devices == 4096
    assert many.hosts[0].device.rate("float32") < few.hosts[0].device.rate("float32")
    assert many.hosts[0].device.memory_bytes == few.hosts[0].device.memory_bytes // 4096


def test_a_file_is_loaded_by_its_path_and_one_of_several_by_its_ranks(tmp_path) -> None:
    file = tmp_path / "cluster.toml"
    two, four = Cluster.local(2), Cluster.local(4)
    file.write_text(cluster_text([two, four]))
    assert load_cluster(str(file)) == two
    assert load_cluster(str(file), ranks=4) == load_cluster(f"{file}@4") == load_cluster(str(file), ranks=3) == four
    assert load_cluster(str(file), ranks=1) == two
    with pytest.raises(ConfigError, match=r"has clusters of 2, 4 devices, but 8 .*--ranks 2,4,8"):
        load_cluster(str(file), ranks=8)
    file.write_text(cluster_text(two))
    assert load_cluster(str(file), ranks=4) == two
    assert load_cluster("h100x8").num_devices == 8
