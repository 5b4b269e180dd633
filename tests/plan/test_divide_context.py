"""Of units on own tokens a rank does a share of the work; of the others all of it."""

from __future__ import annotations

from hand_profiles import chain
from shardwise.describe.context import ContextPlan, UnitContext
from shardwise.plan.divide_context import profile_of_context


def test_a_rank_does_its_share_of_units_on_own_tokens_and_all_of_the_others() -> None:
    profile = chain([5, 7, 9])
    first, second, *_ = profile.calls
    own = profile_of_context(profile, ContextPlan(cp=2, units={first.unit: UnitContext(outputs={0: -2})}))
    assert own.calls[0].forward_flops == -(-first.forward_flops // 2)
    assert own.calls[0].saved_bytes == -(-first.saved_bytes // 2)
    assert own.calls[1] == second
    assert own.units == profile.units
