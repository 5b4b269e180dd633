"""One call on ranks that live for that call alone: from a script without a main guard, a notebook, pytest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from shardwise.launch.collect import OnMessage
from shardwise.launch.pool import RankPool

__all__ = ["run_ranks"]

R = TypeVar("R")


def run_ranks(
    function: Callable[..., R],
    args: tuple[object, ...] = (),
    *,
    world_size: int,
    timeout_s: float | None = None,
    on_message: OnMessage | None = None,
    num_threads: int | None = None,
    preload: Sequence[str] = (),
) -> list[R]:
    """Starts `world_size` ranks, calls `function(context, *args)` on each and returns the results by rank.

    The function makes its own process group with `init_process_group(context, timeout_s=…)`. Functions and
    classes may be defined where they are used; tensors among the arguments exist once, whatever the number of
    ranks, and each rank may write into its view of them without being seen. Output of the ranks goes to ours.
    Errors are those of `RankPool.run`: the first failing rank ends the others within a second or two.
    """
    with RankPool(world_size, process_group_timeout_s=None, num_threads=num_threads, preload=preload) as pool:
        return pool.run(function, *args, timeout_s=timeout_s, on_message=on_message)
