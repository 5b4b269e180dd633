"""The rules a layout must satisfy, one function each: they raise `LayoutError`, or return nothing.

They take plain values, no layout. Those about the world and the batch need to know the machine and the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from shardwise.errors import ConfigError, LayoutError
from shardwise.quantities import parse_bytes

__all__ = [
    "check_axes",
    "check_batch",
    "check_chunks",
    "check_explicit_stages",
    "check_micro_batches",
    "check_offload",
    "check_recompute",
    "check_schedule",
    "check_sequence_parallel",
    "check_shares",
    "check_world_size",
    "check_zero",
]

RECOMPUTE = ("none", "full", "selective")


def check_axes(*, dp: int, pp: int, tp: int = 1, ep: int = 1, fsdp: int = 1, cp: int = 1) -> None:
    """Every axis has at least one rank."""
    for name, size in (("dp", dp), ("pp", pp), ("tp", tp), ("ep", ep), ("fsdp", fsdp), ("cp", cp)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise LayoutError(f"an axis has 1 rank or more, but {name}={size!r:.60}; use {name}=1 to leave it out")


def check_zero(zero: int) -> None:
    """What is divided is one of three."""
    if not isinstance(zero, int) or isinstance(zero, bool) or zero not in (1, 2, 3):
        raise LayoutError(
            f"zero is 1 (optimizer state is divided), 2 (gradients too) or 3 (parameters too), but got {zero!r}; write "
            "for example fsdp=2,zero=3"
        )


def check_recompute(recompute: str) -> None:
    """What is computed again is a word, or follows from a number of bytes."""
    if recompute in RECOMPUTE:
        return
    try:
        fits = isinstance(recompute, str) and parse_bytes(recompute) > 0
    except ConfigError:
        fits = False
    if not fits:
        raise LayoutError(
            f"recompute is {', '.join(RECOMPUTE)}, or the bytes that a rank may keep of activations, but got "
            f"{recompute!r}; write for example recompute=selective or recompute=512MiB"
        )


def check_sequence_parallel(sequence_parallel: bool, *, tp: int, ep: int = 1, cp: int = 1) -> None:
    """Tokens are dealt out among shards that divide layers too."""
    if sequence_parallel and cp > 1:
        raise LayoutError(
            f"sequence parallelism and context parallelism both deal out tokens, but cp={cp}; use one of the two, "
            "or write sequence_parallel=off"
        )
    if sequence_parallel and tp == 1:
        raise LayoutError(
            "sequence parallelism deals out tokens among the shards of tp, but tp=1; use tp=2 or more, or leave it out"
        )
    if sequence_parallel and ep > 1:
        raise LayoutError(
            f"sequence parallelism gives every shard its tokens, and ep={ep} sends tokens to experts: use one of the "
            "two; write sequence_parallel=off"
        )


def check_offload(*, activations: bool, recompute: str, sequence_parallel: bool) -> None:
    """What is computed again keeps its inputs; those that are dealt out by tokens cannot be put away."""
    if activations and recompute != "none" and sequence_parallel:
        raise LayoutError(
            f"what is computed again from tokens that are dealt out stays on the device, but recompute={recompute} and "
            "sequence_parallel=on with activations in the host's memory; use two of the three"
        )


def check_micro_batches(micro_batches: int | None) -> None:
    """A step has at least one micro-batch."""
    if micro_batches is not None and (not isinstance(micro_batches, int) or micro_batches < 1):
        raise LayoutError(
            f"a step has 1 micro-batch or more, but micro_batches={micro_batches!r}; leave it out for 2 a stage"
        )


def check_shares(
    shares: Sequence[int], *, dp: int, micro_batches: int | None, fsdp: int = 1, ep: int = 1, generated: bool = True
) -> None:
    """Every replica has its own number of micro-batches, which are as many together as without shares. Replicas that
    exchange something in every micro-batch have as many of them. generated: the schedule is made for any number of
    micro-batches, and ends with its step."""
    told = ":".join(map(str, shares))
    if fsdp > 1 or ep > 1:
        raise LayoutError(
            f"replicas that divide state or experts meet in every micro-batch, so that they have as many of them, but "
            f"shares={told} with fsdp={fsdp} and ep={ep}; use dp for the replicas, or drop shares"
        )
    if not generated:
        raise LayoutError(
            f"replicas with shares take a schedule each, made for its micro-batches, that ends with the step, but "
            f"shares={told} with one that is found, read or never ends; use schedule=1f1b, or drop shares"
        )
    if len(shares) != dp or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shares):
        raise LayoutError(
            f"shares are the micro-batches of each replica in a step, 1 or more, but dp={dp} and shares={told}; write "
            f"for example shares={':'.join(['3', *['1'] * (dp - 1)])}"
        )
    total, wanted = sum(shares), None if micro_batches is None else dp * micro_batches
    if wanted is not None and total != wanted:
        raise LayoutError(
            f"shares are micro_batches a replica in the mean, but shares={told} are {total} and dp × micro_batches = "
            f"{wanted}; drop micro_batches, or change shares"
        )
    if total % dp:
        raise LayoutError(
            f"shares are a whole number of micro-batches a replica in the mean, but shares={told} are {total} for "
            f"dp={dp}; use for example shares={':'.join(str(dp * n) for n in shares)}"
        )


def check_schedule(schedule: str, known: Collection[str], *, files: tuple[str, ...]) -> None:
    """The schedule is one that there is, or, by its ending, a file."""
    if schedule not in known and not (isinstance(schedule, str) and schedule.endswith(files)):
        raise LayoutError(
            f"a schedule is one of {', '.join(known)}, or a file that ends with {' or '.join(files)}, but got "
            f'"{schedule}"; use one of these'
        )


def check_chunks(chunks: int | None) -> None:
    """A rank owns at least one stage."""
    if chunks is not None and (not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1):
        raise LayoutError(
            f"a rank owns 1 stage or more, but chunks={chunks!r}; leave it out for what the schedule needs"
        )


def check_explicit_stages(stages: Sequence[Sequence[str]], *, pp: int, chunks: int = 1) -> None:
    """As many stages as pp and chunks say, none empty, no entry twice."""
    num_stages = pp * chunks
    if len(stages) != num_stages and chunks > 1:
        raise LayoutError(
            f"stages given by hand are pp × chunks, but there are {len(stages)} and pp={pp} × chunks={chunks} = "
            f"{num_stages}; list {num_stages} stages, or change pp or chunks"
        )
    if len(stages) != num_stages:
        raise LayoutError(
            f"stages given by hand are as many as pp, but there are {len(stages)} and pp={pp}; "
            f"write pp={max(1, len(stages))} or list {pp} stages"
        )
    empty = [s for s, units in enumerate(stages) if not units]
    if empty:
        raise LayoutError(f"a stage has a unit, but stages {empty} of {num_stages} have none; name one, or lower pp")
    times = Counter(unit for units in stages for unit in units)
    twice = [unit for unit in times if times[unit] > 1]
    if twice:
        raise LayoutError(
            f"a unit stands in one stage, but {twice[0]!r} is listed {times[twice[0]]} times; "
            f'name single calls, such as "{twice[0]}#0", to spread a unit that is called several times'
        )


def check_world_size(*, dp: int, pp: int, world_size: int, tp: int = 1, ep: int = 1) -> None:
    """The axes multiply to the number of ranks that there are."""
    if ep > 1 and dp * ep * pp * tp != world_size:
        raise LayoutError(
            f"dp × ep × pp × tp is the number of ranks, but {dp} × {ep} × {pp} × {tp} = {dp * ep * pp * tp} and there "
            f"are {world_size}; start {dp * ep * pp * tp} ranks, or change an axis"
        )
    if ep > 1:
        return
    if tp > 1 and dp * pp * tp != world_size:
        raise LayoutError(
            f"dp × pp × tp is the number of ranks, but {dp} × {pp} × {tp} = {dp * pp * tp} and there are {world_size}; "
            f"start {dp * pp * tp} ranks, or change an axis"
        )
    if tp == 1 and dp * pp != world_size:
        fitting = [f"dp={world_size // p},pp={p}" for p in range(1, world_size + 1) if world_size % p == 0]
        raise LayoutError(
            f"dp × pp is the number of ranks, but {dp} × {pp} = {dp * pp} and there are {world_size}; "
            f"use {' or '.join(fitting)}"
        )


def check_batch(*, dp: int, micro_batches: int, global_batch: int, ep: int = 1) -> None:
    """Every micro-batch of every replica has a sample. They need not be equal: the last may be smaller."""
    if ep > 1 and global_batch < dp * ep * micro_batches:
        raise LayoutError(
            f"every micro-batch of every replica has a sample, and the ranks that divide experts are replicas, but "
            f"{global_batch} samples are fewer than dp={dp} × ep={ep} × micro_batches={micro_batches} = "
            f"{dp * ep * micro_batches}; use micro_batches={max(1, global_batch // (dp * ep))}, or more samples"
        )
    if global_batch < dp * micro_batches:
        raise LayoutError(
            f"every micro-batch of every replica has a sample, but {global_batch} samples are fewer than "
            f"dp={dp} × micro_batches={micro_batches} = {dp * micro_batches}; use micro_batches="
            f"{max(1, global_batch // dp)}" + (f" and dp={global_batch} or less" if global_batch < dp else "")
        )
