"""The profile of one rank that has its tokens of every sequence: a share of the work and of what is saved for backward.

Units that are given all tokens do all of the work on every rank. Knows profiles and plans, no torch.
"""

from __future__ import annotations

import dataclasses

from shardwise.describe.context import ContextPlan
from shardwise.describe.profile import CallProfile, ModelProfile

__all__ = ["profile_of_context"]


def profile_of_context(profile: ModelProfile, context: ContextPlan) -> ModelProfile:
    """`profile` with the flops, seconds and bytes of one of the ranks that divide sequences. Parameters stay."""
    calls = tuple(_own(call, context.cp) if call.unit in context.units else call for call in profile.calls)
    return dataclasses.replace(profile, calls=calls)


def _own(call: CallProfile, cp: int) -> CallProfile:
    return dataclasses.replace(
        call,
        forward_flops=-(-call.forward_flops // cp),
        backward_flops=-(-call.backward_flops // cp),
        saved_bytes=-(-call.saved_bytes // cp),
        output_bytes=-(-call.output_bytes // cp),
        forward_s=None if call.forward_s is None else call.forward_s / cp,
        backward_s=None if call.backward_s is None else call.backward_s / cp,
        weight_flops=_share(call.weight_flops, cp),
        weight_bytes=_share(call.weight_bytes, cp),
        product_flops=_share(call.product_flops, cp),
        product_bytes=_share(call.product_bytes, cp),
    )


def _share(number: int | None, cp: int) -> int | None:
    return None if number is None else -(-number // cp)
