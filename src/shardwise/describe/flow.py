"""The dataflow of one forward and loss: which unit calls and glue operations read which values.

Knows sizes and edges only. Refuses to know tensors, Python functions, stages or devices, so that a cut can be
computed, drawn and tested without torch.

    batch ─► embed#0 ─v0─► layers.0#0 ─v1─► add ─v2─► layers.1#0 ─v3─► …        nodes: calls `unit#call` and ops
                     └──────────v0──────────┘                                  values: what a node makes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import StrEnum

from shardwise.errors import ModelError

__all__ = ["Dataflow", "Node", "NodeKind", "Value"]


class NodeKind(StrEnum):
    """What a node of the dataflow is."""

    CALL = "call"  # one call of a unit: runs on exactly one stage
    OP = "op"  # a glue operation: every stage that needs it may compute it
    READ = "read"  # Python looks at a tensor's value (`if mask.any():`): every stage that passes by needs it


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """One tensor that crosses between nodes. `node` made it as its output number `leaf`."""

    index: int
    node: int
    leaf: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    requires_grad: bool
    crossable: bool = True  # False where aliasing forbids to substitute a received copy here

    @property
    def traffic_bytes(self) -> int:
        """Bytes that one crossing costs: the value, and its gradient where it has one."""
        return self.nbytes * (2 if self.requires_grad else 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One step of the forward: `reads` and `makes` are value indices, in the order of the trace."""

    index: int
    kind: NodeKind
    name: str  # the unit's name, or the operation's
    call: int = 0  # which call of the unit, counted from 0
    reads: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()  # parameters whose values are read
    buffers: tuple[str, ...] = ()  # buffers read or written
    keeps_state: bool = False  # glue that writes a buffer of the model in place

    @property
    def label(self) -> str:
        """`layers.0#0` for a call, `op 17 add` for an operation."""
        return f"{self.name}#{self.call}" if self.kind is NodeKind.CALL else f"{self.kind} {self.index} {self.name}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dataflow:
    """Nodes in execution order and the values between them. `results` are the values the loss is made of."""

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    results: tuple[int, ...]

    def __post_init__(self) -> None:
        places = [value.node for value in self.values]
        _check_among(places, len(self.nodes), "a value is made by one of the nodes")
        _check_among(self.results, len(self.values), "a result is one of the values")
        for node in self.nodes:
            _check_among(node.reads, len(self.values), "a node reads some of the values")
            for read in node.reads:
                if self.values[read].node >= node.index:
                    made_by = self.nodes[self.values[read].node].label
                    raise ModelError(
                        f"a node reads only what was made before it: {node.label} reads value {read} of {made_by}; "
                        "trace the model again"
                    )

    @property
    def calls(self) -> tuple[Node, ...]:
        """The unit calls in order."""
        return tuple(node for node in self.nodes if node.kind is NodeKind.CALL)

    def without_edge(self, node: int, value: int) -> Dataflow:
        """The same dataflow with one read forgotten: the mutation that a run must notice."""
        cut = self.nodes[node]
        kept = dataclasses.replace(cut, reads=tuple(read for read in cut.reads if read != value))
        return dataclasses.replace(self, nodes=(*self.nodes[:node], kept, *self.nodes[node + 1 :]))

    def to_json(self) -> dict[str, object]:
        """Plain dictionaries and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Dataflow:
        """The inverse of `to_json`; raises `ModelError` where a field is missing or of the wrong kind."""
        try:
            nodes = tuple(
                Node(
                    **{
                        **node,
                        "kind": NodeKind(node["kind"]),
                        **_tuples(node, "reads", "makes", "parameters", "buffers"),
                    }
                )
                for node in data["nodes"]  # type: ignore[attr-defined]
            )
            values = tuple(Value(**{**value, **_tuples(value, "shape")}) for value in data["values"])  # type: ignore[attr-defined]
            return cls(nodes=nodes, values=values, results=tuple(data["results"]))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"a dataflow has nodes, values and results; this one does not ({error!r})") from error


def _check_among(numbers: Sequence[int], count: int, rule: str) -> None:
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong:
        raise ModelError(f"{rule}, of which there are {count}, but it is number {wrong[0]}; trace the model again")


def _tuples(record: Mapping[str, list[object]], *names: str) -> dict[str, tuple[object, ...]]:
    return {name: tuple(record[name]) for name in names}
