"""What a search keeps of prices changes none of them."""

from __future__ import annotations

import pytest

from shardwise.layout import Layout
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.price import price
from shardwise.plan.pricer import Pricer
from tests.plan.hand_works import cluster, limits, works

JOB = Job(global_batch=32, per_parameter=PerParameter.mixed())
LAYOUTS = (
    "dp=8,micro_batches=2",
    "fsdp=8,zero=1,micro_batches=2",
    "fsdp=8,zero=2,micro_batches=2",
    "fsdp=8,micro_batches=4",
    "dp=2,fsdp=4,micro_batches=2",
    "tp=4,pp=2,micro_batches=8",
    "tp=2,pp=4,sequence_parallel=on,micro_batches=16,recompute=full",
    "pp=4,fsdp=2,unshard=micro-batch,micro_batches=8,schedule=interleaved",
    "pp=4,fsdp=2,zero=1,micro_batches=8,schedule=zb-v",
    "cp=2,pp=2,dp=2,micro_batches=4",
)


@pytest.mark.parametrize("exact", [False, True])
def test_a_layout_costs_what_it_costs_by_itself_whatever_was_priced_before(exact) -> None:
    made, machine = works(), cluster()
    pricer = Pricer(made, machine, JOB, limits())
    for text in LAYOUTS:
        layout = Layout.parse(text)
        count = layout.num_micro_batches(JOB.global_batch)
        samples = JOB.global_batch // (layout.num_replicas * count)
        alone = price(made(layout, samples), layout, machine, JOB, num_micro_batches=count, exact=exact)
        found = pricer(layout, exact=exact).price
        assert found.step_s == pytest.approx(alone.step_s, rel=1e-9), text
        assert found.memory == alone.memory
        assert found.fits == alone.fits


def test_an_outline_has_the_fullest_place_and_the_same_seconds() -> None:
    pricer = Pricer(works(), cluster(), JOB, limits())
    layout = Layout(pp=4, dp=2, micro_batches=8)
    whole, outline = pricer(layout), pricer(layout, outline=True)
    assert outline.price.step_s == whole.price.step_s
    assert outline.peak_bytes == whole.peak_bytes
    assert len(outline.price.memory) < len(whole.price.memory)
