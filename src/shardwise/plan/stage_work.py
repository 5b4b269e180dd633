"""What one stage does for one micro-batch and holds on one rank: all that a price depends on, without names of units.

The one thing between what describes a model (a traced profile and a cut, or the numbers of an architecture) and what
prices it (seconds, bytes). Bytes and kernels of one rank of the tensor and context axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shardwise.describe.kernels import Exchange, Kernel
from shardwise.errors import LayoutError

__all__ = ["StageWork"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageWork:
    """One stage. Raises `LayoutError` where a number is negative.

    parameters: elements that the rank holds before replicas divide anything; `trained`: of them, those with gradients.
    expert_parameters, expert_trained: of these, experts', which `ep` has divided already and of which there are
        replicas / ep copies.
    shared_parameters: of the trained, those that another stage holds too (a tied head): their gradients are summed.
    small_trained: of the trained, those of parameters (small ones, experts) whose gradients are made beside the buckets
        in which replicas sum them, and copied there.
    unit_parameters: elements of each unit, in the order of calls: what is gathered at a time at zero=3.
    kernels: of a forward and a backward; `recomputed`: forward kernels that run again before the backward;
        `accumulation`: what adds the gradients to those before them, by every micro-batch but the first of a step.
    exchanges: inside units, forward and backward; those of recomputed forwards are among them once more.
    saved_bytes: kept for the backward of one micro-batch, received activations among them, recomputation counted;
        `unit_saved_bytes`: of these, by the unit that keeps the most (0: nobody told units apart).
    weight_bytes: of these, what remains when the gradients of inputs are done.
    transient_bytes: the most that is alive besides, while one unit is computed or computed again.
    logits_bytes: of the head's output, the loss and their gradients, on the stage that has them.
    sends: target stage -> bytes of one micro-batch's activations; `gradients`: of what comes back for them.
    """

    stage: int
    parameters: int
    trained: int
    kernels: tuple[Kernel, ...]
    saved_bytes: float
    recomputed: tuple[Kernel, ...] = ()
    accumulation: tuple[Kernel, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    expert_parameters: int = 0
    expert_trained: int = 0
    shared_parameters: int = 0
    small_trained: int = 0
    unit_parameters: tuple[int, ...] = ()
    unit_saved_bytes: float = 0.0
    weight_bytes: float = 0.0
    transient_bytes: float = 0.0
    logits_bytes: float = 0.0
    sends: Mapping[int, float] = dataclasses.field(default_factory=dict)
    gradients: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = (self.parameters, self.trained, self.expert_parameters, self.expert_trained, *self.unit_parameters)
        held = (self.saved_bytes, self.unit_saved_bytes, self.weight_bytes, self.transient_bytes, self.logits_bytes)
        for number in (*counts, *held, *self.sends.values(), *self.gradients.values()):
            if number < 0:
                raise LayoutError(f"what stage {self.stage} does and holds is 0 or more, but got {number}; count again")
