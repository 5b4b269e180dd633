"""What one rank of a layout computes, keeps and exchanges, traced: the model's own code, laid out as it will be run.

    whole model ──trace──► ModelProfile ──┐
        └─ skeleton, no values ─ divided units, own tokens, even experts ─ one run ─► ModelProfile of a rank ─► works

Parameters are never read, ranks beside the one are counted, blocks that are alike run once. A layout whose run needs
values of the model falls back to shares of the whole model's numbers, and `reasons` says so. Knows traces and plans of
shards; refuses to know devices and seconds.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from shardwise.describe.context import ContextPlan
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.kernels import ExchangeKind
from shardwise.describe.profile import ModelProfile
from shardwise.describe.tensor import SequenceParallel, TensorPlan
from shardwise.errors import LayoutError
from shardwise.execute.batches import batch_size, select
from shardwise.execute.contexts import attention_of, context_plan
from shardwise.execute.dealt import Dealt
from shardwise.execute.rank_profile import rank_profile
from shardwise.layout import Context, Layout, Precision
from shardwise.parallel.context.install import DealtContext
from shardwise.parallel.context.region import ContextRegion
from shardwise.parallel.counted_group import CountedGroup
from shardwise.parallel.expert.even import CountedExpertGroup, EvenExperts
from shardwise.parallel.expert.plan_experts import plan_experts
from shardwise.parallel.precision.numerics import Numerics
from shardwise.parallel.rank_run import GLUE, RankRun
from shardwise.parallel.tensor.divided import Divided
from shardwise.parallel.tensor.given_plan import GivenPlan
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.structure import Structures
from shardwise.plan.cut import cut_stages
from shardwise.plan.divide import profile_of_shard
from shardwise.plan.divide_context import profile_of_context
from shardwise.plan.divide_experts import profile_of_expert_rank
from shardwise.plan.partition import place
from shardwise.plan.recompute import How, computed_again, plan_recompute
from shardwise.plan.sources import source_of
from shardwise.plan.stage_work import StageWork
from shardwise.plan.works import stage_works
from shardwise.trace.capture import Captured, capture, own, without_values
from shardwise.trace.count import Counter
from shardwise.trace.install import Switch, installed
from shardwise.trace.objective import Batch, LossFunction, objective
from shardwise.trace.profile import profile_of
from shardwise.trace.randomness import RandomMode, python_streams
from shardwise.trace.record import Recorder, glue_key
from shardwise.trace.tape import Tape

__all__ = ["TracedProfiles"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Plans:
    """How the units of a rank are divided; None where they are not."""

    tensor: TensorPlan | None
    context: ContextPlan | None
    how: Context
    experts: ExpertPlan | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Whole:
    """The whole model's trace with one batch."""

    batch: Any
    profile: ModelProfile
    tape: Tape
    units: Mapping[str, nn.Module]


