"""`python -m benchmarks.matrix.resume [--only WORD ...] [--json FILE]`: saved on one layout, resumed on another.

Every layout trains six steps and saves after three. Every layout resumes from what every other saved: what it then
has is saved again, and must be the same bits; the losses of its three steps must be those of one device, uninterrupted.
Dropout is on, the rate changes every step, the data are read for the second time towards the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.common.circumstances import circumstances
from benchmarks.matrix.models import TOKENS, VOCABULARY, Reader
from shardwise.checkpoint.load import load_slices
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import open_checkpoint
from shardwise.launch import RankContext, RankPool, RankStarter
from shardwise.layout import Layout
from shardwise.train.build import Job, build
from shardwise.train.loop import run_steps
from shardwise.train.run import prepare
from shardwise.train.run_file import run_from
from shardwise.train.state import save

__all__ = ["CURVE", "LAYOUTS", "REQUIRED", "Resumed", "job_of", "resume_on", "save_on", "some_pairs"]

_NAME = "benchmarks.matrix.resume"
STEPS, SAVED = 6, 3
CURVE = 1e-5  # float32 sums taken in another order, passed on by some updates of Adam
_WORDS = {"num_train": 40, "num_held_out": 8, "ignored_fraction": 0.3}

LAYOUTS: Mapping[str, str] = MappingProxyType(
    {
        "one": "dp=1",
        "dp2": "dp=2",
        "tp2": "tp=2",
        "pp2": "pp=2",
        "tp2-pp2": "tp=2,pp=2",
        "zero1": "fsdp=2,zero=1",
        "zero2": "fsdp=2,zero=2",
        "zero3": "fsdp=2",
        "hsdp": "dp=2,fsdp=2",
        "zero3-tp2": "fsdp=2,tp=2",
        "zero3-pp2": "fsdp=2,pp=2,schedule=zb-h1",
        "cp2": "cp=2",
        "ep2": "ep=2",
        "zero3-ep2": "fsdp=2,ep=2",
    }
)
REQUIRED = ("dp2", "tp2", "pp2", "tp2-pp2", "zero3")  # of which every pair is resumed first


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """What a rank tells: losses of the steps behind the checkpoint, and what it held before them differs where."""

    losses: tuple[float, ...]
    differing: tuple[str, ...]


def some_pairs() -> tuple[tuple[str, str], ...]:
    """As many as have every layout once on either side: each saves for the next."""
    names = tuple(LAYOUTS)
    return tuple(zip(names, (*names[1:], names[0]), strict=True))


def job_of(name: str, folder: Path, *, experts: bool, source: Path | None = None, optimizer: str = "adamw") -> Job:
    """A run under a layout of LAYOUTS that saves, or one that goes on from the folder of a step."""
    every = {"every": SAVED, "keep": 2} if source is None else {"folder": str(source)}
    written: dict[str, Any] = {
        "folder": str(folder),
        "layout": LAYOUTS[name],
        "task": {"kind": "random_tokens", "vocabulary_size": VOCABULARY, "sequence_length": TOKENS, **_WORDS},
        "training": {
            "steps": STEPS,
            "global_batch": 8,
            "optimizer": optimizer,
            "learning_rate": 3e-3,
            "warm_up": 2,
            "seed": 7,
            "clip": 0.5,
        },
        "checkpoint": every,
        "timeline": {"steps": []},
    }
    return prepare(run_from(written), model=functools.partial(Reader, experts=experts), resume=source is not None)


def save_on(rank: RankContext, job: Job) -> tuple[float, ...]:
    """Train all steps; what is saved on the way lies in the run's folder. Collective."""
    world = build(job, rank)
    try:
        return tuple(run_steps(world, _silent))
    finally:
        world.program.close()


def resume_on(rank: RankContext, job: Job, again: Path) -> Resumed:
    """Save what was read, in the folder `again`, and train the steps that are left. Collective."""
    world = build(job, rank)
    try:
        save(
            again,
            world.first_step,
            program=world.program,
            optimizer=world.optimizer,
            state=dict(world.state),
            keep=1,
        )
        differing = _differing(Path(job.run.checkpoint.folder), again) if rank.rank == 0 else ()
        return Resumed(losses=tuple(run_steps(world, _silent)), differing=differing)
    finally:
        world.program.close()


def _silent(_kind: str, *, step: int | None = None, **_data: object) -> None:
    """Nobody is told."""


