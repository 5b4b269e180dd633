"""A plan of tokens says what works on own tokens, and what does not and why."""

from __future__ import annotations

from shardwise.describe.context import ContextPlan, UnitContext


def test_a_plan_names_who_gets_all_tokens_and_who_asks_for_them() -> None:
    units = {
        "embed": UnitContext(inputs={"ids": -1}, outputs={0: -2}),
        "layers.0": UnitContext(outputs={0: -2}, joined=("conv1d",)),
        "layers.1": UnitContext(outputs={0: -2}, joined=("conv1d",)),
    }
    plan = ContextPlan(cp=2, zigzag=True, units=units, whole={"pool": "nothing that it returns is by token"})
    assert plan.lines() == [
        "cp=2: 3 of 4 units work on own tokens (an early and a late part of each sequence on every rank)",
        "  all tokens: pool (nothing that it returns is by token)",
        "  conv1d of all tokens in layers.0, layers.1",
    ]
    assert str(plan) == "\n".join(plan.lines())


def test_many_units_are_named_by_the_first() -> None:
    plan = ContextPlan(cp=2, whole=dict.fromkeys(("a", "b", "c", "d"), "it is not called"))
    assert plan.lines()[1] == "  all tokens: a and 3 more (it is not called)"
