"""Real compute: what a rank does, and the figures made of what the ranks measured.

Contenders take steps in turn; a step costs what the slower rank needed. Knows no files.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.common.steps import assert_same, timed
from benchmarks.pipeline.model import Shape
from benchmarks.schedules.contenders import HALVES, ONE, PEERS, TORCH, make
from benchmarks.schedules.model import batch_of, decoder
from shardwise.launch import RankContext

__all__ = ["figures", "slower", "table", "timed_rounds"]

Seconds = Mapping[str, Sequence[float]]  # contender -> of its steps, in order of rounds

BOUNDS = (ONE, HALVES)


def timed_rounds(context: RankContext, names: Sequence[str], shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step of every contender on this rank. Raises `AssertionError` where one computes wrongly."""
    torch.set_num_threads(1)
    model, batch = decoder(shape), batch_of(shape)
    reference = copy.deepcopy(model)
    loss = reference(**batch)
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    contenders = {}
    for name in names:
        contenders[name] = make(name, copy.deepcopy(model), shape, context.rank)
        gc.collect()
        if name not in BOUNDS:
            assert_same(name, contenders[name], batch, float(loss.item()), expected)
        timed(contenders[name], batch)
    del model, reference, expected, loss
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            seconds[name].append(timed(contenders[name], batch))
    return seconds


def slower(ranks: Sequence[Seconds]) -> dict[str, list[float]]:
    """What each step cost: the seconds of the slower rank."""
    return {name: [max(steps) for steps in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]}


def figures(seconds: Seconds) -> dict[str, Any]:
    """Ratios and efficiencies: medians over rounds of quotients within a round.

    vs_torch: ours / theirs by torch's schedule. Efficiency is t1 / (2 t), the ceiling t1 / (2 t_halves).
    """
    efficiency = {
        name: statistics.median(one / (2 * own) for one, own in zip(seconds[ONE], steps, strict=True))
        for name, steps in seconds.items()
        if name != ONE
    }
    ours = {name: value for name, value in efficiency.items() if name.startswith("shardwise ")}
    peers = {name: value for name, value in efficiency.items() if name.startswith("torch ") or name in PEERS}
    ratios = {}
    for name in TORCH:
        if f"shardwise {name}" in seconds and f"torch {name}" in seconds:
            pairs = zip(seconds[f"shardwise {name}"], seconds[f"torch {name}"], strict=True)
            ratios[name] = round(statistics.median(o / t for o, t in pairs), 4)
    best = max(ours, key=lambda name: ours[name])
    best_peer = max(peers, key=lambda name: peers[name])
    ceiling = efficiency[HALVES]
    return {
        "vs_torch": ratios,
        "best_schedule": best.removeprefix("shardwise "),
        "best_efficiency": round(ours[best], 4),
        "ceiling": round(ceiling, 4),
        "best_of_ceiling": round(ours[best] / ceiling, 4),
        "best_peer": best_peer,
        "best_peer_efficiency": round(peers[best_peer], 4),
        "efficiency": {name: round(value, 4) for name, value in efficiency.items()},
    }


def table(seconds: Seconds, found: Mapping[str, Any]) -> str:
    """Every contender: median milliseconds of a step, its efficiency, and where there is one its ratio to torch's."""
    lines = [f"real compute, {len(seconds[ONE])} rounds      median ms   t1/(2t)   of ceiling"]
    for name, steps in seconds.items():
        value = found["efficiency"].get(name, 0.5)
        lines.append(
            f"  {name:28} {statistics.median(steps) * 1e3:12.1f} {value:9.3f} {value / found['ceiling']:11.3f}"
        )
    lines.append("  ours / torch's: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in found["vs_torch"].items()))
    return "\n".join(lines)
