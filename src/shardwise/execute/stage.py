"""One pipeline stage of one micro-batch: the model's own forward, with absent units answered and glue chosen.

The stage runs the user's `forward`. A function mode counts its glue, a switch counts its unit calls; the tape says
what each one is: computed here, received, or absent. Knows no schedule, no process group: values come in and go out
through `Arrivals` and `departures`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from shardwise.describe.flow import NodeKind
from shardwise.errors import DataflowError
from shardwise.plan.cut import StageCut
from shardwise.trace.absent import Absent, first_absent
from shardwise.trace.checkpointing import Contexts, noticed
from shardwise.trace.extras import follow
from shardwise.trace.functions import as_one_function, name_of
from shardwise.trace.install import Switch
from shardwise.trace.keys import key_of
from shardwise.trace.randomness import RandomMode, Scope, draw, is_random, python_streams
from shardwise.trace.record import glue_key
from shardwise.trace.substitute import Undo, put_back, substitute
from shardwise.trace.tape import AtArgument, AtAttribute, AtHook, FromArgument, Made, Record, Structure, Tape

__all__ = ["Leave", "Programme", "StageRun", "arrive", "programme"]


class Leave(BaseException):
    """Raised to leave the forward once a stage has run its last node; passes through `except Exception`."""


class _Arrive(torch.autograd.Function):
    """Identity that is no view and no leaf: glue may write into a received value in place."""

    @staticmethod
    def forward(ctx: Any, received: torch.Tensor) -> torch.Tensor:
        alias = torch.empty(0, dtype=received.dtype, device=received.device)
        alias.set_(received.detach())  # type: ignore[call-overload]
        return alias

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def arrive(leaf: torch.Tensor) -> torch.Tensor:
    """The tensor that the glue sees for a received leaf."""
    return _Arrive.apply(leaf) if leaf.requires_grad else leaf  # type: ignore[no-untyped-call]


@dataclasses.dataclass(slots=True)
class Programme:
    """Per node: does this stage compute it, which values does it send, which does it receive."""

    computes: list[bool]
    sends: list[tuple[int, ...]]  # values to send, of each node
    plain: list[int | None]  # the value that is the whole answer, where an answer is one
    places: list[bool]  # whether an answer or a write asks for the arguments
    random: bool
    writes: bool  # something in the forward writes in place


def programme(tape: Tape, cut: StageCut) -> Programme:
    """Tables of one stage, indexed by node."""
    computes = [index in cut.computes for index in range(len(tape.flow.nodes))]
    sends: list[tuple[int, ...]] = [() for _ in tape.flow.nodes]
    for value in sorted({value for value, _ in cut.sends}):
        node = tape.flow.values[value].node
        sends[node] = (*sends[node], value)
    answers = [record.answer for record in tape.records]
    return Programme(
        computes,
        sends,
        plain=[_only_value(record) for record in tape.records],
        places=[
            bool(record.writes) or any(isinstance(leaf, FromArgument) for leaf in answer.leaves)
            for record, answer in zip(tape.records, answers, strict=True)
        ],
        random=tape.random,
        writes=any(record.changes for record in tape.records),
    )


def _only_value(record: Record) -> int | None:
    """The value that a node answers with, if that is all there is to its answer."""
    leaves = record.answer.leaves
    if record.changes or record.writes or not record.answer.spec.is_leaf() or len(leaves) != 1:
        return None
    return leaves[0].value if isinstance(leaves[0], Made) else None


class StageRun:
    """Runs the forward of one stage for one micro-batch.

    `received` holds the leaves that came in (value -> tensor); after `forward`, `sent` holds what must go out, with
    the autograd graph attached. `checked` hides from every present node what the dataflow does not list for it.
    """

    def __init__(
        self,
        *,
        tape: Tape,
        cut: StageCut,
        table: Programme,
        modules: Mapping[str, nn.Module],
        received: Mapping[int, torch.Tensor],
        scope: Scope,
        checked: bool = False,
    ) -> None:
        self.tape = tape
        self.cut = cut
        self.table = table
        self.modules = modules
        self.scope = scope
        self.checked = checked
        self.position = 0
        self.inside = False
        self._undo: Undo = []  # what is hidden from the node that runs
        self._recomputes = False  # the unit that is called next is checkpointed
        self._mode: RandomMode | None = None  # of the unit that runs
        self.sent: dict[int, torch.Tensor] = {}
        self.received = {value: arrive(leaf) for value, leaf in received.items()} if table.writes else dict(received)
        self._stale: dict[int, str] = {}  # storage -> the write that this stage has skipped
        self._keep: list[torch.Tensor] = []
        self._values: dict[int, int] = {}  # id(tensor) -> value, when checked
        self._live: dict[int, torch.Tensor] = {}  # value -> tensor, when checked
        self._written: dict[int, int] = {}  # storage -> value of its last write here, when checked
        self._replaced: dict[int, torch.Tensor] = {}

    # -- the forward ----------------------------------------------------------------------------

    def forward(self, run: Callable[[], torch.Tensor], switch: Switch) -> torch.Tensor | None:
        """Run the objective as this stage; the loss on the loss stage, None elsewhere."""
        glue = _GlueMode(self)
        streams = python_streams(glue_key(self.scope)) if self.table.random else contextlib.nullcontext()
        one_function = as_one_function(lambda: None if self.inside else glue)
        with streams, switch.on(self), one_function, noticed(self), glue:
            try:
                loss = run()
            except Leave:
                return None
        if self.position < len(self.tape.flow.nodes):
            raise self._mismatch("the forward ended")
        return loss

    def _mismatch(self, got: str) -> DataflowError:
        nodes = self.tape.flow.nodes
        expected = nodes[self.position].label if self.position < len(nodes) else "the end"
        return DataflowError(
            f"stage {self.cut.stage} runs the recorded order: node {self.position} is {expected}, but {got}; the "
            "forward took another path than when it was traced (its control flow depends on something that is not in "
            "the signature); name the enclosing module as a unit"
        )

    def _after(self, index: int) -> None:
        self.position = index + 1
        if index >= self.cut.last_node:
            raise Leave

    # -- glue -----------------------------------------------------------------------------------

    def glue(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One torch function of the glue: computed, or answered from the tape."""
        if self.inside or func in self.tape.queries:
            return func(*args, **kwargs)
        index = self.position
        if index >= len(self.tape.flow.nodes):
            return self._unrecorded(func, args, kwargs)
        record = self.tape.records[index]
        if record.func is None or record.func != func:
            return self._unrecorded(func, args, kwargs)
        if self._replaced:
            args, kwargs = self._with_replacements(args, kwargs)
        if not self.table.computes[index]:
            out = self._answer(index, record, args, kwargs)
        else:
            if self.checked:
                args, kwargs = self._only_listed(index, args, kwargs)
            if self._stale:
                self._refuse_stale(index, (args, kwargs))
            try:
                out = self._compute(index, record, func, args, kwargs)
            finally:
                put_back(self._undo)
            if record.look is not None or self.tape.flow.nodes[index].kind is NodeKind.READ:
                self._compare_look(index, record, out)
            if self.table.sends[index] or self.checked:
                out = self._made(index, record, out, args, kwargs)
        self._after(index)
        return out

    def _compute(self, index: int, record: Record, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            if record.random and is_random(func, tuple(args), kwargs):
                out = draw(func, tuple(args), kwargs, scope=self.scope, index=record.draw)
            else:
                out = func(*args, **kwargs)
        except RuntimeError as error:
            absent = first_absent((args, kwargs))
            if absent is None:
                raise
            raise DataflowError(
                f"{self.tape.flow.nodes[index].label} needs {absent.what}, which is not on stage {self.cut.stage}: an "
                "edge is missing in the recorded dataflow; trace the model again"
            ) from error
        if self.checked and record.writes:
            arguments = tree_flatten((args, kwargs))[0]
            for position, value in record.writes:
                target = arguments[position]
                self._note(value, target)
                self._written[target.untyped_storage()._cdata] = value
        return out

    def _unrecorded(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_flatten(out)[0]):
            raise self._mismatch(f"the glue called {name_of(func)}")
        return out

    def _compare_look(self, index: int, record: Record, out: Any) -> None:
        seen = tuple(leaf.tobytes() if isinstance(leaf, np.ndarray) else leaf for leaf in tree_flatten(out)[0])
        if seen != record.look:
            raise self._mismatch(f"Python saw {seen} where the trace saw {record.look}")

    def _answer(self, index: int, record: Record, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        plain = self.table.plain[index]
        if plain is not None:
            return self._value(plain)
        if record.changes:
            self._skip_write(index, args, kwargs)
        arguments = tree_flatten((args, kwargs))[0] if self.table.places[index] else ()
        out = record.answer.build(arguments, self._value)
        for position, value in record.writes:
            if value in self.received:  # everyone who still holds the old object sees the new value
                target = arguments[position]
                self._replaced[id(target)] = self.received[value]
                self._keep.append(target)
        return out

    def _value(self, value: int) -> torch.Tensor:
        tensor = self.received.get(value)
        if tensor is None:
            return self.tape.stand_ins[value]
        if self.checked:
            self._note(value, tensor)
        return tensor

    def _note(self, value: int, tensor: torch.Tensor) -> None:
        self._values[id(tensor)] = value
        self._live[value] = tensor
        self._keep.append(tensor)

    def _skip_write(self, index: int, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        target = next((leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)), None)
        if target is not None and not isinstance(target, Absent):
            self._stale[target.untyped_storage()._cdata] = self.tape.flow.nodes[index].label
            self._keep.append(target)
        for value in self.tape.records[index].touches if self.checked else ():  # the target may be an absent view
            live = self._live.get(value)
            if live is not None and not isinstance(live, Absent):
                self._stale[live.untyped_storage()._cdata] = self.tape.flow.nodes[index].label

    def _refuse_stale(self, index: int, tree: object) -> None:
        for leaf in tree_flatten(tree)[0]:
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Absent):
                write = self._stale.get(leaf.untyped_storage()._cdata)
                if write is not None:
                    raise DataflowError(
                        f"{self.tape.flow.nodes[index].label} reads what {write} writes in place, and stage "
                        f"{self.cut.stage} has not run that write: an edge is missing in the recorded dataflow; trace "
                        "the model again"
                    )

    def _with_replacements(self, args: Any, kwargs: Any) -> Any:
        return substitute((args, kwargs), lambda leaf: self._replaced.get(id(leaf), leaf), [])

    # -- what is checked in the first step of a signature -----------------------------------------

    def _only_listed(self, index: int, args: Any, kwargs: Any) -> Any:
        """The arguments, with every value that the dataflow does not list for this node made absent."""
        listed = self.tape.flow.nodes[index].reads

        def visible(leaf: torch.Tensor) -> torch.Tensor:
            value = self._values.get(id(leaf))
            if self._written and not isinstance(leaf, Absent):
                last = self._written.get(leaf.untyped_storage()._cdata)
                if last is not None and last not in listed and (value is None or value < last):
                    value = last
            return leaf if value is None or value in listed else self.tape.stand_ins[value]

        return substitute((args, kwargs), visible, self._undo)

    def _made(self, index: int, record: Record, out: Any, args: Any, kwargs: Any) -> Any:
        """Keep what is sent, note identities when checked."""
        leaves = [out] if isinstance(out, torch.Tensor) else tree_flatten(out)[0]
        sends = self.table.sends[index]
        for place, leaf in enumerate(leaves):
            answer = record.answer.leaves[place] if place < len(record.answer.leaves) else None
            if not isinstance(answer, Made) or not isinstance(leaf, torch.Tensor):
                continue
            if self.checked:
                self._note(answer.value, leaf)
            if answer.value in sends:
                self._send(answer.value, leaf, record)
        return out

    def _send(self, value: int, tensor: torch.Tensor, record: Record) -> None:
        if isinstance(tensor, Absent):
            raise DataflowError(
                f"{tensor.what} must be sent and is absent: an edge is missing in the recorded dataflow"
            )
        about = self.tape.flow.values[value]
        if tuple(tensor.shape) != about.shape or str(tensor.dtype) != f"torch.{about.dtype}":
            raise DataflowError(
                f"{self.tape.stand_ins[value].what} was traced as {about.dtype} {about.shape} and is now "
                f"{tensor.dtype} {tuple(tensor.shape)}: the signature does not determine its shape; name the enclosing "
                "module as a unit"
            )
        self.sent[value] = tensor.clone() if record.written_later else tensor

    # -- units ----------------------------------------------------------------------------------

    def call(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """A unit call: run here, or answered."""
        if self.inside:
            return body(*args, **kwargs)
        glue = torch.overrides._pop_mode()  # type: ignore[no-untyped-call]  # inside a unit the glue's mode is off: no cost for its operations
        try:
            out = self._call(unit, body, args, kwargs)
        finally:
            torch.overrides._push_mode(glue)  # type: ignore[no-untyped-call]
        self._after(self.position)
        return out

    def _call(self, unit: str, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        index = self.position
        nodes = self.tape.flow.nodes
        if index >= len(nodes) or nodes[index].kind is not NodeKind.CALL or nodes[index].name != unit:
            raise self._mismatch(f"unit {unit} was called")
        record = self.tape.records[index]
        if self._replaced:
            args, kwargs = self._with_replacements(args, kwargs)
        if self.table.computes[index]:
            if self.checked:
                args, kwargs = self._only_listed(index, args, kwargs)
            if self._stale:
                self._refuse_stale(index, (args, kwargs))
            try:
                return self._run(index, record, unit, body, args, kwargs)
            finally:
                put_back(self._undo)
        out = self._answer(index, record, args, kwargs)
        if record.extras or record.hooked:
            self._feed(unit, record, args, kwargs)
        return out

    def _run(
        self,
        index: int,
        record: Record,
        unit: str,
        body: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        taken: dict[int, torch.Tensor] = {}
        self.inside = True
        try:
            with self._watched(record, taken) if record.extras else contextlib.nullcontext():
                if self._recomputes:
                    body = functools.partial(checkpoint, body, use_reentrant=False)
                if record.random or record.host_random:
                    out = self._run_random(record, unit, self.tape.flow.nodes[index].call, body, args, kwargs)
                else:
                    out = body(*args, **kwargs)
        finally:
            self.inside = False
        for value in record.extras:
            tensor = taken.get(value)
            if tensor is None:
                tensor = self._pick_up(record, value, args, kwargs)
            if self.checked:
                self._note(value, tensor)
            if value in self.table.sends[index]:
                self._send(value, tensor, record)
        if self.table.sends[index] or self.checked:
            self._made(index, record, out, args, kwargs)
        return out

    def _run_random(
        self,
        record: Record,
        unit: str,
        number: int,
        body: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        scope = dataclasses.replace(self.scope, place=unit, call=number)
        key = key_of(scope.seed, scope.step, scope.micro_batch, unit, number)
        host = (random.getstate(), np.random.get_state()) if record.host_random else None
        try:
            with python_streams(key), RandomMode(scope) as self._mode:
                return body(*args, **kwargs)
        finally:
            self._mode = None
            if host is not None:
                random.setstate(host[0])
                np.random.set_state(host[1])

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Contexts | None]:
        """Checkpointing around a unit is done inside it; the repetition draws what the forward drew."""
        if self.inside:
            yield lambda: (contextlib.nullcontext(), _repeated(self._mode))
            return
        self._recomputes = torch.is_grad_enabled()
        try:
            yield None
        finally:
            self._recomputes = False

    @contextlib.contextmanager
    def _watched(self, record: Record, taken: dict[int, torch.Tensor]) -> Iterator[None]:
        """Take extra outputs from the hooked modules inside a present unit, in the order of the trace."""
        by_number: dict[int, list[tuple[int, AtHook]]] = {}
        for value, place in record.extras.items():
            if isinstance(place, AtHook):
                by_number.setdefault(place.number, []).append((value, place))
        if not by_number:
            yield
            return
        count = [0]

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                number = next(i for i in range(count[0], len(record.hooked)) if record.hooked[i].module == name)
                count[0] = number + 1
                for value, place in by_number.get(number, ()):
                    taken[value] = tree_flatten(output if place.in_output else args)[0][place.leaf]

            return hook

        handles = [
            self.modules[name].register_forward_hook(watch(name)) for name in {call.module for call in record.hooked}
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _pick_up(self, record: Record, value: int, args: Any, kwargs: Any) -> torch.Tensor:
        place = record.extras[value]
        found: Any = None
        match place:
            case AtAttribute(module, name, path):
                found = follow(getattr(self.modules[module], name), path)
            case AtArgument(path, key):
                found = follow((args, kwargs), path)[key]
            case AtHook():
                found = None
        if not isinstance(found, torch.Tensor):
            raise DataflowError(
                f"{self.tape.stand_ins[value].what} is taken from {place}, which holds {type(found).__name__}: the "
                "forward took another path than when it was traced"
            )
        return found

    def _feed(self, unit: str, record: Record, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Feed the collectors of an absent unit in order: hooks inside it, attributes it sets, containers it fills."""
        arguments = tree_flatten((args, kwargs))[0]
        for value, place in record.extras.items():
            match place:
                case AtAttribute(owner, name, path):
                    _leave(self.modules[owner], name, path, self._value(value))
                case AtArgument(path, key):
                    box = follow((args, kwargs), path)
                    if isinstance(box, list):
                        box.insert(key, self._value(value))  # type: ignore[arg-type]
                    else:
                        box[key] = self._value(value)
                case AtHook():
                    pass
        for hooked in record.hooked:
            module = self.modules[hooked.module]
            given = self._fill(hooked.arguments, arguments)
            output = self._fill(hooked.output, arguments)
            wanted = any(isinstance(leaf, Made) for leaf in hooked.output.leaves)
            for hook_id, hook in list(module._forward_hooks.items()):
                try:
                    if hook_id in module._forward_hooks_with_kwargs:
                        hook(module, given, {}, output)
                    else:
                        hook(module, given, output)
                except DataflowError as error:
                    if wanted or record.out_of_reach:
                        raise DataflowError(
                            f"a hook on {hooked.module} computes with what unit {unit} made, and stage "
                            f"{self.cut.stage} does not hold that; let the hook keep the tensor as it is, and compute "
                            "with it in the model"
                        ) from error

    def _fill(self, structure: Structure, arguments: Sequence[object]) -> Any:
        return structure.build(arguments, self._value)


def _leave(module: nn.Module, name: str, path: Sequence[object], tensor: torch.Tensor) -> None:
    if not path:
        setattr(module, name, tensor)
        return
    box = getattr(module, name, None)
    key = path[0]
    if isinstance(box, dict):
        box[key] = tensor
    elif isinstance(box, list) and isinstance(key, int):
        if key < len(box):
            box[key] = tensor
        else:
            box.append(tensor)
    else:
        raise DataflowError(f"attribute {name!r} of an absent unit is a {type(box).__name__}; it cannot be filled")


def _repeated(mode: RandomMode | None) -> contextlib.AbstractContextManager[Any]:
    """Draws of the torch, numpy and Python generators from here on, for a part that is run a second time."""
    if mode is None:
        return contextlib.nullcontext()
    again, host = mode.again(), (random.getstate(), np.random.get_state())

    @contextlib.contextmanager
    def repeated() -> Iterator[None]:
        now = random.getstate(), np.random.get_state()
        random.setstate(host[0])
        np.random.set_state(host[1])
        try:
            with again:
                yield
        finally:
            random.setstate(now[0])
            np.random.set_state(now[1])

    return repeated()


class _GlueMode(TorchFunctionMode):
    def __init__(self, run: StageRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run.glue(func, args, kwargs or {})
