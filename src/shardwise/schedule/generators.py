"""Every schedule by name. To add one, write a file with a `generate` and an `ABOUT`, and add its `Family` below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from shardwise.errors import ScheduleError
from shardwise.schedule import (
    dualpipe_v,
    gpipe,
    interleaved,
    looped_bfs,
    naive,
    one_f_one_b,
    pipedream_2bw,
    zb_h1,
    zb_h2,
    zb_v,
    zb_v_half,
    zb_v_min,
)
from shardwise.schedule.about import About
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.schedule import Schedule

__all__ = ["GENERATORS", "Family", "Generator", "chunks_of", "generate", "placement"]


class Generator(Protocol):
    """A pure function that makes a schedule for any stage graph whose stages are numbered topologically."""

    def __call__(self, *, num_ranks: int, num_micro_batches: int, chunks: int) -> Schedule: ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """A schedule by name: its generator, text about it, how it lays stages over ranks, and how many a rank it takes.

    chunks: (fewest, most) stages a rank; the most is None where there is no limit.
    flushes: whether a step is drained before the next one begins; if not, `generate` gives a step by itself.
    """

    generate: Generator
    about: About
    placement: Placement = Placement.LOOP
    chunks: tuple[int, int | None] = (1, 1)
    flushes: bool = True


GENERATORS: Mapping[str, Family] = MappingProxyType(
    {
        "naive": Family(generate=naive.generate, about=naive.ABOUT),
        "gpipe": Family(generate=gpipe.generate, about=gpipe.ABOUT),
        "1f1b": Family(generate=one_f_one_b.generate, about=one_f_one_b.ABOUT),
        "interleaved": Family(generate=interleaved.generate, about=interleaved.ABOUT, chunks=(2, None)),
        "looped-bfs": Family(generate=looped_bfs.generate, about=looped_bfs.ABOUT, chunks=(2, None)),
        "zb-h1": Family(generate=zb_h1.generate, about=zb_h1.ABOUT, chunks=(1, None)),
        "zb-h2": Family(generate=zb_h2.generate, about=zb_h2.ABOUT),
        "zb-v": Family(generate=zb_v.generate, about=zb_v.ABOUT, placement=Placement.V, chunks=(2, 2)),
        "zb-v-half": Family(generate=zb_v_half.generate, about=zb_v_half.ABOUT, placement=Placement.V, chunks=(2, 2)),
        "zb-v-min": Family(generate=zb_v_min.generate, about=zb_v_min.ABOUT, placement=Placement.V, chunks=(2, 2)),
        "dualpipe-v": Family(
            generate=dualpipe_v.generate, about=dualpipe_v.ABOUT, placement=Placement.V, chunks=(2, 2)
        ),
        pipedream_2bw.NAME: Family(generate=pipedream_2bw.generate, about=pipedream_2bw.ABOUT, flushes=False),
    }
)


def generate(name: str, *, num_ranks: int, num_micro_batches: int, chunks: int | None = None) -> Schedule:
    """The schedule of that name in GENERATORS, `chunks` stages a rank; as few as it is made for, if not given.

    Raises ScheduleError if there is none of that name, a count is 0, or it is not made for so many stages a rank.
    """
    family, chunks = _family(name), chunks_of(name, chunks)
    return family.generate(num_ranks=num_ranks, num_micro_batches=num_micro_batches, chunks=chunks)


def placement(name: str, *, num_ranks: int, chunks: int | None = None) -> tuple[tuple[int, ...], ...]:
    """[r]: the stages of rank r under the schedule of that name. Raises ScheduleError as `generate` does."""
    return stages_of_ranks(_family(name).placement, num_ranks=num_ranks, chunks=chunks_of(name, chunks))


def chunks_of(name: str, chunks: int | None = None) -> int:
    """Stages a rank: `chunks`, or the fewest that the schedule is made for. Raises ScheduleError if it is not."""
    fewest, most = _family(name).chunks
    if chunks is None:
        return fewest
    if chunks < fewest or (most is not None and chunks > most):
        fits = f"{fewest}" if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        raise ScheduleError(
            f"the schedule {name} is made for {fits} stages a rank, but chunks={chunks}; write chunks={fewest}, or "
            "choose another schedule"
        )
    return chunks


def _family(name: str) -> Family:
    if name not in GENERATORS:
        raise ScheduleError(f'a schedule is one of {", ".join(GENERATORS)}, but got "{name}"; use one of these')
    return GENERATORS[name]
