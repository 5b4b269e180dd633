"""One forward (and backward) with real inputs and fake parameters, recorded as a tape.

Two modes watch. The function mode sees the glue: every torch function that the model calls between units becomes a
node. The dispatch mode makes whatever touches a fake tensor fake, runs everything else for real, and sees which
tensors are read, made and written, by glue and inside units. Refuses to know stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.describe.flow import Dataflow, Node, NodeKind, Value
from shardwise.errors import ModelError
from shardwise.trace.checkpointing import Contexts, noticed
from shardwise.trace.extras import changed_attributes, grown_containers, place_of
from shardwise.trace.functions import as_one_function, grouped_mm_like, is_constructor, name_of
from shardwise.trace.keys import key_of
from shardwise.trace.origins import Born, Origin, Origins
from shardwise.trace.randomness import Scope, draw, is_random
from shardwise.trace.tape import (
    Fixed,
    FromArgument,
    HookedCall,
    Leaf,
    Made,
    Place,
    Record,
    Structure,
    Tape,
    Unseen,
    stand_in,
)

__all__ = ["DataDependent", "GlueLooks", "Recorder", "glue_key"]

_GROUPED_MM = torch.ops.aten._grouped_mm.default
_SHAPED_BY_VALUES = frozenset(
    "nonzero argwhere unique unique_consecutive masked_select __getitem__ repeat_interleave bincount where".split()
)
DataDependent = (DataDependentOutputException, DynamicOutputShapeException)


class GlueLooks(Exception):  # noqa: N818  it is a finding, not a fault
    """Glue looked at a value that a unit computed; `module` is the innermost open module, empty for the model."""

    def __init__(self, module: str, what: str) -> None:
        super().__init__(what)
        self.module = module


@dataclasses.dataclass
class _Hooked:
    module: str
    arguments: object
    output: object


@dataclasses.dataclass
class _Call:
    """A unit call while its body runs, and what is known of it afterwards."""

    node: int
    unit: str
    reads: set[int] = dataclasses.field(default_factory=set)
    parameters: set[str] = dataclasses.field(default_factory=set)
    buffers: set[str] = dataclasses.field(default_factory=set)
    hooked: list[_Hooked] = dataclasses.field(default_factory=list)
    arguments: list[object] = dataclasses.field(default_factory=list)
    promoted: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)  # value -> tensor
    left: dict[int, Place] = dataclasses.field(default_factory=dict)  # id(tensor) -> where it is left
    random: bool = False
    changes: bool = False
    for_real: bool = False  # the body is run again, on random real numbers


@dataclasses.dataclass
class _Op:
    """A glue function while it runs."""

    reads: set[int] = dataclasses.field(default_factory=set)
    parameters: set[str] = dataclasses.field(default_factory=set)
    buffers: set[str] = dataclasses.field(default_factory=set)
    written: list[torch.Tensor] = dataclasses.field(default_factory=list)
    born: dict[int | None, torch.Tensor] = dataclasses.field(default_factory=dict)  # storages made by the function
    touched: bool = False
    random: bool = False


def glue_key(scope: Scope) -> int:
    """The key of everything that glue draws in one micro-batch: the same on every stage."""
    return key_of(scope.seed, scope.step, scope.micro_batch, "glue")


class Recorder:
    """Records one forward. Use `with recorder.active(): loss = forward()`, then `recorder.tape(loss)`."""

    def __init__(
        self,
        *,
        parameters: Mapping[int, str],
        buffers: Mapping[int, str],
        modules: Mapping[nn.Module, str],
        fake: FakeTensorMode,
        scope: Scope,
    ) -> None:
        self.fake = fake
        self.phase = "forward"
        self.open_modules: list[str] = []  # glue modules that are running, outermost first
        self.calls: list[_Call] = []
        self.current: _Call | None = None
        self.op: _Op | None = None
        self._names = dict(parameters)
        self._buffer_names = dict(buffers)
        self._modules = modules
        self.scope = scope
        self._origins = Origins()
        self._stale: set[int | None] = set()  # real storages into which fake values were written: fake from then on
        self._nodes: list[Node] = []
        self._values: list[Value] = []
        self._tensors: list[torch.Tensor | None] = []  # of each value, for its metadata
        self._records: list[Record] = []
        self._num_draws = 0  # of the glue
        self._queries: set[Any] = set()
        self._recorded: set[Any] = set()
        self._counts: dict[str, int] = {}
        self.observer: Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None] | None = None

    # -- watching -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Both modes on, inner hooked modules watched, autograd functions of the glue seen as one function each."""
        entered = nn.modules.module.register_module_forward_pre_hook(self._enter_module)
        handle = nn.modules.module.register_module_forward_hook(self._saw_module, with_kwargs=True)
        try:
            with (
                _Glue(self) as glue,
                _Below(self),
                as_one_function(lambda: glue if self._in_glue() else None),
                noticed(self),
                warnings.catch_warnings(),
            ):
                # a fake twin of a real tensor that was written asks also for its gradient
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                yield
        finally:
            handle.remove()
            entered.remove()

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Contexts | None]:
        """A checkpointed call runs once, everything kept; around several units it is refused."""
        before = len(self.calls)
        yield None
        around = [call.unit for call in self.calls[before:]] if self._in_glue() else []
        if len(around) > 1:
            raise ModelError(
                f"activation checkpointing stands inside one unit or around it, and a checkpointed call of this model "
                f"holds {len(around)}: {', '.join(around[:4])}; name the module around them as a unit, or switch the "
                "model's checkpointing off"
            )

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if self.current is None and module in self._modules:
            self.open_modules.append(self._modules[module])

    @property
    def place(self) -> int | None:
        """The node that is running: a unit call, or the glue operation that becomes the next node; None between."""
        if self.op is not None:
            return len(self._nodes)
        return None if self.current is None else self.current.node

    def _in_glue(self) -> bool:
        return self.current is None and self.op is None and self.phase == "forward"

    def _saw_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.current is not None and module._forward_hooks and module in self._modules:
            self.current.hooked.append(_Hooked(self._modules[module], args, output))
        if self.current is None and self.open_modules and self._modules.get(module) == self.open_modules[-1]:
            self.open_modules.pop()

    # -- glue -----------------------------------------------------------------------------------

    def glue(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a torch function of the glue and record it as a node, unless it is a mere query."""
        if not self._in_glue():
            return func(*args, **kwargs)
        op = self.op = _Op()
        try:
            if is_random(func, tuple(args), kwargs):
                op.random = True
                out = draw(func, tuple(args), kwargs, scope=self.scope, index=self._num_draws)
            else:
                out = self._function(func, args, kwargs)
        except DataDependent as error:
            inside = next((name for name in reversed(self.open_modules) if name), "")
            raise GlueLooks(inside, f"{name_of(func)} in the glue of {inside or 'the model'} ({error})") from error
        finally:
            self.op = None
        leaves, spec = tree_flatten(out)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors and not op.touched:
            if func not in self._recorded:
                self._queries.add(func)
            return out
        self._record_op(func, args, kwargs, op, leaves, spec)
        return out

    def _function(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except DataDependent:
            if name_of(func) in _SHAPED_BY_VALUES:
                raise
            # A kernel that looks at values it is given (ctc_loss at lengths): its shapes come from random real numbers.
            back: dict[int, torch.Tensor] = {}
            flat, spec = tree_flatten((args, kwargs))
            real_args, real_kwargs = tree_unflatten([_real(leaf, back) for leaf in flat], spec)
            out = func(*real_args, **real_kwargs)
            if not any(isinstance(leaf, torch.Tensor) for leaf in tree_flatten(out)[0]):
                raise
            return self._faked(out, back)

    def _record_op(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], op: _Op, leaves: list[Any], spec: Any
    ) -> None:
        index = len(self._nodes)
        self._recorded.add(func)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        arguments = tree_flatten((args, kwargs))[0]
        by_storage = {self._origins.storage(a): a for a in reversed(arguments) if isinstance(a, torch.Tensor)}
        for tensor in tensors if not op.touched else ():  # aliased without a dispatched operation
            self._reading(by_storage.get(self._origins.storage(tensor), tensor), op.reads, op.parameters, op.buffers)
        if is_constructor(func):  # zeros_like and the like read metadata only
            op.reads.clear()
        # A view made by the function itself (of `x[0] = y`) stands for the argument it is a view of.
        targets = (by_storage.get(self._origins.storage(tensor), tensor) for tensor in op.written)
        written = list({id(tensor): tensor for tensor in targets}.values())
        changed = {id(tensor) for tensor in written}
        given = {id(leaf): place for place, leaf in enumerate(arguments) if not _plain(leaf)}
        makes: list[int] = []
        made: list[torch.Tensor] = []
        writes: list[tuple[int, int]] = []
        answer: list[Leaf] = []
        for leaf in leaves:
            if id(leaf) in given and id(leaf) not in changed:
                answer.append(FromArgument(given[id(leaf)]))
            elif isinstance(leaf, torch.Tensor):
                makes.append(self._value(index, len(makes), leaf))
                made.append(leaf)
                answer.append(Made(makes[-1]))
            else:
                answer.append(Fixed(leaf))
        for tensor in written:
            inside = [value for value, leaf in zip(makes, made, strict=False) if leaf is tensor]
            if not inside:
                makes.append(self._value(index, len(makes), tensor, name=False))
                inside = [makes[-1]]
            self._origins.write(tensor, inside[0])
            self._origins.name(tensor, inside[0])
            if id(tensor) in given:
                writes.append((given[id(tensor)], inside[0]))
        for value, tensor in zip(makes, made, strict=False):
            self._origins.name(tensor, value, fresh=self._origins.storage(tensor) not in by_storage)
        look = None
        if not tensors and not written:
            look = _seen(leaves)
        kind = NodeKind.OP if tensors or written else NodeKind.READ
        self._nodes.append(
            Node(
                index=index,
                kind=kind,
                name=name_of(func),
                reads=tuple(sorted(op.reads)) if makes or kind is NodeKind.READ else (),
                makes=tuple(makes),
                parameters=tuple(sorted(op.parameters)),
                buffers=tuple(sorted(op.buffers)),
            )
        )
        self._records.append(
            Record(
                func=func,
                answer=Structure(spec, tuple(answer)),
                changes=bool(written),
                writes=tuple(writes),
                buffers_written=tuple(
                    self._buffer_names[id(tensor)] for tensor in written if id(tensor) in self._buffer_names
                ),
                random=op.random,
                draw=self._num_draws,
                look=look,
            )
        )
        self._num_draws += op.random

    # -- units ----------------------------------------------------------------------------------

    def call(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run a unit's body and record the call; a unit inside a running unit is a part of it."""
        if self.current is not None or self.op is not None or self.phase != "forward":
            return body(*args, **kwargs)
        index = len(self._nodes)
        number = self._counts.get(unit, 0)
        self._counts[unit] = number + 1
        arguments = tree_flatten((args, kwargs))[0]
        call = _Call(node=index, unit=unit, arguments=arguments)
        self._nodes.append(Node(index=index, kind=NodeKind.CALL, name=unit, call=number))
        self._records.append(Record(func=None, answer=Structure(tree_flatten(None)[1], (Fixed(None),))))
        self.calls.append(call)
        attributes = changed_attributes(module, self._modules)
        containers = grown_containers((args, kwargs))
        host = (random.getstate(), np.random.get_state())
        self.current = call
        try:
            out = self._body(unit, module, body, args, kwargs)
        finally:
            self.current = None
        host_random = random.getstate() != host[0] or not _same_numpy(np.random.get_state(), host[1])
        if host_random:
            random.setstate(host[0])
            np.random.set_state(host[1])
        call.left = {**attributes(), **containers()}
        self._record_call(call, number, out, host_random)
        return out

    def _body(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        assert self.current is not None
        try:
            return body(*args, **kwargs)
        except DataDependent:
            # The unit looks at its own values (a router, say): run this one unit on random real numbers for its shapes.
            self.current.hooked.clear()
            self.current.for_real = True
            return self._for_real(module, body, args, kwargs)

    def _for_real(
        self, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        assert self.current is not None
        flat, spec = tree_flatten((args, kwargs))
        for leaf in flat:
            if isinstance(leaf, torch.Tensor):
                self._reading(leaf, self.current.reads, self.current.parameters, self.current.buffers)
        back: dict[int, torch.Tensor] = {}
        real_flat = [_real(leaf, back) for leaf in flat]
        swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        memo: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None or id(parameter) not in self._names:
                    continue
                key = id(parameter)
                self.current.parameters.add(self._names[key])
                swapped.append((part, name, parameter))
                if key not in memo:
                    memo[key] = nn.Parameter(_random_like(parameter), requires_grad=parameter.requires_grad)
                    self._names[id(memo[key])] = self._names[key]
                part._parameters[name] = memo[key]
        try:
            real_args, real_kwargs = tree_unflatten(real_flat, spec)
            out = body(*real_args, **real_kwargs)
        finally:
            for part, name, parameter in swapped:
                part._parameters[name] = parameter
        return self._faked(out, back)

    def _faked(self, tree: object, back: dict[int, torch.Tensor]) -> Any:
        leaves, spec = tree_flatten(tree)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
                if id(leaf) not in back:
                    with self.fake:
                        fake = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
                    fake.requires_grad_(leaf.requires_grad)
                    if self.current is not None:
                        self._origins.bear(fake, self.current.node)
                    back[id(leaf)] = fake
                leaves[place] = back[id(leaf)]
        return tree_unflatten(leaves, spec)

    def _record_call(self, call: _Call, number: int, out: object, host_random: bool) -> None:
        positions = {id(leaf): place for place, leaf in enumerate(call.arguments) if not _plain(leaf)}
        leaves, spec = tree_flatten(out)
        makes: list[int] = []
        answer: list[Leaf] = []
        for leaf in leaves:
            if id(leaf) in positions:
                answer.append(FromArgument(positions[id(leaf)]))
            elif isinstance(leaf, torch.Tensor):
                makes.append(self._value(call.node, len(makes), leaf))
                self._origins.name(leaf, makes[-1])
                answer.append(Made(makes[-1]))
            else:
                answer.append(Fixed(leaf))
        node = self._nodes[call.node]
        self._nodes[call.node] = dataclasses.replace(
            node,
            reads=tuple(sorted(call.reads)),
            makes=tuple(makes),
            parameters=tuple(sorted(call.parameters)),
            buffers=tuple(sorted(call.buffers)),
        )
        record = self._records[call.node]
        record.answer = Structure(spec, tuple(answer))
        record.random = call.random
        record.host_random = host_random
        record.changes = call.changes

    # -- below: reads, births and writes -----------------------------------------------------------

    def below(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One dispatched operation: fake if it touches a fake tensor, real otherwise, and noted either way."""
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        context = self.op if self.op is not None else self.current
        if self.phase == "forward" and context is not None:
            for tensor in inputs:
                self._reading(tensor, context.reads, context.parameters, context.buffers)
            if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
                context.random = True
        if any(isinstance(tensor, FakeTensor) for tensor in inputs) or self._reads_stale(func, inputs):
            self._stale.update(
                self._origins.storage(tensor)
                for tensor in (_written(func, args, kwargs) if func._schema.is_mutable else ())
                if not isinstance(tensor, FakeTensor)
            )
            with self.fake:
                out = grouped_mm_like(*args, **kwargs) if func is _GROUPED_MM else func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if self.observer is not None:
            self.observer(func, args, kwargs, out)
        if self.phase == "forward" and context is not None:
            self._made(func, args, kwargs, out, inputs)
        return out

    def _reads_stale(self, func: Any, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether a real computation would use what fake values were written into; views go on being real."""
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            return False
        return any(self._origins.storage(tensor) in self._stale for tensor in inputs)

    def _made(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, inputs: list[torch.Tensor]
    ) -> None:
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        by_storage = {self._origins.storage(tensor): tensor for tensor in reversed(inputs)}
        made = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
        for leaf in made:
            base = by_storage.get(self._origins.storage(leaf))
            if base is not None and base is not leaf:  # a view has the origin of what it is a view of
                self._origins.alias(leaf, base)
                for names in (self._names, self._buffer_names):
                    if id(base) in names:
                        names[id(leaf)] = names[id(base)]
        fresh = [leaf for leaf in made if self._origins.storage(leaf) not in by_storage]
        if self.op is not None:
            self.op.touched = self.op.touched or bool(inputs)
            self.op.written.extend(t for t in written if self._origins.storage(t) not in self.op.born)
            self.op.born.update((self._origins.storage(leaf), leaf) for leaf in fresh)
            return
        call = self.current
        assert call is not None
        for tensor in written:
            if Born(call.node) not in self._origins.of(tensor) and self._origins.known(tensor):
                self._origins.write(tensor, Born(call.node))
                call.changes = True
        for leaf in fresh:
            self._origins.bear(leaf, call.node)

    def _reading(self, tensor: torch.Tensor, reads: set[int], parameters: set[str], buffers: set[str]) -> None:
        name = self._names.get(id(tensor))
        if name is not None and self._origins.value_of(tensor) is None:  # a view that glue made is a value of its own
            parameters.add(name)
            return
        buffer = self._buffer_names.get(id(tensor))
        if buffer is not None:
            buffers.add(buffer)
        for origin in self._origins.of(tensor):
            value = self._resolved(tensor, origin)
            if value is not None:
                reads.add(value)

    def _resolved(self, tensor: torch.Tensor, origin: Origin) -> int | None:
        if isinstance(origin, int):
            return None if self.current is not None and self._values[origin].node == self.current.node else origin
        if self.current is not None and origin.node == self.current.node:
            return None
        # Made inside a unit and read outside of it: an extra output of that call.
        call = next(c for c in self.calls if c.node == origin.node)
        for value, known in call.promoted.items():
            if known is tensor:
                return value
        node = self._nodes[call.node]
        value = self._value(call.node, len(node.makes), tensor)
        self._nodes[call.node] = dataclasses.replace(node, makes=(*node.makes, value))
        call.promoted[value] = tensor
        self._origins.name(tensor, value)
        return value

    def _value(self, node: int, leaf: int, tensor: torch.Tensor, *, name: bool = True) -> int:
        index = len(self._values)
        self._values.append(
            Value(
                index=index,
                node=node,
                leaf=leaf,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                nbytes=tensor.numel() * tensor.element_size(),
                requires_grad=tensor.requires_grad,
                crossable=name,
            )
        )
        self._tensors.append(tensor)
        return index

    # -- the result -----------------------------------------------------------------------------

    def tape(self, results: object, units: Sequence[str]) -> Tape:
        """The tape, once the forward is over; `results` are the tensors that the caller needs, as a rule the loss."""
        wanted: set[int] = set()
        for leaf in tree_flatten(results)[0]:
            if isinstance(leaf, torch.Tensor):
                for origin in self._origins.of(leaf):
                    result = self._resolved(leaf, origin)
                    if result is not None:
                        wanted.add(result)
        self._place_extras()
        self._mind_aliases()
        stand_ins = []
        for value, tensor in zip(self._values, self._tensors, strict=True):
            assert tensor is not None
            stand_ins.append(stand_in(f"{self._nodes[value.node].label} output {value.leaf}", tensor))
        flow = Dataflow(nodes=tuple(self._nodes), values=tuple(self._values), results=tuple(sorted(wanted)))
        return Tape(
            flow=flow,
            records=self._records,
            stand_ins=stand_ins,
            queries=frozenset(self._queries - self._recorded),
            units=tuple(units),
        )

    def _place_extras(self) -> None:
        for call in self.calls:
            values = {id(tensor): value for value, tensor in call.promoted.items()}
            positions = {id(leaf): place for place, leaf in enumerate(call.arguments) if not _plain(leaf)}
            record = self._records[call.node]
            for node in (self._nodes[call.node],):
                for value in node.makes:
                    tensor = self._tensors[value]
                    if tensor is not None:
                        values.setdefault(id(tensor), value)

            def structure(
                tree: object, values: dict[int, int] = values, positions: dict[int, int] = positions
            ) -> Structure:
                leaves, spec = tree_flatten(tree)
                return Structure(spec, tuple(_leaf(leaf, values, positions) for leaf in leaves))

            record.hooked = tuple(
                HookedCall(h.module, structure(h.arguments), structure(h.output)) for h in call.hooked
            )
            extras: dict[int, Place] = {}
            for value, tensor in call.promoted.items():
                place = place_of(value, tensor, record.hooked, call.left)
                if place is None:
                    record.out_of_reach = True
                    self._values[value] = dataclasses.replace(self._values[value], crossable=False)
                else:
                    extras[value] = place
            record.extras = extras

    def _mind_aliases(self) -> None:
        """Of a storage written in place, only what it was at first and what one object holds at last may cross."""
        by_storage: dict[int, list[int]] = {}
        for value, tensor in enumerate(self._tensors):
            key = self._origins.storage(tensor) if tensor is not None else None
            if key is not None:
                by_storage.setdefault(key, []).append(value)
        for key, writers in self._origins.written().items():
            values = sorted(by_storage.get(key, []))
            if not values:
                continue
            for writer in writers:
                node = writer.node if isinstance(writer, Born) else self._values[writer].node
                before = {value for value in values if self._values[value].node < node}
                self._records[node].touches = tuple(sorted({*self._records[node].touches, *before}))
            written = [w for w in writers if isinstance(w, int)]
            for value in values[:1]:
                self._records[self._values[value].node].written_later = True
            objects = {id(self._tensors[value]) for value in values}
            for value in values[1:]:
                fine = value in written and value == max(written) and len(objects) == 1
                self._records[self._values[value].node].written_later = True
                if not fine:
                    self._values[value] = dataclasses.replace(self._values[value], crossable=False)


def _leaf(leaf: object, values: Mapping[int, int], positions: Mapping[int, int]) -> Leaf:
    if id(leaf) in values:
        return Made(values[id(leaf)])
    if id(leaf) in positions:
        return FromArgument(positions[id(leaf)])
    if isinstance(leaf, torch.Tensor):
        return Unseen(stand_in("a tensor inside a unit", leaf))
    return Fixed(leaf)


def _plain(leaf: object) -> bool:
    return leaf is None or isinstance(leaf, (bool, int, float, str, bytes, torch.dtype, torch.device))


def _seen(leaves: Sequence[object]) -> object:
    return tuple(leaf.tobytes() if isinstance(leaf, np.ndarray) else leaf for leaf in leaves)


def _same_numpy(a: Any, b: Any) -> bool:
    return bool(a[2] == b[2] and np.array_equal(a[1], b[1]))


def _random_like(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.randn(tensor.shape, device=tensor.device).mul_(0.02).to(tensor.dtype)


def _real(leaf: object, back: dict[int, torch.Tensor]) -> object:
    """A real random tensor for a fake one; `back` remembers which fake one it stands for."""
    if not isinstance(leaf, FakeTensor):
        return leaf
    real = _random_like(leaf).requires_grad_(leaf.requires_grad)
    if leaf.requires_grad:
        real = real * 1
    back[id(real)] = leaf
    return real


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """False for attention whose dropout is 0."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found.extend(leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor))
    return found


class _Glue(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.glue(func, args, kwargs or {})


class _Below(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.below(func, args, kwargs or {})
