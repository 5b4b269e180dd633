"""What is compared: the demo's model and data, trained synchronously, and by workers from a common start on.

step         0 ───────────── 320 ───────────── 640          the same samples in every step, the same rates
reference    dp, every step      dp, every step
others           (the same)      workers, every 32 steps
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["COMMON", "CONTENDERS", "DEMO", "QUICK", "REFERENCE", "SMALL", "Contender"]

DEMO = Path(__file__).parents[2] / "examples" / "demo.toml"
REFERENCE = "dp, every step"
# AdamW of everybody: with the demo's 0.95 the batch of one worker, four samples, moves a model away from its optimum
# (docs/asynchronous.md); the synchronous run does not care.
COMMON = ("training.betas=[0.9, 0.999]",)
# The outer optimizer of the search (search.py), for any number of workers.
OUTER = {"outer_learning_rate": 1.0, "outer_momentum": 0.4, "nesterov": "true"}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """The demo on `num_workers` replicas; `asynchronous` is its table, empty where each step sums gradients."""

    name: str
    num_workers: int
    asynchronous: Mapping[str, object] = field(default_factory=dict)

    @property
    def overrides(self) -> list[str]:
        return [f"asynchronous.{name}={value}" for name, value in self.asynchronous.items()]


CONTENDERS = (
    Contender(name=REFERENCE, num_workers=2),
    *(
        Contender(name=f"DiLoCo, {n} workers", num_workers=n, asynchronous={"method": "diloco", "every": 32, **OUTER})
        for n in (2, 4)
    ),
    Contender(
        name="DiLoCo in bf16, 4 workers",
        num_workers=4,
        asynchronous={"method": "diloco", "every": 32, "wire": "bf16", **OUTER},
    ),
    Contender(
        name="eager DiLoCo, 4 workers", num_workers=4, asynchronous={"method": "eager-diloco", "every": 32, **OUTER}
    ),
    Contender(name="delayed averaging, 4 workers", num_workers=4, asynchronous={"method": "delayed", "every": 32}),
)
# the model of the search: what is learnt of the demo's data in a few hundred steps, it learns in a tenth of the time
SMALL = (
    "model.config.hidden_size=64",
    "model.config.intermediate_size=176",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=4",
)
# a model that a test can train
QUICK = (
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
    "model.config.vocab_size=512",
    "task.vocabulary_size=512",
    "training.warm_up=0",
)
