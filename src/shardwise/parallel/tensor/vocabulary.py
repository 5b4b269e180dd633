"""Units that read or make a vocabulary: tables divided by rows, heads by columns, tied ones alike or not at all.

    ids ──► rows of rank t ──all-reduce──► … blocks … ──copy──► columns of rank t ──joined──► logits
                 └──────────────── one parameter, where they are tied ────┘

A table has more rows than columns; a head has more outputs than inputs, and as many as a table has rows. A tensor is
divided where everyone who holds it divides it the same way and nobody else reads it; what is proven false takes along
what it is tied to. Knows kinds of units and their calls; refuses to know how blocks are divided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch.nn as nn

from shardwise.describe.tensor import UnitPlan
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.prove import Difference
from shardwise.parallel.tensor.prove_vocabulary import is_head, is_table, local_names, prove_layers
from shardwise.parallel.tensor.ties import names_of

__all__ = ["Vocabularies", "vocabularies"]

Layer = tuple[int, str]  # kind, by its number, and the name of a module in it


@dataclasses.dataclass(kw_only=True, slots=True)
class Vocabularies:
    """Plans of kinds, by number, with their tables and heads; layers that are divided, and why others are not."""

    plans: dict[int, UnitPlan] = dataclasses.field(default_factory=dict)
    reasons: dict[Layer, str] = dataclasses.field(default_factory=dict)
    divided: set[Layer] = dataclasses.field(default_factory=set)

    def reason(self, number: int, reason: str) -> str:
        """Why a kind, or layers of it, stay whole; `reason` is what was known without tables and heads."""
        done = {name for kind, name in self.divided if kind == number}
        if "" in done:
            return ""
        kept = [part for part in reason.split("; ") if part and part.partition(": ")[0] not in done]
        whole = {name: why for (kind, name), why in self.reasons.items() if kind == number}
        if "" in whole:
            return whole[""]
        told = [f"{name}: {why}" for name, why in whole.items()]
        return "; ".join([*(part for part in kept if part.partition(": ")[0] not in whole), *told])


def vocabularies(model: nn.Module, kinds: Sequence[Kind], plans: Mapping[int, UnitPlan], *, tp: int) -> Vocabularies:
    """Divide the tables and heads of `kinds`, on top of the `plans` that kinds, by number, already have.

    What stands inside of an element of a list of modules is a block's own affair, unless it is that element.
    """
    result = Vocabularies()
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    layers = {
        (number, name): module
        for number, kind in enumerate(kinds)
        for name, module in _layers(kind, plans.get(number, UnitPlan()), sizes, lone=_in_list(model, kind.unit))
    }
    proven: dict[tuple[int, frozenset[str]], UnitPlan] = {}
    while True:
        _drop_untied(model, kinds, layers, result.reasons, tp)
        wanted = {
            number: frozenset(name for other, name in layers if other == number) for number in {n for n, _ in layers}
        }
        todo = next((key for key in sorted(wanted.items(), key=lambda item: item[0]) if key not in proven), None)
        if todo is None:
            break
        number, names = todo
        try:
            proven[todo] = prove_layers(kinds[number], names, plans.get(number, UnitPlan()), tp)
        except Exception as error:  # whatever a model raises when it is run alone, on random numbers
            why = str(error) if isinstance(error, Difference) else f"{type(error).__name__}: {error}"
            for name in names:
                result.reasons[number, name] = f"not proven: {why}"
                del layers[number, name]
    result.plans = {number: proven[number, names] for number, names in wanted.items()}
    result.divided = set(layers)
    return result


# -- which layers -------------------------------------------------------------------------------


def _layers(kind: Kind, plan: UnitPlan, sizes: Collection[int], *, lone: bool) -> Iterator[tuple[str, nn.Module]]:
    """Tables, and heads of one of these sizes, that a unit's plan leaves whole; with `lone` only the unit itself."""
    modules = [("", kind.module)] if lone else kind.module.named_modules()
    for name, module in modules:
        whole = _weight_of(name) not in plan.slices and name not in plan.reduces
        if whole and (is_table(module) or (is_head(module) and module.get_parameter("weight").shape[0] in sizes)):
            yield name, module


def _in_list(model: nn.Module, unit: str) -> bool:
    path = unit.split(".")
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return any(isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) for module in around)


def _weight_of(name: str) -> str:
    return f"{name}.weight" if name else "weight"


def _drop_untied(
    model: nn.Module, kinds: Sequence[Kind], layers: dict[Layer, nn.Module], reasons: dict[Layer, str], tp: int
) -> None:
    """Drop layers whose tensors somebody holds or reads whole, until none is left."""
    holders = names_of(model)
    while True:
        names = _names_when_divided(model, kinds, layers)
        dropped = {
            layer: why
            for layer in layers
            if (why := _why_whole(model, kinds[layer[0]], layer[1], names, holders, tp)) is not None
        }
        reasons.update(dropped)
        for layer in dropped:
            del layers[layer]
        if not dropped:
            return


def _names_when_divided(model: nn.Module, kinds: Sequence[Kind], layers: Collection[Layer]) -> set[str]:
    """The names, under which plans of these layers would divide something, of the model's tensors."""
    return {
        f"{unit}.{local}"
        for number, name in layers
        for unit in kinds[number].units
        for local in local_names(model.get_submodule(unit), name)
    }


def _why_whole(
    model: nn.Module, kind: Kind, layer: str, names: Collection[str], holders: Mapping[int, list[str]], tp: int
) -> str | None:
    rows = kind.module.get_submodule(layer).get_parameter("weight").shape[0]
    if rows < tp:
        return f"it has {rows} rows for {tp} ranks"
    for unit in kind.units:
        module = model.get_submodule(unit)
        for name, parameter in module.get_submodule(layer).named_parameters(recurse=False):
            local = next(key for key, each in module.named_parameters() if each is parameter)
            if local in kind.foreign:
                return f"{unit}.{local} is read by code outside of its unit"
            whole = [key for key in holders[id(parameter)] if key not in names]
            if whole:
                return f"its {name} is tied to {whole[0]}, which stays whole"
    return None
