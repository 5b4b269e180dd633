"""Processor seconds in turn in one process, memory each in a process of its own. One thread, so that processor seconds
are those of a clock on a machine where nobody else computes.

python -m benchmarks.schedules.split_backward [--hidden 512] [--tokens 256] [--rounds 30] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common.circumstances import circumstances
from benchmarks.schedules.split_backward.sides import PHASES, SIDES, blocks, run

NAME = "benchmarks.schedules.split_backward"
_MEMORY_TOKENS = 2048


def _seconds(hidden: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    models = {name: blocks(4, hidden) for name in SIDES}
    sides = {name: SIDES[name](models[name]) for name in SIDES}
    x = torch.randn(tokens // 256, 256, hidden)
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in SIDES}
    for turn in range(rounds + 3):
        for name, side in sides.items():
            phases = tuple(run(models[name], side, x))
            if turn >= 3:
                taken[name].append(phases)
    _check(models)
    return {
        name: {
            **{
                phase: statistics.median(column) * 1e3
                for phase, column in zip(PHASES, zip(*rows, strict=True), strict=True)
            },
            "backward": statistics.median(sum(row[1:]) for row in rows) * 1e3,
        }
        for name, rows in taken.items()
    }


def _check(models: dict[str, torch.nn.Sequential]) -> None:
    wanted = dict(models["torch whole"].named_parameters())
    for name, model in models.items():
        for of, parameter in model.named_parameters():
            got, other = parameter.grad, wanted[of].grad
            assert got is not None
            assert other is not None
            error = float((got - other).norm() / other.norm())
            assert error < 1e-5, f"{name}: {of} {error}"


def _memory(name: str, hidden: int) -> dict[str, float]:
    """MiB of the process above what it had before the forward: behind each phase, and at most."""
    model = blocks(4, hidden)
    side = SIDES[name](model)
    x = torch.randn(_MEMORY_TOKENS // 256, 256, hidden)
    for _ in run(model, side, x):  # libraries take their buffers
        pass
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    found = {phase: (_resident() - before) / 2**20 for phase, _ in zip(PHASES, run(model, side, x), strict=True)}
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {**found, "peak": (int(peak.split()[1]) * 1024 - before) / 2**20}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--memory-of", choices=list(SIDES), default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of is not None:
        print(json.dumps(_memory(options.memory_of, options.hidden)))
        return
    seconds = _seconds(options.hidden, options.tokens, options.rounds)
    memory = {name: _in_own_process(name, options.hidden) for name in SIDES}
    told = {"milliseconds": seconds, "mebibytes": memory, "memory_tokens": _MEMORY_TOKENS, **circumstances(NAME)}
    for title, table in (("milliseconds", seconds), ("MiB", memory)):
        print(f"{title:>16}", *(f"{column:>16}" for column in next(iter(table.values()))))
        for name, row in table.items():
            print(f"{name:>16}", *(f"{value:16.1f}" for value in row.values()))
    if options.out is not None:
        options.out.write_text(json.dumps(told, indent=2) + "\n")


def _in_own_process(name: str, hidden: int) -> dict[str, float]:
    freed_at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", NAME, "--hidden", str(hidden), "--memory-of", name]
    done = subprocess.run(command, env=freed_at_once, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
