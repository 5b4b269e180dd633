"""What a search looks at can be built and is one device: a layout for every value of every axis that was tried."""

from __future__ import annotations

import dataclasses

import pytest
from models import make

from shardwise.describe.cluster import Cluster, Device, HostMemory, Hosts, Link
from shardwise.launch import RankStarter
from shardwise.layout import Layout, Offload
from shardwise.plan.budget import within_budget
from shardwise.plan.job import Job
from shardwise.plan.pricer import Pricer
from shardwise.plan.search import Search, search_layouts
from shardwise.plan.space import Axes
from shardwise.train.traced_model import Traced, traced_model
from shardwise.verify import verify

RANKS, BATCH = 4, 4
_RICHEST = slice(1, 2)  # the first has no axis but dp, the next one the most kinds
EXAMPLE = make("llama")


def machine(memory_bytes: int = 1 << 34, *, hosts: int = RANKS // 2) -> Cluster:
    """Devices that compute so slowly that what else is done does not show: every axis has its turn."""
    device = Device(name="slow", memory_bytes=memory_bytes, flops_per_s={"float32": 1e9}, bytes_per_s=1e9)
    store = HostMemory(memory_bytes=1 << 34, link_bytes_per_s=1e9, bytes_per_s=1e9)
    links = (
        Link(name="inside", bytes_per_s=1e9, latency_s=1e-5, ranks=2),
        Link(name="out", bytes_per_s=1e8, latency_s=1e-4),
    )
    return Cluster(hosts=(Hosts(device=device, devices=2, count=hosts, memory=store),), links=links)


@pytest.fixture(scope="module")
def model() -> Traced:
    """Divided by two alone, which is traced in half of the time."""
    return traced_model(EXAMPLE.model, EXAMPLE.batch, samples=BATCH, cluster=machine(hosts=1), loss=EXAMPLE.loss)


def searched(model: Traced) -> Search:
    axes = Axes.of(model.limits, machine(), global_batch=BATCH)
    axes = dataclasses.replace(axes, samples=(1,), ways=(("1f1b", 1), ("zb-v", 2)))
    return search_layouts(model.works, machine(), Job(global_batch=BATCH), limits=model.limits, axes=axes, top=3)


def pricer_of(model: Traced) -> Pricer:
    return Pricer(model.works, machine(), Job(global_batch=BATCH), model.limits)


def kinds(layout: Layout) -> set[str]:
    """The values of a layout's axes that mean another program."""
    found = {f"recompute={layout.recompute}", f"offload={layout.offload}", f"tp={layout.tp}", f"ep={layout.ep}"}
    found.add(f"cp={layout.cp},{layout.context}" if layout.cp > 1 else "cp=1")
    found.add(f"pp={layout.pp},{layout.schedule}" if layout.pp > 1 else "pp=1")
    found.add(f"sequence_parallel={layout.sequence_parallel}")
    state = f"zero={layout.zero},by step={layout.unshards_by_step},pp={layout.pp > 1}"
    found.add(state + f",dp={layout.dp > 1}" if layout.fsdp > 1 else "whole")
    return found


def covering(layouts: list[Layout]) -> list[Layout]:
    """A few of them that have all kinds: each time the one with the most new ones."""
    left, chosen = set[str]().union(*map(kinds, layouts)), list[Layout]()
    while left:
        chosen.append(max(layouts, key=lambda layout: len(kinds(layout) & left)))
        left -= kinds(chosen[-1])
    return chosen


@pytest.fixture(scope="module")
def chosen(model: Traced) -> list[Layout]:
    """A few layouts of the space of a search that have every kind."""
    space = searched(model).explorer.space
    return covering([space.layout(row) for row in range(len(space))])


def assert_one_device(layouts: list[Layout], pricer: Pricer, starter: RankStarter) -> None:
    for layout in layouts:
        assert Layout.parse(str(layout)) == layout
        assert pricer(layout).price.step_s > 0
        comparison = verify(
            EXAMPLE.model, EXAMPLE.batch, layout=layout, loss=EXAMPLE.loss, starter=starter, timeout_s=100
        )
        assert comparison.equal, f"{layout}: {comparison}"


def test_a_search_looks_at_every_value_of_every_axis(chosen: list[Layout]) -> None:
    found = set[str]().union(*map(kinds, chosen))
    assert {f"offload={word}" for word in Offload} <= found
    assert {"cp=2,ring", "cp=2,ulysses", "recompute=selective", "recompute=full"} <= found
    assert {f"zero=3,by step={step},pp=True,dp=False" for step in (True, False)} <= found
    assert "zero=2,by step=False,pp=True,dp=False" in found


def test_the_layout_with_the_most_kinds_is_one_device(
    model: Traced, chosen: list[Layout], starter: RankStarter
) -> None:
    assert_one_device(chosen[_RICHEST], pricer_of(model), starter)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kind_that_a_search_looks_at_is_one_device(
    model: Traced, chosen: list[Layout], starter: RankStarter
) -> None:
    assert_one_device(chosen, pricer_of(model), starter)


def test_a_budget_is_faster_than_computing_everything_again_and_is_one_device(
    model: Traced, starter: RankStarter
) -> None:
    pricer = pricer_of(model)
    full = pricer(Layout(pp=2, dp=2, micro_batches=2, recompute="full"), exact=True)
    none = pricer(Layout(pp=2, dp=2, micro_batches=2), exact=True)
    between = int((full.peak_bytes + none.peak_bytes) / 2 / 0.95)
    tight = Pricer(model.works, machine(between), pricer.job, pricer.limits)
    assert not tight(none.layout).has_room
    budget = within_budget(tight(full.layout, exact=True), tight)
    assert budget is not None
    assert none.price.step_s < budget.price.step_s < full.price.step_s
    assert budget.has_room
    assert budget.peak_bytes > full.peak_bytes
    assert Layout.parse(str(budget.layout)) == budget.layout
    comparison = verify(EXAMPLE.model, EXAMPLE.batch, layout=budget.layout, loss=EXAMPLE.loss, starter=starter)
    assert comparison.equal, str(comparison)