class TracedProfiles:
    """Profiles of the ranks of any layout of one model, by tracing. Everything is asked for once and kept.

    `batch` is what `forward` takes; a micro-batch of other sizes has its samples, again from the first where they are
    too few. `proof_batch` is what divisions are proven with, by default two samples of it. `tp_plan` as `plan_tensor`
    takes it. `precision`: how numbers are kept. The model is left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        loss: LossFunction | None = None,
        units: Sequence[str] = (),
        batch_dims: Mapping[str, int] | None = None,
        tp_plan: GivenPlan | None = None,
        proof_batch: Batch | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.reasons: dict[str, str] = {}  # what was not traced, and why
        self._model = model
        self._batch = batch
        self._size = batch_size(batch, batch_dims)
        self._loss = loss
        self._units = units
        self._batch_dims = batch_dims
        self._tp_plan = tp_plan
        self._precision = precision
        self._proof_batch = self._of_size(min(2, self._size)) if proof_batch is None else proof_batch
        self._wholes: dict[int, _Whole] = {}
        self._tensor: dict[tuple[int, SequenceParallel], TensorPlan] = {}
        self._context: dict[Hashable, ContextPlan] = {}
        self._experts: dict[int, ExpertPlan] = {}
        self._shards: dict[Hashable, ModelProfile] = {}
        self._works: dict[Hashable, tuple[StageWork, ...]] = {}

    def whole(self, samples: int) -> ModelProfile:
        """The whole model with a micro-batch of `samples`, on one device."""
        return self._traced(samples).profile

    def shard(self, layout: Layout, samples: int) -> ModelProfile:
        """What one rank of the layout's tensor, context and expert axes computes, keeps and exchanges for a micro-batch
        of `samples`; values have the bytes that cross from it. Raises what planning the division raises."""
        key = (*_axes(layout), samples)
        if key not in self._shards:
            self._shards[key] = self._shard(layout, samples)
        return self._shards[key]

    def works(self, layout: Layout, samples: int, *, num_micro_batches: int | None = None) -> tuple[StageWork, ...]:
        """What every stage of `layout` does for a micro-batch of `samples`. Raises `LayoutError` where the model cannot
        be cut so. `num_micro_batches` of a replica; by default those of the layout."""
        times = num_micro_batches or layout.micro_batches or (1 if layout.pp == 1 else 2 * layout.pp)
        key = (*_axes(layout), samples, layout.pp, layout.num_stages, layout.schedule, str(layout.stages))
        key = (*key, layout.recompute, *([] if layout.recompute in list(How) else [times]))
        if key not in self._works:
            self._works[key] = self._stage_works(layout, samples, times)
        return self._works[key]

    def __call__(self, layout: Layout, samples: int) -> tuple[StageWork, ...]:
        """The same as `works`."""
        return self.works(layout, samples)

    # -- the whole model ------------------------------------------------------------------------

    def _of_size(self, samples: int) -> Any:
        chosen = [number % self._size for number in range(samples)]
        return select(self._batch, chosen, size=self._size, batch_dims=self._batch_dims)

    def _traced(self, samples: int) -> _Whole:
        if samples not in self._wholes:
            batch = self._of_size(samples)
            counters: list[Counter] = []

            def watch(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
                counters.append(Counter(samples=samples))
                return counters[-1].watching(recorder)

            with _computing(self._model, self._precision):
                captured: Captured = capture(self._model, batch, loss=self._loss, units=self._units, watch=watch)
                profile = profile_of(self._model, captured, counters[-1])
            self._wholes[samples] = _Whole(batch=batch, profile=profile, tape=captured.tape, units=captured.units)
        return self._wholes[samples]

    # -- one rank -------------------------------------------------------------------------------

    def _plans(self, layout: Layout) -> _Plans:
        return _Plans(
            tensor=self.tensor_plan(layout.tp, layout.sequence_parallel) if layout.tp > 1 else None,
            context=self.context_plan(layout) if layout.cp > 1 else None,
            how=layout.context,
            experts=self.expert_plan(layout.ep) if layout.ep > 1 else None,
        )

    def tensor_plan(self, tp: int, sequence: SequenceParallel) -> TensorPlan:
        """How units are divided among `tp` shards. What is known of fewer shards, or of the same with all tokens, is
        not tried again."""
        if (tp, sequence) not in self._tensor:
            fewer = [size for size, how in self._tensor if tp % size == 0 and size < tp and not how]
            with _cast(self._model, self._precision):
                self._tensor[tp, sequence] = plan_tensor(
                    self._model,
                    self._proof_batch,
                    tp=tp,
                    loss=self._loss,
                    units=self._units,
                    sequence=sequence,
                    tp_plan=self._tp_plan,
                    smaller=self._tensor[max(fewer), SequenceParallel.OFF] if fewer else None,
                    undealt=self._tensor.get((tp, SequenceParallel.OFF)),
                )
        return self._tensor[tp, sequence]

    def context_plan(self, layout: Layout) -> ContextPlan:
        """How units work on own tokens. Names and dims alone: what is proven of two ranks is told of any number that
        the batch's sequences are long enough for."""
        if layout.context not in self._context:
            two = dataclasses.replace(layout, cp=2)
            with _cast(self._model, self._precision):
                self._context[layout.context] = context_plan(
                    self._model, self._proof_batch, layout=two, loss=self._loss, units=self._units
                )
        plan, tokens = self._context[layout.context], _longest(self._batch)
        if tokens < 2 * layout.cp:
            why = f"sequences have {tokens} tokens, fewer than two for each of {layout.cp} ranks"
            return ContextPlan(cp=layout.cp, zigzag=plan.zigzag, whole=dict.fromkeys((*plan.units, *plan.whole), why))
        return dataclasses.replace(plan, cp=layout.cp)

    def expert_plan(self, ep: int) -> ExpertPlan:
        """How experts are divided."""
        if ep not in self._experts:
            with _cast(self._model, self._precision):
                self._experts[ep] = plan_experts(
                    self._model, self._proof_batch, ep=ep, loss=self._loss, units=self._units
                )
        return self._experts[ep]

    def _shard(self, layout: Layout, samples: int) -> ModelProfile:
        whole, plans = self._traced(samples), self._plans(layout)
        try:
            run, local_bytes = self._run(whole, plans, layout, samples)
        except Exception as error:  # whatever a model does without values
            axes = ", ".join(f"{name}={size}" for name, size in _sizes(layout).items() if size > 1) or "one device"
            self.reasons[axes] = f"{type(error).__name__}: {error}"
            return _by_shares(whole.profile, plans)
        return rank_profile(_held(whole.profile, plans), run, local_bytes)

    def _run(self, whole: _Whole, plans: _Plans, layout: Layout, samples: int) -> tuple[RankRun, Mapping[int, int]]:
        notes: list[RankRun] = []

        def note(kind: ExchangeKind, axis: str, nbytes: int, hidden: bool) -> None:
            if notes:
                notes[0].note(kind, axis, nbytes, hidden)

        skeleton = _skeleton(self._model)
        alike = _alike(whole, plans)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_computing(skeleton, self._precision))
            divided, dealt = _lay_out(skeleton, whole.units, plans, layout, note, stack)
            local_bytes = _local_bytes(whole.tape, divided, dealt)
            faked = stack.enter_context(without_values(skeleton))
            run = RankRun(whole.profile.flow.calls, faked, samples=samples, alike=alike)
            notes.append(run)
            switch = Switch()
            stack.enter_context(installed({name: skeleton.get_submodule(name) for name in whole.units}, switch))
            stack.enter_context(switch.on(run))
            stack.enter_context(python_streams(glue_key(GLUE)))
            if divided is not None:
                stack.enter_context(divided.step())
            if dealt is not None:  # which attends to others' tokens with dropout only where draws are keyed
                keyed = dataclasses.replace(GLUE, samples=tuple(range(samples)))
                stack.enter_context(RandomMode(keyed))
            run.run(lambda: objective(skeleton, own(whole.batch), self._loss))
        return run, local_bytes

    def _stage_works(self, layout: Layout, samples: int, num_micro_batches: int) -> tuple[StageWork, ...]:
        whole = self._traced(samples).profile
        profile = self.shard(layout, samples)
        cut = cut_stages(whole.flow, place(whole, layout), layout.num_stages)
        if layout.recompute in list(How):
            again = computed_again(profile, cut, layout.recompute)
        else:
            source = source_of(layout)
            if source is None:
                raise LayoutError(
                    f"how much is computed again within recompute={layout.recompute} follows from the schedule, but "
                    f'schedule={layout.schedule} is still to be found; name one, or use recompute = "full"'
                )
            again = dict(plan_recompute(profile, cut, source(num_micro_batches), layout.recompute).units)
        experts = self.expert_plan(layout.ep) if layout.ep > 1 else None
        return stage_works(
            profile,
            cut,
            recompute=again,
            experts=[name for name in profile.parameters if experts is not None and _is_expert(name, experts)],
        )


