"""Make a config of transformers small: few layers that show every kind of layer, narrow widths, a tiny vocabulary.

Knows what names of fields mean (`names`), not architectures. Two ways: to the sizes that well-known names have
(`targets`), or every width divided by one number, which keeps the ratios that a model relies on. Which of them gives a
model that runs is found by trying. Values are those of the class's own defaults, made anew through its constructor, so
that what a config derives from its fields (kinds of layers, sizes of heads) is derived again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.coverage.defaults import NEVER_NONE, OPEN, VOCABULARY, add_sections, known, open_value, small_rope
from benchmarks.coverage.layers import Layers, indices_in, plan_of_layers
from benchmarks.coverage.names import Meaning, meaning_of, target_of

__all__ = ["POLICIES", "Policy", "shrunk"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """How far to shrink. `divisor` of widths; `targets`: well-known names get fixed sizes instead."""

    name: str
    targets: bool
    divisor: int
    image_patches: int = 4  # on a side; 0: images keep their size
    vocabulary: int = VOCABULARY
    depth: int = 1  # layers of each stage, where a list counts them
    least: int = 8  # width, where it is divided
    fill: bool = False  # give numbers to what the class leaves open


POLICIES: tuple[Policy, ...] = (
    Policy(name="targets", targets=True, divisor=16),
    Policy(name="sixteenth", targets=False, divisor=16, depth=2, least=32),
    Policy(name="targets, filled", targets=True, divisor=16, depth=2, fill=True),
    Policy(name="targets, large images", targets=True, divisor=16, image_patches=0, vocabulary=299, depth=3),
    Policy(name="eighth, large images", targets=False, divisor=8, image_patches=0, vocabulary=299, depth=3),
    Policy(name="quarter, large images", targets=False, divisor=4, image_patches=0, vocabulary=2999, depth=3),
    Policy(name="few layers", targets=False, divisor=1, image_patches=0, vocabulary=2999, depth=3),
)


@dataclasses.dataclass(kw_only=True)
class _Tokens:
    """Token ids of a whole config tree: an id beyond the vocabulary becomes a free one, the same everywhere."""

    vocabulary: int
    new: dict[int, int] = dataclasses.field(default_factory=dict)

    def of(self, value: int) -> int:
        if value < self.vocabulary:
            return value
        if value not in self.new:
            self.new[value] = self.vocabulary - 1 - len(self.new) % (self.vocabulary // 2)
        return self.new[value]


def shrunk(config: Any, policy: Policy) -> Any:
    """A small config of the class of `config`. Raises what the class raises for sizes it does not take."""
    return _shrunk(config, policy, _Tokens(vocabulary=policy.vocabulary))


def _shrunk(config: Any, policy: Policy, tokens: _Tokens) -> Any:
    kind = type(config)
    values = {f.name: vars(config)[f.name] for f in dataclasses.fields(kind) if f.init and f.name in vars(config)}
    if "out_indices" not in values and vars(config).get("_out_indices"):
        values["out_indices"] = list(vars(config)["_out_indices"])  # of a backbone: no field, but an argument
    part = _Part(values=values, policy=policy, tokens=tokens, layers=plan_of_layers(values))
    wanted: dict[str, Any] = {}
    for name, value in values.items():
        if name.startswith("_") or name in ("id2label", "label2id", "transformers_version", "dtype", "torch_dtype"):
            continue
        new = part.new(name, value)
        if (new is not value or _explicit(kind, name, value)) and not _derived(kind, name, value, new):
            wanted[name] = new
    if wanted.get("out_indices") == [part.layers.new]:
        del wanted["out_indices"]
    if "width_coefficient" in values:  # rounds its widths to its own taste
        wanted = {name: value for name, value in wanted.items() if meaning_of(name, value) is not Meaning.WIDTH}
        wanted |= {"width_coefficient": values["width_coefficient"] / 8, "hidden_dim": values["hidden_dim"] // 8}
    if "use_cache" in values:
        wanted["use_cache"] = False
    add_sections(kind, values, wanted)
    new = kind(**wanted)
    for name, value in vars(config).items():  # what the class does not know itself, given to it by an outer config
        if name not in values and not name.startswith("_") and name not in vars(new):
            setattr(new, name, value)
    return new


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """One config of the tree while it is made small: its values, and what rules them."""

    values: Mapping[str, Any]
    policy: Policy
    tokens: _Tokens
    layers: Layers

    def new(self, name: str, value: Any) -> Any:
        """The small value of a field; the value itself where it stays."""
        if _is_config(value):
            return _shrunk(known(value), self.policy, self.tokens)
        if value is None and name in NEVER_NONE:
            return NEVER_NONE[name]
        if self.policy.fill and not value and value is not False and name in OPEN:
            return open_value(name, self.values, self.layers)
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return value
        if isinstance(value, dict):
            return small_rope(value, self.pairs(value)) if name.startswith("rope") else value
        if isinstance(value, list | tuple):
            return self.several(name, value)
        return self.number(name, value)

    def pairs(self, rope: Mapping[str, Any]) -> int:
        """Pairs of numbers that rotary positions turn, in a small head."""
        sections = rope.get("mrope_section") or (0,)
        return 8 if self.policy.targets else max(4, sum(sections) // self.policy.divisor)

    def several(self, name: str, value: list[Any] | tuple[Any, ...]) -> Any:
        if value and all(_is_config(one) for one in value):
            return type(value)(_shrunk(one, self.policy, self.tokens) for one in value)
        if isinstance(value, list) and len(value) == self.layers.old > self.layers.new and self.layers.kept:
            return [value[index] for index in self.layers.kept]
        if name == "attention_types":  # [[kinds, repeats], ...]
            return [[kinds, 1] for kinds, _ in value[:1]]
        if not all(isinstance(one, int | float) for one in value):
            return value
        match meaning_of(name, value):
            case Meaning.POSITIONS:
                return value
            case Meaning.LAYER_INDEX:
                return indices_in(value, self.layers)
            case Meaning.DEPTHS:
                return type(value)(min(one, self.policy.depth) for one in value)
            case Meaning.VOCABULARY:
                return type(value)(min(one, 64) for one in value)
            case Meaning.OTHER:
                return value
        return type(value)(self.number(name, one) for one in value)

    def number(self, name: str, value: Any) -> Any:
        if name == "image_embedding_size" and self.policy.image_patches:  # patches on a side
            return self.policy.image_patches
        match meaning_of(name, value):
            case Meaning.CHANCE:
                return 0.0
            case Meaning.VOCABULARY:
                return min(value, self.policy.vocabulary)
            case Meaning.TOKEN:
                return self.tokens.of(value)
            case Meaning.LAYERS:
                return min(value, self.layers.new if self.layers.field == name else 2)
            case Meaning.LAYER_INDEX:
                return indices_in(value, self.layers)
            case Meaning.POSITIONS:
                return min(value, 256)
            case Meaning.IMAGE:
                return min(value, _side(self.values, self.policy))
        return self.width(name, value)

    def width(self, name: str, value: Any) -> Any:
        """Widths, heads, and counts that have a name of their own."""
        target = (
            target_of(name, only_counts=not self.policy.targets)
            if not isinstance(self.values[name], list | tuple)
            else None
        )
        if target is not None:
            inner = int(self.values["expand"]) if name == "num_heads" and "expand" in self.values else 1
            return min(value, target * inner)  # heads of a state space: as many as its inner width has
        if meaning_of(name, self.values[name]) is Meaning.WIDTH:
            return _divided(name, value, self.policy)
        if name.endswith("key_value_heads") and self.policy.targets:
            heads = [self.values[n] for n in ("num_attention_heads", "n_head") if isinstance(self.values.get(n), int)]
            return min(value, 4 if value in heads else 2)
        return value


def _divided(name: str, value: Any, policy: Policy) -> Any:
    """A width by the divisor, not too narrow and even; what is small already stays."""
    if not isinstance(value, int) or value < 32:
        return value
    return max(4 if "head" in name else policy.least, value // policy.divisor // 2 * 2)


def _side(values: Mapping[str, Any], policy: Policy) -> int:
    """The side of images: four patches; 64 where stages halve it several times."""
    if not policy.image_patches:
        return 10**9
    patch = values.get("patch_size", values.get("patch_sizes", 16))
    patch = max(patch) if isinstance(patch, list | tuple) and patch else patch
    patch = patch if isinstance(patch, int) and patch > 0 else 16
    staged = any(isinstance(values.get(name), list | tuple) for name in ("depths", "hidden_sizes", "embed_dims"))
    return max(64 if staged else 0, policy.image_patches * patch)


# -- what the class derives itself ----------------------------------------------------------------------


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and hasattr(type(value), "model_type")


def _default(kind: type, name: str) -> Any:
    field = next((f for f in dataclasses.fields(kind) if f.name == name), None)
    if field is None:
        return ()  # an argument that is no field: given whenever there is one
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _explicit(kind: type, name: str, value: Any) -> bool:
    """Whether a value differs from the default that the class writes, so that it must be given again."""
    default = _default(kind, name)
    return default is not None and not _is_config(value) and bool(default != value)


def _derived(kind: type, name: str, value: Any, new: Any) -> bool:
    """Whether the class computes the value from others: written as None, and a number or list of numbers."""
    if _default(kind, name) is not None or _is_config(value) or isinstance(value, dict):
        return False
    if isinstance(value, list) and value and not isinstance(value[0], int | float):
        return new is value
    return isinstance(value, Sequence | int) and meaning_of(name, value) not in (Meaning.TOKEN, Meaning.CHANCE)
