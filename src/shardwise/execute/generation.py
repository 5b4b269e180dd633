"""Text generation by a program: the same tokens on any layout.

    prompts ──dealt──► replicas ──dealt──► micro-batches that follow each other through the stages

    stage 0    0 1 2 3 0 1 2 3 …          numbers are micro-batches; a micro-batch comes round again once the last
    stage 1      0 1 2 3 0 1 2 3 …        stage has chosen its token and told it to all ranks of the replica

Knows tokens, ranks and when a text ends; refuses to know strings, and how a forward is run (`generate_passes`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardwise.comm.point_to_point import Waitable
from shardwise.errors import BatchError, LayoutError, ModelError
from shardwise.execute.batches import MicroBatch
from shardwise.execute.generate_passes import Passes, Texts
from shardwise.execute.generate_tokens import Choice, Forced, next_tokens
from shardwise.execute.modes import evaluating
from shardwise.execute.program import Program

__all__ = ["Generated", "Rates", "check_class", "generate"]

Told = Callable[[int, int], None]  # (number of a prompt, its next token)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What this rank measured.

    prefill_s            until the first token of every prompt of this replica was known
    first_token_s        until the first of them was
    decode_s             from then on
    prompt_tokens        of this replica's prompts, without padding
    generated_tokens     of this replica, as many as were kept
    cache_bytes          the most that this rank's caches held
    """

    prefill_s: float
    first_token_s: float
    decode_s: float
    prompt_tokens: int
    generated_tokens: int
    cache_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """What follows each prompt, up to and with the token that ends it; the same on every rank. `rates` are of every
    rank, in their order."""

    tokens: tuple[tuple[int, ...], ...]
    rates: tuple[Rates, ...]


