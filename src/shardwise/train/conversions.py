"""How transformers' classes keep in memory what their files keep otherwise: renamed, stacked, fused; both ways.

    in a file    experts.0.w1.weight  experts.0.w3.weight  experts.1.w1.weight  …      (Mixtral)
    in memory    experts.gate_up_proj, of all experts

The rules are transformers' own (`conversion_mapping`). Knows names, and tensors that somebody else reads and writes;
refuses to know files and layouts.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

__all__ = ["Merge", "groups_in_files", "in_files", "is_transformers", "merges_of"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Merge:
    """How some tensors of a model are made of some that were saved: `sources` are (pattern, saved name), in order."""

    converter: Any
    renamed: str  # the first name of what is made
    sources: tuple[tuple[str, str], ...]

    def make(self, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """The model's tensors by name, of the saved ones."""
        converter = copy.deepcopy(self.converter)
        for pattern, saved in self.sources:
            converter.add_tensor(self.renamed, saved, pattern, tensors[saved])
        made = converter.convert(self.renamed, model=model, config=model.config)
        return {name: _one(tensor) for name, tensor in made.items()}

    def of_members(self, start: int, stop: int, num_members: int) -> Merge | None:
        """The same of some members of a list, such as experts; None where it is not made of lists of so many."""
        members: dict[str, list[str]] = {}
        for pattern, saved in self.sources:
            members.setdefault(pattern, []).append(saved)
        if any(len(names) != num_members or "*" not in pattern for pattern, names in members.items()):
            return None
        kept = {(pattern, name) for pattern, names in members.items() for name in names[start:stop]}
        return dataclasses.replace(self, sources=tuple(each for each in self.sources if each in kept))


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is of one of transformers' classes."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def merges_of(model: nn.Module, saved: Iterable[str]) -> tuple[dict[str, str], dict[str, Merge]]:
    """What the names of a file stand for in a model: tensors that have another name there, and those that are made of
    several, by their names in the model."""
    if not is_transformers(model):
        return {}, {}
    from transformers import conversion_mapping, core_model_loading

    rules = conversion_mapping.get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, core_model_loading.WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own = dict.fromkeys(model.state_dict(), True)
    plain: dict[str, str] = {}
    sources: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(saved, key=core_model_loading.dot_natural_key):
        renamed, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, own
        )
        if pattern is None:
            plain[renamed] = name
        else:
            sources.setdefault(renamed, []).append((pattern, name))
    merges: dict[str, Merge] = {}
    for renamed, each in sources.items():
        converter = of_pattern[each[0][0]]
        merge = Merge(converter=converter, renamed=renamed, sources=tuple(each))
        first, *others = converter.target_patterns
        merges |= dict.fromkeys((renamed, *(renamed.replace(first, other) for other in others)), merge)
    return plain, merges


def groups_in_files(model: nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The model's tensors, those together that are together in a file: what `in_files` is to be given at once."""
    converters = _reversed(model)
    if not converters:
        return [(name,) for name in names]
    from transformers.core_model_loading import apply_converters

    groups: dict[str, list[str]] = {}
    for name in names:
        renamed, pattern = apply_converters(name, converters)
        groups.setdefault(name if pattern is None else f"merged {renamed}", []).append(name)
    return [tuple(group) for group in groups.values()]


def in_files(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A group of the model's tensors under the names, and in the shapes, of transformers' files; views where they can
    be. Tensors without values (on meta) tell the names and shapes alone."""
    if not is_transformers(model):
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    made = revert_weight_conversion(model, dict(tensors))
    return {name: _one(tensor) for name, tensor in made.items()}


def _reversed(model: nn.Module) -> list[Any]:
    """The rules that take tensors apart, or together, on their way into a file."""
    if not is_transformers(model):
        return []
    from transformers import conversion_mapping, core_model_loading

    rules = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    converters = [rule for rule in rules[::-1] if isinstance(rule, core_model_loading.WeightConverter)]
    return [converter.reverse_transform() for converter in converters]


def _one(tensor: Any) -> torch.Tensor:
    found = tensor[0] if isinstance(tensor, list) else tensor
    assert isinstance(found, torch.Tensor)
    return found
