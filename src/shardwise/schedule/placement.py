"""Which rank owns which stages, where a rank owns several ("chunks" of the model, as Megatron calls them).

    loop    4 ranks, 2 chunks    stage   0 1 2 3 4 5 6 7      the last stage is on the last rank
                                 rank    0 1 2 3 0 1 2 3      (arXiv:2104.04473, section 2.2)

    v       4 ranks, 2 chunks    stage   0 1 2 3 4 5 6 7      first and last stage are on rank 0: the way back starts
                                 rank    0 1 2 3 3 2 1 0      where the way forth did (arXiv:2405.15362, section 3)

Knows numbers only.
"""

from __future__ import annotations

from enum import StrEnum

from shardwise.errors import ScheduleError

__all__ = ["Placement", "stages_of_ranks"]


class Placement(StrEnum):
    """How stages are laid over the ranks of a pipeline."""

    LOOP = "loop"
    V = "v"


def stages_of_ranks(placement: Placement, *, num_ranks: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """[r]: the `chunks` stages of rank r, ascending. Raises ScheduleError if a count is below 1."""
    if num_ranks < 1 or chunks < 1:
        raise ScheduleError(
            f"a pipeline has at least 1 rank and each rank 1 stage, but got {num_ranks} ranks and {chunks} stages a "
            "rank; raise the one that is 0"
        )
    return tuple(
        tuple(
            chunk * num_ranks + (num_ranks - 1 - r if placement is Placement.V and chunk % 2 else r)
            for chunk in range(chunks)
        )
        for r in range(num_ranks)
    )
