"""Trace a model into a `ModelProfile`: one forward and backward with real inputs and fake parameters.

Joins what was recorded (dataflow, units) with what was counted (flops, saved bytes). Nothing of the model is
allocated, parameters are never read. Refuses to know devices, seconds and layouts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from shardwise.describe.flow import Dataflow, Node, NodeKind
from shardwise.describe.kernels import Kernel
from shardwise.describe.profile import CallProfile, GlueProfile, ModelProfile, ParameterProfile, UnitProfile
from shardwise.trace.capture import Captured, capture
from shardwise.trace.count import Counter
from shardwise.trace.kernels import mirrored
from shardwise.trace.objective import Batch, LossFunction
from shardwise.trace.record import Recorder

__all__ = ["num_samples", "profile_of", "trace"]


def trace(
    model: nn.Module, batch: Batch, *, loss: LossFunction | None = None, units: Sequence[str] = ()
) -> ModelProfile:
    """What `model` costs on `batch`, which is given to `forward`: a mapping by name, a sequence by position.

    The loss is `loss(outputs, batch)`, or what the model returns as its own. Parameters may be on meta,
    buffers must be real. `units` are modules to be placed whole, by name; the rest is chosen. The model is
    left as it was. Raises `ModelError` where there is no loss, a unit is unknown, or glue looks at what a
    unit computed.
    """
    counters: list[Counter] = []
    samples = num_samples(batch)

    def watch(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
        counters.append(Counter(samples=samples))  # a recording may start over with larger units
        return counters[-1].watching(recorder)

    captured = capture(model, batch, loss=loss, units=units, watch=watch)
    return profile_of(model, captured, counters[-1])


def num_samples(batch: Batch) -> int | None:
    """Rows of the first tensor of a batch; None where there is none."""
    leaves = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim())
    return next((leaf.shape[0] for leaf in leaves), None)


def profile_of(model: nn.Module, captured: Captured, counter: Counter) -> ModelProfile:
    """The profile of a recording that `counter` watched."""
    flow = captured.tape.flow
    kernels = _Kernels(counter)
    aliases = _aliases(model)
    parameters = _parameters(model)
    units = tuple(
        UnitProfile(
            name=name,
            class_name=type(unit).__name__,
            parameters={own: parameters[own] for own in dict.fromkeys(_held(unit, aliases))},
        )
        for name, unit in captured.units.items()
    )
    in_units = {name for unit in units for name in unit.parameters}
    saved = counter.saved_bytes()
    return ModelProfile(
        model_class=type(model).__name__,
        units=units,
        calls=tuple(_call(flow, node, counter, saved, kernels) for node in flow.calls),
        glue=tuple(_glue(node, counter, saved, kernels) for node in flow.nodes if _costs(node, counter, saved)),
        flow=flow,
        glue_parameters={name: about for name, about in parameters.items() if name not in in_units},
        tied=_tied(model),
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
    )


def _parameters(model: nn.Module) -> dict[str, ParameterProfile]:
    return {
        name: ParameterProfile(
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            trainable=parameter.requires_grad,
        )
        for name, parameter in model.named_parameters()
    }


def _aliases(model: nn.Module) -> dict[int, str]:
    """id of a parameter -> its first name."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _held(unit: nn.Module, names: Mapping[int, str]) -> list[str]:
    return [names[id(parameter)] for parameter in unit.parameters()]


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name -> other names, of parameters that the module tree holds more than once."""
    first = _aliases(model)
    others: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name:
            others.setdefault(first[id(parameter)], []).append(name)
    return {name: tuple(rest) for name, rest in others.items()}


class _Kernels:
    """The kernels of each node; nodes that do the same share one tuple."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._known: dict[tuple[Kernel, ...], tuple[Kernel, ...]] = {}

    def of(self, node: int, *, estimated: bool = False) -> tuple[Kernel, ...]:
        """estimated: the backward did not get through, and is taken to do twice what the forward does."""
        found = self._counter.kernels(node)
        if estimated:
            found = (*found, *mirrored(found))
        return self._known.setdefault(found, found)


def _call(flow: Dataflow, node: Node, counter: Counter, saved: Mapping[int, int], kernels: _Kernels) -> CallProfile:
    made = [flow.values[value] for value in node.makes]
    forward = counter.forward_flops.get(node.index, 0)
    estimated = node.index not in counter.reached and any(value.requires_grad for value in made)
    return CallProfile(
        node=node.index,
        unit=node.name,
        call=node.call,
        forward_flops=forward,
        backward_flops=_backward_flops(flow, node, counter, forward),
        saved_bytes=saved.get(node.index, 0),
        output_bytes=sum(value.nbytes for value in made),
        dtype=next((value.dtype for value in made if "float" in value.dtype), "float32"),
        weight_flops=min(_backward_flops(flow, node, counter, forward), counter.weight_flops.get(node.index, 0)),
        weight_bytes=counter.weight_bytes.get(node.index, 0),
        product_flops=counter.product_flops.get(node.index, 0),
        product_bytes=counter.product_bytes.get(node.index, 0),
        kernels=kernels.of(node.index, estimated=estimated),
    )


def _backward_flops(flow: Dataflow, node: Node, counter: Counter, forward: int) -> int:
    """As counted. Where the backward did not get through (a unit that looks at its own values ran on random
    numbers, which cuts the graph), twice the forward: one product for the input and one for the weight."""
    if node.index in counter.reached:
        return counter.backward_flops.get(node.index, 0)
    return 2 * forward if any(flow.values[value].requires_grad for value in node.makes) else 0


def _costs(node: Node, counter: Counter, saved: Mapping[int, int]) -> bool:
    books = (counter.forward_flops, counter.backward_flops, saved, counter.booked())
    return node.kind is not NodeKind.CALL and any(node.index in book for book in books)


def _glue(node: Node, counter: Counter, saved: Mapping[int, int], kernels: _Kernels) -> GlueProfile:
    return GlueProfile(
        node=node.index,
        forward_flops=counter.forward_flops.get(node.index, 0),
        backward_flops=counter.backward_flops.get(node.index, 0),
        saved_bytes=saved.get(node.index, 0),
        kernels=kernels.of(node.index),
    )
