"""The calls of a model's units, caught while its forward is recorded with fake parameters: one of each kind of block.

Two blocks are of one kind where class, settings, shapes of tensors, the signature of the call and the operations that
it does agree: what is proven of one holds for the other. Knows modules and arguments; refuses to know how a block is
divided.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from shardwise.describe.flow import NodeKind
from shardwise.parallel.tensor.extra_outputs import extras_of
from shardwise.parallel.tensor.instance import Call, tensors_of
from shardwise.parallel.tensor.structure import Structures
from shardwise.trace.capture import capture
from shardwise.trace.objective import Batch, LossFunction
from shardwise.trace.record import Recorder
from shardwise.trace.tape import Fixed, FromArgument, Made, Tape

__all__ = ["Kind", "kinds_of"]


@dataclasses.dataclass(kw_only=True, slots=True)
class Kind:
    """Units that are alike, and their calls: as many as there are different signatures."""

    unit: str  # the first of them
    module: nn.Module
    units: list[str]
    calls: list[Call]
    tied: frozenset[str]  # its parameters, by local name, that stand outside of it too
    key: str = ""  # digest of all that makes units alike: structure, signatures, operations, who reads them
    foreign: frozenset[str] = frozenset()  # those of its parameters that others read without holding them (glue, say)
    hidden: str = ""  # why its calls prove nothing: it exchanges tensors with others out of their sight

    @property
    def kept_whole(self) -> frozenset[str]:
        """Its parameters that somebody else computes with."""
        return self.tied | self.foreign


def kinds_of(
    model: nn.Module, batch: Batch, *, loss: LossFunction | None = None, units: Sequence[str] = ()
) -> list[Kind]:
    """The kinds of units of `model`, in the order of their first units, with real arguments for each.

    One forward of `batch` with fake parameters. Raises `ModelError` as `trace` does.
    """
    caught: dict[str, dict[str, Call]] = {}
    done: dict[int, set[str]] = {}
    structures = Structures()
    with _caught(model, caught, structures):
        watch = functools.partial(_noting_operations, done)
        captured = capture(model, batch, loss=loss, units=units, watch=watch, backward=False)
    operations = _operations_of(captured.tape, done)
    read = _read_outside(captured.tape)
    readers = _readers(model, captured.tape)
    hidden = _hidden(captured.tape)
    kinds: dict[tuple[object, ...], Kind] = {}
    for name, module in captured.units.items():
        calls = {} if name in hidden else caught.get(name, {})
        outside = read.get(name, frozenset())
        tied, foreign = _tied(model, name, module), _foreign(readers, captured.units, module)
        structure, does = structures.of(module), operations.get(name, frozenset())
        extras = extras_of(captured.tape, name)
        key = (structure, does, outside, tied, foreign, extras, name in hidden, *sorted(calls))
        if key in kinds:
            kinds[key].units.append(name)
        else:
            seen = [dataclasses.replace(call, read=outside, extras=extras) for call in calls.values()]
            names = (sorted(does), sorted(outside), sorted(tied), sorted(foreign), sorted(calls))
            about = (structure, *names, sorted(map(repr, extras)), torch.__version__)
            digest = hashlib.blake2b(repr(about).encode(), digest_size=6).hexdigest()
            kinds[key] = Kind(
                unit=name,
                module=module,
                units=[name],
                calls=seen,
                tied=tied,
                foreign=foreign,
                key=digest,
                hidden=hidden.get(name, ""),
            )
    return list(kinds.values())


@contextlib.contextmanager
def _noting_operations(done: dict[int, set[str]], recorder: Recorder) -> Iterator[None]:
    """Note, by node, the names of what `recorder` sees done: blocks with other branches or functions differ here."""
    done.clear()  # of an attempt that was recorded again

    def observe(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        if recorder.place is not None:
            done.setdefault(recorder.place, set()).add(str(func))

    before, recorder.below.observer = recorder.below.observer, observe
    try:
        yield
    finally:
        recorder.below.observer = before


def _operations_of(tape: Tape, done: Mapping[int, set[str]]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for node in tape.flow.calls:
        found[node.name] = found.get(node.name, frozenset()) | done.get(node.index, set())
    return found


def _hidden(tape: Tape) -> dict[str, str]:
    """Units that hand each other tensors in objects that a trace cannot look into, such as a cache: with what."""
    found: dict[str, str] = {}
    for node in tape.flow.calls:
        for read in node.reads:
            about = tape.flow.values[read]
            made = tape.flow.nodes[about.node]
            if not about.crossable and made.kind is NodeKind.CALL and made.name != node.name:
                found.setdefault(node.name, f"it reads what {made.name} leaves in an object that is not looked into")
                found.setdefault(made.name, f"{node.name} reads what it leaves in an object that is not looked into")
    return found


def _tied(model: nn.Module, unit: str, module: nn.Module) -> frozenset[str]:
    own = {id(parameter): name for name, parameter in module.named_parameters()}
    return frozenset(
        own[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in own and not name.startswith(f"{unit}.")
    )


def _readers(model: nn.Module, tape: Tape) -> dict[int, set[str]]:
    """Parameter, by id -> the units that read it; "" is the model's own code between units."""
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    found: dict[int, set[str]] = {}
    for node in tape.flow.nodes:
        for name in node.parameters:
            found.setdefault(ids[name], set()).add(node.name if node.kind is NodeKind.CALL else "")
    return found


