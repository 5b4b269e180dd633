"""On small cases the solver proves how far the search is from the best there is. Its own process: see `exact`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

needs_solver = pytest.mark.skipif(
    importlib.util.find_spec("ortools") is None, reason="the extra `solver` (ortools) is not installed"
)

SCRIPT = """
from shardwise.schedule import Costs, Kind
from shardwise.schedule.exact import prove
from shardwise.schedule.memory import Memory
from shardwise.schedule.search import search

f, i, w = (1.0, 2.0, 1.5), (1.0, 2.5, 1.5), (0.75, 1.5, 0.0)
costs = Costs(compute_seconds=dict(F=f, I=i, W=w, B=tuple(x + y for x, y in zip(i, w))))
for whole in (costs, ):
    for limit in (None, (2.0, 2.0, 2.0), (3.0, 2.0, 1.0)):
        memory = Memory(activation_bytes=(1.0,) * 3, weight_bytes=(0.5,) * 3, limit_bytes=limit)
        case = dict(num_micro_batches=4, ranks=[(0,), (1,), (2,)], memory=memory)
        found = search(costs, **case)
        proof = prove(costs, known=found.schedule, seconds=20, **case)
        print(found.seconds, found.lower_bound_s, proof.bound_s, proof.optimal)
"""


@needs_solver
def test_the_search_finds_the_proven_optimum_of_small_cases() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        seconds, lower, bound, optimal = line.split()
        assert optimal == "True"
        assert float(bound) <= float(seconds) * (1 + 1e-6)
        assert float(lower) <= float(seconds) * (1 + 1e-9)
        assert float(seconds) <= float(bound) * 1.001
    assert len(done.stdout.splitlines()) == 3
