"""Which tensor is which value while a stage runs, and which memory is not what the model has there by now.

In the first step of a signature every node is shown only what the dataflow lists for it: an edge that is missing in
a recording is then an error that names it, whatever memory happens to hold. Writes that a stage skips are noted always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from shardwise.errors import DataflowError
from shardwise.plan.cut import StageCut
from shardwise.trace.absent import Absent
from shardwise.trace.substitute import Undo, put_back, substitute
from shardwise.trace.tape import Tape

__all__ = ["Ledger"]


class Ledger:
    """Notes of one forward of one stage."""

    def __init__(self, tape: Tape, cut: StageCut, *, checked: bool) -> None:
        self.tape = tape
        self.cut = cut
        self.checked = checked
        self.stale: dict[int, str] = {}  # storage -> the write that this stage has skipped
        self.replaced: dict[int, torch.Tensor] = {}  # id(tensor that was to be written) -> its new value, received
        self._keep: list[torch.Tensor] = []
        self._values: dict[int, int] = {}  # id(tensor) -> value, when checked
        self._live: dict[int, torch.Tensor] = {}  # value -> tensor, when checked
        self._written: dict[int, int] = {}  # storage -> value of its last write here, when checked
        self._undo: Undo = []  # what is hidden from the node that runs

    def note(self, value: int, tensor: torch.Tensor) -> None:
        """`tensor` is `value`."""
        self._values[id(tensor)] = value
        self._live[value] = tensor
        self._keep.append(tensor)

    def wrote(self, value: int, target: torch.Tensor) -> None:
        """`target` was written in place here; it is `value` from now on."""
        self.note(value, target)
        self._written[target.untyped_storage()._cdata] = value

    def replace(self, target: torch.Tensor, received: torch.Tensor) -> None:
        """Everyone who still holds the object `target` is to see the new value, written elsewhere."""
        self.replaced[id(target)] = received
        self._keep.append(target)

    def with_replacements(self, args: Any, kwargs: Any) -> Any:
        """The arguments with received values in place of what was written elsewhere."""
        return substitute((args, kwargs), lambda leaf: self.replaced.get(id(leaf), leaf), [])

    def skip_write(self, index: int, args: Any, kwargs: Any) -> None:
        """Node `index` writes in place and is not run here: what it would have written is stale."""
        label = self.tape.flow.nodes[index].label
        target = next((leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)), None)
        if target is not None and not isinstance(target, Absent):
            self.stale[target.untyped_storage()._cdata] = label
            self._keep.append(target)
        for value in self.tape.records[index].touches if self.checked else ():  # the target may be an absent view
            live = self._live.get(value)
            if live is not None and not isinstance(live, Absent):
                self.stale[live.untyped_storage()._cdata] = label

    def refuse_stale(self, index: int, tree: object) -> None:
        """Raises `DataflowError` where node `index` reads memory that is not what the model has there."""
        for leaf in tree_flatten(tree)[0]:
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Absent):
                write = self.stale.get(leaf.untyped_storage()._cdata)
                if write is not None:
                    raise DataflowError(
                        f"{self.tape.flow.nodes[index].label} reads what {write} writes in place, and stage "
                        f"{self.cut.stage} has not run that write: an edge is missing in the recorded dataflow; trace "
                        "the model again"
                    )

    def only_listed(self, index: int, args: Any, kwargs: Any) -> Any:
        """The arguments, with every value that the dataflow does not list for node `index` made absent.

        Containers are changed in place; `put_back` undoes it.
        """
        listed = self.tape.flow.nodes[index].reads

        def visible(leaf: torch.Tensor) -> torch.Tensor:
            value = self._values.get(id(leaf))
            if self._written and not isinstance(leaf, Absent):
                last = self._written.get(leaf.untyped_storage()._cdata)
                if last is not None and last not in listed and (value is None or value < last):
                    value = last
            return leaf if value is None or value in listed else self.tape.stand_ins[value]

        return substitute((args, kwargs), visible, self._undo)

    def put_back(self) -> None:
        """Show again what `only_listed` has hidden."""
        put_back(self._undo)