def _differing(first: Path, second: Path) -> tuple[str, ...]:
    """Tensors that are not the same bits in both checkpoints, or in one alone."""
    one, other = open_checkpoint(first), open_checkpoint(second)
    found = sorted(one.manifest.tensors.keys() ^ other.manifest.tensors.keys())
    for name in one.manifest.tensors.keys() & other.manifest.tensors.keys():
        whole = TensorSlice.whole(one.entry(name).global_shape)
        shapes = {name: one.entry(name).global_shape}
        a, b = (load_slices(each, {name: whole}, global_shapes=shapes)[name] for each in (one, other))
        if a.dtype != b.dtype or not torch.equal(a, b):
            found.append(name)
    return tuple(found)


def main() -> None:
    """Every pair; exit status 1 if one is not resumed."""
    parser = argparse.ArgumentParser(prog=f"python -m {_NAME}", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these layouts, of LAYOUTS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    told = parser.parse_args()
    names = tuple(told.only) or tuple(LAYOUTS)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="shardwise-resume-") as folder:
        figures = _run(names, Path(folder))
    failed = {pair: each["why"] for pair, each in figures.items() if each["why"]}
    worst = max((each["error"] for each in figures.values() if each["error"] is not None), default=0.0)
    print(
        f"{len(figures)} pairs on real ranks in {time.perf_counter() - start:.0f} s; worst error of a loss {worst:.1e} "
        f"(tolerance {CURVE:.0e}); {len(failed)} failed"
    )
    if told.json is not None:
        told.json.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "tolerance": CURVE,
            "steps": STEPS,
            "saved": SAVED,
            "worst": worst,
            "failed": failed,
            "pairs": figures,
        }
        told.json.write_text(json.dumps(circumstances(_NAME) | values, indent=1) + "\n", encoding="utf-8")
    if failed:
        print("failed:", *(f"{pair}: {why}" for pair, why in failed.items()), sep="\n  ")
        sys.exit(1)


def _run(names: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """By "saved -> resumed": the largest error of a loss, and why the pair is not resumed, or nothing."""
    sizes = {name: Layout.parse(LAYOUTS[name]).world_size for name in names}
    pairs = sorted(itertools.product(names, names), key=lambda pair: sizes[pair[1]])
    figures: dict[str, dict[str, Any]] = {}
    with RankStarter(preload=(__name__,)) as starter:
        curves = {experts: _saved(starter, "one", folder, experts) for experts in (False, True)}
        for name, experts in itertools.product(names, (False, True)):
            if not (experts is False and "ep2" in name):
                _saved(starter, name, folder, experts)
        for size in sorted(set(sizes.values())):
            with RankPool(size, starter=starter, num_threads=1) as pool:
                for first, second in (pair for pair in pairs if sizes[pair[1]] == size):
                    figures[f"{first} -> {second}"] = _pair(pool, first, second, folder, curves)
    return figures


def _saved(starter: RankStarter, name: str, folder: Path, experts: bool) -> tuple[float, ...]:
    own = folder / f"{name}{'-experts' if experts else ''}"
    if (own / "checkpoints").exists():
        return ()
    job = job_of(name, own, experts=experts)
    with RankPool(job.run.layout.world_size, starter=starter, num_threads=1) as pool:
        losses: tuple[float, ...] = pool.run(save_on, job, timeout_s=120.0)[0]
    return losses


def _pair(
    pool: RankPool, first: str, second: str, folder: Path, curves: Mapping[bool, Sequence[float]]
) -> dict[str, Any]:
    experts = "ep2" in f"{first} {second}"
    source = step_folder(folder / f"{first}{'-experts' if experts else ''}")
    target = folder / f"{first}-to-{second}"
    start = time.perf_counter()
    try:
        job = job_of(second, target, experts=experts, source=source)
        told: Resumed = pool.run(resume_on, job, target / "again", timeout_s=120.0)[0]
    except Exception as error:  # a pair that fails is a line of the table
        print(f"{first:12s} -> {second:12s} FAILED {type(error).__name__}: {error}", flush=True)
        return {"error": None, "why": f"{type(error).__name__}: {error}"}
    wanted = curves[experts][SAVED:]
    error = max(abs(a - b) / abs(b) for a, b in zip(told.losses, wanted, strict=True))
    why = f"{len(told.differing)} tensors differ, such as {told.differing[0]}" if told.differing else ""
    why = why or ("" if error <= CURVE else "another curve")
    seconds = time.perf_counter() - start
    print(f"{first:12s} -> {second:12s} worst loss {error:7.1e}  {seconds:4.1f} s  {why}", flush=True)
    return {"error": error, "why": why}


def step_folder(run_folder: Path) -> Path:
    """Where a run that saved has the checkpoint that the others go on from."""
    return run_folder / "checkpoints" / f"step_{SAVED}"


if __name__ == "__main__":
    main()
