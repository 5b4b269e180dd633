"""Runs in 16 bits: what a run says of itself, and that a resumed one goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.checkpoint.source import open_checkpoint
from shardwise.errors import ConfigError
from shardwise.events import read_events
from shardwise.launch import RankContext
from shardwise.testing import on_ranks
from shardwise.train.build import Job
from shardwise.train.run import prepare, train_on_rank
from shardwise.train.run_file import run_from
from train.test_training import TASK, Decoder, off

FLOAT16 = {"compute": "float16", "loss_scale_window": 2}


def job(folder: Path, *, steps: int, layout: str, resume: bool = False, **more: Any) -> Job:
    training = {"steps": steps, "global_batch": 8, "learning_rate": 3e-3, "schedule": "constant", "seed": 7}
    written = {"folder": str(folder), "layout": layout, "task": TASK, "training": training, **more}
    return prepare(run_from(written), model=Decoder, resume=resume)


def told(folder: Path, kind: str, rank: int = 0) -> list[dict[str, Any]]:
    return [dict(event.data) for event in read_events(folder / "events") if event.kind == kind and event.rank == rank]


@on_ranks(2, timeout_s=90)
@pytest.mark.parametrize("layout", ["pp=2", "fsdp=2"])
@pytest.mark.parametrize("emulate", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_in_float16_is_resumed_bit_by_bit(rank: RankContext, tmp_path: Path, layout: str, emulate: bool) -> None:
    precision = {"precision": FLOAT16 | {"emulate": emulate}}
    saved = {"checkpoint": {"folder": str(tmp_path / "saved"), "every": 3}}
    first = train_on_rank(rank, job(tmp_path / "a", steps=3, layout=layout, **precision, **saved))
    torch.distributed.barrier()
    resumed = train_on_rank(rank, job(tmp_path / "b", steps=6, layout=layout, resume=True, **precision, **saved))
    whole = train_on_rank(rank, job(tmp_path / "c", steps=6, layout=layout, **precision))
    assert resumed.first_step == 3
    assert first.losses + resumed.losses == whole.losses
    assert told(tmp_path / "b", "loss_scale") == told(tmp_path / "c", "loss_scale")[3:]
    state = open_checkpoint(tmp_path / "saved").manifest.state
    assert isinstance(state["loss_scale"], dict)
    dtypes = {t.dtype for t in open_checkpoint(tmp_path / "saved").manifest.tensors.values() if t.kind == "parameter"}
    assert dtypes == {"float32"}  # what is saved are masters


@on_ranks(2, timeout_s=60)
def test_a_run_says_in_which_precision_it_computes_and_learns_as_float32_does(
    rank: RankContext, tmp_path: Path
) -> None:
    exact = train_on_rank(rank, job(tmp_path / "exact", steps=10, layout="dp=2"))
    emulated = {"compute": "bfloat16", "emulate": True}
    rounded = train_on_rank(rank, job(tmp_path / "rounded", steps=10, layout="dp=2", precision=emulated))
    assert 0 < off(rounded.losses, exact.losses) <= 1e-2
    if rank.rank == 0:
        assert told(tmp_path / "exact", "start")[0]["precision"] == ""
        assert told(tmp_path / "rounded", "start")[0]["precision"].startswith("emulated bfloat16")


def test_options_are_checked_when_the_run_is_read() -> None:
    training = {"training": {"steps": 1, "global_batch": 2}}
    run = run_from({**training, "precision": {"compute": "bfloat16", "keep": ["norms"]}, "compile": "eager"})
    assert run.techniques.precision.keep == ("norms",)
    assert run.techniques.compile == "eager"
    for wrong, said in (
        ({"compute": "int8"}, "is not one of float32, bfloat16, float16, float8"),
        ({"emulate": True}, "emulate rounds to 16 bits"),
        ({"loss_scale": -1.0}, "a loss scale is a positive number"),
        ({"loss_scale_window": 0}, "loss_scale_window counts good steps"),
        ({"computes": "bfloat16"}, "write compute"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_from({**training, "precision": wrong})


def test_float8_is_refused_where_the_device_has_none(tmp_path: Path) -> None:
    wanted = job(tmp_path, steps=1, layout="dp=1", precision={"compute": "float8"})
    context = RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused")
    with pytest.raises(ConfigError, match=r"capability 8\.9 or more and the package torchao"):
        train_on_rank(context, wanted)


def test_a_backend_that_there_is_not_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no backend of torch.compile"):
        job(tmp_path, steps=1, layout="dp=1", compile="fastest")
