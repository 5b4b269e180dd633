"""Every unit call has one stage; stages are balanced as the layout says, or stand where the user put them."""

from __future__ import annotations

import dataclasses

import pytest

from hand_profiles import chain
from shardwise.errors import LayoutError
from shardwise.layout import Layout, StageRule
from shardwise.plan.cut import cut_stages
from shardwise.plan.partition import call_weights, place

BIG = 10**6  # flops next to which bytes do not matter


def stages(profile, layout, weights=None):
    """The stage of each call, in order, as one text: "0011"."""
    placed = place(profile, layout, weights)
    return "".join(str(placed[call.node]) for call in profile.calls)


def test_cost_parameters_and_depth_balance_what_they_say() -> None:
    profile = chain([6 * BIG, BIG, BIG, BIG, BIG, 2 * BIG], elements=[1, 1, 1, 1, 1, 9])
    assert stages(profile, Layout(pp=2)) == "011111"
    assert stages(profile, Layout(pp=2, stages=StageRule.PARAMETERS)) == "000001"
    assert stages(profile, Layout(pp=2, stages=StageRule.DEPTH)) == "000111"


def test_one_stage_runs_everything() -> None:
    assert stages(chain([BIG] * 3), Layout()) == "000"


def test_given_weights_replace_the_rule_and_serve_a_bare_dataflow() -> None:
    profile = chain([BIG] * 4)
    weights = {0: 3.0, 1: 1.0, 2: 1.0, 3: 1.0}
    assert stages(profile, Layout(pp=2), weights) == "0111"
    assert place(profile.flow, Layout(pp=2), weights) == {0: 0, 1: 1, 2: 1, 3: 1}
    assert place(profile.flow, Layout(pp=2, stages=StageRule.DEPTH)) == {0: 0, 1: 0, 2: 1, 3: 1}


def test_a_bare_dataflow_knows_no_cost() -> None:
    with pytest.raises(LayoutError, match="knows no cost"):
        place(chain([1, 1]).flow, Layout(pp=2))


def test_measured_seconds_go_before_counted_flops() -> None:
    profile = chain([BIG] * 4)
    seconds = (3.0, 1.0, 1.0, 1.0)
    calls = [
        dataclasses.replace(call, forward_s=s / 3, backward_s=2 * s / 3)
        for call, s in zip(profile.calls, seconds, strict=True)
    ]
    measured = dataclasses.replace(profile, calls=tuple(calls))
    assert stages(measured, Layout(pp=2)) == "0111"


def test_a_call_without_flops_is_not_free() -> None:
    weights = call_weights(chain([0, BIG]), StageRule.COST)
    assert 0 < weights[0] < weights[1]


def test_glue_counts_for_the_call_before_it() -> None:
    plain, with_loss = chain([BIG] * 2), chain([BIG] * 2, glue_saved=1000)
    plain_weights, weights = (call_weights(p, StageRule.COST) for p in (plain, with_loss))
    assert weights[0] == plain_weights[0]
    assert weights[1] > plain_weights[1]


def test_parameters_of_a_unit_called_often_are_spread_over_its_calls() -> None:
    profile = chain([1] * 3, units=["layer"] * 3, elements=[6, 6, 6])
    assert call_weights(profile, StageRule.PARAMETERS) == {0: 2.0, 1: 2.0, 2: 2.0}


def test_every_stage_has_a_call_with_parameters() -> None:
    profile = chain([BIG] * 4, elements=[0, 0, 4, 4])
    assert stages(profile, Layout(pp=2)) == "0001"
    with pytest.raises(LayoutError, match="pp=3 and the model has 2; use pp=2 or less"):
        place(profile, Layout(pp=3))


def filled(profile, *pairs):
    """The profile in which the second call of a pair also reads the first one's output, which cannot be sent."""
    nodes, values = list(profile.flow.nodes), list(profile.flow.values)
    for made, read in pairs:
        values[made] = dataclasses.replace(values[made], crossable=False)
        nodes[read] = dataclasses.replace(nodes[read], reads=tuple(sorted({*nodes[read].reads, made})))
    return dataclasses.replace(
        profile, flow=dataclasses.replace(profile.flow, nodes=tuple(nodes), values=tuple(values))
    )


def test_calls_that_hand_each_other_what_cannot_be_sent_stay_together() -> None:
    caches = filled(chain([BIG] * 6), (1, 3), (2, 4))
    assert stages(caches, Layout(pp=2)) == "011111"
    assert stages(caches, Layout(pp=3)) == "011112"
    cut_stages(caches.flow, place(caches, Layout(pp=3)), 3)
    with pytest.raises(
        LayoutError, match=r"such as those from layers.1#0 to layers.4#0: 3 groups; use 3 stages or fewer"
    ):
        place(caches, Layout(pp=4))
    apart = (("layers.0-1",), ("layers.2-5",))
    with pytest.raises(
        LayoutError, match=r"stage 1 cannot get what layers.2#0 reads: layers.1#0 comes from stages \[0\]"
    ):
        cut_stages(caches.flow, place(caches, Layout(pp=2, stages=apart)), 2)


@pytest.mark.parametrize(
    "by_hand, expected",
    [
        ((("layers.0",), ("layers.1-2",), ("layers.3",)), "0112"),
        ((("layers.0-1",), ("layers.2#0",), ("layers.3",)), "0012"),
        ((("0", "1"), ("2",), ("3",)), "0012"),
    ],
)
def test_stages_given_by_hand_may_be_uneven(by_hand, expected) -> None:
    assert stages(chain([BIG] * 4), Layout(pp=3, stages=by_hand)) == expected


def test_calls_of_one_unit_may_stand_on_several_stages() -> None:
    profile = chain([BIG] * 4, units=["layer"] * 3 + ["head"])
    by_hand = (("layer#0",), ("layer#1-2", "head"))
    assert stages(profile, Layout(pp=2, stages=by_hand)) == "0111"


@pytest.mark.parametrize(
    "by_hand, message",
    [
        ((("layers.0",), ("layers.3",)), "2 of 4 calls do not: layers.1-2; add them"),
        ((("layers.0-2",), ("layers.2-3",)), "layers.2#0 is named by 'layers.0-2' on stage 0 and by"),
        ((("layers",), ("layer.1",)), "no 'layer.1'; did you mean layers.1"),
    ],
)
def test_stages_given_by_hand_name_every_call_once(by_hand, message) -> None:
    with pytest.raises(LayoutError, match=message):
        place(chain([BIG] * 4), Layout(pp=2, stages=by_hand))


@pytest.mark.parametrize("pp", [1, 2, 3, 5])
def test_what_is_placed_can_be_cut(pp) -> None:
    profile = chain([BIG] * 5)
    cut = cut_stages(profile.flow, place(profile, Layout(pp=pp)), pp)
    assert cut.order == tuple(range(pp))
    assert cut.edges == tuple((s, s + 1) for s in range(pp - 1))