def _longest(batch: Batch) -> int:
    """Tokens of the longest sequences, or more: sizes behind the samples."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim() > 1]
    return max((max(leaf.shape[1:]) for leaf in leaves), default=0)


@contextlib.contextmanager
def _cast(model: nn.Module, precision: Precision | None) -> Iterator[Numerics]:
    """The model with what casts its activations around its modules, as it is when its divisions are proven."""
    numerics = Numerics(model, precision)
    try:
        yield numerics
    finally:
        numerics.close()


@contextlib.contextmanager
def _computing(model: nn.Module, precision: Precision | None) -> Iterator[None]:
    """The model in the dtypes that a step computes with, without values."""
    with _cast(model, precision) as numerics, numerics.traced():
        yield


def _axes(layout: Layout) -> tuple[Hashable, ...]:
    """What a rank's part depends on."""
    sequence = layout.sequence_parallel if layout.tp > 1 else None
    return layout.tp, sequence, layout.cp, layout.context if layout.cp > 1 else None, layout.ep


def _sizes(layout: Layout) -> dict[str, int]:
    return {"tp": layout.tp, "cp": layout.cp, "ep": layout.ep}


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy with parameters on meta; buffers have their values."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(tuple(parameter.shape), dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    with warnings.catch_warnings():
        # a deferred model may hold a tensor without values in a plain attribute; torch asks where it lies
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        return copy.deepcopy(model, memo)


