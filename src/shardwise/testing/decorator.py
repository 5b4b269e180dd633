"""`@on_ranks(4)`: a test function that runs on four ranks at once.

    pytest ── name of the test, values of its fixtures ──▶ rank 0, 1, 2, 3   (warm, kept for the session)
           ◀─ results, or the tracebacks of all ranks ────

It knows how a test is sent by name. It knows nothing of how ranks are started (`pools`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from shardwise.errors import ConfigError

if TYPE_CHECKING:
    from shardwise.launch import RankStarter  # which imports torch

__all__ = ["RunsTests", "on_ranks"]


class RunsTests(Protocol):
    """What the fixture `rank_pools` gives a test."""

    @property
    def starter(self) -> RankStarter:
        """What its ranks are forked from: for pools of a test's own."""
        ...

    def run_test(
        self,
        *,
        world_size: int,
        module: str,
        name: str,
        values: dict[str, object],
        timeout_s: float,
        fresh: bool,
    ) -> None: ...


def on_ranks(
    world_size: int, *, timeout_s: float = 30.0, fresh: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs the test on `world_size` ranks of this machine, with a gloo process group of all of them.

        @on_ranks(4)
        @pytest.mark.parametrize("size", [1, 7])
        def test_the_sum_reaches_every_rank(rank, size): ...

    rank       the first parameter: a `shardwise.launch.RankContext` (`rank.rank`, `rank.world_size`)
    others     fixtures and parameters, evaluated once by pytest and sent as values: they must be picklable
    timeout_s  deadline; after it the stacks of all ranks are shown
    fresh      start ranks for this test alone: for tests that end a rank or leave groups behind

    The test must stand at the top of its module, which every rank imports: ConfigError if not. torch's seed
    is 0 at its start, torch uses one thread, the project's `filterwarnings` hold on the ranks too. It fails
    with the tracebacks of all ranks; then, and when it leaves a thread, a process group, a variable or a
    setting behind, new ranks are started for the next one.
    """
    if world_size < 1:
        raise ConfigError(f"on_ranks({world_size}): a test needs at least 1 rank")

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        if function.__qualname__ != function.__name__:
            raise ConfigError(
                f"on_ranks sends a test by its name, but {function.__qualname__} is not at the top of its "
                "module; move it there"
            )
        parameters = list(inspect.signature(function).parameters.values())
        if not parameters:
            raise ConfigError(f"{function.__name__} takes no parameter; its first is the rank: add `rank`")

        @functools.wraps(function)
        def test(*, rank_pools: RunsTests, **values: Any) -> None:
            __tracebackhide__ = True
            rank_pools.run_test(
                world_size=world_size,
                module=function.__module__,
                name=function.__name__,
                values=values,
                timeout_s=timeout_s,
                fresh=fresh,
            )

        named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters[1:]]
        pools = inspect.Parameter("rank_pools", inspect.Parameter.KEYWORD_ONLY)
        test.__signature__ = inspect.Signature([pools, *named])  # type: ignore[attr-defined]  # read by pytest
        marked: Callable[..., None] = pytest.mark.ranks(test)
        return marked

    return decorate
