"""Sound files to begin from: a run of a tiny model with two checkpoints, and all that it and the planner write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import shardwise
from benchmarks.fuzz.forgery import toml_text
from shardwise.checkpoint.save import Shard, save_checkpoint
from shardwise.describe.catalogue import named_cluster
from shardwise.describe.cluster_file import cluster_text
from shardwise.describe.profile import ModelProfile
from shardwise.events import NullSink
from shardwise.layout.layout import Layout
from shardwise.schedule import generate
from shardwise.train.export import export
from shardwise.train.run import train
from shardwise.train.run_file import run_from

__all__ = ["make_samples", "plain_samples", "written_run"]

_STEPS = 4  # a checkpoint behind every second


def written_run(folder: Path) -> dict[str, Any]:
    """What the run file says: a Llama of two layers in float16 on two stages, with what a loss scale leaves."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "folder": str(folder),
        "layout": "pp=2",
        "model": {"config": {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 16, **small}},
        "task": {"kind": "random_tokens", "vocabulary_size": 64, "sequence_length": 8, "num_train": 64},
        "precision": {"compute": "float16", "emulate": True},
        "training": {"steps": _STEPS, "global_batch": 4, "learning_rate": 1e-3, "seed": 1},
        "checkpoint": {"every": 2, "keep": 2},
        "timeline": {"every": 2},
    }


def _profile() -> ModelProfile:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    return shardwise.trace(model, {"input": torch.zeros(2, 8)}, loss=lambda outputs, _: outputs.sum())


def plain_samples(folder: Path) -> dict[str, Path]:
    """Name -> a sound file or folder of it, of what needs no training."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"checkpoints": folder / "checkpoints"}
    for step in (2, 4):
        weights = torch.arange(24.0).reshape(4, 6) + step
        shards = [Shard.whole("w", weights), Shard.whole("n", torch.tensor([step]), kind="buffer")]
        save_checkpoint(found["checkpoints"], step, shards, state={"seed": 1, "scale": [1.5, None]})
    for name, text in {
        "run_file": toml_text(written_run(folder / "run")),
        "cluster": cluster_text(named_cluster("h100x8x2")),
        "layout": Layout.parse("dp=2,pp=2,tp=2").to_json(),
        "schedule": generate("1f1b", num_ranks=2, num_micro_batches=4).to_json(),
        "profile": _profile().to_json(),
    }.items():
        found[name] = folder / f"{name}.{'json' if text.startswith('{') else 'toml'}"
        found[name].write_text(text, encoding="utf-8")
    return found


def make_samples(folder: Path) -> dict[str, Path]:
    """The same, and what training and exporting leave."""
    found = plain_samples(folder)
    run_folder = folder / "run"
    run = run_from(written_run(run_folder))
    train(run, progress=NullSink())
    (run_folder / "run.toml").write_text(found["run_file"].read_text(encoding="utf-8"), encoding="utf-8")
    export(run_folder, folder / "exported")
    events = min((run_folder / "events").glob("*.jsonl"))
    return {**found, "run": run_folder, "exported": folder / "exported", "events": events}
