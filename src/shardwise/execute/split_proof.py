"""Whether the backward of a unit may be split: the unit as it stands on this rank, once whole and once in two halves.

    whole    F0 B0 F1 B1                two micro-batches of random numbers, real parameters, real collectives
    split    F0 F1 I0 I1 W1 W0          gradients of inputs and of parameters must be the same

What differs, or raises, keeps its whole backward, and is named. Once a kind of unit, and only where a schedule splits.
Knows units and their calls; refuses to know stages and schedules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.execute.buffers import buffers_of
from shardwise.execute.deferred import Deferred
from shardwise.execute.weight_sums import WeightSums
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.divided_logits import whole_of
from shardwise.parallel.tensor.instance import Call, tensors_of
from shardwise.parallel.tensor.sequence_shard import whole_tokens
from shardwise.parallel.tensor.structure import Structures
from shardwise.trace.absent import Absent
from shardwise.trace.randomness import RandomMode, Scope, python_streams

__all__ = ["Anywhere", "SplitProof", "in_words", "prove_splits"]

# Relative; what sums in another order leave. A gradient that is lost, or counted twice, differs by 1e-2 and more.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
_ROUGH = 5e-2
_FLOOR = 1e-6  # of the root mean square of all gradients: smaller ones are compared with this
_WORTH = 0.05  # of a unit's matrices: for less its operations are not watched
_SIGNATURES = 2  # of a kind of unit
_MICRO_BATCHES = 2

Anywhere = Callable[[bool], bool]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitProof:
    """What was found of one kind of unit.

    units: those of this rank. share: of its matrices, by elements, how much waits for W; None where it has none. why:
    the reason for which its backward stays whole; "" where it is split.
    """

    units: tuple[str, ...]
    share: float | None
    why: str = ""

    def __str__(self) -> str:
        more = f" and {len(self.units) - 1} more" if len(self.units) > 1 else ""
        if self.why:
            return f"{self.units[0]}{more}: whole backward: {self.why}"
        waits = "no matrices, nothing waits" if self.share is None else f"{self.share:.0%} of the weights wait"
        return f"{self.units[0]}{more}: split backward, {waits} for W"


def prove_splits(
    sums: WeightSums,
    modules: Mapping[str, nn.Module],
    kinds: Sequence[Kind],
    *,
    seed: int = 0,
    anywhere: Anywhere = lambda here: here,
) -> tuple[SplitProof, ...]:
    """Compare, and tell `sums` which of the units `modules` keep their whole backward.

    Collective among the shards of these units, and among ranks that divide their experts: `anywhere` tells whether
    something is so on one of them. Parameters, gradients and buffers are left as they are.
    """
    structures, words = Structures(), dict[str, str]()
    for unit, module in modules.items():
        words[unit] = structures.of(module)
    proofs: list[SplitProof] = []
    called = {unit for kind in kinds if kind.calls for unit in kind.units}
    for kind in kinds:
        units = [unit for unit in kind.units if unit in modules]
        if not kind.calls or not units or not _trained(modules[units[0]]):
            continue
        alike = [
            u for u, text in words.items() if u not in called and text == words[units[0]]
        ]  # dropped from the trace
        called.update(alike)
        proofs.append(_best(sums, modules, (*units, *alike), kind.calls[:_SIGNATURES], seed, anywhere))
    unknown = tuple(unit for unit, module in modules.items() if unit not in called and _trained(module))
    if unknown:
        proofs.append(SplitProof(units=unknown, share=0.0, why="it was not called when the model was traced"))
    sums.keep_whole([unit for proof in proofs if proof.why for unit in proof.units])
    return tuple(proofs)


def in_words(proofs: Sequence[SplitProof]) -> tuple[str, ...]:
    """What was proven on all ranks: a line for the units that are split, and one for each that keeps its backward."""
    known = list(dict.fromkeys(proofs))
    split = [unit for proof in known if not proof.why for unit in proof.units]
    first = (f"split backward: proven equal to the whole one of {len(split)} units, before the first step",)
    return (first if split else ()) + tuple(str(proof) for proof in known if proof.why)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad and not isinstance(p, Absent)]


def _best(
    sums: WeightSums,
    modules: Mapping[str, nn.Module],
    units: tuple[str, ...],
    calls: Sequence[Call],
    seed: int,
    anywhere: Anywhere,
) -> SplitProof:
    """With the products of layers alone, if they are all; else with those of plain code too, where that is right."""
    module = modules[units[0]]
    proof = _agreed(_prove(sums, module, units, calls, seed), anywhere)
    if proof.why or proof.share is None or proof.share == 1.0:
        return proof
    sums.watch(units[0], module)
    more = _agreed(_prove(sums, module, units, calls, seed), anywhere)
    if more.why or more.share is None or more.share < proof.share + _WORTH:
        sums.unwatch(units[0])
        return proof
    for unit in units[1:]:
        sums.watch(unit, modules[unit])
    return more


def _agreed(proof: SplitProof, anywhere: Anywhere) -> SplitProof:
    """What holds on all ranks of the unit, so that they go on alike."""
    failed = anywhere(bool(proof.why))
    return dataclasses.replace(proof, share=0.0, why="not so on another rank") if failed and not proof.why else proof


def _prove(sums: WeightSums, module: nn.Module, units: tuple[str, ...], calls: Sequence[Call], seed: int) -> SplitProof:
    waited: set[int] = set()
    why = ""
    for call in calls:
        try:
            with _as_it_was(module):
                whole = _run(sums, module, call, seed, None)
            with _as_it_was(module):
                split = _run(sums, module, call, seed, waited)
        except Exception as error:  # whatever a module raises when it is called by itself
            why = why or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            continue
        why = why or _difference(whole, split, _dtype(module)) or _nothing(whole)
    matrices = [p for p in _trained(module) if p.dim() > 1]
    held = sum(p.numel() for p in matrices if id(p) in waited)
    share = held / sum(p.numel() for p in matrices) if matrices else None
    return SplitProof(units=units, share=0.0 if why else share, why=why)


def _run(
    sums: WeightSums, module: nn.Module, call: Call, seed: int, waited: set[int] | None
) -> dict[str, torch.Tensor | None]:
    """Gradients by name, of all micro-batches together; split where `waited` collects what is put off."""
    split = waited is not None
    given: list[dict[str, torch.Tensor]] = []
    roots: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    queues = [Deferred() for _ in range(_MICRO_BATCHES)]

    def backward(number: int) -> None:
        with sums.deferring(queues[number]) if split else contextlib.nullcontext():
            if roots[number][0]:
                torch.autograd.backward(*roots[number])

    with sums.running(sums=False, splits=split):
        for number in range(_MICRO_BATCHES):
            args, kwargs, leaves = _arguments(module, call, seed + number)
            given.append(leaves)
            scope = Scope(seed=seed, step=0, micro_batch=number, samples=_samples(args, kwargs), place="proof", call=0)
            with python_streams(number), RandomMode(scope), torch.enable_grad():
                roots.append(_roots(module(*args, **kwargs), call))
            if not split:
                backward(number)
        for number in range(_MICRO_BATCHES if split else 0):
            backward(number)
        for queue in reversed(queues):
            if waited is not None:
                waited |= queue.parameters
            queue.run()
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, Absent)}
    of_inputs = {f"input {n} of micro-batch {m}": t.grad for m, own in enumerate(given) for n, t in own.items()}
    return {**{name: None if g is None else g.clone() for name, g in found.items()}, **of_inputs}


def _arguments(module: nn.Module, call: Call, seed: int) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Fresh arguments as the module takes them, and those among them that ask for a gradient."""
    args, kwargs = call.fresh(seed=seed)
    leaves, spec = tree_flatten((args, kwargs))
    given: dict[str, torch.Tensor] = {}
    dtype, device = _dtype(module), next(iter(module.parameters())).device
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            wanted = leaf.requires_grad
            leaf = leaf.detach().to(device, dtype if leaf.is_floating_point() else leaf.dtype)
            leaves[place] = leaf.requires_grad_(wanted)
            if wanted:
                given[str(place)] = leaf
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs, given


