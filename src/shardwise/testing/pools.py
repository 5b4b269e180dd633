"""Pools of warm ranks for a test session, one a world size, forked from one process that imported torch once.

It turns what the ranks report into pytest's verdict. It does not know how a test is decorated.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shardwise.errors import LaunchError
from shardwise.launch import RankPool, RankStarter
from shardwise.testing.body import NamedTest, Verdict, run_named_test

__all__ = ["RankPools"]

_COLLECTIVE_TIMEOUT_S = 20.0  # below the deadline of a test, so that a stuck collective names itself


class RankPools:
    """The session's ranks. They start with the first test that needs them; `close` ends them."""

    def __init__(self, *, preload: Sequence[str] = (), warning_filters: Sequence[str] = ()) -> None:
        self._preload = ("shardwise.testing.body", *preload)
        self._warning_filters = tuple(warning_filters)
        self._starters: list[RankStarter] = []
        self._pools: dict[int, RankPool] = {}

    def run_test(
        self,
        *,
        world_size: int,
        module: str,
        name: str,
        values: dict[str, object],
        timeout_s: float,
        fresh: bool,
    ) -> None:
        """Runs the test on the ranks; fails, skips or returns as pytest expects of a test."""
        __tracebackhide__ = True
        test = NamedTest(module=module, name=name, values=values, warning_filters=self._warning_filters)
        pool = self._new_pool(world_size) if fresh else self._warm_pool(world_size)
        failure: str | None = None
        verdicts: list[Verdict] = []
        try:
            pool.start()
            verdicts = pool.run(run_named_test, test, timeout_s=timeout_s)
        except Exception as error:
            failure = str(error.__cause__ if isinstance(error.__cause__, LaunchError) else error)
        finally:
            if fresh:
                pool.close()
        if failure is not None:
            pytest.fail(failure, pytrace=False)
        self._judge(verdicts, pool, fresh=fresh)

    def _judge(self, verdicts: Sequence[Verdict], pool: RankPool, *, fresh: bool) -> None:
        __tracebackhide__ = True
        leaks = [f"rank {rank}: {leak}" for rank, verdict in enumerate(verdicts) for leak in verdict.left_behind]
        if leaks and not fresh:
            pool.close()  # the next test gets clean ranks
            pytest.fail("the test left behind:\n" + "\n".join(leaks), pytrace=False)
        reasons = [verdict.skipped for verdict in verdicts if verdict.skipped is not None]
        if reasons:
            pytest.skip(reasons[0])

    def _warm_pool(self, world_size: int) -> RankPool:
        if world_size not in self._pools:
            self._pools[world_size] = self._new_pool(world_size)
        return self._pools[world_size]

    def _new_pool(self, world_size: int) -> RankPool:
        return RankPool(
            world_size,
            process_group_timeout_s=_COLLECTIVE_TIMEOUT_S,
            num_threads=1,
            starter=self.starter,
        )

    @property
    def starter(self) -> RankStarter:
        """The process that ranks are forked from, alive."""
        if not self._starters or not self._starters[-1].alive:
            self._starters.append(RankStarter(preload=self._preload))
            self._pools.clear()  # their ranks ended with the last starter
        return self._starters[-1]

    def close(self) -> None:
        """Ends all ranks."""
        for pool in self._pools.values():
            pool.close()
        for starter in self._starters:
            starter.close()
