"""An estimate adds up memory, traffic and time as one would by hand."""

from __future__ import annotations

import dataclasses

import pytest

from hand_profiles import chain
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.cut import cut_stages
from shardwise.plan.estimate import costs_of, estimate, memory_of
from shardwise.plan.partition import place
from shardwise.plan.sources import breadth_first
from shardwise.schedule import Kind
from shardwise.schedule.memory import peak_bytes

RATE = 1e6  # flops a second, and so many flops a call: forward 1 s, backward 2 s


def estimated(profile, layout, *, num_micro_batches=1, flops_per_s=RATE, **options):
    cut = cut_stages(profile.flow, place(profile, layout), layout.num_stages)
    return estimate(profile, layout, cut, num_micro_batches=num_micro_batches, flops_per_s=flops_per_s, **options)


def test_one_device_holds_everything_and_never_waits() -> None:
    found = estimated(chain([10**6] * 3, elements=[4, 5, 6], glue_saved=7), Layout(), num_micro_batches=2)
    (stage,) = found.stages
    assert (stage.num_parameters, stage.parameter_bytes, stage.gradient_bytes) == (15, 60, 60)
    assert stage.optimizer_bytes == 120  # AdamW keeps two moments
    assert stage.activation_bytes == 307
    assert stage.memory_bytes == 60 + 60 + 120 + 307
    assert found.edges == ()
    assert found.step_s == pytest.approx(2 * 9, rel=1e-3)
    assert found.bubble_fraction == pytest.approx(0)


def test_sgd_keeps_nothing_and_an_unknown_optimizer_is_refused() -> None:
    assert estimated(chain([1]), Layout(), optimizer="sgd").stages[0].optimizer_bytes == 0
    with pytest.raises(LayoutError, match="one of adamw, sgd"):
        estimated(chain([1]), Layout(), optimizer="lion")


def test_activations_are_what_is_saved_and_received_for_every_micro_batch_in_flight() -> None:
    found = estimated(chain([10**6] * 4), Layout(pp=2), num_micro_batches=4)
    assert [stage.in_flight for stage in found.stages] == [2, 1]
    assert [stage.micro_batch_bytes for stage in found.stages] == [200, 232]  # 8 float32 arrive at stage 1
    assert [stage.activation_bytes for stage in found.stages] == [400, 232]


def test_gpipe_keeps_all_micro_batches() -> None:
    found = estimated(chain([10**6] * 4), Layout(pp=2, schedule="gpipe"), num_micro_batches=4)
    assert [stage.in_flight for stage in found.stages] == [4, 4]


def test_an_edge_carries_the_value_forward_and_its_gradient_back() -> None:
    (edge,) = estimated(chain([10**6] * 4), Layout(pp=2)).edges
    assert (edge.source, edge.target, edge.values) == (0, 1, (1,))
    assert (edge.forward_bytes, edge.backward_bytes) == (32, 32)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_bubble_is_that_of_the_schedule(name) -> None:
    found = estimated(chain([10**6] * 4), Layout(pp=4, schedule=name), num_micro_batches=8)
    assert found.bubble_fraction == pytest.approx(3 / 11, rel=1e-3)  # (p-1)/(m+p-1)
    assert found.imbalance == pytest.approx(1, rel=1e-3)


def test_a_slow_link_makes_the_step_longer() -> None:
    profile, layout = chain([10**6] * 2), Layout(pp=2)
    free, slow = estimated(profile, layout), estimated(profile, layout, bytes_per_s=32.0)
    assert slow.step_s == pytest.approx(free.step_s + 2)  # 32 bytes there and 32 back


def test_a_micro_batch_of_half_the_size_keeps_and_sends_half() -> None:
    half = estimated(chain([10**6] * 4), Layout(pp=2), scale=0.5)
    assert half.edges[0].forward_bytes == 16
    assert half.stages[0].micro_batch_bytes == 100
    assert half.stages[0].forward_s == pytest.approx(1)
    assert half.stages[0].parameter_bytes == 32


def test_replicas_send_their_gradients_around_a_ring() -> None:
    found = estimated(chain([10**6] * 4), Layout(dp=4, pp=2))
    assert found.stages[0].all_reduce_bytes == 2 * 3 * 32 // 4


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(LayoutError, match="flops_per_s is above 0"):
        estimated(chain([1]), Layout(), flops_per_s=0.0)


def test_a_rank_with_two_stages_holds_both_and_what_they_keep_at_once(tmp_path) -> None:
    path = tmp_path / "v.json"
    path.write_text(breadth_first(((0, 3), (1, 2)), 4).to_json())
    found = estimated(
        chain([10**6] * 4, elements=[4, 5, 6, 7]), Layout(pp=2, chunks=2, schedule=str(path)), num_micro_batches=4
    )
    assert [rank.stages for rank in found.ranks] == [(0, 3), (1, 2)]
    assert [rank.parameter_bytes for rank in found.ranks] == [44, 44]
    kept = [stage.micro_batch_bytes for stage in found.stages]
    assert [rank.activation_bytes for rank in found.ranks] == [4 * (kept[0] + kept[3]), 4 * (kept[1] + kept[2])]
    assert found.peak_bytes == max(rank.memory_bytes for rank in found.ranks)
    assert found.imbalance == pytest.approx(1, rel=1e-3)


def test_the_two_halves_of_a_backward_are_its_whole() -> None:
    stages = estimated(chain([10**6] * 4), Layout(pp=2)).stages
    costs = costs_of(stages, ())
    for stage in range(2):
        halves = costs.compute_seconds[Kind.I][stage] + costs.compute_seconds[Kind.W][stage]
        assert halves == pytest.approx(costs.compute_seconds[Kind.B][stage])


def test_a_split_backward_keeps_for_its_weights_what_they_are_made_of() -> None:
    profile, layout = chain([10**6] * 2), Layout(pp=2, schedule="zb-h2")
    whole = estimated(profile, layout, num_micro_batches=4)  # nobody counted: all of it stays until W
    assert [stage.weight_bytes for stage in whole.stages] == [stage.micro_batch_bytes for stage in whole.stages]
    calls = tuple(dataclasses.replace(call, weight_bytes=10) for call in profile.calls)
    counted = estimated(dataclasses.replace(profile, calls=calls), layout, num_micro_batches=4)
    assert [stage.weight_bytes for stage in counted.stages] == [10, 10]
    kept, memory = peak_bytes(counted.schedule, memory_of(counted.stages)), counted.ranks
    assert [rank.activation_bytes for rank in memory] == [round(nbytes) for nbytes in kept]
    assert [stage.activation_bytes for stage in counted.stages] == [rank.activation_bytes for rank in memory]
    assert counted.peak_bytes <= whole.peak_bytes