def _lay_out(
    model: nn.Module,
    units: Mapping[str, nn.Module],
    plans: _Plans,
    layout: Layout,
    note: Any,
    stack: contextlib.ExitStack,
) -> tuple[Divided | None, DealtContext | None]:
    """`model` as `execute.build` lays it out, in the same order; the first rank of shards and contexts, the last of
    experts, which has the most of them."""
    divided: Divided | None = None
    dealt: DealtContext | None = None
    if plans.tensor is not None:
        group = CountedGroup("tp", note, size=layout.tp)
        divided = Divided(model, plans.tensor, group, units, keep_logits=True)
        stack.callback(divided.close)
    if plans.experts is not None:
        experts = EvenExperts(model, plans.experts, CountedExpertGroup(note, size=layout.ep, rank=layout.ep - 1))
        stack.callback(experts.close)
    if plans.context is not None:
        links = CountedGroup("cp", note, size=layout.cp, hidden=plans.how is Context.RING)
        region = ContextRegion(links, zigzag=plans.context.zigzag, attention=attention_of(plans.how))
        dealt = DealtContext(model, plans.context, region, units)
        stack.callback(dealt.close)
    return divided, dealt


def _local_bytes(tape: Tape, divided: Divided | None, dealt: DealtContext | None) -> dict[int, int]:
    """Value -> bytes of what crosses from this rank, of those that do not cross whole."""
    crossing = Dealt(tape, divided, dealt)
    found: dict[int, int] = {}
    for value in tape.flow.values:
        shape = crossing.shape(value.index)
        if shape is not None and value.nbytes:
            elements = torch.Size(value.shape).numel()
            found[value.index] = value.nbytes // max(1, elements) * torch.Size(shape).numel()
    return found


def _alike(whole: _Whole, plans: _Plans) -> dict[int, Hashable]:
    """Node -> what makes calls alike: structure, work in the whole model, plans. Calls that leave something elsewhere
    (for a hook, in a list) are alike to none."""
    structures = Structures()
    told = {unit: structures.of(module) for unit, module in whole.units.items()}
    found: dict[int, Hashable] = {}
    for call in whole.profile.calls:
        record = whole.tape.records[call.node]
        if record.extras or record.changes or record.out_of_reach:
            continue
        tensor = None if plans.tensor is None else plans.tensor.units.get(call.unit)
        context = None if plans.context is None else plans.context.units.get(call.unit)
        experts = None if plans.experts is None else plans.experts.units.get(call.unit)
        divided = "" if tensor is None else tensor.digest, repr(context), repr(experts)
        found[call.node] = told[call.unit], call.kernels, call.saved_bytes, divided
    return found


def _held(profile: ModelProfile, plans: _Plans) -> ModelProfile:
    """With the parameters of one rank; what it does is the whole's still."""
    made = profile
    if plans.tensor is not None:
        made = profile_of_shard(made, plans.tensor)
    if plans.experts is not None:
        made = profile_of_expert_rank(made, plans.experts, rank=plans.experts.ep - 1)
    return dataclasses.replace(profile, units=made.units)


def _by_shares(profile: ModelProfile, plans: _Plans) -> ModelProfile:
    """Shares of the whole model's numbers; kernels are the whole's, nothing is exchanged."""
    if plans.context is not None:
        profile = profile_of_context(profile, plans.context)
    if plans.tensor is not None:
        profile = profile_of_shard(profile, plans.tensor)
    if plans.experts is not None:
        profile = profile_of_expert_rank(profile, plans.experts, rank=plans.experts.ep - 1)
    return profile


def _is_expert(name: str, plan: ExpertPlan) -> bool:
    if name in plan.slices():
        return True
    return any(name.startswith(f"{expert}.") for expert in plan.owners())
