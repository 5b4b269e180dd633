"""A run, or a program on its ranks, as a folder that `from_pretrained` of transformers reads: weights in safetensors
under transformers' names, config, generation config, tokenizer. A model of somebody's own becomes safetensors alone.

Knows checkpoints and what a run says of its model; refuses to know layouts.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.checkpoint.export import Group, export_safetensors
from shardwise.checkpoint.source import Source, open_checkpoint
from shardwise.checkpoint.storage import complete_steps
from shardwise.errors import CheckpointError
from shardwise.execute.program import Program
from shardwise.tasks import LanguageModelling, Task
from shardwise.train.conversions import groups_in_files, in_files
from shardwise.train.model_folder import copy_folder, empty_model_of, write_model, write_tokenizer
from shardwise.train.run_file import Run
from shardwise.train.state import save

__all__ = ["MODEL_FOLDER", "describe", "export"]

MODEL_FOLDER = "model"  # of a run's folder: what `write_model` and `write_tokenizer` wrote
_PARTS = ".parts"


def export(
    what: Program | str | Path,
    folder: str | Path,
    *,
    step: int | None = None,
    checkpoint: str | Path | None = None,
    dtype: str | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> tuple[Path, ...]:
    """Write a model into a folder that has none; returns the files.

    what             the folder of a run, or a program: then every rank calls it, on a folder that all share, and the
                     files are written by rank 0, which alone is told of them
    step             the checkpoint after so many steps; the latest, if not given
    checkpoint       the folder of the run's checkpoints, where it is not RUN/checkpoints
    dtype            of floating point tensors ("bfloat16"); theirs, if not given
    max_file_bytes   of one file of weights; more are numbered and indexed

    Raises CheckpointError.
    """
    folder = Path(folder)
    if isinstance(what, Program):
        return _export_program(what, folder, dtype=dtype, max_file_bytes=max_file_bytes)
    run = Path(what)
    source = open_checkpoint(_step_folder(Path(checkpoint) if checkpoint else run / "checkpoints", step))
    described = run / MODEL_FOLDER
    model = empty_model_of(described)
    files = _write(source, folder, model, dtype=dtype, max_file_bytes=max_file_bytes)
    if described.is_dir():
        files += copy_folder(described, folder, dtype=dtype or _dtype_of(source))
    return files


def describe(run: Run, *, model: nn.Module, task: Task) -> None:
    """Write into a run's folder what its exports have besides weights, anew."""
    folder = Path(run.folder) / MODEL_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder, model)
    given = run.task_options.get("tokenizer")
    if given:
        write_tokenizer(folder, Path(str(given)).expanduser(), trained_here=False)
    elif isinstance(task, LanguageModelling):
        write_tokenizer(folder, task.folder, trained_here=True)


def _step_folder(checkpoints: Path, step: int | None) -> Path:
    if step is None:
        return checkpoints
    steps = complete_steps(checkpoints)
    if step not in steps:
        raise CheckpointError(
            f"{checkpoints} has checkpoints of steps {', '.join(map(str, steps)) or 'none'}, but step {step} is asked "
            "for; take one of them"
        )
    return steps[step]


def _export_program(program: Program, folder: Path, *, dtype: str | None, max_file_bytes: int) -> tuple[Path, ...]:
    parts = folder / _PARTS
    save(parts, 0, program=program, optimizer=None, state={}, keep=1)
    files: tuple[Path, ...] = ()
    if program.place.rank == 0:
        source = open_checkpoint(parts)
        files = _write(source, folder, program.model, dtype=dtype, max_file_bytes=max_file_bytes)
        shutil.rmtree(parts)
        described = folder / f"{_PARTS}-model"
        write_model(described, program.model)
        if described.is_dir():
            files += copy_folder(described, folder, dtype=dtype or _dtype_of(source))
            shutil.rmtree(described)
    if program.place.world_size > 1:
        dist.barrier()
    return files


def _write(
    source: Source, folder: Path, model: nn.Module | None, *, dtype: str | None, max_file_bytes: int
) -> tuple[Path, ...]:
    groups: list[Group] | None = None
    if model is not None:
        names = [name for name, entry in source.manifest.tensors.items() if entry.kind in ("parameter", "buffer")]
        groups = [Group(names=each, convert=partial(_in_files, model)) for each in groups_in_files(model, names)]
    return export_safetensors(source, folder, dtype=dtype, max_file_bytes=max_file_bytes, groups=groups)


def _in_files(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return in_files(model, tensors)


def _dtype_of(source: Source) -> str:
    """Of most parameters."""
    dtypes = [entry.dtype for entry in source.manifest.tensors.values() if entry.kind == "parameter"]
    return max(set(dtypes), key=dtypes.count)
