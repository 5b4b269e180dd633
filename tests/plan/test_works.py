"""A stage's work is the sum of its calls and glue: what it runs, runs again, holds, keeps and sends."""

from __future__ import annotations

import dataclasses

import pytest

from shardwise.describe.flow import Dataflow, Node, NodeKind, Value
from shardwise.describe.kernels import Exchange, ExchangeKind, Kernel, KernelKind, Phase
from shardwise.describe.profile import CallProfile, GlueProfile, ModelProfile, ParameterProfile, UnitProfile
from shardwise.plan.cut import Cut, cut_stages
from shardwise.plan.recompute import How, computed_again
from shardwise.plan.works import ADDED_IN_PLACE, stage_works

PRODUCT = Kernel(
    kind=KernelKind.MATMUL, phase=Phase.FORWARD, dtype="float32", flops=100, nbytes=50, shape=(1, 4, 2, 2),
    batch_dims=(1,), batch_bytes=30,
)  # fmt: skip
NORM = Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="float32", nbytes=20, count=2)
BACK = dataclasses.replace(PRODUCT, phase=Phase.INPUT)
SUM = Exchange(kind=ExchangeKind.ALL_REDUCE, axis="tp", phase=Phase.FORWARD, nbytes=16)
BACK_SUM = dataclasses.replace(SUM, phase=Phase.INPUT)
NAMES = ("embed", "first", "second", "head")


def profile() -> ModelProfile:
    """embed ─► first ─► second ─► head ─► loss; the head has the embedding's weight."""
    parameters = {name: ParameterProfile(shape=(10,), dtype="float32") for name in ("embed.w", "first.w", "second.w")}
    parameters["second.frozen"] = ParameterProfile(shape=(5,), dtype="float32", trainable=False)
    held = {"embed": ["embed.w"], "first": ["first.w"], "second": ["second.w", "second.frozen"], "head": ["embed.w"]}
    nodes, values = [], []
    for index, name in enumerate(NAMES):
        reads = () if index == 0 else (index - 1,)
        nodes.append(
            Node(index=index, kind=NodeKind.CALL, name=name, reads=reads, makes=(index,), parameters=tuple(held[name]))
        )
        values.append(value(index))
    nodes.append(Node(index=4, kind=NodeKind.OP, name="loss", reads=(3,), makes=(4,)))
    values.append(value(4))
    calls = tuple(
        CallProfile(
            node=index, unit=name, call=0, forward_flops=100, backward_flops=200, saved_bytes=40, output_bytes=16,
            dtype="float32", weight_bytes=24, product_flops=100, product_bytes=8, transient_bytes=60,
            kernels=(PRODUCT, NORM, BACK), exchanges=(SUM, BACK_SUM),
        )
        for index, name in enumerate(NAMES)
    )  # fmt: skip
    return ModelProfile(
        model_class="Model",
        units=tuple(UnitProfile(name=n, class_name="U", parameters={p: parameters[p] for p in held[n]}) for n in NAMES),
        calls=calls,
        flow=Dataflow(nodes=tuple(nodes), values=tuple(values), results=(4,)),
        glue=(
            GlueProfile(node=4, forward_flops=0, backward_flops=0, saved_bytes=7, transient_bytes=300, kernels=(NORM,)),
        ),
    )


def value(index: int) -> Value:
    return Value(index=index, node=index, leaf=0, shape=(4,), dtype="float32", nbytes=16, requires_grad=True)


def cut(num_stages: int = 2) -> Cut:
    return cut_stages(profile().flow, {0: 0, 1: 0, 2: num_stages - 1, 3: num_stages - 1}, num_stages)


def test_a_stage_holds_what_it_reads_and_a_tied_weight_stands_on_both() -> None:
    first, last = stage_works(profile(), cut())
    assert (first.parameters, first.trained, first.unit_parameters) == (20, 20, (10, 10))
    assert (last.parameters, last.trained, last.unit_parameters) == (25, 20, (15, 10))
    assert first.shared_parameters == last.shared_parameters == 10


def test_kernels_and_exchanges_of_calls_and_glue_are_added_up() -> None:
    first, last = stage_works(profile(), cut())
    doubled = {dataclasses.replace(each, count=2 * each.count) for each in (PRODUCT, NORM, BACK)}
    assert set(first.kernels) == doubled
    assert set(last.kernels) == doubled - {dataclasses.replace(NORM, count=4)} | {dataclasses.replace(NORM, count=6)}
    assert set(first.exchanges) == {dataclasses.replace(each, count=2) for each in (SUM, BACK_SUM)}


def test_what_is_received_is_kept_and_what_is_sent_has_a_gradient() -> None:
    first, last = stage_works(profile(), cut())
    assert (first.saved_bytes, last.saved_bytes) == (80, 16 + 80 + 7)
    assert (first.weight_bytes, last.weight_bytes) == (48, 48)
    assert first.sends == first.gradients == {1: 16}
    assert last.sends == last.gradients == {}