def generate(
    program: Program,
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int,
    choice: Choice | None = None,
    forced: Forced | None = None,
    ends: Sequence[int] = (),
    pad: int = 0,
    start: int | None = None,
    num_micro_batches: int | None = None,
    told: Told | None = None,
) -> Generated:
    """Continue the prompts of `batch`, the same on every rank: input_ids (prompts, tokens), padded on the left where
    attention_mask is 0. Of an encoder-decoder they are what its encoder reads, and texts begin with `start`.

    A text ends behind one of `ends`, or with `max_new_tokens`. Each replica continues its share of the prompts, in
    `num_micro_batches` that fill its pipeline (as many as it has stages, at most one a prompt). `forced` are tokens
    that are not chosen by `choice`. `told` is given the tokens of this rank's replica as they come. Collective. The
    model is put into evaluation mode meanwhile.

    Raises BatchError for wrong prompts, LayoutError where replicas must compute together (ep, fsdp) or sequences are
    divided (cp, sequence_parallel), ModelError for a model that keeps no cache of transformers.
    """
    _check(program, batch, max_new_tokens)
    place = program.place
    prompts = len(batch["input_ids"])
    own = range(prompts * place.replica // place.dp, prompts * (place.replica + 1) // place.dp)
    choice = choice or Choice()
    with evaluating(program.model):
        run = _Run(
            program, choice=choice, forced=forced, ends=frozenset(ends), pad=pad, told=told, limit=max_new_tokens
        )
        for texts in _dealt(batch, own, num_micro_batches or place.pp, program, start):
            run.add(texts)
        tokens, rates = run.to_the_end() if own else ({}, Rates(**dict.fromkeys(_RATES, 0)))
    return _gathered(tokens, rates, place.world_size)


_RATES = tuple(field.name for field in dataclasses.fields(Rates))


class _Run:
    """The texts of one replica, until all have ended."""

    def __init__(
        self,
        program: Program,
        *,
        choice: Choice,
        forced: Forced | None,
        ends: frozenset[int],
        pad: int,
        told: Told | None,
        limit: int,
    ) -> None:
        self._passes = Passes(program)
        self._program = program
        self._choice = choice
        self._forced = forced
        self._ends = ends
        self._pad = pad
        self._told = told
        self._limit = limit
        self._growing: list[_Growing] = []
        self._sending: list[tuple[Waitable, torch.Tensor]] = []

    def add(self, texts: Texts) -> None:
        """Another micro-batch."""
        self._passes.begin(texts)
        self._growing.append(_Growing(texts))

    def to_the_end(self) -> tuple[dict[int, tuple[int, ...]], Rates]:
        """The tokens by number of their prompt."""
        started = time.perf_counter()
        first_s = prefill_s = 0.0
        prompt_tokens = sum(each.prompt_tokens for each in self._growing)
        going = self._growing
        for growing in going:
            self._run(growing, 0)
        for number in range(self._limit):
            for growing in going:
                growing.take(number, self._ends, self._pad, self._told)
                if number == 0:
                    prefill_s = time.perf_counter() - started
                    first_s = first_s or prefill_s
                if growing.goes_on and number + 1 < self._limit:
                    self._run(growing, number + 1)
            going = [growing for growing in going if growing.goes_on]
            if not going:
                break
        self._passes.finish()
        for work, _ in self._sending:
            work.wait()
        tokens = {sample: tuple(row) for each in self._growing for sample, row in each.by_sample()}
        rates = Rates(
            prefill_s=prefill_s,
            first_token_s=first_s,
            decode_s=time.perf_counter() - started - prefill_s,
            prompt_tokens=prompt_tokens,
            generated_tokens=sum(map(len, tokens.values())),
            cache_bytes=sum(self._passes.held_bytes(each.texts) for each in self._growing),
        )
        return tokens, rates

    def _run(self, growing: _Growing, number: int) -> None:
        """One pass. Behind it one rank chooses the tokens; the others have asked for them before anything else of its
        is asked for, so that messages keep their order."""
        logits = self._passes.run(growing.texts)
        place, transport = self._program.place, self._program.engine.transport
        chooser = place.rank_of(self._passes.logits_stage) - place.shard
        if place.rank != chooser:
            arriving = torch.empty(len(growing.rows), dtype=torch.int64, device=growing.texts.tokens.device)
            growing.pending = transport.irecv(arriving, chooser), arriving
            return
        assert logits is not None  # this rank has the last units
        samples = growing.texts.micro_batch.samples
        chosen = next_tokens(
            logits,
            growing.seen(self._choice),
            self._choice,
            samples=samples,
            number=number,
            forced=self._forced,
            is_last=number + 1 == self._limit,
        )
        growing.pending = None, chosen
        for rank in (own - place.shard + shard for own in place.pipeline() for shard in range(place.tp)):
            if rank != chooser:
                self._sending.append((transport.isend(chosen, rank), chosen))


class _Growing:
    """The texts of a micro-batch while they grow."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.rows: list[list[int]] = [[] for _ in texts.tokens]
        self.pending: tuple[Waitable | None, torch.Tensor] | None = None  # the next tokens, perhaps on their way
        self._ended = [False] * len(self.rows)
        read = texts.source if texts.source is not None else {"input_ids": texts.tokens, "attention_mask": texts.mask}
        mask = read.get("attention_mask")
        self.prompt_tokens = read["input_ids"].numel() if mask is None else int(mask.sum())  # type: ignore[union-attr]

    @property
    def goes_on(self) -> bool:
        """Whether a text has not ended."""
        return not all(self._ended)

    def take(self, number: int, ends: frozenset[int], pad: int, told: Told | None) -> None:
        """Append the tokens that have been chosen; padding to texts that have ended."""
        assert self.pending is not None
        work, tokens = self.pending
        if work is not None:
            work.wait()
        self.pending = None
        chosen = tokens.tolist()
        for place, token in enumerate(chosen):
            if self._ended[place]:
                chosen[place] = pad
                continue
            self.rows[place].append(token)
            self._ended[place] = token in ends
            if told is not None:
                told(self.texts.micro_batch.samples[place], token)
        self.texts.append(torch.tensor(chosen, dtype=torch.int64, device=tokens.device))

    def seen(self, choice: Choice) -> list[torch.Tensor]:
        """The tokens of every text, without padding, where the choice asks for them."""
        if choice.repetition_penalty == 1:
            return []
        tokens, mask = self.texts.tokens, self.texts.mask
        return [row if mask is None else row[mask[place] != 0] for place, row in enumerate(tokens)]

    def by_sample(self) -> Iterator[tuple[int, list[int]]]:
        """What was generated, with the numbers of the prompts."""
        return zip(self.texts.micro_batch.samples, self.rows, strict=True)


def _dealt(
    batch: Mapping[str, Any], own: range, num_micro_batches: int, program: Program, start: int | None
) -> Iterator[Texts]:
    """The prompts `own` in micro-batches of about equal size."""
    device, place = program.engine.device, program.place
    model: Any = program.model
    parts = min(num_micro_batches, len(own))
    mask = batch.get("attention_mask")
    for part in range(parts):
        rows = own[len(own) * part // parts : len(own) * (part + 1) // parts]
        taken = slice(rows.start, rows.stop)
        tokens = batch["input_ids"][taken].to(device)
        padded = None if mask is None or bool((mask[taken] != 0).all()) else mask[taken].to(device)
        micro_batch = MicroBatch(
            index=place.replica * num_micro_batches + part, samples=tuple(rows), inputs={}, weight=1.0
        )
        if model.config.is_encoder_decoder:
            source = {"input_ids": tokens} | ({} if padded is None else {"attention_mask": padded})
            texts = torch.full((len(rows), 1), _start_of(model, start), dtype=torch.int64, device=device)
            yield Texts(micro_batch, texts, None, source=source)
            continue
        if padded is not None and not model._is_stateful:  # columns that are padding in all of these
            empty = int((padded != 0).any(dim=0).int().argmax())
            tokens, padded = tokens[:, empty:], padded[:, empty:]
        yield Texts(micro_batch, tokens, padded)


def _start_of(model: Any, start: int | None) -> int:
    config = model.generation_config
    described = getattr(model.config, "decoder_start_token_id", None)
    for known in (start, config.decoder_start_token_id, described, config.bos_token_id):
        if known is not None:
            return int(known)
    raise BatchError("a decoder's text begins with a token, and the model's config names none; give start")


def _check(program: Program, batch: Mapping[str, Any], max_new_tokens: int) -> None:
    place, model = program.place, program.model
    if max_new_tokens < 1:
        raise BatchError(f"at least one token is generated, but max_new_tokens={max_new_tokens}; ask for one or more")
    tokens = batch.get("input_ids")
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or 0 in tokens.shape:
        shape = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else tokens
        raise BatchError(f"prompts are input_ids of shape (prompts, tokens), each at least 1, got {shape}")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != tokens.shape:
        raise BatchError(f"attention_mask has the shape of input_ids {tuple(tokens.shape)}, got {tuple(mask.shape)}")
    if place.ep > 1 or place.fsdp > 1 or place.cp > 1:
        raise LayoutError(
            f"replicas generate by themselves, each by whole sequences, but ep={place.ep}, fsdp={place.fsdp}, "
            f"cp={place.cp}; generate from the checkpoint under a layout of dp, tp and pp"
        )
    if program.divided is not None and program.divided.region is not None:
        raise LayoutError("a token that is generated is no sequence to divide; lay out without sequence_parallel")
    check_class(type(model))


def check_class(kind: Any) -> None:
    """Raises ModelError for a class of models that does not generate, or keeps no cache that is one of transformers."""
    from transformers import GenerationMixin

    if not issubclass(kind, GenerationMixin) or not kind.can_generate():
        raise ModelError(
            f"a model that generates is one of transformers with a head for it, but this is a {kind.__name__}; use "
            "...ForCausalLM or ...ForConditionalGeneration"
        )
    if not kind._supports_default_dynamic_cache():
        raise ModelError(
            f"a model that generates keeps a cache of transformers, but {kind.__name__} keeps another; generate with "
            "transformers on one device"
        )


def _gathered(tokens: Mapping[int, tuple[int, ...]], rates: Rates, world_size: int) -> Generated:
    """The tokens of all replicas, in the order of the prompts."""
    told: list[Any] = [(tokens, rates)] * world_size
    if world_size > 1:
        dist.all_gather_object(told, (tokens, rates))
    every = {sample: row for own, _ in told for sample, row in own.items()}
    return Generated(tokens=tuple(every[sample] for sample in sorted(every)), rates=tuple(rates for _, rates in told))
