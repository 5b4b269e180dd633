"""A transformers config made small: the same classes and options, fewer and narrower of everything that is counted.

Each kind of size is divided by one number, so that packed tensors keep their proportions: heads (as many as ranks),
their widths, the width of the model, of its inner layers, ranks of low-rank projections, experts. Two such configs that
grow by different primes tell apart what a plan's numbers follow. Knows names of settings; refuses to know models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["GROWTH", "narrow_config"]

# What the second instance has more of than the first: primes, so that every product of kinds is another.
GROWTH: Mapping[str, int] = {"heads": 3, "head_width": 2, "width": 5, "inner": 7, "rank": 11, "experts": 2}

_FLOORS = {"head_width": 8, "width": 32, "inner": 16, "rank": 16}
_VOCABULARY = 256
_KINDS: tuple[tuple[str, str], ...] = (
    ("layers", r"(num_hidden_layers|num_layers|n_layers?|(en|de)coder_layers|depth)"),
    ("vocabulary", r"vocab_size"),
    ("experts", r"(n|num)_(local_|routed_)?experts"),
    ("head_width", r"(.*_)?head_(dim|size)"),
    ("heads", r"(.*_)?(n|num)_(.*_)?heads?|n_head|(en|de)coder_attention_heads"),
    ("rank", r".*lora_rank"),
    ("inner", r".*intermediate_size|(.*_)?ffn_dim|d_ff|n_inner|ffn_hidden_size"),
    ("width", r"hidden_size|d_model|n_embd"),
)


def narrow_config(config: Any, *, tp: int, num_layers: int, grown: bool = False) -> Any:
    """A narrow copy of `config`, with at most `num_layers` layers of each stack; with `grown` the second instance.

    Sizes that `tp` divides are divided by it in the copy too. Nested configs are narrowed alike.
    """
    values = _narrowed(config.to_dict(), tp=tp, num_layers=num_layers, grown=grown)
    made = type(config).from_dict(values)
    for name in ("_attn_implementation", "_experts_implementation"):
        setattr(made, name, getattr(config, name, None))
    return made


def _narrowed(values: Mapping[str, Any], *, tp: int, num_layers: int, grown: bool) -> dict[str, Any]:
    kinds = {name: kind for name in values if (kind := _kind_of(name, values[name]))}
    factors = _factors(values, kinds, tp)
    growth = {kind: GROWTH.get(kind, 1) if factor > 1 else 1 for kind, factor in factors.items()}
    if _follows_heads(values, kinds):
        growth["width"] = growth["heads"] * growth.get("head_width", GROWTH["head_width"])
    made: dict[str, Any] = {}
    depths = {values[name] for name, kind in kinds.items() if kind == "layers"}
    for name, value in values.items():
        kind = kinds.get(name)
        if isinstance(value, Mapping) and "model_type" in value:
            made[name] = _narrowed(value, tp=tp, num_layers=num_layers, grown=grown)
        elif kind == "layers":
            made[name] = min(value, num_layers)
        elif kind == "vocabulary":
            made[name] = min(value, _VOCABULARY)
        elif kind is not None:
            made[name] = value // factors[kind] * (growth[kind] if grown else 1)
        elif isinstance(value, list) and len(value) in depths:
            made[name] = value[:num_layers]
        elif name.endswith("_token_id") and isinstance(value, int):
            made[name] = value % _VOCABULARY
        else:
            made[name] = value
    return made


def _kind_of(name: str, value: object) -> str | None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return None
    return next((kind for kind, pattern in _KINDS if re.fullmatch(pattern, name)), None)


def _factors(values: Mapping[str, Any], kinds: Mapping[str, str], tp: int) -> dict[str, int]:
    """What each kind of size is divided by."""
    sizes: dict[str, list[int]] = {}
    for name, kind in kinds.items():
        sizes.setdefault(kind, []).append(values[name])
    least = {kind: _least(kind, values, tp) for kind in sizes}
    factors = {kind: _divisor(of_kind, least[kind], tp) for kind, of_kind in sizes.items()}
    if _follows_heads(values, kinds):
        head_width = max(sizes["width"]) // max(sizes["heads"])
        factors["width"] = factors["heads"] * factors.get("head_width", _divisor([head_width], 8, 1))
    elif "heads" in sizes and "width" in sizes and all(size % max(sizes["heads"]) == 0 for size in sizes["width"]):
        factors["width"] = _divisor(sizes["width"], least["width"], max(sizes["heads"]) // factors["heads"])
    return factors


def _least(kind: str, values: Mapping[str, Any], tp: int) -> int:
    if kind == "heads":
        return tp
    if kind == "experts":
        return max(4, tp, 2 * int(values.get("n_group") or 1), 2 * int(values.get("num_experts_per_tok") or 1))
    return max(_FLOORS.get(kind, 1), 2 * tp if kind == "inner" else 1)


def _divisor(sizes: list[int], least: int, tp: int) -> int:
    """The largest common divisor that leaves at least `least`, and what `tp` divides divisible by it."""
    common = math.gcd(*sizes)
    for factor in sorted((f for f in range(1, common + 1) if common % f == 0), reverse=True):
        kept = [size // factor for size in sizes]
        divisible = all(k % tp == 0 for k, size in zip(kept, sizes, strict=True) if size % tp == 0)
        if divisible and min(kept) >= min(least, min(sizes)):
            return factor
    return 1


def _follows_heads(values: Mapping[str, Any], kinds: Mapping[str, str]) -> bool:
    """Whether the width of the model is that of all heads together."""
    sizes = {kind: max(values[name] for name in kinds if kinds[name] == kind) for kind in kinds.values()}
    if "heads" not in sizes or "width" not in sizes:
        return False
    return "head_width" not in sizes or sizes["width"] == sizes["heads"] * sizes["head_width"]