def _foreign(readers: Mapping[int, set[str]], units: Mapping[str, nn.Module], module: nn.Module) -> frozenset[str]:
    def holds(unit: str, parameter: nn.Parameter) -> bool:
        return bool(unit) and any(each is parameter for each in units[unit].parameters())

    return frozenset(
        name
        for name, parameter in module.named_parameters()
        if any(not holds(unit, parameter) for unit in readers.get(id(parameter), ()))
    )


def _read_outside(tape: Tape) -> dict[str, frozenset[int]]:
    """Unit -> places among the tensors it returns that somebody else reads, or that are its own arguments."""
    read = {value for node in tape.flow.nodes for value in node.reads}.union(tape.flow.results)
    found: dict[str, frozenset[int]] = {}
    for node in tape.flow.calls:
        leaves = [leaf for leaf in tape.records[node.index].answer.leaves if not isinstance(leaf, Fixed)]
        places = {
            place
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, FromArgument) or (isinstance(leaf, Made) and leaf.value in read)
        }
        found[node.name] = found.get(node.name, frozenset()) | places
    return found


@contextlib.contextmanager
def _caught(model: nn.Module, calls: dict[str, dict[str, Call]], structures: Structures) -> Iterator[None]:
    """Note the calls of all modules with parameters, once for each signature of a kind of module."""
    known: dict[tuple[str, str], Call] = {}
    noted: set[str] = set()  # modules that are entered as usual: their forward is not noted again
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if not name or not any(True for _ in module.parameters()):
                continue
            structure = structures.of(module)

            def note(args: Any, kwargs: Any, *, name: str = name, structure: str = structure) -> None:
                with torch._C.DisableTorchFunction(), _disable_current_modes():
                    signature = _signature(args, kwargs)
                    if (structure, signature) not in known:
                        known[structure, signature] = _call(args, kwargs)
                    calls.setdefault(name, {})[signature] = known[structure, signature]

            stack.enter_context(_noting(name, module, note, noted))
        yield


@contextlib.contextmanager
def _noting(name: str, module: nn.Module, note: Callable[[Any, Any], None], noted: set[str]) -> Iterator[None]:
    """`note` the arguments of each call of `module`, and of its forward where that is called by itself."""
    before, body = module.__dict__.get("forward"), module.forward

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        note(args, kwargs)
        noted.add(name)

    @functools.wraps(body)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if name not in noted:
            note(args, kwargs)
        noted.discard(name)
        return body(*args, **kwargs)

    handle = module.register_forward_pre_hook(enter, with_kwargs=True)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        handle.remove()
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _signature(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    return f"{spec} {[_described(leaf) for leaf in leaves]}"


def _described(leaf: object) -> object:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), str(leaf.dtype), leaf.requires_grad)
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return leaf
    return type(leaf).__qualname__


def _call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    tensors = tensors_of((tuple(args), dict(kwargs)))
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {id(tensor): _real(tensor, generator) for tensor in tensors}
    for leaf in tree_flatten((tuple(args), dict(kwargs)))[0]:
        memo.update({id(t): _real(t, generator) for t in _inside(leaf, set()) if id(t) not in memo})
    own_args, own_kwargs = copy.deepcopy((tuple(args), dict(kwargs)), memo)
    return Call(
        args=own_args,
        kwargs=own_kwargs,
        requires_grad=frozenset(place for place, tensor in enumerate(tensors) if tensor.requires_grad),
        invented=frozenset(
            place
            for place, tensor in enumerate(tensors)
            if isinstance(tensor, FakeTensor) and tensor.is_floating_point() and not tensor.requires_grad
        ),
        counted=frozenset(
            place
            for place, tensor in enumerate(tensors)
            if isinstance(tensor, FakeTensor) and tensor.dtype in (torch.int64, torch.int32)
        ),
    )


def _inside(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that an object (a cache, say) holds, however deep."""
    if id(value) in seen or value is None or isinstance(value, (str, int, float, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for element in value.values():
            yield from _inside(element, seen)
    elif isinstance(value, (list, tuple, set)):
        for element in value:
            yield from _inside(element, seen)
    else:
        for element in getattr(value, "__dict__", {}).values():
            yield from _inside(element, seen)


def _real(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers for what the model computes, a copy of what it was given."""
    if not isinstance(tensor, FakeTensor):
        return tensor.detach().cpu().clone()
    if not tensor.is_floating_point():
        return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype)
    return torch.randn(tuple(tensor.shape), generator=generator, dtype=torch.float64).to(tensor.dtype)
