"""One forward of a micro-batch of texts: the prompts at first, then the token that came last, on every stage.

    pass 0   all tokens of the prompts      the cache takes them in
    pass t   one token a text               one dataflow for all t: what a cache holds crosses to no other stage, so
                                            its length is none of the signature

Knows a program, caches and the inputs that a model of transformers prepares; chooses no tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from shardwise.execute.batches import MicroBatch
from shardwise.execute.flows import Flow
from shardwise.execute.generate_caches import (
    Effects,
    copied,
    describe,
    empty_cache,
    held_bytes,
    recording,
    replay,
    stand_in,
)
from shardwise.execute.generate_growing import Growing, compute_free_glue, growing_between
from shardwise.execute.generate_states import LeftShapes, ModuleStates, States
from shardwise.execute.program import Program
from shardwise.execute.step_state import UnderWay, Work
from shardwise.parallel.tensor.divided_logits import whole_of
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.check import check
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.transfers import Row, with_transfers
from shardwise.trace.absent import Absent
from shardwise.trace.objective import LossFunction
from shardwise.trace.randomness import Scope
from shardwise.trace.tape import AtAttribute

__all__ = ["Passes", "Texts"]


@dataclasses.dataclass(slots=True)
class Texts:
    """The texts of one micro-batch.

    tokens     int64 (batch, tokens): padding on the left, the prompts, what has been generated
    mask       int64 (batch, tokens), 0 for padding; None where there is none
    positions  int64, as the model takes them, of all tokens; None where it takes none
    source     of an encoder-decoder: what its encoder reads; `tokens` are its decoder's then
    caches     by stage of this rank
    states     what the model keeps in its modules
    left       of which shapes that is in the whole model
    twin       a cache of the whole model without values, where those of this rank are of its shard
    passes     that have been run
    """

    micro_batch: MicroBatch
    tokens: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None = None
    source: Mapping[str, torch.Tensor] | None = None
    caches: dict[int, Any] = dataclasses.field(default_factory=dict)
    states: States = dataclasses.field(default_factory=dict)
    left: LeftShapes = dataclasses.field(default_factory=dict)
    twin: Any = None
    encoded: Any = None  # what the encoder made of the source, as `forward` takes it; without values on stages
    passes: int = 0

    @property
    def begun(self) -> bool:
        """Whether the prompts have been read."""
        return self.passes > 0

    def append(self, tokens: torch.Tensor) -> None:
        """One more token a text, (batch,)."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        if self.positions is not None:
            self.positions = torch.cat([self.positions, self.positions[..., -1:] + 1], dim=-1)


