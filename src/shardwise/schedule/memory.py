"""What the ranks keep while a schedule runs: a running sum over each rank's row. It knows neither time nor modules.

    F   keeps what the stage's backward will read          +activation
    I   lets go of it, but for what W reads                -activation +weight
    W   lets go of the rest                                -weight
    B   is I and W in one                                  -activation
    F   with a C to come keeps only its inputs             +input
    C   computes the rest of it again                      +activation -input
    O   moves what is kept to the host, L brings it back   -kept, +kept

Bytes or micro-batches, floats or whole numbers: any unit, the same throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.schedule import Schedule

__all__ = ["Memory", "check_memory", "fits", "peak_bytes"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one micro-batch keeps on each stage, and what a rank may hold.

    activation_bytes[s]: kept from the start of F to the end of I or B.
    weight_bytes[s]: the part of it that stays until the end of W (W's inputs and the gradients of its outputs).
    limit_bytes[r]: the most that rank r may keep for all its stages; None where nothing limits it, and None
    alone where no rank is limited.
    input_bytes[s]: the part of activation_bytes that a stage keeps which computes its forward again (C); none means 0.

    Raises ScheduleError if a number is negative or not finite, or the stages of the two lists differ in number.
    """

    activation_bytes: tuple[float, ...]
    weight_bytes: tuple[float, ...]
    limit_bytes: tuple[float | None, ...] | None = None
    input_bytes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.activation_bytes) != len(self.weight_bytes):
            raise ScheduleError(
                f"both kinds of memory are given for every stage, but there are {len(self.activation_bytes)} "
                f"activation_bytes and {len(self.weight_bytes)} weight_bytes; give as many of each"
            )
        if len(self.input_bytes) not in (0, len(self.activation_bytes)):
            raise ScheduleError(
                f"input_bytes are given for every stage or for none, but there are {len(self.input_bytes)} for "
                f"{len(self.activation_bytes)} stages; give one a stage"
            )
        limits = [limit for limit in self.limit_bytes or () if limit is not None]
        for number in (*self.activation_bytes, *self.weight_bytes, *self.input_bytes, *limits):
            if not (math.isfinite(number) and number >= 0):
                raise ScheduleError(
                    f"memory is finite and not negative, but found {number}; use bytes from 0 up, and None for no limit"
                )

    def limit_of(self, rank: int) -> float:
        """The limit of that rank; infinite where it has none."""
        limit = self.limit_bytes[rank] if self.limit_bytes is not None else None
        return math.inf if limit is None else limit


def check_memory(memory: Memory, *, num_stages: int, num_ranks: int) -> None:
    """Raises ScheduleError unless `memory` speaks of so many stages and ranks."""
    if len(memory.activation_bytes) != num_stages:
        raise ScheduleError(
            f"memory is given for each of {num_stages} stages, but for {len(memory.activation_bytes)}; give one "
            "number a stage"
        )
    if memory.limit_bytes is not None and len(memory.limit_bytes) != num_ranks:
        raise ScheduleError(
            f"there is a memory limit for each of {num_ranks} ranks or for none, but {len(memory.limit_bytes)} are "
            "given; give one a rank, None where there is none"
        )


def peak_bytes(schedule: Schedule, memory: Memory) -> tuple[float, ...]:
    """[r]: the most that rank r keeps at once. Raises ScheduleError if `memory` is for other stages or ranks.

    A forward-only schedule keeps nothing for a backward.
    """
    check_memory(memory, num_stages=schedule.num_stages, num_ranks=schedule.num_ranks)
    if schedule.forward_only:
        return (0.0,) * schedule.num_ranks
    return tuple(_peak(schedule, r, memory) for r in range(schedule.num_ranks))


def fits(schedule: Schedule, memory: Memory | None) -> bool:
    """Whether every rank stays within its limit; sums may differ by rounding."""
    if memory is None or memory.limit_bytes is None:
        return True
    return all(peak <= memory.limit_of(r) * (1 + 1e-9) for r, peak in enumerate(peak_bytes(schedule, memory)))


def _peak(schedule: Schedule, rank: int, memory: Memory) -> float:
    kept = peak = 0.0
    row = [action for action in schedule.actions[rank] if isinstance(action, Action)]
    again = {(action.stage, action.micro_batch) for action in row if action.kind is Kind.C}
    inputs = memory.input_bytes or (0.0,) * schedule.num_stages
    for action in row:
        activation, weight = memory.activation_bytes[action.stage], memory.weight_bytes[action.stage]
        first = inputs[action.stage] if (action.stage, action.micro_batch) in again else activation
        match action.kind:
            case Kind.F | Kind.L:
                kept += first
            case Kind.O:
                kept -= first
            case Kind.C:
                kept += activation - first
            case Kind.I:
                kept += weight - activation
            case Kind.W:
                kept -= weight
            case Kind.B:
                kept -= activation
        peak = max(peak, kept)
    return peak