def _roots(out: object, call: Call) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    made = [whole_tokens(whole_of(tensor)) for tensor in tensors_of(out)]
    read = [tensor for place, tensor in enumerate(made) if call.read is None or place in call.read]
    roots = [tensor for tensor in read if tensor.requires_grad]
    generator = torch.Generator().manual_seed(1)
    return roots, [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in roots]


def _samples(args: Any, kwargs: Any) -> tuple[int, ...]:
    sizes = [tensor.shape[0] for tensor in tensors_of((args, kwargs)) if tensor.dim()]
    return tuple(range(sizes[0] if sizes else 1))


@contextlib.contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Gradients begin as none, and parameters that are zero (gates, biases) as something else, for behind a zero all
    gradients are equal. They and the buffers are put back."""
    zeros = [(name, p, p.data) for name, p in module.named_parameters() if p.requires_grad and _is_zero(p)]
    gradients = [(parameter, parameter.grad) for parameter in _trained(module)]
    buffers = buffers_of(module)
    for parameter, _ in gradients:
        parameter.grad = None
    for name, parameter, value in zeros:  # of the name: what all ranks have whole is the same on all
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter.data = (0.1 * torch.randn(value.shape, generator=generator)).to(value.device, value.dtype)
    try:
        yield
    finally:
        for _, parameter, value in zeros:
            parameter.data = value
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for buffer in buffers:
            if buffer.is_written():
                buffer.restore()


def _is_zero(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter, Absent) and parameter.is_floating_point() and not parameter.detach().any()


def _nothing(whole: Mapping[str, torch.Tensor | None]) -> str:
    """Why gradients that are equal prove nothing; "" where they do."""
    seen = any(gradient is not None and gradient.any() for gradient in whole.values())
    return "" if seen else "called by itself it has no gradients, so nothing is proven"


def _difference(
    whole: Mapping[str, torch.Tensor | None], split: Mapping[str, torch.Tensor | None], dtype: torch.dtype
) -> str:
    """The first gradient that is not the same, in words; "" where all are."""
    floor = _FLOOR * _root_mean_square([g for g in whole.values() if g is not None])
    tolerance = _TOLERANCES.get(dtype, _ROUGH)
    for name, wanted in whole.items():
        got = split[name]
        if got is None or wanted is None:
            if got is not wanted:
                return f"the gradient of {name} is {'missing' if got is None else 'there'} in halves alone"
            continue
        least = floor * math.sqrt(wanted.numel())
        error = float((got - wanted).norm()) / max(float(wanted.norm()), least, 1e-300)
        if not error <= tolerance:
            return f"the gradient of {name} differs by {error:.1e} (relative; {tolerance:g} is allowed)"
    return ""


def _root_mean_square(gradients: Collection[torch.Tensor]) -> float:
    squares = sum(float(gradient.norm()) ** 2 for gradient in gradients)
    return math.sqrt(squares / max(sum(gradient.numel() for gradient in gradients), 1))


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
