"""Plans in the words of transformers (`{"layers.*.self_attn.q_proj": "colwise", …}`) as plans of units.

Words are taken at their meaning, and proven afterwards like any plan (`check_plan`). Knows patterns of names, and which
words a model carries; what a word means is in `styles`.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch.nn as nn

from shardwise.describe.tensor import TensorPlan, UnitPlan
from shardwise.errors import ModelError
from shardwise.parallel.tensor.styles import with_style

__all__ = ["carried_words", "words_by_hand", "written_plan"]


def written_plan(
    model: nn.Module,
    words: Mapping[str, str],
    units: Iterable[str],
    *,
    tp: int,
    instances: Mapping[str, nn.Module] | None = None,
) -> TensorPlan:
    """The plan that `words` (pattern of names of modules or parameters, with `*` for numbers -> style) say for `units`.

    Modules outside of units are left whole. `instances` stand for some of the units. Raises `ModelError` for a style
    that is not known or not one of ours, and a pattern that names nothing (and is none of the library's own);
    `LayoutError` for a layer that does not divide.
    """
    matched: set[str] = set()
    plans: dict[str, UnitPlan] = {}
    for unit in units:
        module, plan = (instances or {}).get(unit) or model.get_submodule(unit), UnitPlan()
        for pattern, name, leaf in _matches(module, unit, words):
            matched.add(pattern)
            plan = with_style(plan, module, name, words[pattern], tp=tp, leaf=leaf, within=unit)
        if plan != UnitPlan():
            plans[unit] = plan
    usual = _library_words(model)  # which a class carries for all of its models, with experts and without
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))]
    for pattern in words.keys() - matched - usual.keys():
        if not any(_fits(pattern, name) for name in names):
            raise ModelError(
                f"a plan names modules of the model: no module is called {pattern!r}; correct the name, or leave it out"
            )
    return TensorPlan(tp=tp, units=plans, reasons={}, sharded_share=0.0, origin="as written")


def _matches(module: nn.Module, unit: str, words: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Pattern, module, and for a parameter its own name, of all that words name inside a unit."""
    for name, part in module.named_modules():
        path = ".".join(each for each in (unit, name) if each)
        for pattern in words:
            if _fits(pattern, path):
                yield pattern, name, ""
            for leaf, parameter in part._parameters.items():
                if parameter is not None and _fits(pattern, f"{path}.{leaf}" if path else leaf):
                    yield pattern, name, leaf


def _fits(pattern: str, name: str) -> bool:
    """Whether the last parts of `name` are those of `pattern`: a base model's plan holds inside its wrappers too."""
    expression = re.escape(pattern).replace(r"\*", r"\d+")
    return re.fullmatch(rf"(.*\.)?{expression}", name) is not None


# -- what a model carries -----------------------------------------------------------------------


def carried_words(model: nn.Module) -> dict[str, str]:
    """The words that a model brings along: its own `tp_plan`, or what its transformers class and config say."""
    own = vars(model).get("tp_plan")
    if isinstance(own, Mapping):
        return dict(own)
    if not _is_transformers(model):
        return {}
    library: Any = model
    words: dict[str, str] = dict(library.tp_plan or {})
    config = dict(library.config.base_model_tp_plan or {})
    usual = dict(type(library.config).base_model_tp_plan or {})
    if config == usual:
        return words
    return {key: style for key, style in words.items() if not any(_fits(old, key) for old in usual)} | config


def words_by_hand(model: nn.Module) -> dict[str, str] | None:
    """The words that somebody gave to this very model; None where it carries none, or only those of its library.

    A plan that was set is used or refused. One that comes with a class is one more proposal.
    """
    if isinstance(vars(model).get("tp_plan"), Mapping):
        return carried_words(model) or None
    if not _is_transformers(model):
        return None
    library: Any = model
    config = library.config
    same = library.tp_plan == _library_words(model) and config.base_model_tp_plan == type(config).base_model_tp_plan
    return None if same else carried_words(model) or None


def _library_words(model: nn.Module) -> dict[str, str]:
    """What transformers sets on a model of this class and config."""
    if not _is_transformers(model):
        return {}
    fresh: Any = copy.copy(model)
    fresh.init_parallel_plans()
    return dict(fresh.tp_plan)


def _is_transformers(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    import transformers

    return isinstance(model, transformers.PreTrainedModel)
