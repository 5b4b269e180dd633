"""What is computed again so that a rank keeps its bytes: the cheapest of all choices, found without trying them."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from hand_profiles import chain
from shardwise.describe.profile import ModelProfile
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.cut import Cut, cut_stages
from shardwise.plan.estimate import estimate
from shardwise.plan.explain import explain
from shardwise.plan.knapsack import Item, Limit, Option, choose
from shardwise.plan.recompute import How, plan_recompute, profile_with
from shardwise.schedule import Schedule, generate


def brute_force(items: list[Item], limits: list[Limit]) -> float | None:
    best: float | None = None
    for options in itertools.product(*(item.options for item in items)):
        sums = [sum(sizes) for sizes in zip(*(option.sizes for option in options), strict=True)]
        if all(sum(w * s for w, s in zip(limit.weights, sums, strict=True)) <= limit.bound for limit in limits):
            cost = sum(option.cost for option in options)
            best = cost if best is None or cost < best else best
    return best


@pytest.mark.parametrize("seed", range(12))
def test_a_choice_is_the_cheapest_of_all(seed: int) -> None:
    draw = random.Random(seed)
    dims = 1 + seed % 2
    items = [
        Item(
            name=f"unit {number}",
            options=tuple(
                Option(name, cost, tuple(draw.randrange(size) for _ in range(dims)))
                for name, cost, size in (
                    ("none", 0, 90),
                    ("some", draw.randrange(9), 40),
                    ("all", draw.randrange(30), 9),
                )
            ),
        )
        for number in range(6)
    ]
    limits = [Limit(weights=tuple(draw.randrange(1, 4) for _ in range(dims)), bound=260.0) for _ in range(dims)]
    picked = choose(items, limits)
    best = brute_force(items, limits)
    assert (picked is None) == (best is None)
    if picked is not None:
        taken = {item.name: next(o for o in item.options if o.name == picked[item.name]) for item in items}
        assert sum(option.cost for option in taken.values()) == best


def test_what_cannot_be_kept_is_no_choice() -> None:
    item = Item(name="unit", options=(Option("none", 0.0, (10,)), Option("full", 1.0, (5,))))
    assert choose([item], [Limit(weights=(2,), bound=9)]) is None
    assert choose([item], [Limit(weights=(2,), bound=10)]) == {"unit": "full"}


# -- of a model ---------------------------------------------------------------------------------


def model(flops: tuple[int, ...] = (1000, 1000, 1000, 1000)) -> ModelProfile:
    """Every layer saves 100 bytes, of which 40 are products and 32 its output."""
    made = chain(flops)
    calls = tuple(
        dataclasses.replace(call, product_bytes=40, product_flops=call.forward_flops * 9 // 10) for call in made.calls
    )
    return dataclasses.replace(made, calls=calls)


def cut_of(profile: ModelProfile, num_stages: int = 1) -> Cut:
    per_stage = len(profile.calls) // num_stages
    return cut_stages(profile.flow, {call.node: call.node // per_stage for call in profile.calls}, num_stages)


def one(num_micro_batches: int = 1) -> Schedule:
    return generate("gpipe", num_ranks=1, num_micro_batches=num_micro_batches)


def test_full_keeps_inputs_and_costs_a_forward() -> None:
    plan = plan_recompute(model(), cut_of(model()), one(), "full")
    assert set(plan.units.values()) == {How.FULL}
    assert plan.without_bytes == (400,)
    assert plan.kept_bytes == (4 * 32,)
    assert plan.flops == 4000
    again = profile_with(model(), plan)
    assert [call.saved_bytes for call in again.calls] == [32] * 4
    assert [call.backward_flops for call in again.calls] == [3000] * 4


def test_selective_keeps_products_and_costs_the_rest() -> None:
    plan = plan_recompute(model(), cut_of(model()), one(), "selective")
    assert set(plan.units.values()) == {How.SELECTIVE}
    assert plan.kept_bytes == (4 * 72,)
    assert plan.flops == 400
    assert "keeps 288 B instead of 400 B" in plan.lines()[-1]


def test_a_unit_that_saves_nothing_more_than_its_output_is_left_alone() -> None:
    calls = tuple(dataclasses.replace(call, saved_bytes=32) for call in model().calls[:1]) + model().calls[1:]
    profile = dataclasses.replace(model(), calls=calls)
    plan = plan_recompute(profile, cut_of(profile), one(), "full")
    assert sorted(plan.units) == ["layers.1", "layers.2", "layers.3"]


def test_bytes_that_suffice_ask_for_nothing() -> None:
    assert not plan_recompute(model(), cut_of(model()), one(), "400B").units


def test_cheap_ways_come_first_and_the_unit_at_work_has_room() -> None:
    """Of 399 bytes 68 are for the unit that is whole in the backward: 331 are left for what waits."""
    plan = plan_recompute(model(), cut_of(model()), one(), "399B")
    assert sorted(plan.units.values()) == [How.SELECTIVE] * 3
    tight = plan_recompute(model(), cut_of(model()), one(), f"{4 * 32 + 68}B")
    assert sorted(tight.units.values()) == [How.FULL] * 4


def test_a_dear_unit_is_kept() -> None:
    profile = model((10_000_000, 1000, 1000, 1000))
    plan = plan_recompute(profile, cut_of(profile), one(), f"{100 + 3 * 32 + 68}B")
    assert plan.units == {f"layers.{number}": How.FULL for number in (1, 2, 3)}


def test_micro_batches_in_flight_count_each() -> None:
    """1F1B: the first rank keeps two, the last one."""
    schedule = generate("1f1b", num_ranks=2, num_micro_batches=4)
    plan = plan_recompute(model(), cut_of(model(), 2), schedule, "330B")
    assert sorted(plan.units) == ["layers.0", "layers.1"]
    assert plan.without_bytes[0] == 400


def test_too_few_bytes_name_those_that_suffice() -> None:
    with pytest.raises(LayoutError, match="keeps 196 B with every unit computed again.*give it 196 B or more"):
        plan_recompute(model(), cut_of(model()), one(), "195B")
    assert plan_recompute(model(), cut_of(model()), one(), "196B")


def test_the_plan_says_what_is_computed_again() -> None:
    layout = Layout(recompute="selective")
    plan = plan_recompute(model(), cut_of(model()), one(), "selective")
    profile = profile_with(model(), plan)
    predicted = estimate(profile, layout, cut_of(model()), num_micro_batches=1, flops_per_s=1e9)
    assert predicted.stages[0].micro_batch_bytes == 4 * 72
    told = explain(profile, layout, cut_of(model()), predicted, again=plan)
    assert "4 units compute again all but products with weights: layers.0, layers.1, layers.2" in told
    assert "recompute" not in explain(model(), Layout(), cut_of(model()), predicted)
