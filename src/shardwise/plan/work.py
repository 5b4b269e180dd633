"""What every node of a model costs, in one number forward and one backward, so that stages can be balanced.

Of the backward, the part that makes gradients of weights, which a schedule may put off, is counted by operation: a
product with a parameter takes as many flops for the parameter's gradient as it took forward. Where there are no
flops (an embedding, a norm) it is the share of the bytes: those of the gradients of parameters over all that is moved.

Seconds where every call was measured. Else flops, and where little is computed the bytes that are moved, at
as many flops a byte as a machine does in that time (the roofline: Williams, Waterman, Patterson 2009).
Knows no machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shardwise.describe.profile import CallProfile, GlueProfile, ModelProfile

__all__ = ["FLOPS_PER_BYTE", "Work", "work_of"]

# Of a CPU. Accelerators do 100 and more.
FLOPS_PER_BYTE = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Node -> cost of one traced batch, in flops or, if `in_seconds`, in seconds."""

    forward: Mapping[int, float]
    backward: Mapping[int, float]
    weight: Mapping[int, float]  # of `backward`: gradients of parameters
    in_seconds: bool

    def total(self, node: int) -> float:
        """Forward and backward of one node; 0 for glue that costs nothing."""
        return self.forward.get(node, 0.0) + self.backward.get(node, 0.0)


def work_of(profile: ModelProfile) -> Work:
    """The work of calls and glue."""
    measured = {call.node: (call.forward_s, call.backward_s) for call in profile.calls}
    if measured and all(None not in seconds for seconds in measured.values()):
        return Work(
            forward={node: forward or 0.0 for node, (forward, _) in measured.items()},
            backward={node: backward or 0.0 for node, (_, backward) in measured.items()},
            weight={call.node: _weight_share(profile, call) * (call.backward_s or 0.0) for call in profile.calls},
            in_seconds=True,
        )
    forward: dict[int, float] = {}
    backward: dict[int, float] = {}
    for part in profile.parts:
        made = part.output_bytes if isinstance(part, CallProfile) else 0
        written = _gradient_bytes(profile, part.node)
        moved = made + part.saved_bytes
        forward[part.node] = max(part.forward_flops, FLOPS_PER_BYTE * moved)
        goes_back = part.backward_flops or part.saved_bytes or written
        floor = FLOPS_PER_BYTE * (moved + written) if goes_back else 0.0
        backward[part.node] = max(part.backward_flops, floor)
    weight = {part.node: _weight_share(profile, part) * backward[part.node] for part in profile.parts}
    return Work(forward=forward, backward=backward, weight=weight, in_seconds=False)


def _weight_share(profile: ModelProfile, part: CallProfile | GlueProfile) -> float:
    """Of the backward of a node, 0 to 1."""
    if not isinstance(part, CallProfile):
        return 0.0
    written = _gradient_bytes(profile, part.node)
    if part.backward_flops and written:
        return 0.5 if part.weight_flops is None else min(1.0, part.weight_flops / part.backward_flops)
    return written / (written + part.saved_bytes + part.output_bytes) if written else 0.0


def _gradient_bytes(profile: ModelProfile, node: int) -> int:
    """Bytes of the gradients that the backward of a node writes."""
    read = (profile.parameters[name] for name in profile.flow.nodes[node].parameters)
    return sum(parameter.nbytes for parameter in read if parameter.trainable)
