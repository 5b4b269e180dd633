"""Which operations are worth keeping when the rest of a unit is computed again: products of matrices with weights.

Korthikanti et al. 2022 (arXiv:2205.05198, section 5): attention's scores and what works element by element are large
and quickly computed, products of activations with weights are not. Knows names of operations; no tensors, no modules.
"""

from __future__ import annotations

__all__ = ["is_kept"]

_ALWAYS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::linear",
        "aten::convolution",
        "aten::_convolution",
        "aten::mkldnn_convolution",
        "aten::_grouped_mm",
        "aten::_scaled_mm",
        "mkldnn::_linear_pointwise",
        "transformers::grouped_mm_fallback",
    }
)
_WITH_A_WEIGHT = frozenset({"aten::bmm", "aten::baddbmm"})  # without one they are attention


def is_kept(name: str, *, has_weight: bool) -> bool:
    """Whether the result of the operation `name` is kept; `has_weight`: one of its operands lies in a parameter."""
    return name in _ALWAYS or (has_weight and name in _WITH_A_WEIGHT)
