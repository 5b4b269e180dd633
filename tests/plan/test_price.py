"""The price of layouts of a small model by hand, against sums on paper and against the simulator."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shardwise.describe.cluster import Cluster, Device, Efficiency, Hosts, Link, Overheads
from shardwise.describe.kernels import Exchange, ExchangeKind, Kernel, KernelKind, Phase
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.job import Job
from shardwise.plan.price import Price, price
from shardwise.plan.stage_work import StageWork

CARD = Device(
    name="card",
    memory_bytes=10**9,
    flops_per_s={"float32": 1e12},
    bytes_per_s=1e12,
    efficiency=Efficiency(matmul=1.0, attention=1.0, memory=1.0, launch_s=0.0),
)
LINKS = (
    Link(name="in", bytes_per_s=1e11, latency_s=0.0, ranks=4, efficiency=1.0),
    Link(name="out", bytes_per_s=1e10, latency_s=0.0, efficiency=1.0),
)
CLUSTER = Cluster(hosts=(Hosts(device=CARD, devices=4, count=4),), links=LINKS)
JOB = Job(global_batch=64)


def passing(phase: Phase, seconds: float) -> Kernel:
    return Kernel(kind=KernelKind.MEMORY, phase=phase, dtype="float32", nbytes=round(seconds * 1e12))


def work(stage: int = 0, last: int = 0, **changes: Any) -> StageWork:
    """A stage whose forward takes 1 s and whose backward takes 2 s, half of it for weights."""
    given: dict[str, Any] = {
        "stage": stage,
        "parameters": 0,
        "trained": 0,
        "kernels": tuple(passing(phase, 1.0) for phase in Phase),
        "saved_bytes": 1e6,
        "sends": {stage + 1: 0.0} if stage < last else {},
        "gradients": {stage + 1: 0.0} if stage < last else {},
        **changes,
    }
    return StageWork(**given)


def stages(layout: Layout, **changes: Any) -> list[StageWork]:
    return [work(stage, layout.num_stages - 1, **changes) for stage in range(layout.num_stages)]


def priced(layout: Layout, count: int = 4, *, cluster: Cluster = CLUSTER, job: Job = JOB, **changes: Any) -> Price:
    return price(stages(layout, **changes), layout, cluster, job, num_micro_batches=count)


def test_one_device_takes_the_sum_of_its_kernels() -> None:
    found = priced(Layout())
    assert found.step_s == pytest.approx(4 * 3.0)
    assert found.time[0].compute == pytest.approx(12.0)
    assert found.time[0].total == pytest.approx(found.step_s)


def test_a_pipeline_waits_for_its_first_and_last_micro_batch() -> None:
    found = priced(Layout(pp=4), 8)
    assert found.step_s == pytest.approx((8 + 3) * 3.0)
    assert found.bubble_fraction == pytest.approx(3 / 11)
    for lines in found.time:
        assert lines.total == pytest.approx(found.step_s)


@pytest.mark.parametrize("count, more", [(1, 0.0), (2, 0.5), (4, 1.5)])
def test_every_micro_batch_but_the_first_adds_its_gradients_to_those_before(count: int, more: float) -> None:
    adds = (passing(Phase.WEIGHT, 0.5),)
    found = priced(Layout(), count, accumulation=adds)
    assert found.step_s == pytest.approx(count * 3.0 + more)
    assert found.time[0].compute == pytest.approx(found.step_s)
    exact = price([work(accumulation=adds)], Layout(), CLUSTER, JOB, num_micro_batches=count, exact=True)
    assert exact.step_s == pytest.approx(found.step_s)


def test_a_step_is_as_slow_as_the_slowest_of_its_hosts() -> None:
    """Of 2, 4 normal numbers the largest is expected 0.564, 1.029 deviations above the mean."""
    uneven = dataclasses.replace(CLUSTER, overheads=Overheads(spread=0.1))
    for devices, largest in ((1, 0.0), (4, 0.0), (8, 0.564), (16, 1.029)):
        even_s, found = (priced(Layout(dp=devices), 1, cluster=own) for own in (CLUSTER, uneven))
        assert found.step_s / even_s.step_s == pytest.approx(1 + 0.1 * largest, abs=0.003)
        assert found.time[0].total == pytest.approx(found.step_s)


def test_sums_in_many_calls_have_the_hops_of_each() -> None:
    """16 replicas on four hosts, rings alone: 30 hops of 0.1 s a call, and the same bytes."""
    links = (CLUSTER.links[0], dataclasses.replace(CLUSTER.links[1], latency_s=0.1, trees=False))
    slow, job = dataclasses.replace(CLUSTER, links=links), dataclasses.replace(JOB, overlap_replicas=False)
    once, often = (
        priced(Layout(dp=16), 1, cluster=slow, job=dataclasses.replace(job, reduce_calls=calls), trained=10**6)
        for calls in (1.0, 5.0)
    )
    assert often.time[0].replicas - once.time[0].replicas == pytest.approx(4 * 30 * 0.1, rel=1e-3)
    with pytest.raises(LayoutError, match="reduce_calls=0"):
        dataclasses.replace(JOB, reduce_calls=0.0)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_the_closed_form_is_what_the_simulator_says(schedule: str) -> None:
    layout = Layout(pp=4, schedule=schedule)
    works = stages(layout)
    found = price(works, layout, CLUSTER, JOB, num_micro_batches=8)
    exact = price(works, layout, CLUSTER, JOB, num_micro_batches=8, exact=True)
    assert found.timeline is None
    assert exact.timeline is not None
    assert found.step_s == pytest.approx(exact.step_s)
    assert exact.timeline.seconds == pytest.approx(exact.step_s)


def test_recomputation_and_exchanges_are_lines_of_their_own() -> None:
    again = (passing(Phase.FORWARD, 1.0),)
    sums = (Exchange(kind=ExchangeKind.ALL_GATHER, axis="tp", phase=Phase.FORWARD, nbytes=2 * 10**11),)
    found = priced(Layout(tp=2), 1, recomputed=again, exchanges=sums)
    assert found.time[0].recompute == pytest.approx(1.0)
    assert found.time[0].tp == pytest.approx(1.0)  # half of 2e11 bytes at 1e11 bytes a second
    assert found.step_s == pytest.approx(5.0)


@pytest.mark.parametrize("hidden", [False, True])
def test_every_exchange_inside_a_unit_interrupts_what_computes(hidden: bool) -> None:
    """Five of them, in each of two micro-batches; those of a ring, too, where nothing hides."""
    sums = tuple(
        Exchange(kind=ExchangeKind.ALL_REDUCE, axis="tp", phase=phase, nbytes=0, count=count, hidden=hidden)
        for phase, count in ((Phase.FORWARD, 3), (Phase.INPUT, 2))
    )
    slow = dataclasses.replace(CLUSTER, overheads=Overheads(interrupted_s=0.1, overlap=0.0))
    found = priced(Layout(tp=2), 2, cluster=slow, exchanges=sums)
    assert found.step_s == pytest.approx(2 * (3.0 + 0.5))
    assert found.time[0].tp == pytest.approx(0.0 if hidden else 1.0)
    assert found.time[0].total == pytest.approx(found.step_s)
    four = priced(Layout(tp=4), 2, cluster=slow, exchanges=sums)
    assert four.step_s == pytest.approx(2 * (3.0 + 1.5))  # for each of three others
    alone = priced(Layout(dp=2), 2, cluster=slow)
    assert alone.step_s == pytest.approx(2 * 3.0)  # sums of gradients are behind what computes


@pytest.mark.parametrize("kind, messages", [(ExchangeKind.SEND, 1), (ExchangeKind.ALL_TO_ALL, 3)])
def test_messages_inside_a_unit_have_a_price_of_their_own(kind: ExchangeKind, messages: int) -> None:
    """A turn of a ring is one, an all-to-all among four is three."""
    sent = (Exchange(kind=kind, axis="cp", phase=Phase.FORWARD, nbytes=0, count=5),)
    slow = dataclasses.replace(CLUSTER, overheads=Overheads(message_s=0.1, interrupted_s=7.0, overlap=0.0))
    assert priced(Layout(cp=4), 2, cluster=slow, exchanges=sent).step_s == pytest.approx(2 * (3.0 + 0.5 * messages))


def test_functions_that_the_program_answers_take_their_own_time_again_where_a_forward_is() -> None:
    functions = Kernel(kind=KernelKind.FUNCTION, phase=Phase.FORWARD, dtype="", count=4)
    (hosts,) = CLUSTER.hosts
    reached = dataclasses.replace(hosts.device.efficiency, dealt_s=0.25, asked_s=1.0)
    slow = dataclasses.replace(
        CLUSTER, hosts=(dataclasses.replace(hosts, device=dataclasses.replace(hosts.device, efficiency=reached)),)
    )
    plain = priced(Layout(), 1, cluster=slow).step_s
    assert priced(Layout(), 1, cluster=slow, recomputed=(functions,)).step_s == pytest.approx(plain + 1.0)


def test_a_host_that_is_slower_than_its_device_sets_the_pace() -> None:
    slow = dataclasses.replace(CLUSTER, overheads=Overheads(kernel_s=10.0))
    found = priced(Layout(), 1, cluster=slow)
    assert found.step_s == pytest.approx(30.0, rel=0.01)  # three kernels; the device would take 3 s
    assert found.time[0].host == pytest.approx(27.0, rel=0.02)


def test_a_forward_that_is_computed_again_is_a_phase_in_which_the_host_may_be_ahead() -> None:
    """3 s a kernel of the host: 3 s for a forward of 1 s, 9 s for what takes the device 9, 6 s for a backward of 2."""
    slow = dataclasses.replace(CLUSTER, overheads=Overheads(kernel_s=3.0))
    found = priced(Layout(), 1, cluster=slow, recomputed=(passing(Phase.FORWARD, 9.0),))
    assert found.step_s == pytest.approx(3.0 + 9.0 + 6.0, rel=0.01)


def test_exchanges_of_a_forward_that_is_computed_again_are_of_its_phase() -> None:
    again = (passing(Phase.FORWARD, 1.0),)
    sums = Exchange(kind=ExchangeKind.ALL_GATHER, axis="tp", phase=Phase.INPUT, nbytes=16 * 10**11, again=True)
    slow = dataclasses.replace(CLUSTER, overheads=Overheads(kernel_s=3.0))
    found = priced(Layout(tp=2), 1, cluster=slow, recomputed=again, exchanges=(sums,))
    assert found.step_s == pytest.approx(3.0 + 9.0 + 6.0, rel=0.01)
    assert found.time[0].tp == pytest.approx(8.0)


def test_an_update_takes_the_host_a_start_for_every_kernel() -> None:
    slow = dataclasses.replace(CLUSTER, overheads=Overheads(kernel_s=0.01))
    free, many = (
        priced(Layout(), 1, cluster=slow, job=dataclasses.replace(JOB, step_kernels=count)) for count in (0, 200)
    )
    assert many.step_s - free.step_s == pytest.approx(2.0)
    assert many.time[0].optimizer == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_the_closed_form_is_the_simulators_where_a_pipeline_crosses_hosts_beside_shards(schedule: str) -> None:
    """Four shards inside each host, four stages on four hosts: hops of collectives hold up the host."""
    layout = Layout(tp=4, pp=4, schedule=schedule)
    crowded = dataclasses.replace(CLUSTER, overheads=Overheads(kernel_s=0.1, crowded_s=0.5))
    sums = tuple(
        Exchange(kind=ExchangeKind.ALL_REDUCE, axis="tp", phase=phase, nbytes=10**9, count=2)
        for phase in (Phase.FORWARD, Phase.INPUT)
    )
    works = stages(layout, exchanges=sums)
    closed, exact, alone = (
        price(works, layout, cluster, JOB, num_micro_batches=8, exact=simulated)
        for cluster, simulated in ((crowded, False), (crowded, True), (CLUSTER, False))
    )
    assert closed.step_s == pytest.approx(exact.step_s)
    assert closed.step_s > 1.2 * alone.step_s


def test_sums_of_gradients_hide_behind_the_last_backward_or_show() -> None:
    """1e11 bytes around a ring of four: 1.5 s; a backward takes 2 s."""
    some: dict[str, Any] = {"parameters": 25 * 10**9, "trained": 25 * 10**9}
    per = dataclasses.replace(JOB.per_parameter, gradient=0, optimizer=0, parameter=0)
    hidden = priced(Layout(dp=4), 1, job=dataclasses.replace(JOB, per_parameter=per), **some)
    shown = priced(Layout(dp=4), 1, job=dataclasses.replace(JOB, per_parameter=per, overlap_replicas=False), **some)
    assert hidden.step_s == pytest.approx(3.0)
    assert shown.step_s == pytest.approx(4.5)
    assert shown.time[0].replicas == pytest.approx(1.5)


def test_without_overlap_a_rank_sums_the_gradients_of_all_its_stages_behind_its_last_backward() -> None:
    """5e10 bytes a stage around a ring of four: 0.75 s each; of two chunks on one rank 1.5 s."""
    some: dict[str, Any] = {"parameters": 125 * 10**8, "trained": 125 * 10**8}
    per = dataclasses.replace(JOB.per_parameter, gradient=0, optimizer=0, parameter=0)
    job = dataclasses.replace(JOB, per_parameter=per, overlap_replicas=False)
    layout = Layout(dp=4, pp=2, schedule="interleaved", chunks=2)
    links = (dataclasses.replace(LINKS[0], ranks=8), LINKS[1])
    cluster = Cluster(hosts=(Hosts(device=CARD, devices=8),), links=links)
    found, free = (priced(layout, 2, job=job, cluster=cluster, **own) for own in (some, {}))
    assert found.step_s - free.step_s == pytest.approx(1.5)


def test_divided_optimizers_update_less_and_gather_parameters() -> None:
    some: dict[str, Any] = {"parameters": 10**9, "trained": 10**9}
    whole, divided = (priced(layout, 1, **some) for layout in (Layout(dp=4), Layout(fsdp=4, zero=1)))
    assert divided.time[0].optimizer < 0.5 * whole.time[0].optimizer
    assert divided.time[0].replicas > whole.time[0].replicas
    assert divided.memory[0].optimizer == pytest.approx(whole.memory[0].optimizer / 4)


def test_parameters_gathered_for_every_micro_batch_show_where_computing_is_shorter() -> None:
    """1e12 bytes around a ring of four at 1e11 bytes a second: 7.5 s, where a forward takes 1 s and a backward 2 s."""
    some: dict[str, Any] = {"parameters": 25 * 10**10, "trained": 0}
    found = priced(Layout(fsdp=4, zero=3), 2, **some)
    assert found.time[0].replicas == pytest.approx(2 * (6.5 + 13.0), rel=0.01)  # gradients of 4 bytes besides
    assert found.time[0].host == pytest.approx(0.0, abs=1e-9)
    assert found.time[0].total == pytest.approx(found.step_s)


def test_what_does_not_fit_is_said() -> None:
    assert priced(Layout(), saved_bytes=9e8).fits
    assert not priced(Layout(), saved_bytes=1.1e9).fits


def test_what_leaves_hardly_any_memory_fits_and_has_no_room() -> None:
    full, roomy = (priced(Layout(), 1, saved_bytes=nbytes) for nbytes in (9.6e8, 9.4e8))
    assert (full.fits, full.has_room) == (True, False)
    assert (roomy.fits, roomy.has_room) == (True, True)
    assert roomy.room == pytest.approx(0.06)


def test_utilisation_counts_the_model_and_not_what_is_computed_again() -> None:
    product = Kernel(
        kind=KernelKind.MATMUL,
        phase=Phase.FORWARD,
        dtype="float32",
        flops=2 * 10**12,
        shape=(1, 1000, 10**6, 1000),
    )
    once = priced(Layout(), 1, kernels=(product,))
    twice = priced(Layout(), 1, kernels=(product,), recomputed=(product,))
    assert once.mfu == pytest.approx(1.0)
    assert twice.mfu == pytest.approx(0.5)


def test_the_work_is_that_of_the_layout() -> None:
    with pytest.raises(LayoutError, match="2 stages"):
        price([work()], Layout(pp=2), CLUSTER, JOB, num_micro_batches=2)
