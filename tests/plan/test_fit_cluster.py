"""A cluster is fitted so that the price's own formulas say what was measured."""

from __future__ import annotations

import dataclasses

import pytest

from shardwise.describe.catalogue import find_device
from shardwise.describe.cluster import Cluster, Device, Efficiency, Hosts, Link, Overheads
from shardwise.describe.kernels import Exchange, ExchangeKind, Kernel, KernelKind, Phase
from shardwise.describe.measured import (
    TINY,
    UPDATE,
    BlockTime,
    DividedTime,
    ExchangeTime,
    KernelTime,
    MachineTimes,
    PeakBytes,
    ProgramTime,
)
from shardwise.plan.collectives import exchange_seconds
from shardwise.plan.compute import KernelTable, kernel_seconds
from shardwise.plan.fit_cluster import FittedCluster, fit_cluster, held_of
from shardwise.plan.fit_coefficients import divided_s
from shardwise.plan.placing import Span

CORE = Device(
    name="a core",
    memory_bytes=8 << 30,
    flops_per_s={"float32": 60e9, "bfloat16": 150e9},
    bytes_per_s=20e9,
    efficiency=Efficiency(
        matmul=0.9, attention=0.3, memory=0.6, launch_s=1e-6, matmul_half_flops=3e5, memory_half_bytes=4e4
    ),
)
LINK = Link(name="shared memory", bytes_per_s=4e9, latency_s=20e-6, efficiency=0.8, half_bytes=30e3, meeting_s=50e-6)
ROUNDS = (0.97, 1.0, 1.04)  # how much slower the machine was in each
TINY_S = 30e-6


def kernels() -> list[Kernel]:
    made = []
    for m, n, k in ((64, 64, 64), (256, 256, 256), (1024, 1024, 1024), (512, 2048, 128)):
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            made.append(
                Kernel(
                    kind=KernelKind.MATMUL,
                    phase=Phase.FORWARD,
                    dtype=dtype,
                    flops=2 * m * n * k,
                    nbytes=(m * k + k * n + m * n) * size,
                    shape=(1, m, n, k),
                )
            )
    for tokens in (128, 1024):
        flops, nbytes = 4 * 8 * tokens * tokens * 64, 4 * 8 * tokens * 64 * 4
        shape = (8, tokens, tokens, 64, 64)
        made.append(
            Kernel(
                kind=KernelKind.ATTENTION, phase=Phase.FORWARD, dtype="float32", flops=flops, nbytes=nbytes, shape=shape
            )
        )
    for nbytes in (1 << 14, 1 << 18, 1 << 22, 1 << 27):
        made.append(Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=nbytes))
    return made


def measured(device: Device, link: Link, *, name: str = "a core", ranks: int = 2, noise: float = 1.0) -> MachineTimes:
    """What a machine that is as the formulas say would have shown."""
    table = KernelTable.of(kernels())
    cluster = Cluster(hosts=(Hosts(device=device, devices=ranks),), links=(link,))

    def rounds(seconds: float) -> tuple[float, ...]:
        return tuple(seconds * (1 + (each - 1) * noise) for each in ROUNDS)

    timed = [
        KernelTime(kernel=kernel, seconds=rounds(float(seconds)))
        for kernel, seconds in zip(kernels(), kernel_seconds(table, device), strict=True)
    ]
    tiny = Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=128)
    update = Kernel(kind=KernelKind.MEMORY, phase=Phase.WEIGHT, dtype="float32", nbytes=36 << 20)
    exchanges = [
        ExchangeTime(
            kind=kind,
            group=ranks,
            nbytes=nbytes,
            way="shared memory",
            seconds=rounds(exchange_seconds(kind, nbytes, Span(sizes=(ranks,)), cluster)),
        )
        for kind in ExchangeKind
        for nbytes in (4 << 10, 1 << 17, 1 << 20, 1 << 25)
    ]
    unused = dataclasses.replace(exchanges[0], way="gloo", seconds=(1.0, 1.0, 1.0), chosen=False)
    return MachineTimes(
        ranks=ranks,
        cores=2,
        device=name,
        memory_bytes=8 << 30,
        kernels=(
            KernelTime(kernel=tiny, seconds=rounds(TINY_S), what=TINY),
            KernelTime(kernel=update, seconds=rounds(update.nbytes / 5e9), what=UPDATE),
            *timed,
        ),
        exchanges=(*exchanges, unused),
        program=ProgramTime(
            action_s=rounds(400e-6),
            step_s=(-1e-4, 3e-4, 2e-4),
            start_s=3.0,
            layout_s=1.0,
            framework_bytes=200 << 20,
        ),
        hidden=(0.2, 0.3, 0.25),
    )