def test_early_units_have_the_room_that_late_ones_leave_and_the_loss_has_a_line_of_its_own() -> None:
    first, last = stage_works(profile(), cut())
    assert first.transient_bytes == 60  # of `first`; of `embed` it is 60 - 40
    assert first.logits_bytes == 0
    assert last.logits_bytes == 300
    assert last.transient_bytes == 60 - 40 - 7


def test_full_recomputation_keeps_outputs_runs_forwards_again_and_needs_one_unit_whole() -> None:
    again = computed_again(profile(), cut(), "full")
    assert again == dict.fromkeys(NAMES, How.FULL)
    first, _ = stage_works(profile(), cut(), recompute=again)
    assert first.saved_bytes == 32
    assert first.transient_bytes == 60 + 40 - 16
    assert set(first.recomputed) == {dataclasses.replace(each, count=2 * each.count) for each in (PRODUCT, NORM)}
    later = dataclasses.replace(SUM, phase=Phase.INPUT, again=True, count=2)
    assert set(first.exchanges) == {*(dataclasses.replace(each, count=2) for each in (SUM, BACK_SUM)), later}


def test_selective_recomputation_multiplies_with_no_weight_again() -> None:
    again = computed_again(profile(), cut(), "selective")
    first, _ = stage_works(profile(), cut(), recompute=again)
    assert first.saved_bytes == 2 * (8 + 16)
    assert first.recomputed == (dataclasses.replace(NORM, count=4),)
    assert computed_again(profile(), cut(), "none") == {}


def test_other_micro_batches_scale_what_belongs_to_samples() -> None:
    plain, scaled = stage_works(profile(), cut())[0], stage_works(profile(), cut(), scale=3.0)[0]
    assert scaled.parameters == plain.parameters
    assert scaled.saved_bytes == 3 * plain.saved_bytes
    assert scaled.sends == {1: 48.0}
    product = next(each for each in scaled.kernels if each.kind is KernelKind.MATMUL)
    assert (product.shape, product.flops, product.nbytes) == ((1, 12, 2, 2), 300, 20 + 90)
    assert {each.nbytes for each in scaled.exchanges} == {48}


def test_gradients_of_several_micro_batches_are_added_up() -> None:
    (more,) = stage_works(profile(), cut())[0].accumulation
    assert (more.kind, more.phase, more.nbytes, more.batch_bytes) == (KernelKind.MEMORY, Phase.WEIGHT, 3 * 20 * 4, 0)


def test_experts_are_told_apart() -> None:
    works = stage_works(profile(), cut(), experts=["second.w", "second.frozen"])
    assert [(work.expert_parameters, work.expert_trained) for work in works] == [(0, 0), (15, 10)]


@pytest.mark.parametrize("num_stages", [1, 2])
def test_nothing_is_lost_or_done_twice_however_it_is_cut(num_stages: int) -> None:
    own = profile()
    whole = cut_stages(own.flow, {node: min(node // 2, num_stages - 1) for node in range(4)}, num_stages)
    works = stage_works(own, whole)
    flops = sum(kernel.flops * kernel.count for work in works for kernel in work.kernels)
    assert flops == sum(kernel.flops * kernel.count for part in own.parts for kernel in part.kernels)


def with_first(own: ModelProfile, name: str, shape: tuple[int, ...]) -> ModelProfile:
    """The parameter of the first unit under another name, of another shape."""
    parameter = ParameterProfile(shape=shape, dtype="float32")
    units = tuple(
        dataclasses.replace(unit, parameters={name: parameter}) if unit.name == "first" else unit for unit in own.units
    )
    nodes = tuple(
        dataclasses.replace(node, parameters=tuple(name if each == "first.w" else each for each in node.parameters))
        for node in own.flow.nodes
    )
    return dataclasses.replace(own, units=units, flow=dataclasses.replace(own.flow, nodes=nodes))


@pytest.mark.parametrize(
    "name, elements, passes",
    [
        ("first.weight", ADDED_IN_PLACE, 1),
        ("first.weight", ADDED_IN_PLACE - 1, 3),  # a call in Python would cost more
        ("first.experts", ADDED_IN_PLACE, 3),  # the model's own code multiplies with it
    ],
)
def test_the_product_of_a_layer_adds_a_large_gradient_itself(name: str, elements: int, passes: int) -> None:
    own = with_first(profile(), name, (elements,))
    plain = stage_works(own, cut())[0]
    (more,) = plain.accumulation
    others = plain.trained - elements
    assert more.nbytes == 4 * (passes * elements + 3 * others)
    assert plain.small_trained == others + (elements if passes == 3 else 0)
