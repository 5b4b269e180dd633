"""Which blocks of a decoder stand on which stage, by the rule of the software that ran it. Arithmetic alone."""

from __future__ import annotations

import dataclasses

from benchmarks.planner.shapes import Architecture
from benchmarks.planner.stacks import Stack

__all__ = ["Share", "shares_of"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Of one stage: layers, whether the embedding and the head are there, and blocks of any kind (a norm, the loss)."""

    stage: int
    layers: int
    embedding: bool
    head: bool
    blocks: int


def shares_of(arch: Architecture, stages: int, stack: Stack, *, ends: bool = False) -> tuple[Share, ...]:
    """Of every stage. ends: whether embedding and head count as a layer each."""
    if stack.split == "costs" and stages > 1:
        return _by_costs(arch, stages)
    fewer = arch.layers % stages and (arch.layers + 2) % stages == 0  # it divides only so
    extra = 2 if (stack.split == "ends" or ends or fewer) and stages > 1 else 0
    even, rest = divmod(arch.layers + extra, stages)
    layers = [even + (stage < rest) for stage in range(stages)]
    if extra:
        layers[0] -= 1
        layers[-1] -= 1
    return tuple(
        Share(
            stage=stage,
            layers=max(0, count),
            embedding=stage == 0,
            head=stage == stages - 1,
            blocks=max(0, count) + (stage == 0) + (stage == stages - 1),
        )
        for stage, count in enumerate(layers)
    )


def _by_costs(arch: Architecture, stages: int) -> tuple[Share, ...]:
    """nanotron: a layer costs its products, the head its own, all else nothing; blocks go to a stage in order until
    their sum reaches the stage's share of the whole."""
    layer = 4 * arch.heads * arch.head_dim * arch.hidden + 3 * arch.ffn * arch.hidden
    head = arch.vocab * arch.hidden
    blocks = [
        ("embedding", 0),
        *[("layer", layer)] * arch.layers,
        ("norm", 0),
        ("head", head),
        ("cast", 0),
        ("loss", 0),
    ]
    found: list[list[str]] = [[] for _ in range(stages)]
    total, passed, at = arch.layers * layer + head, 0, 0
    for name, cost in blocks:
        passed += cost
        found[at].append(name)
        if passed * stages >= total * (at + 1) and at + 1 < stages:
            at += 1
    return tuple(
        Share(
            stage=stage,
            layers=own.count("layer"),
            embedding="embedding" in own,
            head="head" in own,
            blocks=len(own),
        )
        for stage, own in enumerate(found)
    )
