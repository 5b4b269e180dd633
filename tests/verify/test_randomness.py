"""The loss curve does not know the layout, with everything that a model draws at random switched on.

Micro-batches have two samples on every layout, because SpecAugment and LayerDrop draw once a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
from models import Example, make

from shardwise.launch import RankPool, RankStarter
from shardwise.layout import Layout
from shardwise.verify.sides import Job, run_side

pytestmark = pytest.mark.slow  # `make verify-all`

STEPS, MICRO_BATCHES = 20, 4  # of all replicas
ONE_DEVICE = Layout()
# dropout, also on attention; LayerDrop; SpecAugment in time and features, and LayerDrop
MODELS = ("bert", "bart", "wav2vec2")


@pytest.fixture(scope="module")
def pools(starter: RankStarter, one: RankPool) -> Iterator[Mapping[int, RankPool]]:
    with (
        RankPool(2, starter=starter, num_threads=1) as two,
        RankPool(4, starter=starter, num_threads=1) as four,
    ):
        yield {1: one, 2: two, 4: four}


@pytest.fixture(scope="module")
def curve(pools: Mapping[int, RankPool]) -> Callable[[str, Layout], list[float]]:
    """The losses of a model's first steps under a layout; each is computed once."""
    known: dict[tuple[str, Layout], list[float]] = {}

    def losses(name: str, layout: Layout) -> list[float]:
        if (name, layout) not in known:
            of_replica = MICRO_BATCHES // layout.dp
            job = _job(make(name), layout, of_replica)
            sides = pools[layout.world_size].run(run_side, job, layout, of_replica, False, timeout_s=60)
            known[(name, layout)] = sides[0].losses
        return known[(name, layout)]

    return losses


def _job(example: Example, layout: Layout, micro_batches: int) -> Job:
    return Job(
        model=example.model,
        batch=example.batch,
        loss=example.loss,
        layout=layout,
        micro_batches=micro_batches,
        steps=STEPS,
        optimizer="sgd",
        learning_rate=0.02,
        dtype=None,
        batch_dims={},
        units=(),
        weight=None,
    )


@pytest.mark.parametrize("layout", ["dp=2", "pp=2", "dp=2,pp=2"])
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_have_the_losses_of_one_device(
    name: str, layout: str, curve: Callable[[str, Layout], list[float]]
) -> None:
    wanted = curve(name, ONE_DEVICE)
    assert len(wanted) == STEPS
    assert curve(name, Layout.parse(layout)) == pytest.approx(wanted, rel=1e-5)
