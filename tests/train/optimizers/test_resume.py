"""What optimizers remember is saved and restored: a resumed run has the bits of one that was not stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from shardwise.launch import RankContext
from shardwise.testing import on_ranks
from shardwise.train.build import Job
from shardwise.train.run import prepare, train_on_rank
from shardwise.train.run_file import run_from


class Model(nn.Module):
    """An embedding, three hidden layers with vectors, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 24)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(24, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def job(folder: Path, *, layout: str, optimizer: str, steps: int, every: int = 0, resume: bool = False) -> Job:
    written = {
        "folder": str(folder / f"{steps}-{resume}"),
        "layout": layout,
        "task": {"kind": "random_tokens", "num_train": 40, "num_held_out": 16},
        "training": {
            "steps": steps,
            "global_batch": 8,
            "learning_rate": 3e-3,
            "schedule": "constant",
            "optimizer": optimizer,
        },
        "checkpoint": {"folder": str(folder / "saved"), "every": every},
    }
    return dataclasses.replace(prepare(run_from(written), model=Model), resume=resume)


@on_ranks(2, timeout_s=60)
@pytest.mark.parametrize(
    ("optimizer", "layout"),
    [
        ("momentum", "dp=2"),
        ("muon", "pp=2"),
        ("muon", "fsdp=2,zero=3"),
        ("adamw", "fsdp=2,zero=2,offload=optimizer"),
    ],
)
def test_a_resumed_run_is_the_one_that_was_not_stopped(rank: RankContext, tmp_path, optimizer, layout) -> None:
    options = {"layout": layout, "optimizer": optimizer}
    first = train_on_rank(rank, job(tmp_path, steps=3, every=3, **options)).losses
    resumed = train_on_rank(rank, job(tmp_path, steps=6, resume=True, **options))
    whole = train_on_rank(rank, job(tmp_path / "whole", steps=6, **options)).losses
    assert resumed.first_step == 3
    assert first + resumed.losses == whole