def divided(device: Device, link: Link, overheads: Overheads, *, slower: float = 1.0) -> tuple[DividedTime, ...]:
    """Ways to divide a model on a machine that is as the formulas say, and was slower by a factor meanwhile."""

    def way(group: int, functions: int, exchanges: tuple[Exchange, ...]) -> DividedTime:
        asked = Kernel(kind=KernelKind.FUNCTION, phase=Phase.FORWARD, dtype="", count=functions)
        made = (*(dataclasses.replace(kernel, count=40 // group) for kernel in kernels()), asked)
        time = DividedTime(what="", group=group, kernels=made, exchanges=exchanges, seconds=())
        alone = divided_s(time, dataclasses.replace(device, efficiency=bare), link, Overheads())
        added = divided_s(time, device, link, overheads) - alone
        return dataclasses.replace(time, seconds=tuple((alone * slower + added) * each for each in ROUNDS))

    def some(kind: ExchangeKind, count: int) -> Exchange:
        return Exchange(kind=kind, axis="tp", phase=Phase.FORWARD, nbytes=1 << 16, count=count)

    bare = dataclasses.replace(device.efficiency, dealt_s=0.0)
    return (
        way(1, 0, ()),
        way(2, 0, (some(ExchangeKind.ALL_REDUCE, 40),)),
        way(2, 90, (some(ExchangeKind.REDUCE_SCATTER, 40), some(ExchangeKind.ALL_GATHER, 40))),
        way(2, 160, (some(ExchangeKind.SEND, 30),)),
        way(4, 160, (some(ExchangeKind.ALL_TO_ALL, 30),)),
    )


def prices(cluster: Cluster) -> list[float]:
    found = kernel_seconds(KernelTable.of(kernels()), cluster.hosts[0].device).tolist()
    span = Span(sizes=(cluster.num_devices,))
    return [*found, *(exchange_seconds(kind, 1 << 20, span, cluster) for kind in ExchangeKind)]


def test_prices_of_the_fitted_cluster_are_what_was_measured() -> None:
    true = Cluster(hosts=(Hosts(device=CORE, devices=2),), links=(LINK,))
    fitted = fit_cluster(measured(CORE, LINK), on_gpu=True)  # where the program is not a part of every kernel
    assert prices(fitted.cluster) == pytest.approx(prices(true), rel=0.08)
    assert max(each.largest for each in fitted.residuals) < 0.08


def test_an_update_has_a_rate_of_its_own() -> None:
    device = fit_cluster(measured(CORE, LINK)).cluster.hosts[0].device
    assert device.bytes_per_s * device.efficiency.update == pytest.approx(5e9, rel=0.01)


def test_a_message_meets_nobody() -> None:
    """What all collectives cost and messages do not is told apart from the latency of a hop."""
    link = fit_cluster(measured(CORE, LINK, noise=0.0)).cluster.links[0]
    assert link.latency_s == pytest.approx(LINK.latency_s, rel=0.1)
    assert link.meeting_s == pytest.approx(LINK.meeting_s, rel=0.1)


def test_coefficients_are_physical_and_lie_between_those_of_the_rounds() -> None:
    fitted = fit_cluster(measured(CORE, LINK))
    by_name = {each.name: each for each in fitted.coefficients}
    for each in fitted.coefficients:
        assert 0 <= each.least <= each.value <= each.most
    for name in ("matmul", "attention", "memory", "efficiency"):
        assert 0 < by_name[name].most <= 1
    assert by_name["action_s"].value == pytest.approx(400e-6, rel=0.01)
    assert by_name["step_s"].least == 0  # a difference that noise made negative
    assert by_name["latency_s"].most > by_name["latency_s"].least > 0


def test_a_quiet_machine_gives_the_same_in_every_round() -> None:
    fitted = fit_cluster(measured(CORE, LINK, noise=0.0))
    for each in fitted.coefficients:
        if each.name not in ("step_s", "overlap"):
            assert each.most == each.least == each.value


@pytest.mark.parametrize("slower", [1.0, 1.3])
def test_what_a_program_adds_to_divided_units_is_told_apart_also_while_the_machine_is_slow(slower: float) -> None:
    added = Overheads(interrupted_s=2e-4, message_s=3e-4)
    device = dataclasses.replace(CORE, efficiency=dataclasses.replace(CORE.efficiency, dealt_s=5e-5))
    times = dataclasses.replace(measured(CORE, LINK, noise=0.0), divided=divided(device, LINK, added, slower=slower))
    fitted = fit_cluster(times)
    found = fitted.cluster
    assert found.overheads.interrupted_s == pytest.approx(2e-4, rel=0.1)
    assert found.overheads.message_s == pytest.approx(3e-4, rel=0.1)
    assert found.hosts[0].device.efficiency.dealt_s == pytest.approx(5e-5, rel=0.1)
    (residual,) = (each for each in fitted.residuals if each.what == "divided")
    assert residual.count == 4
    assert residual.largest < (0.05 if slower == 1.0 else 0.3)  # what fits the machine as it was for a while


def test_what_is_no_longer_divided_than_alone_costs_nothing_besides() -> None:
    times = dataclasses.replace(measured(CORE, LINK, noise=0.0), divided=divided(CORE, LINK, Overheads()))
    found = fit_cluster(times).cluster
    assert found.overheads.interrupted_s < 1e-5
    assert found.overheads.message_s < 1e-5
    assert found.hosts[0].device.efficiency.dealt_s < 5e-6


def test_blocks_settle_what_a_program_adds_to_kernels_and_what_rates_they_reach_in_it() -> None:
    true = dataclasses.replace(
        CORE,
        efficiency=dataclasses.replace(CORE.efficiency, memory=0.2, matmul_half_flops=1e6, memory_half_bytes=7.4e4),
    )
    blocks = []
    for size in (1, 8, 64, 512):
        shape = (1, 32 * size, 64, 64)
        product = Kernel(
            kind=KernelKind.MATMUL,
            phase=Phase.FORWARD,
            dtype="float32",
            flops=2 * 32 * size * 64 * 64,
            nbytes=4 * 64 * (64 * size + 64),
            shape=shape,
            count=4,
        )
        between = Kernel(
            kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=(1 << 15) * size, count=6 + size % 5
        )
        each = kernel_seconds(KernelTable.of([product, between]), true)
        seconds = float(each[0] * product.count + each[1] * between.count)
        blocks.append(BlockTime(what=f"forward of {size}", kernels=(product, between), seconds=(seconds,) * 3))
    times = dataclasses.replace(measured(CORE, LINK), blocks=tuple(blocks))
    fitted = fit_cluster(times)
    of_blocks = [each for each in fitted.residuals if each.what.startswith("block")]
    assert [each.count for each in of_blocks] == [4]
    assert of_blocks[0].largest < 0.15
    device = fitted.cluster.hosts[0].device
    assert device.bytes_per_s * device.efficiency.memory == pytest.approx(20e9 * 0.2, rel=0.1)


def test_on_a_core_the_program_delays_every_kernel() -> None:
    device = fit_cluster(measured(CORE, LINK)).cluster.hosts[0].device
    tiny = Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=128)
    (seconds,) = kernel_seconds(KernelTable.of([tiny]), device)
    assert seconds == pytest.approx(TINY_S, rel=0.02)
    small = Kernel(
        kind=KernelKind.MATMUL, phase=Phase.FORWARD, dtype="float32", flops=2 * 8**3, nbytes=768, shape=(1, 8, 8, 8)
    )
    (seconds,) = kernel_seconds(KernelTable.of([small]), device)
    assert seconds == pytest.approx(TINY_S, rel=0.02)


def gpu(name: str, promised: Device) -> FittedCluster:
    device = dataclasses.replace(promised, efficiency=Efficiency(matmul=0.7, attention=0.4, memory=0.8, launch_s=4e-6))
    link = Link(name="any", bytes_per_s=200e9, latency_s=5e-6, efficiency=0.9)
    return fit_cluster(measured(device, link, name=name), on_gpu=True)


def test_a_gpu_keeps_what_its_maker_promises_and_starts_kernels_from_the_host() -> None:
    promised = find_device("h100").device
    fitted = gpu("NVIDIA H100 80GB HBM3", promised)
    device = fitted.cluster.hosts[0].device
    assert device.flops_per_s == promised.flops_per_s
    assert (device.processors, device.memory_bytes) == (promised.processors, 8 << 30)
    assert fitted.cluster.overheads.kernel_s == pytest.approx(TINY_S, rel=0.01)
    assert fitted.cluster.overheads.overlap == 0.25
    assert device.efficiency.matmul == pytest.approx(0.7, rel=0.05)


def test_a_gpu_that_nobody_knows_has_the_best_rates_that_were_measured() -> None:
    fitted = gpu("Unheard-of 9000", find_device("h100").device)
    assert 0.3e15 < fitted.cluster.hosts[0].device.rate("bfloat16") < 0.989e15


def test_one_rank_has_no_link_to_measure() -> None:
    times = dataclasses.replace(measured(CORE, LINK), ranks=1, exchanges=())
    cluster = fit_cluster(times).cluster
    assert cluster.num_devices == 1
    assert cluster.links[0].name == "no other rank"


def peak(passing: float, measured: float) -> PeakBytes:
    return PeakBytes(states=40e6, passing=passing, measured=round(measured))


def test_two_peaks_tell_what_is_held_before_a_model_and_what_an_allocator_holds_besides() -> None:
    framework, slack = held_of([peak(10e6, 130e6 + 40e6 + 1.5 * 10e6), peak(60e6, 130e6 + 40e6 + 1.5 * 60e6)]) or (0, 0)
    assert framework == pytest.approx(130e6, rel=1e-3)
    assert slack == pytest.approx(0.5, abs=1e-3)


def test_an_allocator_never_holds_less_than_the_tensors() -> None:
    framework, slack = held_of([peak(10e6, 180e6), peak(60e6, 220e6)]) or (0, 0)
    assert slack == 0
    assert framework == pytest.approx((130e6 + 120e6) / 2)


def test_one_peak_tells_nothing_apart() -> None:
    assert held_of([peak(10e6, 180e6)]) is None
    assert held_of([]) is None


def test_ranks_that_are_more_than_cores_share_them_in_the_cluster() -> None:
    assert fit_cluster(dataclasses.replace(measured(CORE, LINK, ranks=4), cores=2)).cluster.hosts[0].crowd == 2
    assert fit_cluster(dataclasses.replace(measured(CORE, LINK, ranks=2), cores=2)).cluster.hosts[0].crowd == 1
