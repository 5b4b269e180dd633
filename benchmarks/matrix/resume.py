"""`python -m benchmarks.matrix.resume [--only WORD ...] [--json FILE]`: saved on one layout, resumed on another.

Every layout trains six steps and saves after three. Every layout resumes from what every other saved: what it then
has is saved again, and must be the same bits; the losses of its three steps must be those of one device, uninterrupted.
Dropout is on, the rate changes every step, the data are read for the second time towards the end.
"""

from __future__ import annotations

import argparse
import contextlib
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
from shardwise.train.build import Job, build
from shardwise.train.loop import run_steps
from shardwise.train.run import prepare
from shardwise.train.run_file import run_from
from shardwise.train.state import save

__all__ = ["CURVE", "LAYOUTS", "REQUIRED", "Resumed", "Runs", "some_pairs"]

_NAME = "benchmarks.matrix.resume"
STEPS, SAVED, NUM_BLOCKS = 6, 3, 2
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
    """As few as have every layout once, on either side."""
    return (
        ("one", "zero1"),
        ("dp2", "tp2"),
        ("pp2", "zero3"),
        ("tp2-pp2", "hsdp"),
        ("zero2", "cp2"),
        ("zero3-tp2", "zero3-pp2"),
        ("zero3-ep2", "ep2"),
    )


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
    return prepare(
        run_from(written), model=functools.partial(Reader, NUM_BLOCKS, experts=experts), resume=source is not None
    )


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


class Runs:
    """Runs that save and runs that go on from them, in one folder, on warm ranks. Used with `with`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._starter = self._stack.enter_context(RankStarter(preload=(__name__,)))
        self._pools: dict[int, RankPool] = {}
        self._curves: dict[tuple[str, bool, str], tuple[float, ...]] = {}

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def pair(self, first: str, second: str, *, optimizer: str = "adamw") -> tuple[float, str]:
        """The largest error of a loss that `second` has behind the checkpoint of `first`, and what is wrong, or ""."""
        experts = "ep2" in f"{first} {second}"
        whole = self._saved("one", experts, optimizer)
        own = self._saved(first, experts, optimizer)
        source = self._run(first, experts, optimizer) / "checkpoints" / f"step_{SAVED}"
        target = self._folder / f"{first}-to-{second}-{optimizer}"
        job = job_of(second, target, experts=experts, source=source, optimizer=optimizer)
        told: Resumed = self._pool(job).run(resume_on, job, target / "again", timeout_s=120.0)[0]
        error = max(_error(told.losses, whole[SAVED:]), _error(own, whole))
        if told.differing:
            return error, f"{len(told.differing)} tensors differ, such as {told.differing[0]}"
        return error, "" if error <= CURVE else "another curve"

    def _saved(self, name: str, experts: bool, optimizer: str) -> tuple[float, ...]:
        """The losses of the run that saves."""
        key = (name, experts, optimizer)
        if key not in self._curves:
            job = job_of(name, self._run(*key), experts=experts, optimizer=optimizer)
            self._curves[key] = self._pool(job).run(save_on, job, timeout_s=120.0)[0]
        return self._curves[key]

    def _run(self, name: str, experts: bool, optimizer: str) -> Path:
        return self._folder / f"{name}-{optimizer}{'-experts' if experts else ''}"

    def _pool(self, job: Job) -> RankPool:
        size = job.run.layout.world_size
        if size not in self._pools:
            made = RankPool(size, starter=self._starter, num_threads=1)
            self._pools[size] = self._stack.enter_context(made)
        return self._pools[size]


def _error(losses: Sequence[float], wanted: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))


def main() -> None:
    """Every pair; exit status 1 if one is not resumed."""
    parser = argparse.ArgumentParser(prog=f"python -m {_NAME}", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="pairs of these layouts, of LAYOUTS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, after every pair")
    parser.add_argument("--missing", action="store_true", help="only pairs that FILE has not; it keeps its others")
    told = parser.parse_args()
    names = tuple(told.only) or tuple(LAYOUTS)
    figures: dict[str, dict[str, Any]] = {}
    if told.missing and told.json is not None and told.json.exists():
        figures = json.loads(told.json.read_text(encoding="utf-8"))["pairs"]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="shardwise-resume-") as folder, Runs(Path(folder)) as runs:
        for first, second in itertools.product(names, names):
            if f"{first} -> {second}" not in figures:
                figures[f"{first} -> {second}"] = _figure(runs, first, second)
                if told.json is not None:
                    _write(told.json, figures)
    failed = _failed(figures)
    print(
        f"{len(figures)} pairs on real ranks in {time.perf_counter() - start:.0f} s; worst error of a loss "
        f"{_worst(figures):.1e} (tolerance {CURVE:.0e}); {len(failed)} failed"
    )
    if failed:
        print("failed:", *(f"{pair}: {why}" for pair, why in failed.items()), sep="\n  ")
        sys.exit(1)


def _write(file: Path, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """All figures, in the order of the pairs, whole or not at all."""
    names = [f"{first} -> {second}" for first, second in itertools.product(LAYOUTS, LAYOUTS)]
    told = {
        "tolerance": CURVE,
        "steps": STEPS,
        "worst": _worst(figures),
        "failed": _failed(figures),
        "pairs": {name: figures[name] for name in names if name in figures},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(circumstances(_NAME) | told, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)


def _failed(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {pair: each["why"] for pair, each in figures.items() if each["why"]}


def _worst(figures: Mapping[str, Mapping[str, Any]]) -> float:
    return max((each["error"] for each in figures.values() if each["error"] is not None), default=0.0)


def _figure(runs: Runs, first: str, second: str) -> dict[str, Any]:
    start, error = time.perf_counter(), None
    try:
        error, why = runs.pair(first, second)
    except Exception as failure:  # a pair that fails is a line of the table
        why = f"{type(failure).__name__}: {failure}"
    shown = "" if error is None else f"worst loss {error:7.1e}  {time.perf_counter() - start:4.1f} s"
    print(f"{first:12s} -> {second:12s} {shown}  {why.splitlines()[0][:160] if why else ''}", flush=True)
    return {"error": error, "why": why}


if __name__ == "__main__":
    main()
