"""What a stage sums, scatters and gathers behind a step, by hand."""

from __future__ import annotations

from shardwise.describe.kernels import ExchangeKind
from shardwise.layout import Layout
from shardwise.plan.price import placed_stages
from shardwise.plan.stage_exchanges import exchanges_of
from shardwise.plan.stage_work import StageWork
from tests.plan.test_price import CLUSTER, JOB

DENSE, EXPERTS = 1000, 600
WORK = StageWork(
    stage=0,
    parameters=DENSE + EXPERTS,
    trained=DENSE + EXPERTS,
    expert_parameters=EXPERTS,
    expert_trained=EXPERTS,
    kernels=(),
    saved_bytes=0.0,
)


def behind_a_step(layout: Layout) -> list[tuple[str, ExchangeKind, float, int]]:
    (placed,) = placed_stages([WORK], layout, CLUSTER, JOB)
    return [(name, kind, nbytes, span.num_ranks) for name, (kind, nbytes, span, _) in exchanges_of(placed)]


def test_gradients_of_experts_are_summed_over_their_copies_alone() -> None:
    assert behind_a_step(Layout(dp=2, ep=2)) == [
        ("reduce", ExchangeKind.ALL_REDUCE, 4.0 * DENSE, 4),
        ("reduce", ExchangeKind.ALL_REDUCE, 4.0 * EXPERTS, 2),
    ]


def test_where_states_are_divided_those_of_experts_are_too() -> None:
    """Scattered with the rest, summed over what is left of their copies, gathered once."""
    assert behind_a_step(Layout(dp=2, ep=2, fsdp=4, zero=1)) == [
        ("reduce", ExchangeKind.REDUCE_SCATTER, 4.0 * (DENSE + EXPERTS), 4),
        ("reduce", ExchangeKind.ALL_REDUCE, 4.0 * DENSE / 4, 4),
        ("reduce", ExchangeKind.ALL_REDUCE, 4.0 * EXPERTS / 4, 2),
        ("gather", ExchangeKind.ALL_GATHER, 4.0 * (DENSE + EXPERTS), 4),
    ]
