"""`generate`: continues prompts by a checkpoint or a model, split over processes as a layout says.

    prompts ──tokenizer──► tokens ──► ranks of the layout ──► tokens as they come, and all of them ──► texts

Starts the ranks here, or is one of those that another launcher started; one rank runs in this process. Knows no stages
and no caches (`execute.generation`).
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from pydantic import ValidationError

from shardwise.errors import ConfigError, LayoutError
from shardwise.execute.assemble import assemble
from shardwise.execute.generate_tokens import Choice, Forced
from shardwise.execute.generation import Generated, check_class
from shardwise.execute.generation import generate as generate_on_rank
from shardwise.execute.modes import evaluating
from shardwise.generate.checkpoint import Checkpoint, checkpoint_at
from shardwise.generate.figures import Figures, figures_of
from shardwise.generate.prompts import Prompts, prompts_of, text_of, tokenizer_at
from shardwise.launch import RankContext, init_process_group, read_world, run_ranks
from shardwise.launch.worker import tell_all
from shardwise.layout import Layout
from shardwise.train.meeting import Meeting, backend_of, check_own_ranks, meet
from shardwise.train.technique_tables import CommunicationOptions

__all__ = ["Continued", "generate"]

Told = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continued:
    """What follows each prompt: as tokens, and as text where there is a tokenizer. `figures` say how fast; `ready_s`
    how long it took until the first pass, with starting processes and reading weights."""

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    figures: Figures
    ready_s: float
    first: bool = True  # whether this process is the one to show it


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """What every rank is told."""

    source: Checkpoint | nn.Module
    prompts: Prompts
    layout: Layout
    choice: Choice
    forced: Forced
    ends: tuple[int, ...]
    pad: int
    max_new_tokens: int
    micro_batches: int | None
    device: str
    dtype: str | None
    backend: str
    streams: bool


def generate(
    source: str | Path | nn.Module,
    prompts: Sequence[str | Sequence[int]],
    *,
    layout: Layout | str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    tokenizer: Any = None,
    micro_batches: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    backend: str = "auto",
    told: Told | None = None,
) -> Continued:
    """Continue prompts, the same on any layout of dp, tp and pp.

    source         the folder of a run, one of its checkpoints, a folder of transformers, or a model of transformers
    prompts        texts, or tokens of texts; of an encoder-decoder what its encoder reads
    temperature    0: the likeliest token each time; else drawn, by `seed` and the number of prompt and token alone
    stop           tokens that end a text; those of the model's generation config, if not given; () for none
    tokenizer      of texts; the checkpoint's, if not given
    micro_batches  in which a replica's prompts follow each other through its stages; as many as stages, if not given
    backend        by which ranks exchange: "auto" (gloo, nccl on GPUs), or "mpi" where MPI has started them
    told           is given (number of a prompt, token) as tokens come, in this process

    Callable from a script without a main guard. Among ranks of torchrun, srun or mpirun each calls it, and the prompts
    are those of rank 0, which alone is `first`, and is told of its replica's tokens.

    Raises ConfigError, CheckpointError, BatchError, LayoutError, and the error of the first rank that fails.
    """
    started_s = time.monotonic()
    layout = Layout.parse(layout) if isinstance(layout, str) else layout

    def job_of(prompts: Sequence[str | Sequence[int]]) -> tuple[_Job, Any]:
        _check(layout, device, dtype)
        found = source if isinstance(source, nn.Module) else checkpoint_at(source)
        reader = tokenizer
        if reader is None and isinstance(found, Checkpoint):
            reader = tokenizer_at(found.described)
        config, described = _described(found)
        ends = _numbers(described.eos_token_id) if stop is None else tuple(stop)
        pad = next((p for p in (*_numbers(described.pad_token_id), *ends)), 0)
        job = _Job(
            source=found,
            prompts=prompts_of(prompts, tokenizer=reader, pad=pad, on_the_left=not config.is_encoder_decoder),
            layout=layout,
            choice=Choice(
                temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
            ),
            forced=_forced(described, config),
            ends=ends,
            pad=pad,
            max_new_tokens=max_new_tokens,
            micro_batches=micro_batches,
            device=device,
            dtype=dtype,
            backend=backend,
            streams=told is not None,
        )
        return job, reader

    world = read_world()
    if world is None:
        job, reader = job_of(prompts)
        made, began_s = _on_own_ranks(job, told)
        return _continued(job, made, reader, ready_s=began_s - started_s)
    meeting = meet(world, _communication(backend), device)
    with meeting.ending_together():
        context, store = meeting.context, meeting.store
        job, reader = job_of(list(prompts) if store is None else tell_all(context, store, lambda: list(prompts)))
        made, began_s = _as_one_rank(meeting, job, told if context.rank == 0 else None)
        return _continued(job, made, reader, ready_s=began_s - started_s, first=context.rank == 0)


def _check(layout: Layout, device: str, dtype: str | None) -> None:
    if layout.sequence_parallel or layout.cp > 1 or layout.ep > 1 or layout.fsdp > 1:
        raise LayoutError(
            f"text is generated under layouts of dp, tp and pp, but this one is {layout}; leave the rest out"
        )
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"a device is cpu or cuda, got {device!r}; take one of them")
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype is one of torch, such as bfloat16, got {dtype!r}")


def _replica_of(rank: int, layout: Layout) -> int:
    return rank // layout.tp % layout.num_replicas


def _described(source: Checkpoint | nn.Module) -> tuple[Any, Any]:
    """The config of a model, and how it generates. Raises ModelError for one that does not."""
    import transformers

    if isinstance(source, nn.Module):
        check_class(type(source))
        model: Any = source
        return model.config, model.generation_config
    config = transformers.AutoConfig.from_pretrained(source.described)
    check_class(source.class_of(config))
    if (source.described / "generation_config.json").is_file():
        return config, transformers.GenerationConfig.from_pretrained(source.described)
    return config, transformers.GenerationConfig.from_model_config(config)


def _forced(described: Any, config: Any) -> Forced:
    """Tokens that the generation config forces and forbids. Words of several tokens are not looked for."""
    words = [word[0] for word in described.bad_words_ids or () if len(word) == 1]
    return Forced(
        never=(*words, *_numbers(described.suppress_tokens)),
        never_first=_numbers(described.begin_suppress_tokens),
        first=described.forced_bos_token_id if config.is_encoder_decoder else None,
        last=next(iter(_numbers(described.forced_eos_token_id)), None),
    )


def _numbers(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _continued(job: _Job, made: Generated, tokenizer: Any, *, ready_s: float, first: bool = True) -> Continued:
    replicas = range(job.layout.num_replicas)
    ranks = [[r for r in range(job.layout.world_size) if _replica_of(r, job.layout) == i] for i in replicas]
    return Continued(
        tokens=made.tokens,
        texts=tuple(text_of(row, tokenizer) for row in made.tokens) if tokenizer is not None else (),
        figures=figures_of(made.rates, ranks_of_replica=ranks, num_prompts=len(job.prompts.tokens)),
        ready_s=ready_s,
        first=first,
    )


def _communication(backend: str) -> CommunicationOptions:
    try:
        return CommunicationOptions.model_validate({"backend": backend})
    except ValidationError as error:
        raise ConfigError(f"a backend is auto, gloo, nccl or mpi, got {backend!r}; take one of them") from error


def _as_one_rank(meeting: Meeting, job: _Job, told: Told | None) -> tuple[Generated, float]:
    """The process is a rank of a launcher already."""
    context = meeting.context
    if context.world_size != job.layout.world_size:
        raise LayoutError(
            f"a layout has as many ranks as were started, but {job.layout or 'that of one device'} has "
            f"{job.layout.world_size} and there are {context.world_size}; start {job.layout.world_size}, or set layout"
        )
    if job.device == "cpu":
        torch.set_num_threads(1)
    if context.world_size == 1:
        return _on_rank(context, job, told)
    init_process_group(context, backend=backend_of(_communication(job.backend), job.device), store=meeting.store)
    made = _on_rank(context, job, told)
    dist.destroy_process_group()
    return made


def _on_own_ranks(job: _Job, told: Told | None) -> tuple[Generated, float]:
    """One rank runs in this process; several are started."""
    check_own_ranks(_communication(job.backend), job.layout.world_size, job.device, command="generate CHECKPOINT")
    if job.layout.world_size == 1:
        return _on_rank(RankContext(rank=0, world_size=1, local_rank=0, rendezvous=""), job, told)

    def heard(rank: int, message: object) -> None:
        if told is not None and isinstance(message, tuple):
            told(*message)

    return run_ranks(_on_started_rank, (job,), world_size=job.layout.world_size, on_message=heard)[0]


def _on_started_rank(context: RankContext, job: _Job) -> tuple[Generated, float]:
    init_process_group(context, backend=backend_of(_communication(job.backend), job.device))
    tells = job.streams and context.rank // job.layout.tp % job.layout.num_replicas * job.layout.tp == context.rank
    return _on_rank(context, job, (lambda sample, token: context.post((sample, token))) if tells else None)


def _on_rank(context: RankContext, job: _Job, told: Told | None) -> tuple[Generated, float]:
    """One rank's part, and when it began to generate."""
    device = torch.device("cuda", context.local_rank) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    fill = None
    if isinstance(job.source, nn.Module):
        model = (
            job.source if job.layout.world_size == 1 and device.type == "cpu" else copy.deepcopy(job.source).to(device)
        )
    else:
        model, fill = job.source.model(dtype=job.dtype, device=device)
    with evaluating(model):
        program = assemble(
            model, _example(model, device), layout=job.layout, rank=context.rank, device=device, fill=fill
        )
        try:
            began_s = time.monotonic()
            made = generate_on_rank(
                program,
                job.prompts.batch,
                max_new_tokens=job.max_new_tokens,
                choice=job.choice,
                forced=job.forced,
                ends=job.ends,
                pad=job.pad,
                num_micro_batches=job.micro_batches,
                told=told,
            )
        finally:
            program.close()
    return made, began_s


def _example(model: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """What a model is laid out by: two samples of 8 tokens."""
    tokens = torch.arange(1, 17, device=device).view(2, 8) % model.config.get_text_config(decoder=True).vocab_size
    return {"input_ids": tokens, "labels": tokens}
