"""Megatron Core's 1F1B on CPU tensors. Megatron is imported when one is made: it lives in an environment of its own.

Its schedule and its transfers name the accelerator; in these two modules `torch` is a copy that answers with the CPU.
Transfers are (sequence, micro-batch, hidden) there; a micro-batch of one sequence is given as (1, tokens, hidden).
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from benchmarks.pipeline.model import Decoder, Part, Shape, loss_of

__all__ = ["MegatronPipeline", "torch_on_cpu"]


class MegatronPipeline:
    """`forward_backward_pipelining_without_interleaving` with the half that this rank runs."""

    def __init__(self, model: Decoder, shape: Shape, rank: int) -> None:
        parallel_state: Any = importlib.import_module("megatron.core.parallel_state")
        schedules: Any = importlib.import_module("megatron.core.pipeline_parallel.schedules")
        p2p_communication: Any = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
        config_class: Any = importlib.import_module("megatron.core.transformer").TransformerConfig
        model_type: Any = importlib.import_module("megatron.core.enums").ModelType

        schedules.torch = p2p_communication.torch = torch_on_cpu()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, create_gloo_process_groups=False)
        self._run = schedules.forward_backward_pipelining_without_interleaving
        self._shape = shape
        self._first = rank == 0
        part: Any = Part(model, rank)
        self.parameters: Mapping[str, nn.Parameter] = dict(part.named_parameters())
        self._part = part
        self._part.config = config_class(
            num_layers=shape.blocks,
            hidden_size=shape.hidden,
            num_attention_heads=shape.heads,
            pipeline_model_parallel_size=2,
            pipeline_dtype=torch.float32,
        )
        self._part.model_type = model_type.encoder_or_decoder
        self._part.set_input_tensor = self._take
        self._received: torch.Tensor | None = None

    def step(self, batch: Mapping[str, torch.Tensor]) -> float | None:
        losses = self._run(
            forward_step_func=self._forward,
            data_iterator=zip(torch.split(batch["ids"], 1), torch.split(batch["labels"], 1), strict=True),
            model=self._part,
            num_microbatches=self._shape.micro_batches,
            seq_length=1,
            micro_batch_size=self._shape.sequence,
        )
        return float(torch.stack(losses).mean().item()) if losses else None

    def _take(self, tensors: list[torch.Tensor | None]) -> None:
        self._received = tensors[0]

    def _forward(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], part: Any) -> tuple[Any, Any]:
        ids, labels = next(batches)

        def reduce(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss = loss_of(logits, labels)
            return loss, loss.detach().clone()  # the first is divided in place

        return part(ids if self._first else self._received), reduce


def torch_on_cpu() -> types.ModuleType:
    """A copy of the module `torch` in which the current accelerator is the CPU."""

    def zeros(*sizes: Any, **options: Any) -> torch.Tensor:
        return torch.zeros(*sizes, **{**options, "device": "cpu"})

    copied = types.ModuleType("torch")
    copied.__dict__.update(vars(torch))
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(vars(torch.cuda))
    cuda.__dict__.update(current_device=lambda: "cpu", synchronize=lambda: None)
    copied.__dict__.update(zeros=zeros, cuda=cuda)
    return copied
