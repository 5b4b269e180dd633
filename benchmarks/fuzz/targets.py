"""What is attacked: a sound file or folder, which of its files are changed, how, and who reads it.

A reader gives a value that can be compared: of a sound file always the same. A damaged file is refused, or read as what
it was; a forged one is refused, or read as what it says.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.fuzz.damage import DAMAGES, Damage
from benchmarks.fuzz.forgery import forge, forged_header, forged_json, forged_manifest, toml_text
from shardwise.checkpoint.load import load_slices, verify_checkpoint
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import Source, open_checkpoint, open_safetensors
from shardwise.describe.cluster_file import read_clusters
from shardwise.describe.profile import ModelProfile
from shardwise.events import read_events
from shardwise.files import read_text
from shardwise.launch import RankContext
from shardwise.layout.layout import Layout
from shardwise.plan.run_estimate import read_estimate
from shardwise.report.read_run import read_run
from shardwise.schedule import Schedule
from shardwise.trace.model_config import read_config
from shardwise.train.build import build
from shardwise.train.run import prepare
from shardwise.train.run_file import load_run

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """sample     name of a sound file or folder
    files      patterns of the files in it that are attacked; ("",) where it is a file itself
    read       what a user's command does with it
    forgeries  changes of content under a right form
    exact      damage is found by checksums: what is read in spite of it is what was written
    """

    sample: str
    files: tuple[str, ...]
    read: Callable[[Path], object]
    forgeries: tuple[Damage, ...] = ()
    damages: Sequence[str] = tuple(DAMAGES)
    exact: bool = False


def _loaded(source: Source) -> object:
    """Every tensor, as numbers that can be compared."""
    wanted = {name: TensorSlice.whole(entry.global_shape) for name, entry in source.manifest.tensors.items()}
    loaded = load_slices(source, wanted)
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in loaded.items()}


def _resumed(run: Path) -> object:
    """The world of a run that goes on, on one rank in this process: weights, moments, step."""
    job = prepare(load_run(run / "run.toml", [f"folder={run}", "layout=pp=1"]), resume=True)
    world = build(job, RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///dev/null"))
    try:
        found = {name: each.detach().float().sum().item() for name, each in world.program.parameters.items()}
        return found, world.first_step
    finally:
        world.program.close()


def _checkpoint(run: Path) -> object:
    return _whole(run / "checkpoints")


def _whole(folder: Path) -> object:
    verify_checkpoint(folder / "step_4")
    source = open_checkpoint(folder / "step_4")
    return source.manifest.step, source.manifest.state, _loaded(source)


def _exported(folder: Path) -> object:
    read_config(folder / "config.json")
    return _loaded(open_safetensors(folder))


def _report(run: Path) -> object:
    return read_estimate(run), repr(read_run(run))


def _forged_toml(path: Path, chance: random.Random) -> str:
    tree, told = forge(tomllib.loads(path.read_text(encoding="utf-8")), chance)
    path.write_text(toml_text(tree), encoding="utf-8")
    return told


def _run_file(path: Path) -> object:
    run = load_run(path)
    return {field: repr(getattr(run, field)) for field in type(run).model_fields}


TARGETS: Mapping[str, Target] = {
    "checkpoint alone": Target(
        sample="checkpoints",
        files=("step_4/*",),
        read=_whole,
        exact=True,
    ),
    "checkpoint, read whole": Target(
        sample="run",
        files=("checkpoints/step_4/*",),
        read=_checkpoint,
        exact=True,
    ),
    "checkpoint, forged": Target(
        sample="run",
        files=("checkpoints/step_4/manifest.json",),
        read=_checkpoint,
        forgeries=(forged_manifest,),
        damages=(),
    ),
    "checkpoint, headers forged": Target(
        sample="run",
        files=("checkpoints/step_4/*.safetensors",),
        read=_checkpoint,
        forgeries=(forged_header,),
        damages=(),
        exact=True,
    ),
    "run, resumed": Target(
        sample="run",
        files=("checkpoints/step_4/manifest.json",),
        read=_resumed,
        forgeries=(forged_manifest,),
        damages=("cut", "flip", "pickled", "archive", "foreign", "pipe"),
    ),
    "exported model": Target(
        sample="exported",
        files=("*.safetensors",),
        read=_exported,
        forgeries=(forged_header,),
    ),
    "exported config": Target(sample="exported", files=("config.json",), read=_exported, forgeries=(forged_json,) * 4),
    "run file": Target(sample="run_file", files=("",), read=_run_file, forgeries=(_forged_toml,) * 12),
    "cluster file": Target(sample="cluster", files=("",), read=read_clusters, forgeries=(_forged_toml,) * 8),
    "layout": Target(
        sample="layout",
        files=("",),
        read=lambda path: Layout.from_json(path.read_text(encoding="utf-8")),
        forgeries=(forged_json,),
        damages=(),
    ),
    "schedule": Target(
        sample="schedule",
        files=("",),
        read=lambda path: Schedule.from_json(read_text(path, what="a schedule file", repair="correct the path")),
        forgeries=(forged_json,) * 8,
    ),
    "profile": Target(
        sample="profile",
        files=("",),
        read=lambda path: ModelProfile.from_json(path.read_text(encoding="utf-8")),
        forgeries=(forged_json,),
        damages=(),
    ),
    "estimate and report": Target(
        sample="run",
        files=("estimate.json", "events/*.jsonl", "timelines/*.json"),
        read=_report,
        forgeries=(forged_json,) * 4,
    ),
    "events": Target(
        sample="events", files=("",), read=lambda path: list(read_events(path)), forgeries=(forged_json,) * 4
    ),
}
