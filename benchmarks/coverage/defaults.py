"""What the defaults of configs leave open, or give for large sizes alone: experts, rotary positions, parts of timm.

Knows names of fields; refuses to know how the rest is made small.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from benchmarks.coverage.layers import Layers

__all__ = ["NEVER_NONE", "OPEN", "VOCABULARY", "add_sections", "known", "open_value", "small_rope"]

VOCABULARY = 99
NEVER_NONE: Mapping[str, Any] = {"prediction_length": 16, "vocabulary_map": {"<image>": 50, "IMGIMGAZ": 51}}

OPEN: Mapping[str, Any] = {
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2,
    "moe_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "rope_parameters": None, "mlp_layer_types": None, "vocab_size": VOCABULARY, "head_dim": 16,
    "num_key_value_heads": 2,
}  # fmt: skip


def open_value(name: str, values: Mapping[str, Any], plan: Layers) -> Any:
    """A small value of a field that the class leaves open."""
    match name:
        case "rope_parameters":
            return _rope_of(values)
        case "mlp_layer_types":
            return ["dense", *["sparse"] * (plan.new - 1)]
    return OPEN[name]


def _rope_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions, of each kind of layer where there are kinds."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    kinds = values.get("layer_types")
    return {kind: dict(plain) for kind in kinds} if kinds else plain


def known(config: Any) -> Any:
    """A part that needs the timm library is a ResNet of transformers with as many outputs."""
    if not config.model_type.startswith("timm"):
        return config
    wanted = list(vars(config).get("_out_indices") or [4])
    return transformers.ResNetConfig(out_indices=wanted)


def add_sections(kind: type, values: Mapping[str, Any], wanted: dict[str, Any]) -> None:
    """Sections of multi-axis rotary positions, where the model has its own idea of them for large heads."""
    if not isinstance(values.get("rope_parameters"), dict) or "rope_type" not in values["rope_parameters"]:
        return
    if "mrope_section" not in _model_source(kind):
        return
    rope = dict(wanted.get("rope_parameters") or values["rope_parameters"])
    new = {**values, **wanted}
    head = new.get("head_dim") or new.get("hidden_size", 0) // (new.get("num_attention_heads") or 1)
    if isinstance(head, int) and head >= 6 and not any(isinstance(one, dict) for one in rope.values()):
        pairs = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [pairs // 3, pairs // 3, pairs - 2 * (pairs // 3)]
        wanted["rope_parameters"] = rope


def _model_source(kind: type) -> str:
    found = importlib.util.find_spec(kind.__module__.replace("configuration_", "modeling_"))
    return Path(found.origin).read_text(encoding="utf-8") if found is not None and found.origin else ""


def small_rope(rope: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Sections of multi-axis rotary positions, as many `pairs` in all as half a head is wide."""
    new = {key: small_rope(one, pairs) if isinstance(one, dict) else one for key, one in rope.items()}
    sections = rope.get("mrope_section")
    if isinstance(sections, list | tuple):
        small = [max(1, pairs * section // sum(sections)) for section in sections]
        small[-1] += pairs - sum(small)
        new["mrope_section"] = small
    return new