class Passes:
    """Runs passes of `program`, whose model is one of transformers and in evaluation mode."""

    def __init__(self, program: Program) -> None:
        model: Any = program.model
        self._program, self._model = program, model
        accepted = inspect.signature(self._model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._takes_positions = "position_ids" in accepted and not model.config.is_encoder_decoder
        self._known: dict[Hashable, Flow] = {}  # in which Python looks at nothing
        self._rows: dict[frozenset[tuple[int, int]], Row] = {}
        self._under_way = UnderWay()
        self._states = ModuleStates(self._model)
        self._looked_at: set[int] = set()  # numbers of passes of which it is known what they leave in modules
        self.logits_stage = 0  # of the last pass

    def begin(self, texts: Texts) -> None:
        """Give texts empty caches, and positions where the model takes any."""
        place = self._program.place
        texts.caches = {stage: empty_cache(self._model) for stage in place.stages}
        texts.twin = empty_cache(self._model) if place.tp > 1 and place.num_stages > 1 else None
        if self._takes_positions:
            given = {} if texts.mask is None else {"attention_mask": texts.mask}
            texts.positions = self._model._prepare_position_ids_for_generation(texts.tokens, given)

    def run(self, texts: Texts) -> torch.Tensor | None:
        """The logits of the next token, (batch, vocabulary), where the last units are; None elsewhere. Every rank of
        the pipeline calls it, for the same texts in the same order."""
        program = self._program
        looks = texts.passes < 2 and texts.passes not in self._looked_at  # what one micro-batch leaves, all do
        self._looked_at.add(texts.passes)
        kept = self._states.of(texts.states, looks=looks)
        with torch.no_grad(), program.numerics.running(), self._divided(), kept:
            if program.place.num_stages == 1:
                way = _Way(self._model, {0: self._prepared(texts, texts.caches[0])})
                logits: torch.Tensor | None = program.engine.whole(lambda: way.compute(0))
                texts.encoded = texts.encoded if way.encoded is None else (way.encoded,)
            else:
                logits = self._in_stages(texts)
            texts.passes += 1
            return None if logits is None else whole_of(logits)

    def held_bytes(self, texts: Texts) -> int:
        """Of this rank's caches."""
        return held_bytes(list(texts.caches.values()))

    def finish(self) -> None:
        """Wait until everything that was sent has gone."""
        for outgoing in self._under_way.outgoing:
            outgoing.wait()
        self._under_way.outgoing.clear()

    # -- stages ---------------------------------------------------------------------------------

    def _in_stages(self, texts: Texts) -> torch.Tensor | None:
        program, scope = self._program, self._scope(texts)
        inputs = {stage: self._prepared(texts, texts.caches[stage]) for stage in program.place.stages}
        flow = self._flow(texts, next(iter(inputs.values())), scope)
        way = _Way(self._model, inputs, texts.caches, flow, flow.notes.effects)
        now = flow.notes.growing.at(flow, texts.tokens.shape[1])
        work = Work(texts.micro_batch, now, 0.0, scope, headers=flow.met == 0, way=way)
        losses, _ = program.engine.run(self._row(frozenset(flow.cut.edges)), [work], under_way=self._under_way)
        for stage in program.place.stages:
            way.left(stage, 0)  # what had nothing to run
        for node in sorted(flow.notes.effects) if texts.twin is not None else ():
            replay(flow.notes.effects[node], texts.twin)
        texts.left = {**texts.left, **flow.notes.left}
        flow.met += 1
        self.logits_stage = flow.cut.loss_stage
        self._under_way.alive.clear()
        if not texts.begun and flow.notes.encoded is not None:
            shape, dtype = flow.notes.encoded
            absent = Absent(what="what the encoder made", shape=shape, dtype=dtype, device=texts.tokens.device)
            texts.encoded = (absent,)
        return losses.pop(0, None)

    def _flow(self, texts: Texts, inputs: Mapping[str, Any], scope: Scope) -> Flow:
        """The dataflow of this pass, with inputs of one stage: recorded once for all that are alike, on contents
        without values."""
        device, cache = texts.tokens.device, next(iter(texts.caches.values()))
        signed = _signature(texts, cache, inputs)
        if signed in self._known:
            return self._known[signed]
        stood_in = stand_in(cache if texts.twin is None else texts.twin, device)
        flow = self._recorded(texts, signed, stood_in, scope)
        if flow.notes.growing is None:
            flow.notes.growing = self._growing(texts, signed, flow, stood_in, scope) if texts.begun else Growing()
        if not flow.tape.looks:
            self._known[signed] = flow
        return flow

    def _growing(self, texts: Texts, signed: Hashable, flow: Flow, stood_in: Any, scope: Scope) -> Growing:
        """Which crossing values have a dim that grows by every token: found by a recording of the pass that follows,
        where one has a dim as long as the texts."""
        tokens = texts.tokens.shape[1]
        crossing = {value for stage in flow.cut.stages for value, _ in stage.sends}
        if not any(tokens in flow.tape.flow.values[value].shape for value in crossing):
            return Growing()
        longer = dataclasses.replace(texts)
        longer.append(torch.zeros_like(texts.tokens[:, 0]))
        longer.left = {**texts.left, **flow.notes.left}
        later = copied(stood_in, lambda name, tensor: tensor if tensor.dim() == 0 else tensor.to("meta"))
        for node in sorted(flow.notes.effects):
            replay(flow.notes.effects[node], later)
        next_one = self._recorded(longer, ("longer", signed), stand_in(later, texts.tokens.device), scope)
        return growing_between(flow, next_one, tokens, crossing)

    def _recorded(self, texts: Texts, signed: Hashable, stood_in: Any, scope: Scope) -> Flow:
        """The dataflow of a pass on a cache without values."""
        device = texts.tokens.device
        inputs = self._prepared(texts, stood_in)
        if texts.encoded is not None:
            known = texts.encoded[0]
            inputs["encoder_outputs"] = (torch.zeros(known.shape, dtype=known.dtype, device=device),)
        recorders: list[Any] = []
        notes = _Notes()
        states = {place: torch.zeros(shape, dtype=dtype, device=device) for place, (shape, dtype) in texts.left.items()}

        @contextlib.contextmanager
        def watch(recorder: Any) -> Iterator[None]:
            recorders.append(recorder)
            yield
            recorders.pop()

        def compute(model: nn.Module, given: Any, loss: LossFunction | None) -> torch.Tensor:
            attempt = copied(stood_in)
            remembered: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if recorders:  # else Python only looks whether it would go the same way
                notes.effects = recording(attempt, lambda: recorders[-1].place)
                remembered = self._states.recorded(states, notes.left)
            way = _Way(model, {0: {name: attempt if each is stood_in else each for name, each in given.items()}})
            with remembered:
                logits = way.compute(0)
            if way.encoded is not None:
                notes.encoded = tuple(way.encoded.shape), way.encoded.dtype
            return logits

        flow = self._program.flows.flow_for(signed, inputs, scope, compute=compute, watch=watch)
        if flow.notes is None:
            flow.notes = notes
            compute_free_glue(flow)
        return flow

    def _row(self, edges: frozenset[tuple[int, int]]) -> Row:
        if edges not in self._rows:
            place = self._program.place
            owned = tuple(
                tuple(s for s in range(place.num_stages) if place.owner_of[s] == position)
                for position in range(place.pp)
            )
            schedule = Schedule(
                name="one pass",
                num_stages=place.num_stages,
                num_micro_batches=1,
                ranks=owned,
                actions=tuple(tuple(Action(kind=Kind.F, stage=s, micro_batch=0) for s in row) for row in owned),
            )
            check(schedule, edges)
            self._rows[edges] = with_transfers(schedule, edges)[place.position]
        return self._rows[edges]

    # -- inputs ---------------------------------------------------------------------------------

    def _prepared(self, texts: Texts, cache: Any) -> dict[str, Any]:
        """What `forward` is given in this pass, as transformers prepares it."""
        more: dict[str, Any] = dict(self._last_only)
        if texts.positions is not None:
            more["position_ids"] = texts.positions
        mask = texts.mask
        if texts.source is not None:
            mask = texts.source.get("attention_mask")
            more["encoder_outputs"] = texts.encoded
        name = "cache_params" if "mamba" in type(self._model).__name__.lower() else "past_key_values"
        prepared: dict[str, Any] = self._model.prepare_inputs_for_generation(
            texts.tokens,
            next_sequence_length=1 if texts.begun else None,
            attention_mask=mask,
            is_first_iteration=not texts.begun,
            use_cache=True,
            **{name: cache},
            **more,
        )
        if texts.source is not None and not texts.begun:
            prepared |= {key: value for key, value in texts.source.items() if key != "attention_mask"}
        return {key: value for key, value in prepared.items() if value is not None} | {"return_dict": True}

    def _scope(self, texts: Texts) -> Scope:
        micro_batch = texts.micro_batch
        return Scope(
            seed=self._program.seed,
            step=0,
            micro_batch=micro_batch.index,
            samples=micro_batch.samples,
            place="glue",
            call=0,
        )

    def _divided(self) -> contextlib.AbstractContextManager[None]:
        divided = self._program.divided
        return contextlib.nullcontext() if divided is None else divided.step()


@dataclasses.dataclass(slots=True)
class _Notes:
    """What is known of a pass besides its dataflow: what units do to the cache and leave in modules, what the encoder's
    result is like."""

    effects: Effects = dataclasses.field(default_factory=dict)
    encoded: tuple[tuple[int, ...], torch.dtype] | None = None
    growing: Growing | None = None
    left: dict[AtAttribute, tuple[torch.Size, torch.dtype]] = dataclasses.field(default_factory=dict)  # in modules


class _Way:
    """One pass on the stages of this rank (`step_state.Way`)."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[int, Mapping[str, Any]],
        caches: Mapping[int, Any] | None = None,
        flow: Flow | None = None,
        effects: Effects | None = None,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._caches = caches or {}
        self._flow = flow
        self._effects = effects or {}
        self._settled: set[int] = set()  # stages whose caches are up to date
        self.encoded: torch.Tensor | None = None

    def compute(self, stage: int) -> torch.Tensor:
        """The logits behind the last token, (batch, vocabulary)."""
        outputs = self._model(**self._inputs[stage])
        self.encoded = getattr(outputs, "encoder_last_hidden_state", None)
        logits: torch.Tensor = outputs.logits[:, -1]
        return logits

    def absent(self, stage: int, node: int) -> None:
        """The cache takes in what an absent unit would have put there."""
        replay(self._effects.get(node, ()), self._caches[stage])

    def left(self, stage: int, node: int) -> None:
        """The same of all units from `node` on."""
        if stage in self._settled or self._flow is None:
            return
        self._settled.add(stage)
        computes = self._flow.cut.stages[stage].computes
        for later in sorted(self._effects):
            if later >= node and later not in computes:
                self.absent(stage, later)


def _signature(texts: Texts, cache: Any, inputs: Mapping[str, Any]) -> Hashable:
    """Which passes have one dataflow. Of a pass behind the first, lengths are left out."""
    about = tuple(
        (name, None if texts.begun and name != "encoder_outputs" else tuple(value.shape), value.dtype)
        if isinstance(value, torch.Tensor)
        else (name, tuple(value[0].shape) if name == "encoder_outputs" else type(value).__name__)
        for name, value in inputs.items()
    )
    return ("pass", texts.begun, len(texts.tokens), about, describe(cache))
