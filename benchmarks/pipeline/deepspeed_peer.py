"""DeepSpeed's PipelineModule. DeepSpeed is imported when one is made: it lives in an environment of its own.

Its step is `train_batch` with the optimizer's step taken out: gradients stay, as with the other contenders.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from benchmarks.pipeline.model import Decoder, Shape, loss_of

__all__ = ["DeepSpeedPipeline"]


class _Rotary(nn.Module):
    """A block that brings its rotary tables: PipelineModule hands one tensor from layer to layer."""

    def __init__(self, block: nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block(x, self.cos, self.sin)
        return out


class DeepSpeedPipeline:
    """Layers are dealt uniformly but for the head: `partition_method` is given the same halves as everyone's."""

    def __init__(self, model: Decoder, shape: Shape, rank: int) -> None:
        deepspeed: Any = importlib.import_module("deepspeed")
        base: Any = importlib.import_module("deepspeed.pipe").PipelineModule
        instructions: Any = importlib.import_module("deepspeed.runtime.pipe.schedule")
        os.environ["LOCAL_RANK"] = str(rank)  # as its own launcher says it
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        blocks = [_Rotary(block, model.cos, model.sin) for block in model.layers]
        layers = [model.embed, *blocks, model.norm, model.head]
        half = 1 + shape.blocks // 2
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        class Halves(base):  # type: ignore[misc]
            def _partition_layers(self, method: str = "uniform") -> None:
                stage = self._topo.get_coord(self.global_rank).pipe
                self.parts = [0, half, len(layers)]
                self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

        module = Halves(layers=layers, num_stages=2, loss_fn=loss_of)
        mine = layers[:half] if rank == 0 else layers[half:]
        self._parameters = {names[id(p)]: p for layer in mine for p in layer.parameters()}
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.SGD(self._parameters.values(), lr=0.0),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": shape.micro_batches,
                "gradient_clipping": 0.0,
                "wall_clock_breakdown": False,
                "steps_per_print": 10**9,
            },
        )
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, instructions.OptimizerStep: lambda *_, **__: None}
        self._engine: Any = engine

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._parameters

    def step(self, batch: Mapping[str, torch.Tensor]) -> float | None:
        batches = zip(torch.split(batch["ids"], 1), torch.split(batch["labels"], 1), strict=True)
        return float(self._engine.train_batch(data_iter=batches).item())
