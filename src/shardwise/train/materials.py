"""What a run is made of before a layout divides it: task, model, initial values, the first micro-batch.

Knows a job. Refuses to know ranks: whoever asks, on whatever rank, gets the same.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.checkpoint.source import Source, open_safetensors
from shardwise.execute.program import Place
from shardwise.layout import SYNCHRONISED
from shardwise.parallel.hold import hold
from shardwise.quantities import format_bytes, format_count
from shardwise.tasks import Described, Headed, LanguageModelling, ModelHead, Task, indices_at, may_have_head, task_from
from shardwise.trace.deferred import Blueprint, defer
from shardwise.trace.placing import place
from shardwise.train.model import Values, model_factory, names_in, values_of
from shardwise.train.run_file import Run
from shardwise.train.shares import share
from shardwise.train.world import Fresh, Job

__all__ = ["about", "build_model", "build_task", "first_micro_batch", "fresh_models", "head_for", "head_of", "state_of"]

_SPREAD = 0.02  # of placeholders: about what weights begin with


def build_task(job: Job) -> Task:
    """The task object that was given, or the one of the run."""
    return job.task if job.task is not None else task_from(job.run.task.kind, job.task_options)


def head_of(task: Task) -> ModelHead | None:
    """What the task wants of a transformers model; None where it wants nothing."""
    return task.head() if isinstance(task, Headed) else None


def head_for(job: Job) -> ModelHead | None:
    """What the job's task wants; a task that wants nothing is not opened for it."""
    return head_of(build_task(job)) if job.task is not None or may_have_head(job.run.task.kind) else None


def build_model(job: Job, source: Source | None = None) -> tuple[nn.Module, Values | None]:
    """The model without values, its buffers real, and where its values come from; None: it has its own.

    `source` is the checkpoint to go on from. Raises ConfigError, ModelError, CheckpointError.
    """
    if isinstance(job.model, nn.Module):
        model = job.model.train()
        return model, values_of(source, model) if source is not None else None
    blueprint = _blueprint(job)
    model = blueprint.module
    path = job.run.model.path
    if source is None and path is None:
        return model, blueprint.materialize
    initial = None
    if source is None and path is not None:
        source = open_safetensors(path)
        initial = blueprint.materialize if head_for(job) is not None else None
    assert source is not None
    values = values_of(source, model, initial)
    saved = names_in(source, model)
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(values([name])[name])
    return model, values


def _blueprint(job: Job) -> Blueprint:
    """A model of the job's factory, its buffers real."""
    factory = job.model if job.model is not None else model_factory(job.run.model, head_for(job))
    assert not isinstance(factory, nn.Module)
    blueprint = defer(factory, seed=job.run.training.seed)
    buffers = [name for name, _ in blueprint.module.named_buffers(remove_duplicate=False)]
    place(blueprint.module, blueprint.materialize(buffers))
    return blueprint


def fresh_models(job: Job, model: nn.Module) -> Fresh:
    """Makes the model of a job again and again; `model` is what `build_model` gave, not laid out yet.

    A factory is called again. Of a live module a copy without parameters is kept, of which copies are given; its
    meanwhile values are random numbers keyed by name, for what is proven before the true ones come.
    """
    if not isinstance(model, nn.Module) or not isinstance(job.model, nn.Module):
        return functools.partial(_from_factory, job)
    return functools.partial(_from_copy, _hollow(model))


def _from_factory(job: Job) -> tuple[nn.Module, Values]:
    blueprint = _blueprint(job)
    return blueprint.module, blueprint.materialize


def _from_copy(kept: nn.Module) -> tuple[nn.Module, Values]:
    model = copy.deepcopy(kept)
    described = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters(remove_duplicate=False)}
    hold(model, (), device=torch.device("cpu"))

    def values(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        return {name: _placeholder(name, *described[name]) for name in names}

    return model, values


def _hollow(model: nn.Module) -> nn.Module:
    """A copy with parameters on meta; buffers have their values."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(tuple(parameter.shape), dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        return copy.deepcopy(model, memo)


def _placeholder(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(math.prod(shape), generator=generator) * _SPREAD).to(dtype).view(shape)


def about(task: Task) -> str:
    """A task's data in words."""
    samples = format_count(task.num_samples("train"), "samples")
    if isinstance(task, Described):
        return f"{samples}, {task.about()}"
    if not isinstance(task, LanguageModelling):
        return samples
    corpus = task.corpus
    tokens = format_count(corpus.num_train_tokens, "tokens")
    return f"{samples}, {tokens} of {format_bytes(corpus.num_bytes)} of text in {corpus.num_documents} documents"


def first_micro_batch(run: Run, task: Task, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """What every rank traces: the first micro-batch of the first replica at step 0."""
    indices = indices_at(task, seed=run.training.seed, step=0, global_batch=run.training.global_batch)
    first = Place(rank=0, dp=run.layout.num_replicas, pp=run.layout.pp)
    parts = share(
        task,
        indices,
        replica=first.replica,
        replicas=first.dp,
        num_micro_batches=run.num_micro_batches,
        device=device,
        seed=run.training.seed,
        together=run.techniques.batch_norm == SYNCHRONISED,
    )
    inputs: dict[str, torch.Tensor] = parts[0].inputs
    return inputs


def state_of(job: Job, task: Task) -> dict[str, object]:
    """What a resumed run must have in common with the one that was saved."""
    training = job.run.training
    told = {"seed": training.seed, "global_batch": training.global_batch, "data": _fingerprint(job, task)}
    return {**told, "optimizer": training.optimizer}


def _fingerprint(job: Job, task: Task) -> str:
    if isinstance(task, LanguageModelling):
        return f"{task.corpus.fingerprint}-{task.sequence_length}"
    known = type(task).__qualname__ if job.task is not None else job.run.task.kind
    text = json.dumps([known, dict(job.task_options), task.num_samples("train")], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
