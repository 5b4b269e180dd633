"""A chain of layers with numbers by hand, and small clusters: for tests of searches that need no model."""

from __future__ import annotations

import dataclasses

from shardwise.describe.cluster import Cluster, Device, Hosts, Link, Overheads
from shardwise.describe.kernels import Exchange, ExchangeKind, Kernel, KernelKind, Phase
from shardwise.layout import Layout
from shardwise.plan.chain_works import ChainWorks
from shardwise.plan.space import Limits
from shardwise.plan.stage_work import StageWork

TOKENS, WIDTH = 1024, 2048
PARAMETERS = 12 * WIDTH * WIDTH


def device(*, flops: float = 1e14, memory: float = 16e9, usd: float | None = 2.0, name: str = "card") -> Device:
    return Device(
        name=name,
        memory_bytes=int(memory),
        flops_per_s={"bfloat16": flops, "float32": flops / 2},
        bytes_per_s=1e12,
        usd_per_hour=usd,
    )


def cluster(*, hosts: int = 2, devices: int = 4, kind: Device | None = None) -> Cluster:
    return Cluster(
        hosts=(Hosts(device=kind or device(), devices=devices, count=hosts),),
        links=(
            Link(name="inside", bytes_per_s=100e9, latency_s=3e-6, ranks=devices),
            Link(name="between", bytes_per_s=10e9, latency_s=10e-6),
        ),
        overheads=Overheads(framework_bytes=1 << 29),
        name="by hand",
    )


def limits(num_layers: int = 8, *, experts: int = 0) -> Limits:
    return Limits(
        stages=num_layers,
        tensor={"heads": 8},
        context={"tokens": TOKENS},
        experts=experts,
        names=tuple(f"layers.{index}" for index in range(num_layers)),
    )


def works(num_layers: int = 8, *, heavier_last: float = 1.0) -> ChainWorks:
    """Equal layers of products, that tp and cp divide; the last one takes `heavier_last` times as long."""

    def units(layout: Layout, samples: int) -> tuple[StageWork, ...]:
        first = _layer(layout, samples, 1.0)
        last = first if heavier_last == 1.0 else _layer(layout, samples, heavier_last)
        row = [first] * (num_layers - 1) + [last]
        return tuple(dataclasses.replace(unit, stage=stage) for stage, unit in enumerate(row))

    return ChainWorks(units, [f"layers.{index}" for index in range(num_layers)])


def _layer(layout: Layout, samples: int, factor: float) -> StageWork:
    tokens = samples * TOKENS // layout.cp
    out = round(12 * WIDTH * factor) // layout.tp
    between = tokens // layout.tp if layout.sequence_parallel else tokens
    boundary = 2.0 * between * WIDTH
    forward, back, weight = (
        Kernel(
            kind=KernelKind.MATMUL,
            phase=phase,
            dtype="bfloat16",
            flops=2 * tokens * WIDTH * out,
            nbytes=2 * (tokens * WIDTH + tokens * out + WIDTH * out),
            shape=(1, tokens, out, WIDTH),
            batch_dims=(1,),
        )
        for phase in Phase
    )
    again = 2 if layout.recompute == "full" else 1
    exchanges = [
        Exchange(
            kind=ExchangeKind.ALL_REDUCE,
            axis="tp",
            phase=phase,
            nbytes=2 * tokens * WIDTH,
            count=2 if phase is Phase.FORWARD else 2 * again,
        )
        for phase in (Phase.FORWARD, Phase.INPUT)
        if layout.tp > 1
    ]
    saved = {"none": 34.0, "selective": 20.0, "full": 0.0}[layout.recompute] * tokens * WIDTH / layout.tp + boundary
    return StageWork(
        stage=0,
        parameters=PARAMETERS // layout.tp,
        trained=PARAMETERS // layout.tp,
        kernels=(forward, back, weight),
        recomputed=(forward,) if layout.recompute == "full" else (),
        exchanges=tuple(exchanges),
        unit_parameters=(PARAMETERS // layout.tp,),
        saved_bytes=saved,
        transient_bytes=2.0 * tokens * out,
        sends={1: boundary},
        gradients={1: boundary},
    )
