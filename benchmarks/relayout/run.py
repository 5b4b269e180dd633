"""`python -m benchmarks.relayout [--quick] [--json FILE]`: another layout in memory, beside a checkpoint on disk.

A decoder is trained a step on each of a row of layouts of two ranks. From one to the next the run goes over in memory;
beside it the same is done by a checkpoint: saved, then built anew from what was saved, in the same warm processes.
Prints a table and one JSON line. Seconds are of the slowest rank, bytes of the fullest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.common.circumstances import circumstances
from shardwise.launch import RankContext, RankPool, RankStarter
from shardwise.layout import Layout
from shardwise.quantities import format_bytes, format_seconds
from shardwise.train.build import Candidate, Job, World, build
from shardwise.train.loop import run_steps, save_world
from shardwise.train.memory import PeakMemory
from shardwise.train.relayout import relayout
from shardwise.train.run import prepare
from shardwise.train.run_file import run_from

__all__ = ["main"]

_NAME = "benchmarks.relayout"
LAYOUTS = ("dp=2", "pp=2", "tp=2", "fsdp=2", "dp=2")
_DEADLINE_S = 900.0


def job_of(folder: Path, layout: str, *, hidden: int, layers: int, steps: int) -> Job:
    """A run of a Llama of that size on random tokens, in float32 with AdamW."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": 8192,
        "max_position_embeddings": 64,
    }
    written: dict[str, Any] = {
        "folder": str(folder),
        "layout": layout,
        "model": {"config": config},
        "task": {"kind": "random_tokens", "vocabulary_size": 8192, "sequence_length": 64, "num_train": 16},
        "training": {"steps": steps, "global_batch": 4, "seed": 7},
        "timeline": {"steps": []},
    }
    return prepare(run_from(written))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gone:
    """From one layout to the next on one rank, both ways."""

    source: str
    target: str
    build_s: float
    move_s: float
    sent_bytes: int
    state_bytes: int
    held_bytes: int  # at most in the step before
    peak_bytes: int  # at most on the way in memory
    save_s: float = 0.0
    resume_s: float = 0.0  # laid out anew, from the files


def measured(rank: RankContext, job: Job, layouts: Sequence[str]) -> list[Gone]:
    """On one rank; collective. In memory first, then through the same layouts again by disk."""
    moved = [found for found, _ in _chain(rank, job, layouts, by_disk=False)]
    by_disk = [seconds for _, seconds in _chain(rank, job, layouts, by_disk=True)]
    return [
        dataclasses.replace(each, save_s=save_s, resume_s=resume_s)
        for each, (save_s, resume_s) in zip(moved, by_disk, strict=True)
    ]


def _chain(
    rank: RankContext, job: Job, layouts: Sequence[str], *, by_disk: bool
) -> Iterator[tuple[Gone, tuple[float, float]]]:
    own = Candidate(layout=job.run.layout, predicted_s=1.0)
    world = build(dataclasses.replace(job, candidates=(own, own)), rank)
    for number, text in enumerate(layouts[1:]):
        peak = PeakMemory(world.device)
        run_steps(dataclasses.replace(world, first_step=number), _silent, until=number + 1)
        held, seconds = peak.nbytes, (0.0, 0.0)
        if by_disk:
            seconds = _by_disk(rank, job, world, Layout.parse(text), number + 1)
        dist.barrier()
        world, told = relayout(world, Layout.parse(text), step=number + 1)
        gone = Gone(
            source=told.source,
            target=told.target,
            build_s=told.build_s,
            move_s=told.move_s,
            sent_bytes=told.sent_bytes,
            state_bytes=told.state_bytes,
            held_bytes=held,
            peak_bytes=told.peak_bytes,
        )
        yield gone, seconds
    world.program.close()


def _by_disk(rank: RankContext, job: Job, world: World, layout: Layout, steps: int) -> tuple[float, float]:
    """Seconds to save a checkpoint, and to lay the model out from it."""
    dist.barrier()
    start = time.perf_counter()
    save_world(world, _silent, steps)
    saved = time.perf_counter()
    run = job.run.model_copy(update={"layout": layout})
    resumed = build(dataclasses.replace(job, run=run, resume=True), rank)
    ended = time.perf_counter()
    resumed.program.close()
    dist.barrier()
    if rank.rank == 0:
        shutil.rmtree(run.checkpoint_folder)
    return saved - start, ended - saved


def _silent(_kind: str, *, step: int | None = None, **_data: object) -> None:
    """Nobody is told."""


def _worst(ranks: Sequence[Gone]) -> dict[str, Any]:
    plain = [dataclasses.asdict(each) for each in ranks]
    return {k: (v if isinstance(v, str) else max(each[k] for each in plain)) for k, v in plain[0].items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog=f"python -m {_NAME}", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a model of 6 M parameters in place of 43 M")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    told = parser.parse_args()
    hidden, layers = (192, 4) if told.quick else (512, 8)
    with tempfile.TemporaryDirectory(prefix="shardwise-relayout-") as folder:
        job = job_of(Path(folder), LAYOUTS[0], hidden=hidden, layers=layers, steps=len(LAYOUTS))
        preload = (f"{_NAME}.run", "transformers.models.llama.modeling_llama")
        with RankStarter(preload=preload) as starter, RankPool(2, starter=starter, num_threads=1) as pool:
            ranks = pool.run(measured, job, LAYOUTS, timeout_s=_DEADLINE_S)
    rows = [_worst(each) for each in zip(*ranks, strict=True)]
    for row in rows:
        print(
            f"{row['source']:>7s} -> {row['target']:7s}  in memory {format_seconds(row['move_s']):>8s} + laid out "
            f"{format_seconds(row['build_s']):>8s}   by disk: saved {format_seconds(row['save_s']):>8s}, laid out from "
            f"it {format_seconds(row['resume_s']):>8s}   at most {format_bytes(row['peak_bytes'])}, a step "
            f"{format_bytes(row['held_bytes'])}"
        )
    memory = sum(row["move_s"] + row["build_s"] for row in rows)
    disk = sum(row["save_s"] + row["resume_s"] for row in rows)
    figures = {
        "state_bytes": rows[0]["state_bytes"],
        "in_memory_s": memory / len(rows),
        "moved_s": sum(row["move_s"] for row in rows) / len(rows),
        "by_disk_s": disk / len(rows),
        "rows": rows,
    }
    if told.json is not None:
        told.json.parent.mkdir(parents=True, exist_ok=True)
        told.json.write_text(json.dumps(circumstances(_NAME) | figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in figures.items() if name != "rows"}))
