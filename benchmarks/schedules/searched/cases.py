"""The twenty cases and the rule that makes them: five models by four conditions, fixed before anything was measured.

    model          ranks  micro-batches      condition
    gpt2               2              4      free       no memory limit
    gemma-2b           4              8      as-1f1b    every device has the memory that 1F1B needs, its fullest rank's
    llama-3-8b         8             16      half       half of that, or what one micro-batch needs if that is more
    llava-1.5-7b       4             16      slow-one   1.5 times that, and the device of the rank in the middle
    qwen2-vl-2b        8             32                 (p // 2) is half as fast

A device does 300 Tflop/s and moves 2 TB/s, a link 25 GB/s. Stages are cut by shardwise's own partitioner, which
balances forward and backward seconds of stages, and of ranks that own several, as if all devices were equal.
Generators' placements: one stage a rank; two and four a rank in a loop; two as a V.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.schedules.searched.models import MODELS, Model, Unit
from shardwise.plan.balance import balanced_ends, evened_ends
from shardwise.schedule import Costs, Kind, Placement, chain, generate
from shardwise.schedule.memory import Memory, peak_bytes

__all__ = [
    "CHUNKS",
    "CONDITIONS",
    "PLACEMENTS",
    "PROVEN_PLACEMENTS",
    "SETTINGS",
    "Case",
    "Cut",
    "cases",
    "smaller_cases",
]

FLOPS, MOVED_BYTES, LINK_BYTES = 300e12, 2e12, 25e9  # a second
SETTINGS = (("gpt2", 2, 4), ("gemma-2b", 4, 8), ("llama-3-8b", 8, 16), ("llava-1.5-7b", 4, 16), ("qwen2-vl-2b", 8, 32))
SMALLER = (("gpt2", 2, 4), ("gemma-2b", 3, 4), ("llama-3-8b", 4, 6), ("llava-1.5-7b", 3, 5), ("qwen2-vl-2b", 4, 5))
CONDITIONS = ("free", "as-1f1b", "half", "slow-one")
CHUNKS = (1, 2, 4)  # stages a rank on average
PLACEMENTS = ((Placement.LOOP, 1), (Placement.LOOP, 2), (Placement.LOOP, 4), (Placement.V, 2))
PROVEN_PLACEMENTS = ((Placement.LOOP, 1), (Placement.V, 2))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model in so many stages: seconds on a device of speed 1, and memory."""

    costs: Costs
    memory: Memory

    @property
    def num_stages(self) -> int:
        return len(self.memory.activation_bytes)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on so many ranks, under one of the conditions."""

    model: Model
    num_ranks: int
    num_micro_batches: int
    condition: str

    @property
    def name(self) -> str:
        return f"{self.model.name} pp{self.num_ranks} m{self.num_micro_batches} {self.condition}"

    @property
    def speeds(self) -> tuple[float, ...]:
        """[r]: how fast the device of rank r is."""
        slow = self.num_ranks // 2 if self.condition == "slow-one" else None
        return tuple(0.5 if r == slow else 1.0 for r in range(self.num_ranks))

    def cut(self, chunks: int, ranks: Sequence[Sequence[int]] | None = None, *, aware: bool = False) -> Cut:
        """In `chunks` stages a rank: as shardwise cuts for stages that these ranks own, or where nobody knows yet who
        will own them; `aware` of the speeds of the ranks, which shardwise is not."""
        owner = {s: r for r, own in enumerate(ranks or ()) for s in own}
        stages = _cut(self.model, self.num_ranks * chunks, owner)
        if aware:
            stages = _cut_for(self.model, [self.speeds[owner[s]] for s in range(len(stages))])
        forward, back, late = zip(*map(_seconds, stages), strict=True)
        sent = {(s, s + 1): stages[s][-1].sent_bytes / LINK_BYTES for s, _ in chain(len(stages))}
        return Cut(
            costs=Costs(
                compute_seconds={
                    Kind.F: forward,
                    Kind.I: back,
                    Kind.W: late,
                    Kind.B: tuple(i + w for i, w in zip(back, late, strict=True)),
                },
                activation_seconds=sent,
                gradient_seconds=sent,
            ),
            memory=Memory(
                activation_bytes=_kept(stages),
                weight_bytes=tuple(sum(unit.late_bytes for unit in units) for units in stages),
                limit_bytes=self._limits(),
            ),
        )

    def _limits(self) -> tuple[float, ...] | None:
        if self.condition == "free":
            return None
        share = {"as-1f1b": 1.0, "half": 0.5, "slow-one": 1.5}[self.condition]
        kept = _kept(_cut(self.model, self.num_ranks))
        schedule = generate("1f1b", num_ranks=self.num_ranks, num_micro_batches=self.num_micro_batches)
        peak = max(peak_bytes(schedule, Memory(activation_bytes=kept, weight_bytes=(0.0,) * len(kept))))
        return (max(share * peak, *kept),) * self.num_ranks


def cases() -> Iterator[Case]:
    """All twenty."""
    yield from _product(SETTINGS)


def smaller_cases() -> Iterator[Case]:
    """The same on fewer ranks and micro-batches, for the solver."""
    yield from _product(SMALLER)


def _product(settings: tuple[tuple[str, int, int], ...]) -> Iterator[Case]:
    for name, num_ranks, num_micro_batches in settings:
        for condition in CONDITIONS:
            yield Case(
                model=MODELS[name], num_ranks=num_ranks, num_micro_batches=num_micro_batches, condition=condition
            )


def _cut(model: Model, num_stages: int, owner: Mapping[int, int] | None = None) -> list[tuple[Unit, ...]]:
    """As `shardwise.plan.partition` does."""
    weights = [sum(_seconds((unit,))) for unit in model.units]
    traffic = [0.0, *(unit.sent_bytes for unit in model.units[:-1])]
    counts = [True] * len(weights)
    ends = balanced_ends(weights, traffic, counts, num_stages)
    if owner and num_stages > max(owner.values()) + 1:
        ends = evened_ends(ends, weights, traffic, counts, [owner[s] for s in range(num_stages)])
    return [model.units[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _cut_for(model: Model, speeds: Sequence[float]) -> list[tuple[Unit, ...]]:
    """One stage for each speed, the slowest stage as fast as can be, then each as even as can be."""
    sums = [0.0, *accumulate(sum(_seconds((unit,))) for unit in model.units)]
    n = len(model.units)
    best: list[dict[int, tuple[tuple[float, float], int]]] = [{0: ((0.0, 0.0), 0)}]  # end -> (cost, start)
    for speed in speeds:
        here: dict[int, tuple[tuple[float, float], int]] = {}
        for end in range(1, n + 1):
            options = []
            for start, ((slowest, squares), _) in best[-1].items():
                if start < end:
                    seconds = (sums[end] - sums[start]) / speed
                    options.append(((max(slowest, seconds), squares + seconds * seconds), start))
            if options:
                here[end] = min(options)
        best.append(here)
    ends = [n]
    for part in range(len(speeds), 1, -1):
        ends.append(best[part][ends[-1]][1])
    ends.reverse()
    return [model.units[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _kept(stages: list[tuple[Unit, ...]]) -> tuple[float, ...]:
    return tuple(sum(unit.kept_bytes for unit in units) for units in stages)


def _seconds(units: tuple[Unit, ...]) -> tuple[float, float, float]:
    """F, I and W of these units."""
    f, i, w = (sum(u.flops[k] / FLOPS + u.moved_bytes[k] / MOVED_BYTES for u in units) for k in range(3))
    return f, i, w
