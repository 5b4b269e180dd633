"""Seconds of kernels by their shapes, on a device with round numbers."""

from __future__ import annotations

import dataclasses

import pytest

from shardwise.describe.cluster import Device, Efficiency
from shardwise.describe.kernels import Kernel, KernelKind, Phase
from shardwise.plan.compute import START_DEPTH, KernelTable, kernel_seconds

PLAIN = Efficiency(matmul=1.0, attention=1.0, memory=1.0, launch_s=0.0)
DEVICE = Device(
    name="round",
    memory_bytes=1 << 34,
    flops_per_s={"bfloat16": 1e14, "float32": 1e13},
    bytes_per_s=1e12,
    processors=100,
    efficiency=PLAIN,
)


def seconds(kernel: Kernel, device: Device = DEVICE) -> float:
    return float(kernel_seconds(KernelTable.of([kernel]), device)[0])


def product(m: int, n: int, k: int, *, batch: int = 1) -> Kernel:
    return Kernel(
        kind=KernelKind.MATMUL,
        phase=Phase.FORWARD,
        dtype="bfloat16",
        flops=2 * batch * m * n * k,
        nbytes=2 * batch * (m * k + k * n + m * n),
        shape=(batch, m, n, k),
    )


def passing(nbytes: int) -> Kernel:
    return Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="bfloat16", nbytes=nbytes)


def test_a_product_of_whole_waves_takes_its_flops_and_the_start_of_its_tiles() -> None:
    kernel = product(256 * 10, 128 * 10, 4096)  # 100 tiles: one wave
    assert seconds(kernel) == pytest.approx(kernel.flops / 1e14 * (4096 + START_DEPTH) / 4096)


def test_one_tile_too_many_costs_a_second_wave_or_smaller_tiles() -> None:
    whole, more = product(256 * 10, 128 * 10, 4096), product(256 * 10 + 8, 128 * 10, 4096)
    assert seconds(more) > 1.05 * seconds(whole)
    assert seconds(more) <= 2 * seconds(whole)


def test_rows_that_are_no_multiple_of_16_bytes_keep_matrix_units_idle() -> None:
    """BLOOM's heads of 108 instead of 112: a step of 148 s instead of 104 s."""
    assert seconds(product(2048, 2048, 108, batch=64)) > 5 * seconds(product(2048, 2048, 112, batch=64))


def test_a_core_packs_the_second_operand_before_it_computes() -> None:
    """That of a linear is its weight, 4 MB here, however many tokens there are."""
    reached = Efficiency(matmul=1.0, memory=1.0, launch_s=0.0, pack_bytes_per_s=4e9)
    core = Device(name="core", memory_bytes=1, flops_per_s={"float32": 1e11}, bytes_per_s=1e12, efficiency=reached)
    for tokens in (16, 512):
        kernel = dataclasses.replace(product(tokens, 1000, 1000), dtype="float32")
        found = float(kernel_seconds(KernelTable.of([kernel]), core)[0])
        assert found == pytest.approx(kernel.flops / 1e11 + 4e6 / 4e9)


def test_a_product_of_few_flops_takes_its_bytes() -> None:
    thin = product(8, 8192, 8192)
    assert seconds(thin) == pytest.approx(thin.nbytes / 1e12, rel=0.2)


def test_a_pass_over_memory_takes_its_bytes_and_never_less_than_a_launch() -> None:
    assert seconds(passing(10**9)) == pytest.approx(1e-3)
    slow = dataclasses.replace(DEVICE, efficiency=dataclasses.replace(PLAIN, launch_s=5e-6))
    assert seconds(passing(1), slow) == pytest.approx(5e-6)


def test_attention_waits_for_its_last_blocks() -> None:
    def attention(batch: int) -> Kernel:
        return Kernel(
            kind=KernelKind.ATTENTION,
            phase=Phase.FORWARD,
            dtype="bfloat16",
            flops=batch * 10**9,
            shape=(batch, 128, 128, 64, 64),
        )

    assert seconds(attention(100)) == pytest.approx(100 * 1e9 / 1e14)
    assert seconds(attention(101)) == pytest.approx(200 * 1e9 / 1e14)


def test_faster_devices_and_better_efficiencies_never_take_longer() -> None:
    kernels = [product(1000, 1000, 1000), product(8, 8, 8), passing(12345), product(4096, 4096, 64, batch=3)]
    table = KernelTable.of(kernels)
    worse = dataclasses.replace(DEVICE, efficiency=dataclasses.replace(PLAIN, matmul=0.5, memory=0.5))
    assert (kernel_seconds(table, worse) >= kernel_seconds(table, DEVICE)).all()


def test_an_empty_table_has_no_seconds() -> None:
    assert len(kernel_seconds(KernelTable.of([]), DEVICE)) == 0
