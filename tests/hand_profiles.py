"""Profiles written by hand, for tests that need no torch."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.describe.flow import Dataflow, Node, NodeKind, Value
from shardwise.describe.profile import CallProfile, GlueProfile, ModelProfile, ParameterProfile, UnitProfile

WIDTH = 8  # elements of what crosses


def chain(
    flops: Sequence[int], *, units: Sequence[str] = (), elements: Sequence[int] = (), glue_saved: int = 0
) -> ModelProfile:
    """A row of calls, each reading the last, then a loss in the glue.

    flops[i] is the forward of call i, its backward twice that; elements[i] the size of its parameter, of its
    unit units[i] (the same name twice: two calls of one unit). Each call saves 100 bytes and makes 8 float32.
    """
    names = list(units) or [f"layers.{i}" for i in range(len(flops))]
    sizes = list(elements) or [4] * len(flops)
    last = len(flops)
    nodes = [
        Node(
            index=i,
            kind=NodeKind.CALL,
            name=name,
            call=names[:i].count(name),
            reads=(i - 1,) if i else (),
            makes=(i,),
            parameters=(f"{name}.weight",) if sizes[i] else (),
        )
        for i, name in enumerate(names)
    ]
    nodes.append(Node(index=last, kind=NodeKind.OP, name="mean", reads=(last - 1,), makes=(last,)))
    values = [
        Value(index=i, node=i, leaf=0, shape=(WIDTH,), dtype="float32", nbytes=4 * WIDTH, requires_grad=True)
        for i in range(last + 1)
    ]
    unit_profiles = {
        name: UnitProfile(
            name=name,
            class_name="Layer",
            parameters={f"{name}.weight": ParameterProfile(shape=(size,), dtype="float32")} if size else {},
        )
        for name, size in zip(names, sizes, strict=True)
    }
    return ModelProfile(
        model_class="Chain",
        units=tuple(unit_profiles.values()),
        calls=tuple(
            CallProfile(
                node=i,
                unit=name,
                call=nodes[i].call,
                forward_flops=flops[i],
                backward_flops=2 * flops[i],
                saved_bytes=100,
                output_bytes=4 * WIDTH,
                dtype="float32",
            )
            for i, name in enumerate(names)
        ),
        flow=Dataflow(nodes=tuple(nodes), values=tuple(values), results=(last,)),
        glue=(GlueProfile(node=last, forward_flops=0, backward_flops=0, saved_bytes=glue_saved),) if glue_saved else (),
    )
