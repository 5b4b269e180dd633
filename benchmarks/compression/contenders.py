"""Who takes part: two replicas whose gradients are compressed, and two stages whose activations are."""

from __future__ import annotations

import dataclasses

__all__ = ["CONTENDERS", "Contender"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One run of the demo task. `axis` is whose bytes count."""

    layout: str
    axis: str
    gradients: str = "none"
    activations: str = "none"

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{self.layout.partition(',')[0]} {self.gradients if self.axis == 'dp' else self.activations}"


CONTENDERS = (
    *(
        Contender(layout="dp=2", axis="dp", gradients=gradients)
        for gradients in ("none", "bf16", "fp16", "int8", "powersgd:4", "powersgd:32", "topk:0.01", "topk:0.1")
    ),
    *(
        Contender(layout="pp=2,micro_batches=2", axis="pp", activations=activations)
        for activations in ("none", "bf16", "fp16", "int8")
    ),
)
