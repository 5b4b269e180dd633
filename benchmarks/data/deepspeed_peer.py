"""DeepSpeed's ZeRO. DeepSpeed is imported when one is made: it lives in an environment of its own."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.data.setting import ADAMW, CLIP, Setting
from benchmarks.pipeline.model import Decoder

__all__ = ["DeepSpeedZero"]


class DeepSpeedZero:
    """One engine of a stage, in float32, with torch's fused AdamW and its own clipping."""

    of_all = False

    def __init__(self, model: Decoder, setting: Setting, rank: int, *, stage: int) -> None:
        deepspeed: Any = importlib.import_module("deepspeed")
        os.environ["LOCAL_RANK"] = str(rank)  # as its own launcher says it
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), **ADAMW),  # type: ignore[arg-type]
            config={
                "train_micro_batch_size_per_gpu": setting.sequences,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": CLIP,
                "zero_optimization": {"stage": stage, "overlap_comm": False},
                "wall_clock_breakdown": False,
                "steps_per_print": 10**9,
            },
        )

    def step(self, share: Mapping[str, torch.Tensor]) -> float:
        loss = self._engine(**share)
        self._engine.backward(loss)
        self._engine.step()
        return float(loss.item())

    def close(self) -> None:
        """Its groups go with the process."""
