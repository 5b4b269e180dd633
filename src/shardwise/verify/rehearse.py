"""One rank's program, run by itself: the job of many ranks whose machine is not there.

    run or model ─ layout, rank ─► assemble, as in training ─► engine, the same actions ─► Rehearsed
                                   comm.alone: nobody answers         memory, traffic, seconds of one step

On a device everything is real but the values that others would have sent; without one the parameters are fake, and so
is what is computed from them (`rehearse_memory`). A step is run until its memory repeats, then measured. Refuses to
know files and words; what is predicted of the same rank is in `rehearse_predicted`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.comm.alone import AloneTransport, alone
from shardwise.errors import LayoutError
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch
from shardwise.execute.build import Part
from shardwise.execute.moments import clock_of
from shardwise.execute.program import Program, StepResult
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.layout import SEARCHED, Layout, Offload, Techniques
from shardwise.plan.lines import MemoryLines
from shardwise.schedule import GENERATORS, Action
from shardwise.trace.objective import LossFunction
from shardwise.verify.rehearse_held import Holdings, lines_of
from shardwise.verify.rehearse_memory import LiveBytes, RehearsalMode, fake_parameter

__all__ = ["Behind", "Rehearsed", "rehearse"]

Optimizer = Callable[[Program], torch.optim.Optimizer | None]
_TIMED_STEPS = 3
_STD = 0.02  # of made-up parameters


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Behind:
    """Bytes alive behind an action, and the most that were alive while it ran."""

    action: str
    alive: int
    highest: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """One step of rank `rank`, the same in every step.

    peak_bytes: the most that is alive at once on its device; `peak_at`: the action that runs then; lines: whose bytes
        these are, `transient` with logits. actions: in their order, the optimizer last.
    sent_bytes: by axis and kind (`comm.traffic`). seconds: of an action, by its kind; empty without a device.
    step_s: of the whole step, without waiting for anyone; None without a device.
    allocated_bytes, reserved_bytes: what the device's allocator says, with workspaces of kernels, and what it has taken
        for it; None without a device.
    """

    rank: int
    layout: Layout
    stages: tuple[int, ...]
    device: str
    num_micro_batches: int
    peak_bytes: int
    peak_at: str
    lines: MemoryLines
    actions: tuple[Behind, ...]
    sent_bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    step_s: float | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


def rehearse(
    model: nn.Module,
    micro_batches: Callable[[int], Sequence[MicroBatch]],
    *,
    layout: Layout,
    rank: int,
    profiles: TracedProfiles,
    optimizer: Optimizer,
    loss: LossFunction | None = None,
    techniques: Techniques | None = None,
    device: torch.device | str | None = None,
    units: Sequence[str] = (),
) -> Rehearsed:
    """Run rank `rank` of `layout`, alone. `micro_batches(replica)` are those of a replica; `profiles` has the same
    model, and finds how its units are divided. device: None: fake tensors, on the CPU. The model is used up.

    Raises `LayoutError` for a rank or a schedule that there is not, `ModelError` for a model that looks at values.
    """
    _check(layout, rank, device)
    batches = tuple(micro_batches(rank // (layout.tp * layout.cp) % layout.num_replicas))
    fake = FakeTensorMode(allow_non_fake_inputs=True) if device is None else None
    where = torch.device("cpu" if device is None else device)
    tensor = profiles.tensor_plan(layout.tp, layout.sequence_parallel) if layout.tp > 1 else None
    if tensor is not None:  # a rank by itself proves nothing
        known = {
            name: dataclasses.replace(unit, proof=None if unit.proof is None else _told(unit.proof))
            for name, unit in tensor.units.items()
        }
        tensor = dataclasses.replace(tensor, units=known)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(alone(rank=rank, world_size=layout.world_size))
        program = assemble(
            model,
            batches[0].inputs,
            layout=layout,
            rank=rank,
            loss=loss,
            units=units,
            device=where,
            fill=_fill(model, fake, where),
            transport=AloneTransport(),
            tensor=tensor,
            experts=profiles.expert_plan(layout.ep) if layout.ep > 1 else None,
            context=profiles.context_plan(layout) if layout.cp > 1 else None,
            num_micro_batches=len(batches),
            techniques=techniques,
            believed=True,
        )
        stack.callback(program.close)
        program.meet(batches, step=0)
        return _Steps(program, optimizer(program), batches, fake, where).rehearsed(layout)


def _check(layout: Layout, rank: int, device: torch.device | str | None) -> None:
    if not 0 <= rank < layout.world_size:
        raise LayoutError(
            f"layout {layout} has ranks 0..{layout.world_size - 1}, but rank {rank} is to be rehearsed; choose one"
        )
    if layout.schedule in GENERATORS and not GENERATORS[layout.schedule].flushes:
        raise LayoutError(
            f"one step is rehearsed, but {layout.schedule} is never between two of them; use a schedule that flushes"
        )
    if layout.schedule == SEARCHED:
        raise LayoutError("a schedule is searched for by the ranks of a job, and here is one alone; name one")
    if device is None and layout.offload is not Offload.NONE:
        raise LayoutError(
            f"without a device there is one memory and not two, but offload={layout.offload} moves things between "
            "them; rehearse it where there is a device, or with offload=none"
        )
    if device is None and layout.ep > 1:
        raise LayoutError(
            f"who is sent how many rows is a value, and without a device nothing is computed, but ep={layout.ep}; "
            "rehearse it where there is a device, or with ep=1"
        )


def _told(proof: Any) -> Any:
    return dataclasses.replace(proof, start_up=False)


def _fill(model: nn.Module, fake: FakeTensorMode | None, device: torch.device) -> Any:
    """A `Fill` of made-up values, of this rank's parts alone; without values where they are fake."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # still whole

    def value(like: torch.Tensor) -> torch.Tensor:
        if fake is not None:
            return fake_parameter(fake, like)
        made = torch.empty(tuple(like.shape), dtype=like.dtype, device=device)
        return made.fill_(1.0) if made.dim() < 2 else made.normal_(0.0, _STD)

    def fill(model: nn.Module, names: Sequence[str], part: Part = lambda name, whole: whole) -> None:
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        wanted, made = set(names), dict[int, nn.Parameter]()
        for module in model.modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None or canonical[id(parameter)] not in wanted:
                    continue
                if id(parameter) not in made:
                    name = canonical[id(parameter)]
                    own = value(part(name, torch.empty(shapes[name], dtype=parameter.dtype, device="meta")))
                    made[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
                module._parameters[leaf] = made[id(parameter)]

    return fill


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Timed:
    """See `Rehearsed`."""

    step_s: float | None = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


class _Steps:
    """The steps of one rehearsal."""

    def __init__(
        self,
        program: Program,
        optimizer: torch.optim.Optimizer | None,
        batches: Sequence[MicroBatch],
        fake: FakeTensorMode | None,
        device: torch.device,
    ) -> None:
        self._program = program
        self._optimizer = optimizer
        self._batches = batches
        self._fake = fake
        self._device = device
        self._steps = 0

    def rehearsed(self, layout: Layout) -> Rehearsed:
        program, live = self._program, LiveBytes(self._device)
        holdings = Holdings(program, self._optimizer)
        timed = self._timed()
        live.adopt(holdings.freed(), resized=True)
        live.adopt(holdings.all())
        live.adopt(leaf for mb in self._batches for leaf in mb.inputs.values() if isinstance(leaf, torch.Tensor))
        with RehearsalMode(live, self._fake), holdings.saving():
            self._step(live)  # which makes the optimizer's state, and memory that is kept from step to step
            holdings.end_step()
            self._zero()
            behind: list[Behind] = []
            live.begin()
            result = self._step(live, behind)
            holdings.end_step()
            self._zero()
            peak, found = live.peak, list[MemoryLines]()
            live.begin(
                stop_at=peak.at, look=lambda sizes, stays: found.append(lines_of(holdings.kinds(), sizes, stays))
            )
            self._step(live)
            self._zero()
        return Rehearsed(
            rank=program.place.rank,
            layout=layout,
            stages=program.place.stages,
            device="fake" if self._fake is not None else str(self._device),
            num_micro_batches=len(self._batches),
            peak_bytes=peak.nbytes,
            peak_at=peak.where,
            lines=found[0] if found else MemoryLines(),
            actions=tuple(behind),
            sent_bytes=dict(result.sent_bytes),
            seconds=timed.seconds,
            step_s=timed.step_s,
            allocated_bytes=timed.allocated_bytes,
            reserved_bytes=timed.reserved_bytes,
        )

    def _step(self, live: LiveBytes | None = None, behind: list[Behind] | None = None) -> StepResult:
        """One step and its update; gradients stay."""

        def note(after: str) -> None:
            if live is not None:
                if behind is not None and live.place:
                    behind.append(Behind(action=live.place, alive=live.alive, highest=live.mark()))
                live.place = after

        def before(action: Action) -> None:
            note(str(action))

        note("")
        result = self._program.step(self._batches, step=self._steps, before_action=before)
        note("optimizer")
        self._program.gradient_norm()
        if self._optimizer is not None:
            self._optimizer.step()
        self._program.updated()
        note("")
        self._steps += 1
        return result

    def _zero(self) -> None:
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        for parameter in self._program.parameters.values():
            parameter.grad = None

    def _timed(self) -> _Timed:
        """What there is to be had on a device alone, before anything is counted."""
        if self._device.type != "cuda":
            return _Timed()
        clock, taken = clock_of(self._device), list[float]()
        by_kind: dict[str, list[float]] = collections.defaultdict(list)
        for step in range(1 + _TIMED_STEPS):
            torch.cuda.reset_peak_memory_stats(self._device)
            start = clock.now()
            result = self._step()
            end = clock.now()
            self._zero()
            if step:
                taken.append(clock.between(start, end))
                for kind in {moment.action.kind for moment in result.moments}:
                    seconds = [moment.compute_s for moment in result.moments if moment.action.kind is kind]
                    by_kind[str(kind)].append(sum(seconds) / len(seconds))
        return _Timed(
            step_s=_median(taken),
            seconds={kind: _median(seconds) for kind, seconds in by_kind.items()},
            allocated_bytes=torch.cuda.max_memory_allocated(self._device),
            reserved_bytes=torch.cuda.max_memory_reserved(self._device),
        )


def _median(numbers: Sequence[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]
