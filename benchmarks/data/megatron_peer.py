"""Megatron Core's DistributedDataParallel on CPU tensors; Megatron is imported when one is made.

Its buffers are made on the accelerator; in that module `torch` is a copy that answers with the CPU. The optimizer is
torch's fused AdamW over the parameters, whose gradients are Megatron's `main_grad`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.data.setting import ADAMW, CLIP, Setting
from benchmarks.pipeline.megatron_peer import torch_on_cpu
from benchmarks.pipeline.model import Decoder

__all__ = ["MegatronData"]


class MegatronData:
    """Gradients summed while the backward runs (`overlap_grad_reduce`)."""

    of_all = False

    def __init__(self, model: Decoder, setting: Setting, rank: int) -> None:
        parallel_state: Any = importlib.import_module("megatron.core.parallel_state")
        distributed: Any = importlib.import_module("megatron.core.distributed")
        buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
        config_class: Any = importlib.import_module("megatron.core.transformer").TransformerConfig
        buffers.torch = torch_on_cpu()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        shape = setting.shape
        config = config_class(num_layers=shape.blocks, hidden_size=shape.hidden, num_attention_heads=shape.heads)
        options = distributed.DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=1_000_000)
        self._model: Any = distributed.DistributedDataParallel(config, options, model)
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, **ADAMW)  # type: ignore[arg-type]

    def step(self, share: Mapping[str, torch.Tensor]) -> float:
        self._model.zero_grad_buffer()
        loss: torch.Tensor = self._model(**share)
        torch.autograd.backward([loss])
        self._model.finish_grad_sync()
        for parameter in self._parameters:
            parameter.grad = parameter.main_grad  # type: ignore[attr-defined]
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        return float(loss.item())

    def close(self) -> None:
        """Its groups go with the process."""
