"""The cases of the matrix, generated: every schedule times every way of using it. Knows names and numbers only.

schedule       every name of GENERATORS, with as few stages a rank as it is made for and, where it takes any number,
               one more; what a search finds, in a loop and as a V; breadth first as a V, from a file of torch's
pp             2 and 4 ranks
composition    alone; with two replicas; the same with the pass that says when gradients are summed; two shards; tied
               ends; skip connections; unequal micro-batches; dropout; the same with the pass that computes the
               activations of every other stage again (no pass where the schedule is searched)
"""

from __future__ import annotations

import dataclasses
import itertools

from shardwise.layout import SEARCHED
from shardwise.schedule import GENERATORS

__all__ = ["COMPOSITIONS", "FROM_FILE", "PASSES", "Case", "all_cases", "covering_cases"]

COMPOSITIONS = ("alone", "dp2", "reduced", "tp2", "tied", "skips", "unequal", "dropout", "recompute")
PASSES = ("reduced", "recompute")
FROM_FILE = "file.csv"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One schedule in one composition. `schedule` is a name as in a layout, or FROM_FILE."""

    schedule: str
    chunks: int
    pp: int
    composition: str

    def __str__(self) -> str:
        return f"{self.schedule}-chunks{self.chunks}-pp{self.pp}-{self.composition}"

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def dp(self) -> int:
        return 2 if self.composition in ("dp2", "reduced") else 1

    @property
    def tp(self) -> int:
        return 2 if self.composition == "tp2" else 1

    @property
    def model(self) -> str:
        others = {"tied": "tied", "skips": "skips", "dropout": "dropout", "recompute": "dropout", "tp2": "attending"}
        return others.get(self.composition, "decoder")

    @property
    def num_blocks(self) -> int:
        """So many that every stage has one; the two ends come besides."""
        return max(4, self.pp * self.chunks)

    @property
    def micro_batches(self) -> int:
        """Of one replica; an odd number where they are unequal."""
        return 2 * self.pp + (self.composition == "unequal")

    @property
    def num_samples(self) -> int:
        """Of the global batch."""
        even = 2 * self.micro_batches * self.dp
        return even - 3 if self.composition == "unequal" else even


def all_cases() -> tuple[Case, ...]:
    """The whole matrix."""
    return tuple(
        Case(schedule=schedule, chunks=chunks, pp=pp, composition=composition)
        for (schedule, chunks), pp, composition in itertools.product(_schedules(), (2, 4), COMPOSITIONS)
        if schedule != SEARCHED or composition not in PASSES
    )


def covering_cases() -> tuple[Case, ...]:
    """On two and four ranks: every schedule twice, on both numbers of places where that fits, every composition about
    as often, each time with other schedules."""
    possible = set(all_cases())
    chosen: list[Case] = []
    for index, (schedule, chunks) in enumerate(_schedules()):
        for turn, pp in enumerate((2, 4)):
            offset = (index + 3 * turn) % len(COMPOSITIONS)
            rotated = (*COMPOSITIONS[offset:], *COMPOSITIONS[:offset])
            wanted = [Case(schedule=schedule, chunks=chunks, pp=pp, composition=each) for each in rotated]
            chosen.append(next(case for case in wanted if case in possible and case.world_size <= 4))
    return tuple(chosen)


def _schedules() -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for name, family in GENERATORS.items():
        if not family.flushes:
            continue  # what one step does is no gradient of one batch
        fewest, most = family.chunks
        found.append((name, fewest))
        if most is None or most > fewest:
            found.append((name, fewest + 1 if fewest > 1 else 2))
    return [*found, (SEARCHED, 1), (SEARCHED, 2), (FROM_FILE, 2)]
